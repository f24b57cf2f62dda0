import os
import warnings

import pytest
import torch

# No run of a test may reach a logger's server.
os.environ["WANDB_MODE"] = "offline"
warnings.filterwarnings("ignore", message=".*out of date.*")


@pytest.fixture(autouse=True)
def _one_thread():
    """Results depend on the number of threads, and small nets are faster with one."""
    torch.set_num_threads(1)
