"""Errors during a run end it with a one-line message and leave complete checkpoints."""

import errno
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from lightning import Callback

from checks import build_algorithm, metrics
from failures import FAILING, complete_checkpoints, run_and_fail
from levin import resume
from levin.algorithms.sac import SAC
from levin.config.compose import compose
from levin.core import files
from levin.core.errors import ConfigError, NotFiniteError, RunError
from levin.envs.config import TRAINING
from levin.envs.vector import episode_seed
from levin.runs import folder as run_folder
from levin.training import trainer as trainers
from levin.training.guards import FiniteGuard
from levin.training.session import build_run, train
from short_runs import SMALL

OVERRIDES = (*SMALL, "checkpoint.every=64", "total_env_steps=640")


def spoil(monkeypatch, method: str, at: int, change) -> None:
    """Change the return value of a method of SAC in update `at`."""
    real = getattr(SAC, method)

    def spoiled(self, *args):
        loss = real(self, *args)
        return change(loss) if self.updates == at else loss

    monkeypatch.setattr(SAC, method, spoiled)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, monkeypatch, capsys):
    spoil(monkeypatch, "critic_loss", 200, lambda losses: (losses[0] * torch.nan, *losses[1:]))
    message = run_and_fail(OVERRIDES, tmp_path / "run", monkeypatch, capsys)
    # Update 200 belongs to env step 40 + 200, in the iteration that ends at 256.
    assert "train/critic_loss" in message
    assert "not finite after 256 env steps and 216 updates" in message
    assert f"continue from checkpoint 192 with make resume RUN={tmp_path / 'run'}" in message
    assert complete_checkpoints(tmp_path / "run") == [128, 192]


def test_a_count_that_is_recorded_first_does_not_hide_a_loss_that_is_not_finite():
    algorithm = build_algorithm("algo=sac", "env=pendulum", "algo.hidden_sizes=[4]")
    algorithm.record(zeros=torch.tensor(3))
    algorithm.record(loss=torch.tensor(torch.nan))
    guard = FiniteGuard()
    guard.stepped = []
    with pytest.raises(NotFiniteError, match="train/loss"):
        guard.on_train_batch_end(MagicMock(), algorithm)


def test_a_gradient_that_is_not_finite_ends_the_run(tmp_path, monkeypatch, capsys):
    def poison(losses):
        losses[0].register_hook(lambda gradient: gradient * torch.nan)
        return losses

    spoil(monkeypatch, "critic_loss", 215, poison)  # the last update of that iteration
    message = run_and_fail(OVERRIDES, tmp_path / "run", monkeypatch, capsys)
    assert "the gradient of critic" in message
    assert "not finite after 256 env steps" in message
    assert complete_checkpoints(tmp_path / "run") == [128, 192]


def test_a_nan_gradient_within_an_iteration_ends_the_run_after_it(tmp_path, monkeypatch, capsys):
    def poison(losses):
        losses[0].register_hook(lambda gradient: gradient * torch.nan)
        return losses

    spoil(monkeypatch, "critic_loss", 190, poison)
    message = run_and_fail(OVERRIDES, tmp_path / "run", monkeypatch, capsys)
    assert "not finite after 256 env steps" in message
    assert complete_checkpoints(tmp_path / "run") == [128, 192]


@pytest.mark.parametrize(("failure", "value"), [("blind", "nan"), ("boundless", "inf")])
def test_an_observation_or_reward_that_is_not_finite_ends_the_run(failure, value, tmp_path, monkeypatch, capsys):
    overrides = (
        *OVERRIDES,
        *FAILING,
        f"+env.kwargs.how={failure}",
        "+env.kwargs.after=170",
        "env.normalize_observation=true",
    )
    message = run_and_fail(overrides, tmp_path / "run", monkeypatch, capsys)
    assert f"Failing-v0 gave [{value}]" in message or f"Failing-v0 gave {value}" in message
    assert "in iteration 6: env 0, step 10 of episode 8, seed" in message  # step 170 of the env; episodes have 20 steps
    assert complete_checkpoints(tmp_path / "run") == [64, 128]


def test_an_env_that_raises_is_named_and_its_traceback_kept(tmp_path, monkeypatch, capsys):
    overrides = (*OVERRIDES, *FAILING, "+env.kwargs.how=raise")
    message = run_and_fail(overrides, tmp_path / "run", monkeypatch, capsys)
    assert "the step of toy_envs:Failing-v0 raised ZeroDivisionError: the cart has left the track" in message
    assert "toy_envs.py" in (tmp_path / "run" / "traceback.txt").read_text()
    assert complete_checkpoints(tmp_path / "run") == [64]


