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

# Tests of `make test-quick`: mathematics, networks, spaces, configs, envs and rollouts, without whole runs.
QUICK = (
    *("core", "data", "bench", "scripts", "collectors/test_collectors.py", "collectors/test_reported_numbers.py"),
    *("config/test_config.py", "envs/test_envs.py", "envs/test_ids.py", "runs/test_checkpoint.py"),
    *("estimators/test_estimators.py", "estimators/test_graph.py"),
    *("estimators/test_other_distributions.py", "algorithms/test_on_policy.py", "algorithms/test_dreamer_v3.py"),
    *("algorithms/test_dreamer_v3_world_model.py", "algorithms/test_dreamer_v3_numbers.py"),
)
QUICK_CHECKS = (  # of tests/checks.py, for every row
    *("optimizers_step_and_parameters_move", "targets_follow_their_source", "losses_equal_the_oracle"),
    *("truncation_bootstraps_and_termination_does_not", "yaml_and_signature_agree"),
)


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marker
def pytest_collection_modifyitems(items):
    for item in items:
        path = item.path.relative_to(Path(__file__).parent)
        check = getattr(item, "callspec", None) and item.callspec.params.get("check")
        of_rows = path.name == "test_algorithms.py" and getattr(check, "__name__", "") in QUICK_CHECKS
        if of_rows or any(path.is_relative_to(each) for each in QUICK):
            item.add_marker("quick")


@pytest.fixture(autouse=True)
def _one_thread():
    """Use one thread: results depend on the number of threads, and small networks are faster with one."""
    torch.set_num_threads(1)
