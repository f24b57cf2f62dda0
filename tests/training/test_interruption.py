"""Signals in the middle of an evaluation or a slow rollout, and episodes that have no end."""

import os
import pty
import signal
import subprocess
import warnings

import numpy as np
import pytest
import torch
from lightning import Callback

import careless_envs  # noqa: F401
from checks import metrics
from levin import resume
from levin.algorithms.sac import SAC
from levin.collectors import episodes, vector
from levin.collectors.vector import VectorCollector
from levin.config.compose import compose
from levin.core.errors import RunError, exit_on_user_error
from levin.envs.config import EnvConfig
from levin.envs.vector import SeededVectorEnv
from levin.evaluate import evaluate_run
from levin.runs import checkpoint
from levin.runs import folder as run_folder
from levin.runs.checkpoint_io import FolderCheckpointIO
from levin.training.session import train
from levin.training.video import record_video
from processes import start_python, wait_until
from rows import ROWS
from short_runs import TINY, assert_identical_runs

ENDLESS = ("env=gym", "env.id=careless_envs:Endless-v0", "env.action=rescale")
REINFORCE = ("algo=reinforce", "env=cartpole", "algo.transitions_per_update=60", "algo.hidden_sizes=[8]")
REINFORCE += ("algo.schedule_env_steps=448", "eval.episodes=2", "eval.every=70", "checkpoint.every=90", "logger=csv")
SLOW_SAC = (*TINY, "env.num_envs=2", "algo.steps_per_iteration=16")
TD3 = (
    *("algo=td3", *TINY[1:], "algo.learning_starts=64", "algo.steps_per_iteration=4", "algo.replay_ratio=0.25"),
    *("env.num_envs=1", "algo.policy_delay=2"),
)
MEMORY = ("algo=ddpg", "algo.noise=ornstein_uhlenbeck", *TINY[1:])  # a policy with a state


def remembering(name: str) -> tuple[str, ...]:
    """Return the overrides of a small run of an algorithm whose policy has a memory."""
    (row,) = (each for each in ROWS if each.algo == name)
    schedule = ("eval.every=70", "eval.episodes=1", "checkpoint.every=90", "logger=csv", "algo.steps_per_iteration=16")
    return (f"algo={name}", f"env={row.env}", *row.small, *schedule)


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
    # Returns that fall make the checkpoint at 96 the best, whose evaluation the first signal interrupts.
    monkeypatch.setattr(SAC, "on_evaluation", lambda self, _: {"eval/return_mean": -float(self.env_steps)})
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
    assert best == ["96", "96"]


def test_a_repeated_evaluation_of_a_world_model_reads_the_replay_buffer(tmp_path, monkeypatch):
    overrides = [*remembering("dreamer_v3"), "total_env_steps=224"]
    train(compose(overrides), tmp_path / "straight")
    assert any("eval/open_loop" in name for name in metrics(tmp_path / "straight")[-1])
    with monkeypatch.context() as patch:
        signal_at(patch, "evaluation", 40)
        train(compose(overrides), tmp_path / "run")
    assert not is_complete(tmp_path / "run")
    resume.resume(run=str(tmp_path / "run"))
    assert_identical_runs(tmp_path / "straight", tmp_path / "run")


def test_a_signal_does_not_separate_the_hooks_of_an_evaluation(tmp_path, monkeypatch):
    """The callback itself checks that no checkpoint is saved between its hooks."""
    overrides = [*TINY, "total_env_steps=224", "+callbacks.swaps={_target_:test_hooks.Swaps}"]
    with monkeypatch.context() as patch:
        steps = signal_at(patch, "evaluation", 50)
        train(compose(overrides), tmp_path / "run")
    assert len(steps) == 200  # the evaluation is finished
    assert not is_complete(tmp_path / "run")


class Draws(Callback):
    """Callback that draws random numbers at evaluations, and is ready for them only after `on_train_start`."""

    def on_train_start(self, *_) -> None:
        self.drawn = []

    def on_validation_end(self, trainer, pl_module) -> None:
        self.drawn.append(torch.rand(3))
        pl_module.log("mine/drawn", self.drawn[-1].sum())