ENDS = [
    (("blind", "sync"), "gave [nan], not finite"),
    (("raise", "sync"), "raised ZeroDivisionError"),
    (("raise", "async"), "raised ZeroDivisionError"),
    (("die", "async"), "its process has ended"),
    (("hang", "async"), "did not come back within env.timeout=1.5 seconds"),
]


@pytest.mark.parametrize("env", [0, 1])
@pytest.mark.parametrize("end", ENDS)
def test_the_error_names_env_step_and_episode(end, env, tmp_path, monkeypatch, capsys):
    (failure, vectorization), cause = end
    seed = episode_seed(0, TRAINING, 0, env, 2)
    overrides = (*OVERRIDES, *FAILING, f"+env.kwargs.how={failure}", "+env.kwargs.after=7", f"+env.kwargs.seed={seed}")
    overrides = (*overrides, "env.num_envs=3", f"env.vectorization={vectorization}", "env.timeout=1.5")
    message = run_and_fail((*overrides, "algo.steps_per_iteration=8"), tmp_path / "run", monkeypatch, capsys)
    assert cause in message
    assert f"env {env}, step 7 of episode 2, seed {seed}" in message


def test_an_env_process_that_raises_is_named(tmp_path, monkeypatch, capsys):
    overrides = (*OVERRIDES, *FAILING, "+env.kwargs.how=raise", "env.vectorization=async", "env.num_envs=2")
    message = run_and_fail((*overrides, "algo.steps_per_iteration=16"), tmp_path / "run", monkeypatch, capsys)
    assert "raised ZeroDivisionError: the cart has left the track" in message
    assert complete_checkpoints(tmp_path / "run") == [128, 192]


def test_an_env_process_that_hangs_ends_the_run_after_the_timeout(tmp_path, monkeypatch, capsys):
    overrides = (*OVERRIDES, *FAILING, "+env.kwargs.how=hang", "env.vectorization=async", "env.timeout=1.5")
    begin = time.monotonic()
    message = run_and_fail(overrides, tmp_path / "run", monkeypatch, capsys)
    assert "did not come back within env.timeout=1.5 seconds" in message
    assert time.monotonic() - begin < 30
    assert complete_checkpoints(tmp_path / "run") == [64]


def full(*_) -> None:
    """Raise the error of a full disk."""
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_run_ended_by_a_full_disk_can_be_resumed(tmp_path, monkeypatch, capsys):
    train(compose([*OVERRIDES]), tmp_path / "straight")
    real, saves = files.save, []
    with monkeypatch.context() as patch:
        patch.setattr(files, "save", lambda *args: full() if len(saves) > 5 else saves.append(1) or real(*args))
        message = run_and_fail(OVERRIDES, tmp_path / "run", patch, capsys)
    assert "can't be written: No space left on device; continue from checkpoint 192" in message
    assert complete_checkpoints(tmp_path / "run") == [128, 192]
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))  # the space of the half-written one is free again
    resume.resume(run=str(tmp_path / "run"))
    assert metrics(tmp_path / "run") == metrics(tmp_path / "straight")


def test_a_half_written_checkpoint_is_removed_before_a_resumed_run_writes(tmp_path, monkeypatch):
    """It may have filled the disk."""
    train(compose([*OVERRIDES, "total_env_steps=64"]), tmp_path / "run")
    left = tmp_path / "run" / "checkpoints" / ".96.partial"
    left.mkdir()
    real = run_folder.create
    monkeypatch.setattr(run_folder, "create", lambda *args, **named: full() if left.exists() else real(*args, **named))
    resume.resume(run=str(tmp_path / "run"), total_env_steps=128)


def test_a_new_run_does_not_write_into_one_with_checkpoints(tmp_path):
    """Two commands may name the same folder, or a cell of a notebook is run twice."""
    train(compose([*OVERRIDES, "total_env_steps=64"]), tmp_path / "run")
    before = (tmp_path / "run" / "metrics.csv").read_text()
    with pytest.raises(ConfigError, match="exists already; name another folder"):
        train(compose([*OVERRIDES, "total_env_steps=96"]), tmp_path / "run")
    assert (tmp_path / "run" / "metrics.csv").read_text() == before


def test_the_error_message_of_the_operating_system_is_kept(tmp_path):
    """torch.save alone would raise an error of its zip writer."""
    with pytest.raises(OSError, match="No space left on device"):
        files.save({"weights": torch.randn(100_000)}, Path("/dev/full"))


