"""Signals in the middle of an evaluation or a slow rollout, and episodes that have no end."""

import os
import signal
import warnings

import numpy as np
import pytest

from checks import metrics
from levin import resume
from levin.collectors import episodes, vector
from levin.collectors.vector import VectorCollector
from levin.config.compose import compose
from levin.core.errors import RunError
from levin.envs.vector import SeededVectorEnv
from levin.evaluate import evaluate_run
from levin.runs import checkpoint
from levin.runs import folder as run_folder
from levin.training.session import train
from levin.training.video import record_video
from short_runs import TINY, assert_identical_runs

ENDLESS = ("env=gym", "env.id=careless_envs:Endless-v0", "env.action=rescale")
REINFORCE = ("algo=reinforce", "env=cartpole", "algo.transitions_per_update=60", "algo.hidden_sizes=[8]")
REINFORCE += ("algo.schedule_env_steps=448", "eval.episodes=2", "eval.every=70", "checkpoint.every=90", "logger=csv")
SLOW_SAC = (*TINY, "env.num_envs=2", "algo.steps_per_iteration=16")
MEMORY = ("algo=ddpg", "algo.noise=ornstein_uhlenbeck", *TINY[1:])  # a policy with a state


def signal_at(monkeypatch, purpose: str, at: int) -> list[int]:
    """Send SIGTERM to this process in step `at` of the evaluation or training envs. Return the list of steps taken."""
    steps: list[int] = []
    receive = SeededVectorEnv.receive

    def counted(self):
        if self._seed_of.args[1] == {"training": 0, "evaluation": 1}[purpose]:
            steps.append(1)
            if len(steps) == at:
                os.kill(os.getpid(), signal.SIGTERM)
        return receive(self)

    monkeypatch.setattr(SeededVectorEnv, "receive", counted)
    return steps


def is_complete(run) -> bool:
    """Return whether the run folder says that the run is complete."""
    return run_folder.read_provenance(run)["env_steps"] is not None


@pytest.mark.parametrize("at", [100, 450, 1250])  # evaluations at 96, 160, ..., of 200 steps each; the last at the end
def test_an_evaluation_gives_way_to_a_signal_and_is_repeated(at, tmp_path, monkeypatch, capfd):
    overrides = [*TINY, "total_env_steps=480"]
    train(compose(overrides), tmp_path / "straight")
    with monkeypatch.context() as patch:
        steps = signal_at(patch, "evaluation", at)
        train(compose(overrides), tmp_path / "run")
        assert len(steps) == at  # the evaluation ends at once
    assert "SIGTERM: the run will be saved and end" in capfd.readouterr().err
    assert not is_complete(tmp_path / "run")
    resume.resume(run=str(tmp_path / "run"))
    assert is_complete(tmp_path / "run")
    assert_identical_runs(tmp_path / "straight", tmp_path / "run")
    best = [(tmp_path / run / "checkpoints" / checkpoint.BEST).readlink().name for run in ("straight", "run")]
    assert best[0] == best[1] or int(best[1]) % 90  # a checkpoint that only the interrupted run has may be better


def test_a_repeated_evaluation_gives_way_as_well(tmp_path, monkeypatch):
    overrides = [*TINY, "total_env_steps=224"]
    train(compose(overrides), tmp_path / "straight")
    for at in (300, 50):  # twice in the same evaluation
        with monkeypatch.context() as patch:
            signal_at(patch, "evaluation", at)
            if at == 300:
                train(compose(overrides), tmp_path / "run")
            else:
                resume.resume(run=str(tmp_path / "run"))
        assert checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")[-1].name == "160"
        assert len(metrics(tmp_path / "run")) == 3  # those of 64, 96 and 128 env steps
    resume.resume(run=str(tmp_path / "run"))
    assert_identical_runs(tmp_path / "straight", tmp_path / "run")


@pytest.mark.parametrize(
    ("overrides", "at"),
    [
        (REINFORCE, 200),
        (SLOW_SAC, 150),
        ((*MEMORY, "env.num_envs=2"), 130),
        ((*SLOW_SAC, "env.vectorization=async"), 90),
    ],
    ids=["whole episodes", "sac", "a policy with a state", "async envs"],
)
def test_a_slow_rollout_is_abandoned_and_repeated(overrides, at, tmp_path, monkeypatch):
    monkeypatch.setattr(vector, "SLOW", 0.0)
    overrides = [*overrides, "total_env_steps=448"]
    train(compose(overrides), tmp_path / "straight")
    with monkeypatch.context() as patch:
        steps = signal_at(patch, "training", at)
        train(compose(overrides), tmp_path / "run")
        assert len(steps) == at
    assert not is_complete(tmp_path / "run")
    assert not (tmp_path / "run" / "traceback.txt").exists()
    resume.resume(run=str(tmp_path / "run"))
    assert_identical_runs(tmp_path / "straight", tmp_path / "run")


