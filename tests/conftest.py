import os
import warnings
from pathlib import Path

import pytest
import torch

# Processes that tests start find the toy envs and algorithms, too.
PLACES = (Path(__file__).parent, Path(__file__).parent / "support")
os.environ["PYTHONPATH"] = os.pathsep.join([*map(str, PLACES), *filter(None, [os.environ.get("PYTHONPATH")])])
# No run of a test may reach a logger's server.
os.environ["WANDB_MODE"] = "offline"
warnings.filterwarnings("ignore", message=".*out of date.*")


@pytest.fixture(autouse=True)
def _one_thread():
    """Results depend on the number of threads, and small nets are faster with one."""
    torch.set_num_threads(1)
