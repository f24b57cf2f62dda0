"""Short runs, and bitwise comparison of two runs."""

import random
from pathlib import Path

import numpy as np
import torch

from checks import metrics, same, saved_state
from levin import resume
from levin.config.compose import compose
from levin.training.session import train

SMALL = (
    *("algo=sac", "env=pendulum", "logger=csv", "eval.episodes=2", "eval.every=200", "checkpoint.every=150"),
    *("algo.learning_starts=40", "algo.batch_size=16", "algo.hidden_sizes=[16,16]", "log_every=50"),
)

# No multiples of the 32 steps of an iteration, so that a run is interrupted between two events of every schedule.
INTERVALS = ("eval.every=70", "checkpoint.every=90", "log_every=50")
TINY = (*SMALL, *INTERVALS, "algo.replay_ratio=0.25")


def last_words(words: tuple[str, ...]) -> tuple[str, ...]:
    """Return `key=value` words with each key once, its last: the commands warn of a key that is given twice."""
    return tuple({word.partition("=")[0]: word for word in words}.values())


def change_random_states() -> None:
    """Change the state of all global random generators, as another program in the process would."""
    random.seed(9), np.random.seed(9), torch.manual_seed(9)
    torch.rand(17)


def assert_identical_runs(straight: Path, resumed: Path) -> None:
    """Check that the last checkpoints and the metrics of two runs are bitwise identical, apart from times."""
    expected, got = saved_state(straight), saved_state(resumed)
    assert expected.keys() == got.keys()
    for key in expected:
        assert same(expected[key], got[key]), key
    assert metrics(straight) == metrics(resumed)


def loader_state(state: dict) -> dict:
    """Return the state of the rollout loader in a checkpoint."""
    return state["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]


def check_resumed_run_is_identical(tmp_path: Path, overrides: tuple[str, ...], total: int) -> None:
    """Train to `total` env steps in one run, and in one that is resumed halfway; check that both are identical."""
    train(compose([*overrides, f"total_env_steps={total}"]), tmp_path / "straight")
    train(compose([*overrides, f"total_env_steps={total // 2}"]), tmp_path / "halves")
    change_random_states()
    resume.resume(run=str(tmp_path / "halves"), total_env_steps=total)
    assert_identical_runs(tmp_path / "straight", tmp_path / "halves")


class Killed(BaseException):
    """Simulated kill: an exception that nothing catches."""


def kill(*_) -> None:
    """Raise Killed; replaces a function at which a run is to die."""
    raise Killed
