"""What ends a run before its time ends it in one sentence, with the newest checkpoint whole."""

import errno
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from lightning import Callback

from checks import metrics
from failures import FAILING, run_and_fail, whole
from levin import resume
from levin.algorithms.sac import SAC
from levin.config.compose import compose
from levin.core import files
from levin.envs.config import TRAINING
from levin.envs.vector import episode_seed
from levin.runs import folder as run_folder
from levin.training.session import train
from short_runs import SMALL

WORDS = (*SMALL, "checkpoint.every=64", "total_env_steps=640")


def spoil(monkeypatch, method: str, at: int, change) -> None:
    real = getattr(SAC, method)

    def spoiled(self, *args):
        loss = real(self, *args)
        return change(loss) if self.updates == at else loss

    monkeypatch.setattr(SAC, method, spoiled)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, monkeypatch, capsys):
    spoil(monkeypatch, "critic_loss", 200, lambda losses: (losses[0] * torch.nan, losses[1]))
    said = run_and_fail(WORDS, tmp_path / "run", monkeypatch, capsys)
    # Update 200 is in the iteration that ends at 40 + 200 < 256 env steps.
    assert "train/critic_loss" in said
    assert "not finite after 256 env steps and 216 updates" in said
    assert f"checkpoint 192 is whole: make resume RUN={tmp_path / 'run'}" in said
    assert whole(tmp_path / "run") == [128, 192]


def test_a_gradient_that_is_not_finite_ends_the_run(tmp_path, monkeypatch, capsys):
    def poison(losses):
        losses[0].register_hook(lambda gradient: gradient * torch.nan)
        return losses

    spoil(monkeypatch, "critic_loss", 215, poison)  # the last update before 256
    said = run_and_fail(WORDS, tmp_path / "run", monkeypatch, capsys)
    assert "the gradient of critic" in said
    assert "not finite after 256 env steps" in said
    assert whole(tmp_path / "run") == [128, 192]


def test_a_gradient_in_the_middle_of_an_iteration_is_seen_by_its_end(tmp_path, monkeypatch, capsys):
    def poison(losses):
        losses[0].register_hook(lambda gradient: gradient * torch.nan)
        return losses

    spoil(monkeypatch, "critic_loss", 190, poison)
    said = run_and_fail(WORDS, tmp_path / "run", monkeypatch, capsys)
    assert "not finite after 256 env steps" in said
    assert whole(tmp_path / "run") == [128, 192]


@pytest.mark.parametrize(("how", "value"), [("blind", "nan"), ("boundless", "inf")])
def test_what_an_env_gives_is_looked_at(how, value, tmp_path, monkeypatch, capsys):
    words = (*WORDS, *FAILING, f"+env.kwargs.how={how}", "+env.kwargs.after=170", "env.normalize_observation=true")
    said = run_and_fail(words, tmp_path / "run", monkeypatch, capsys)
    assert f"Failing-v0 gave [{value}]" in said or f"Failing-v0 gave {value}" in said
    assert "in iteration 6: env 0, step 10 of episode 8, seed" in said  # step 170 of episodes of 20
    assert whole(tmp_path / "run") == [64, 128]


def test_an_env_that_raises_is_named_and_its_traceback_kept(tmp_path, monkeypatch, capsys):
    words = (*WORDS, *FAILING, "+env.kwargs.how=raise")
    said = run_and_fail(words, tmp_path / "run", monkeypatch, capsys)
    assert "the step of toy_envs:Failing-v0 raised ZeroDivisionError: the cart has left the track" in said
    assert "toy_envs.py" in (tmp_path / "run" / "traceback.txt").read_text()
    assert whole(tmp_path / "run") == [64]


ENDS = [
    (("blind", "sync"), "gave [nan], not finite"),
    (("raise", "sync"), "raised ZeroDivisionError"),
    (("raise", "async"), "raised ZeroDivisionError"),
    (("die", "async"), "lost its process"),
    (("hang", "async"), "did not come back within env.timeout=1.5 seconds"),
]


