"""n-step returns and prioritized replay in the algorithms that sample single transitions."""

from dataclasses import replace

import pytest
import torch

from checks import (
    build_algorithm,
    captured_and_eager_are_the_same,
    compiled_and_eager_are_the_same,
    make_batch,
    metrics,
    saved_state,
)
from levin.config.compose import compose
from levin.core.errors import ConfigError
from levin.data.replay import FrameReplay
from levin.training.session import build_run, train
from rows import LATE, ROWS
from segment_trees import LOADS, REASON
from short_runs import INTERVALS, check_resumed_run_is_identical

CONTINUOUS, DISCRETE = ("ddpg", "td3", "sac"), ("dqn", "sac_discrete")
ALGOS = (*CONTINUOUS, *DISCRETE)
BOTH = ("algo.n_step=3", "algo.replay=prioritized")
SMALL = (
    *("logger=csv", "eval.episodes=1", *INTERVALS, "algo.learning_starts=40", "algo.batch_size=16"),
    *("algo.hidden_sizes=[16]", "algo.replay_ratio=0.5", "algo.steps_per_iteration=16", "algo.schedule_env_steps=300"),
)


def make_algorithm(algo: str, *overrides: str):
    env = "env=pendulum" if algo in CONTINUOUS else "env=cartpole"
    return build_algorithm(f"algo={algo}", env, *LATE, "algo.hidden_sizes=[8]", *overrides)


def loss_of(algorithm, batch):
    torch.manual_seed(0)
    return algorithm.critic_loss(batch)


@pytest.mark.parametrize("algo", ALGOS)
@pytest.mark.parametrize("huber", [False, True])
def test_the_critic_loss_reads_discount_and_weight(algo, huber):
    if huber and algo in CONTINUOUS:
        pytest.skip("has no Huber loss")
    words = ["algo.huber=true"] if huber else []
    one, squared = make_algorithm(algo, "algo.gamma=0.9", *words), make_algorithm(algo, "algo.gamma=0.81", *words)
    squared.load_state_dict(one.state_dict())
    batch = make_batch(one)
    batch["next", "reward"] *= 3  # so that some errors are beyond 1
    num = len(batch)
    loss, _, td_error = loss_of(one, batch)
    critics = td_error.numel() // num
    errors = td_error.reshape(critics, num, 1)
    each = torch.where(errors.abs() > 1, errors.abs() - 0.5, errors**2 / 2) if huber else errors.square()
    torch.testing.assert_close(loss, each.mean(1).sum())

    assert not torch.isclose(loss_of(squared, batch)[0], loss)
    two_steps = batch.copy().set("discount", torch.full((num, 1), 0.81))
    torch.testing.assert_close(loss_of(one, two_steps)[0], loss_of(squared, batch)[0])

    weight = torch.rand(num, 1)
    weighted, _, unweighted = loss_of(one, batch.copy().set("weight", weight))
    torch.testing.assert_close(weighted, (weight * each).mean(1).sum())
    torch.testing.assert_close(unweighted, td_error)


@pytest.mark.usefixtures("some_trees")
@pytest.mark.parametrize("algo", ALGOS)
def test_a_resumed_run_is_identical(algo, tmp_path):
    env = "env=pendulum" if algo in CONTINUOUS else "env=cartpole"
    words = (f"algo={algo}", env, "env.num_envs=2", *SMALL, *BOTH)
    more = ("env.normalize_observation=true", "env.normalize_reward=true") if algo == "sac" else ()
    storage = "memmap" if algo == "td3" else "memory"
    size = 100 if algo in ("dqn", "td3") else 1000  # 100: the ring buffer wraps
    words = (*words, *more, f"algo.buffer_storage={storage}", f"algo.buffer_size={size}")
    check_resumed_run_is_identical(tmp_path, words, 448)
    sampler = saved_state(tmp_path / "straight")["buffer"]["sampler"]
    assert len(sampler["raised"].unique()) > 20, "the updates have set priorities"


@pytest.mark.usefixtures("some_trees")
@pytest.mark.parametrize("algo", ["sac", "dqn"])
@pytest.mark.parametrize("n", [1, 3])
def test_a_resumed_run_on_pixels_is_identical(algo, n, tmp_path):
    name = "Frame-v0" if algo in CONTINUOUS else "FrameSteps-v0"
    words = (f"algo={algo}", "env=gym", f"env.id=toy_envs:{name}", "env.frame_stack=4", "env.num_envs=2", *SMALL)
    words += (f"algo.n_step={n}", "algo.replay=prioritized", "algo.steps_per_iteration=4", "algo.buffer_size=160")
    assert isinstance(build_run(compose([*words]))[0].buffer, FrameReplay)
    check_resumed_run_is_identical(tmp_path, (*words, "algo.replay_ratio=0.1", "algo.batch_size=8"), 224)


@pytest.mark.usefixtures("some_trees")
@pytest.mark.parametrize("algo", ["dqn", "td3", "sac"])  # those of DDPG and discrete SAC are written alike
def test_losses_are_compiled_once_and_captured(algo, tmp_path):
    (row,) = (row for row in ROWS if row.algo == algo)
    row = replace(row, small=(*row.small, *BOTH))
    compiled_and_eager_are_the_same(row, tmp_path / "compiled")
    captured_and_eager_are_the_same(row, tmp_path / "captured")


@pytest.mark.usefixtures("some_trees")
def test_the_options_reach_the_buffer():
    algorithm, _ = build_run(compose(["algo=sac", "env=pendulum", *SMALL, *BOTH]))
    algorithm.configure_optimizers()
    assert algorithm.buffer.n_step.n_step == 3
    assert algorithm.buffer.n_step.gamma == algorithm.gamma
    assert (algorithm.buffer.priorities.alpha, algorithm.buffer.priorities.beta) == (0.6, 0.4)
    assert algorithm.schedule_env_steps == 300


def test_updates_wait_until_a_window_is_complete(tmp_path):
    words = ("algo=dqn", "env=cartpole", *SMALL, "algo.n_step=6", "algo.learning_starts=0", "total_env_steps=16")
    train(compose([*words, "algo.steps_per_iteration=2", "algo.replay_ratio=1", "log_every=1"]), tmp_path / "run")
    assert [int(row["updates"]) for row in metrics(tmp_path / "run")] == [0, 0, *range(6, 17, 2), 16]


@pytest.mark.skipif(LOADS, reason="the extension loads")
def test_a_run_with_prioritized_replay_is_refused_without_the_extension():
    with pytest.raises(ConfigError, match=r"algo.replay=prioritized needs the C\+\+ extension"):
        build_run(compose(["algo=dqn", "env=cartpole", *BOTH]))


@pytest.mark.skipif(not LOADS, reason=REASON)
def test_a_run_with_the_extension_learns(tmp_path):
    words = ("algo=dqn", *LATE, *next(row for row in ROWS if row.algo == "dqn").learns[0])
    assert train(compose([*words, *BOTH]), tmp_path / "run") >= -4.5
