"""Short runs for tests, and the comparison of two of them to the bit."""

import random
from pathlib import Path

import numpy as np
import torch

from checks import metrics, same, saved
from levin import resume
from levin.config.compose import compose
from levin.training.session import train

SMALL = (
    *("algo=sac", "env=pendulum", "logger=csv", "eval.episodes=2", "eval.every=200", "checkpoint.every=150"),
    *("algo.learning_starts=40", "algo.batch_size=16", "algo.hidden_sizes=[16,16]", "log_every=50"),
)

# What is not a multiple of the iterations' 32 steps, so that every clock is between two beats where a run is cut.
CLOCKS = ("eval.every=70", "checkpoint.every=90", "log_every=50")
TINY = (*SMALL, *CLOCKS)


def scramble() -> None:
    random.seed(9), np.random.seed(9), torch.manual_seed(9)
    torch.rand(17)


def assert_same_run(straight: Path, resumed: Path) -> None:
    expected, got = saved(straight), saved(resumed)
    assert expected.keys() == got.keys()
    for key in expected:
        assert same(expected[key], got[key]), key
    assert metrics(straight) == metrics(resumed)


def loader_state(state: dict) -> dict:
    return state["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]


def in_two_halves(tmp_path: Path, words: tuple[str, ...], total: int) -> None:
    train(compose([*words, f"total_env_steps={total}"]), tmp_path / "straight")
    train(compose([*words, f"total_env_steps={total // 2}"]), tmp_path / "halves")
    scramble()
    resume.resume(run=str(tmp_path / "halves"), total_env_steps=total)
    assert_same_run(tmp_path / "straight", tmp_path / "halves")


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def kill(*_) -> None:
    raise Killed