def test_a_fast_rollout_is_finished(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        signal_at(patch, "training", 129)
        train(compose([*TINY, "total_env_steps=448"]), tmp_path / "run")
    assert checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")[-1].name == "160"


def test_a_signal_in_the_first_rollout_leaves_a_run_that_starts_again(tmp_path, monkeypatch):
    overrides = [*TINY, "total_env_steps=96"]
    train(compose(overrides), tmp_path / "straight")
    with monkeypatch.context() as patch:
        signal_at(patch, "training", 5)
        train(compose(overrides), tmp_path / "run")
    assert not checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")
    resume.resume(run=str(tmp_path / "run"))
    assert metrics(tmp_path / "straight") == metrics(tmp_path / "run")


def test_a_signal_ends_a_run_in_an_endless_episode(tmp_path, monkeypatch):
    overrides = [*REINFORCE, *ENDLESS, "algo.schedule_env_steps=4000", "+env.kwargs.after=3", "total_env_steps=4000"]
    with monkeypatch.context() as patch:
        signal_at(patch, "training", 5000)
        train(compose(overrides), tmp_path / "run")
    assert checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")[-1].name == "60"


def test_an_endless_episode_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(episodes, "ENDLESS", 3000)
    monkeypatch.setattr(episodes, "LONG_WAIT", 0.0)
    reason = r"an episode of careless_envs:Endless-v0 has not ended after 3,\d\d\d steps; .* env.time_limit=<steps>"
    for overrides in ((*TINY, *ENDLESS), (*REINFORCE, *ENDLESS, "algo.schedule_env_steps=4000")):
        run = tmp_path / str(len(overrides))
        with pytest.raises(RunError, match=reason), pytest.warns(UserWarning, match="has not ended for 0 s"):
            train(compose([*overrides, "total_env_steps=448"]), run)
    train(compose([*TINY, *ENDLESS, "env.time_limit=20", "total_env_steps=64"]), tmp_path / "limited")
    config = tmp_path / "limited" / "config.yaml"
    config.write_text(config.read_text().replace("time_limit: 20", "time_limit: null"))
    with pytest.raises(RunError, match=reason), pytest.warns(UserWarning, match="has not ended for 0 s"):
        evaluate_run(run=str(tmp_path / "limited"), episodes=2)


def test_a_video_of_an_endless_episode_ends(tmp_path, capsys):
    train(compose([*TINY, *ENDLESS, "env.time_limit=20", "total_env_steps=64"]), tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("time_limit: 20", "time_limit: null"))
    (video,) = record_video(run=str(tmp_path / "run"), steps=50)
    assert video.stat().st_size > 0
    assert "has not ended after 50 steps, and its video ends here" in capsys.readouterr().err


def test_an_episode_that_is_too_long_to_replay_is_truncated(tmp_path, monkeypatch):
    monkeypatch.setattr(vector, "MAX_REPLAY", 40)
    overrides = [*TINY, *ENDLESS, "eval.every=100000", "env.num_envs=2", "+env.kwargs.after=3", "total_env_steps=448"]
    train(compose(overrides), tmp_path / "run")
    with pytest.warns(UserWarning, match="its open episode has more than 40 steps .* of 2 env.s. is truncated"):
        resume.resume(run=str(tmp_path / "run"), total_env_steps=640)


def test_the_history_of_a_long_episode_is_bounded(monkeypatch):
    monkeypatch.setattr(vector, "MAX_REPLAY", 40)
    collector = VectorCollector.__new__(VectorCollector)
    collector._history, collector._history_start, collector.vector_steps = vector.deque(), 0, 0
    collector._seeded_at = np.zeros(2, dtype=np.int64)
    for _ in range(30):
        collector.vector_steps += 8
        collector._append_history(np.zeros((2, 8, 1)))
    assert sum(each.shape[1] for each in collector._history) == 40
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        collector._append_history(np.zeros((2, 8, 1)))