def test_a_repeated_evaluation_is_as_the_original_for_the_users_callbacks(tmp_path, monkeypatch):
    overrides = [*TINY, "total_env_steps=448", "+callbacks.draws={_target_:test_interruption.Draws}"]
    train(compose(overrides), tmp_path / "straight")
    with monkeypatch.context() as patch:
        signal_at(patch, "evaluation", 300)
        train(compose(overrides), tmp_path / "run")
    resume.resume(run=str(tmp_path / "run"))
    assert_identical_runs(tmp_path / "straight", tmp_path / "run")


def test_the_best_checkpoint_is_linked_after_a_repeated_last_evaluation(tmp_path, monkeypatch):
    overrides = [*TINY, "eval.every=224", "total_env_steps=224"]
    with monkeypatch.context() as patch:
        signal_at(patch, "evaluation", 50)
        train(compose(overrides), tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints" / checkpoint.BEST).exists()
    resume.resume(run=str(tmp_path / "run"))
    assert (tmp_path / "run" / "checkpoints" / checkpoint.BEST).readlink().name == "224"
    assert is_complete(tmp_path / "run")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR1"])
def test_a_second_signal_does_not_keep_a_run_from_being_saved(name, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(vector, "SLOW", 0.0)
    save, handler = FolderCheckpointIO.save_checkpoint, signal.getsignal(getattr(signal, name))

    def save_and_signal(*arguments, **options):
        os.kill(os.getpid(), getattr(signal, name))
        return save(*arguments, **options)

    with monkeypatch.context() as patch:
        signal_at(patch, "training", 150)
        patch.setattr(FolderCheckpointIO, "save_checkpoint", save_and_signal)
        train(compose([*SLOW_SAC, "checkpoint.every=1000", "total_env_steps=448"]), tmp_path / "run")
    assert [each.name for each in checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")] == ["288"]
    assert "stopped and saved at 288 of 448 env steps; to continue: make resume" in capfd.readouterr().out
    assert signal.getsignal(getattr(signal, name)) == handler


def test_a_closed_terminal_does_not_keep_a_run_from_being_saved(tmp_path):
    main, terminal = pty.openpty()
    code = "import fcntl, runpy, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "  # the terminal controls the process
    code += "runpy.run_module('levin.train', None, '__main__')"
    overrides = [*SLOW_SAC, "env=gym", "env.id=signal_env:Slow-v0", "env.action=rescale", "total_env_steps=1_000_000"]
    ends = {"stdin": terminal, "stdout": terminal, "stderr": terminal}
    run = start_python("-c", code, *overrides, f"run={tmp_path / 'run'}", start_new_session=True, **ends)
    os.close(terminal)
    wait_until(lambda: checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints"), 120)
    os.close(main)  # the kernel sends SIGHUP
    assert run.wait(120) == 0
    assert run_folder.read_provenance(tmp_path / "run")["wall_seconds"] > 0


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
        (remembering("dreamer"), 130),
        (remembering("dreamer_v3"), 130),
        (remembering("recurrent_ppo"), 130),
    ],
    ids=["whole episodes", "sac", "a policy with noise", "async envs", "dreamer", "dreamer_v3", "recurrent_ppo"],
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


@pytest.mark.parametrize("overrides", [TINY, TD3], ids=["sac", "td3"])
def test_a_signal_while_losses_are_compiled_does_not_end_the_compiler(overrides, tmp_path, monkeypatch):
    """The compiler is a child process. It gets the signals of a terminal and of SLURM too.

    TD3 compiles the loss of its actor an iteration later than that of its critic. The signal comes with the last loss.
    """
    left = []

    def compile_with_a_signal(loss, *, dynamic):
        name = loss.__name__

        def call(*arguments):
            if name in left:
                left.remove(name)
                subprocess.run(["sh", "-c", "kill -TERM $$"], check=True)
                if not left:
                    os.kill(os.getpid(), signal.SIGTERM)
            return loss(*arguments)

        return call

    monkeypatch.setattr("levin.algorithms.base.compile_loss", compile_with_a_signal)
    overrides = [*overrides, "algo.compile=true", "total_env_steps=448"]
    train(compose(overrides), tmp_path / "straight")
    left += ["critic_loss", "actor_loss"]
    train(compose(overrides), tmp_path / "run")
    assert not left
    assert not is_complete(tmp_path / "run")
    resume.resume(run=str(tmp_path / "run"))
    assert_identical_runs(tmp_path / "straight", tmp_path / "run")


def test_a_signal_while_the_envs_are_compiled_does_not_end_the_compiler(tmp_path, monkeypatch):
    def compile_in_a_child(function, **_):
        subprocess.run(["sh", "-c", "true"], check=True)

        def call(*arguments):
            if not stepped:
                stepped.append(True)
                subprocess.run(["sh", "-c", "kill -TERM $$"], check=True)
            return function(*arguments)

        return call

    stepped = []
    monkeypatch.setattr(torch, "compile", compile_in_a_child)
    words = ["algo=ppo", "env=cartpole_batched", "algo.compile=true", "debug=smoke", "logger=csv"]
    train(compose([*words, "total_env_steps=2048"]), tmp_path / "run")
    assert stepped


def test_a_fast_rollout_is_finished(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(vector, "SLOW", 1e9)  # also on a machine that stands still for a second
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


def test_ctrl_c_before_training_is_no_error(tmp_path, monkeypatch):
    """Lightning would exit as after an error, without a message."""

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Callback, "on_fit_start", interrupt)
    with pytest.raises(SystemExit) as ending, exit_on_user_error():
        train(compose(list(TINY)), tmp_path / "run")
    assert ending.value.code == 130


def test_a_signal_ends_a_run_in_an_endless_episode(tmp_path, monkeypatch):
    overrides = [*REINFORCE, *ENDLESS, "algo.schedule_env_steps=4000", "+env.kwargs.after=3", "total_env_steps=4000"]
    with monkeypatch.context() as patch:
        signal_at(patch, "training", 5000)
        train(compose(overrides), tmp_path / "run")
    assert checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")[-1].name == "60"


@pytest.mark.parametrize(
    ("config", "reported"),
    [
        ({"id": "careless_envs:Endless-v0"}, True),
        ({"id": "careless_envs:Careless-v0"}, False),
        ({"id": "careless_envs:Endless-v0", "time_limit": 5}, False),
        ({"id": "pong", "family": "atari"}, False),
    ],
)
def test_only_an_env_without_a_limit_is_reported(config, reported, monkeypatch):
    monkeypatch.setattr(episodes, "LONG_WAIT", 0.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        episodes.EpisodeEnd(EnvConfig(**config)).check(10)
    assert bool(caught) == reported


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
    with pytest.warns(UserWarning, match="an open episode has more than 40 steps .* of 2 env.s. is truncated"):
        resume.resume(run=str(tmp_path / "run"), total_env_steps=640)


def test_the_history_of_a_long_episode_is_bounded(monkeypatch):
    monkeypatch.setattr(vector, "MAX_REPLAY", 40)
    collector = VectorCollector.__new__(VectorCollector)
    collector._history, collector._history_start, collector.vector_steps = vector.deque(), 0, 0
    collector._seeded_at = np.zeros(2, dtype=np.int64)
    kept = []
    for steps in range(8, 97, 8):
        collector.vector_steps = steps
        collector._seeded_at[1] = max(0, steps - 20) // 16 * 16
        collector._append_history(np.zeros((2, 8, 1)))
        kept.append(sum(each.shape[1] for each in collector._history))
    assert kept == [8, 16, 24, 32, 40, 32, 24, 32, 24, 32, 24, 32]  # after 40 steps only what env 1 needs
