import pytest
import torch


@pytest.fixture(autouse=True)
def _double():
    """Use float64, because exact moments are compared to more digits than float32 has."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