@pytest.mark.parametrize(("way", "cause"), ENDS)
def test_env_step_and_episode_are_named(way, cause, tmp_path, monkeypatch, capsys):
    how, vectorization = way
    seed = episode_seed(0, TRAINING, 0, 1, 2)
    words = (*WORDS, *FAILING, f"+env.kwargs.how={how}", "+env.kwargs.after=7", f"+env.kwargs.seed={seed}")
    words = (*words, "env.num_envs=3", f"env.vectorization={vectorization}", "env.timeout=1.5")
    said = run_and_fail((*words, "algo.steps_per_iteration=8"), tmp_path / "run", monkeypatch, capsys)
    assert cause in said
    assert f"env 1, step 7 of episode 2, seed {seed}" in said


def test_a_worker_that_raises_is_named(tmp_path, monkeypatch, capsys):
    words = (*WORDS, *FAILING, "+env.kwargs.how=raise", "env.vectorization=async", "env.num_envs=2")
    said = run_and_fail((*words, "algo.steps_per_iteration=16"), tmp_path / "run", monkeypatch, capsys)
    assert "raised ZeroDivisionError: the cart has left the track" in said
    assert whole(tmp_path / "run") == [128, 192]


def test_a_worker_that_hangs_is_waited_for_no_longer_than_the_timeout(tmp_path, monkeypatch, capsys):
    words = (*WORDS, *FAILING, "+env.kwargs.how=hang", "env.vectorization=async", "env.timeout=1.5")
    begin = time.monotonic()
    said = run_and_fail(words, tmp_path / "run", monkeypatch, capsys)
    assert "did not come back within env.timeout=1.5 seconds" in said
    assert time.monotonic() - begin < 30
    assert whole(tmp_path / "run") == [64]


def full(*_) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_ends_the_run_and_it_goes_on_when_there_is_room(tmp_path, monkeypatch, capsys):
    train(compose([*WORDS]), tmp_path / "straight")
    real, saves = files.save, []
    with monkeypatch.context() as patch:
        patch.setattr(files, "save", lambda *args: full() if len(saves) > 5 else saves.append(1) or real(*args))
        said = run_and_fail(WORDS, tmp_path / "run", patch, capsys)
    assert "can't be written: No space left on device; checkpoint 192 is whole" in said
    assert whole(tmp_path / "run") == [128, 192]
    resume.resume(run=str(tmp_path / "run"))
    assert metrics(tmp_path / "run") == metrics(tmp_path / "straight")


def test_the_system_s_own_words_reach_the_user(tmp_path):
    """Torch hides them behind an error of its zip writer."""
    with pytest.raises(OSError, match="No space left on device"):
        files.save({"weights": torch.randn(100_000)}, Path("/dev/full"))


def test_a_folder_that_has_become_read_only_ends_the_run(tmp_path, monkeypatch, capsys):
    real = os.mkdir

    def mkdir(path, *args, **kwargs):
        if ".192.partial" in str(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "mkdir", mkdir)
    said = run_and_fail(WORDS, tmp_path / "run", monkeypatch, capsys)
    assert "can't be written: Permission denied; checkpoint 128 is whole" in said


class Delete(Callback):
    """Deletes the run folder in the middle of the run."""

    folder: Path

    def on_train_batch_end(self, trainer, algorithm, *_) -> None:
        if algorithm.env_steps == 160:
            shutil.rmtree(self.folder)


def test_a_deleted_run_folder_ends_the_run_and_does_not_come_back(tmp_path, monkeypatch, capsys):
    Delete.folder = tmp_path / "run"
    words = (*WORDS, "+callbacks.delete={_target_:test_guards.Delete}")
    said = run_and_fail(words, tmp_path / "run", monkeypatch, capsys)
    assert "can't be written: No such file or directory; it has no checkpoint yet" in said
    assert not (tmp_path / "run").exists()


def test_a_kill_while_a_run_begins_leaves_nothing_that_is_in_the_way(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(Killed):
            train(compose([*WORDS]), tmp_path / "run")
    assert all(each.name.startswith(".") for each in (tmp_path / "run").iterdir())
    cfg = compose([*WORDS, f"run={tmp_path / 'run'}", "total_env_steps=64"])
    train(cfg, run_folder.new_run_path(cfg))
    assert whole(tmp_path / "run") == [64]