def test_a_read_only_run_folder_ends_the_run(tmp_path, monkeypatch, capsys):
    real = os.mkdir

    def mkdir(path, *args, **kwargs):
        if ".192.partial" in str(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "mkdir", mkdir)
    message = run_and_fail(OVERRIDES, tmp_path / "run", monkeypatch, capsys)
    assert "can't be written: Permission denied; continue from checkpoint 128" in message


class ReadMissingFile(Callback):
    """Callback that opens a file that does not exist."""

    def on_train_batch_end(self, trainer, algorithm, *_) -> None:
        if algorithm.env_steps == 160:
            Path("/nowhere/labels.csv").read_text()


def test_a_file_that_a_callback_misses_is_not_taken_for_the_run_folder(tmp_path, monkeypatch, capsys):
    overrides = (*OVERRIDES, "+callbacks.read={_target_:test_guards.ReadMissingFile}")
    message = run_and_fail(overrides, tmp_path / "run", monkeypatch, capsys)
    assert "raised FileNotFoundError: [Errno 2] No such file or directory: '/nowhere/labels.csv'" in message
    assert f"(see {tmp_path / 'run'}/traceback.txt); continue from checkpoint 128" in message
    assert "labels.csv" in (tmp_path / "run" / "traceback.txt").read_text()


class Misspelt(Callback):
    """Callback with a mistake."""

    def on_train_batch_end(self, trainer, algorithm, *_) -> None:
        {"labels": 1}["absent"]


def test_the_traceback_of_any_error_is_kept(tmp_path):
    with pytest.raises(KeyError, match="absent"):
        train(compose([*OVERRIDES, "+callbacks.mine={_target_:test_guards.Misspelt}"]), tmp_path / "run")
    assert "KeyError: 'absent'" in (tmp_path / "run" / "traceback.txt").read_text()


def test_a_full_disk_does_not_hide_why_an_env_failed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(files, "write_text", lambda folder, name, text: full() if "traceback" in name else None)
    with (
        pytest.raises(RunError, match="env failed; the run has no checkpoint yet"),
        run_folder.report_failure(tmp_path),
    ):
        raise RunError("env failed") from ValueError("x")


class Delete(Callback):
    """Callback that deletes the run folder during the run."""

    folder: Path

    def on_train_batch_end(self, trainer, algorithm, *_) -> None:
        if algorithm.env_steps == 160:
            shutil.rmtree(self.folder)


def test_a_deleted_run_folder_ends_the_run_and_is_not_created_again(tmp_path, monkeypatch, capsys):
    Delete.folder = tmp_path / "run"
    overrides = (*OVERRIDES, "+callbacks.delete={_target_:test_guards.Delete}")
    message = run_and_fail(overrides, tmp_path / "run", monkeypatch, capsys)
    assert "can't be written: No such file or directory; the run has no checkpoint yet" in message
    assert not (tmp_path / "run").exists()


def test_a_run_killed_at_its_start_does_not_block_a_new_run(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(Killed):
            train(compose([*OVERRIDES]), tmp_path / "run")
    assert all(each.name.startswith(".") for each in (tmp_path / "run").iterdir())
    cfg = compose([*OVERRIDES, f"run={tmp_path / 'run'}", "total_env_steps=64"])
    train(cfg, run_folder.new_run_path(cfg))
    assert complete_checkpoints(tmp_path / "run") == [64]


def test_a_metric_with_more_than_one_number_is_named():
    algorithm, _ = build_run(compose(list(SMALL)))
    algorithm.record(good=torch.ones(1), better=1.0)
    with pytest.raises(
        ValueError, match=r"record\(q_value=...\) takes one number, got a tensor \[256\]: take its mean"
    ):
        algorithm.record(q_value=torch.ones(256))


def test_an_apple_gpu_is_not_chosen_automatically_and_refused_where_it_lacks_a_dtype(monkeypatch):
    monkeypatch.setattr("lightning.pytorch.accelerators.MPSAccelerator.is_available", lambda: True)
    cfg = compose(["algo=ppo", "env=pendulum", "env.normalize_observation=true", "trainer.accelerator=auto"])
    algorithm, rollouts = build_run(cfg)
    trainer, _, _ = trainers.build_trainer(cfg, Path("run"), rollouts.env.config, None)
    assert trainer.strategy.root_device.type == "cpu"
    apple = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("mps")))
    with pytest.raises(ConfigError, match=r"mps has no float64.* of PPO need: set trainer.accelerator=cpu"):
        trainers.check_dtypes(apple, algorithm)
