import pytest
import torch


@pytest.fixture(autouse=True)
def _double():
    """Exact moments are compared to more digits than float32 has."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
