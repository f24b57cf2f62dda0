import os
import tempfile
import warnings
from pathlib import Path

import pytest
import torch

# Processes started by tests must find the toy envs and algorithms as well.
PLACES = (Path(__file__).parent, Path(__file__).parent / "support")
os.environ["PYTHONPATH"] = os.pathsep.join([*map(str, PLACES), *filter(None, [os.environ.get("PYTHONPATH")])])
# Runs that tests begin are not recorded in the user's home (levin.runs.trust).
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="levin-test-state-")
# No test may send data to the server of a logger.
os.environ["WANDB_MODE"] = "offline"
warnings.filterwarnings("ignore", message=".*out of date.*")


@pytest.fixture(autouse=True)
def _one_thread():
    """Use one thread: results depend on the number of threads, and small networks are faster with one."""
    torch.set_num_threads(1)
