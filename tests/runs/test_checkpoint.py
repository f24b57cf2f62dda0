"""Checkpoint files: complete or absent after a kill, only new transitions written, synced to disk."""

import errno
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict

import levin
from checks import same
from levin import resume
from levin.config.compose import compose
from levin.core import files
from levin.core.errors import ConfigError, RunError
from levin.data.replay import Replay
from levin.evaluate import evaluate_run
from levin.runs import checkpoint, segments
from levin.runs.checkpoint_io import FolderCheckpointIO
from levin.training.session import train
from levin.training.video import record_video
from short_runs import SMALL, TINY, Killed


def make_state(step: int, buffer: Replay | None) -> dict:
    """Return the state of a toy checkpoint at an env step."""
    return {
        "algorithm": "Toy",
        "levin": {"env_steps": step},
        "weights": torch.full((100,), float(step)),
        "buffer": buffer and buffer.state_dict(),
    }


def transitions(start: int, stop: int) -> TensorDict:
    """Return transitions `[1, stop - start]` numbered from `start` to `stop`."""
    value = torch.arange(start, stop, dtype=torch.float32).reshape(1, -1, 1)  # [T] -> [N, T, 1]
    after = {"observation": value + 1, "reward": value, "terminated": value > 0}
    return TensorDict({"observation": value, "action": value, "next": after}, batch_size=(1, stop - start))


OPERATIONS = ("mkdir", "link", "fsync", "rename", "replace", "symlink", "unlink", "rmdir", "open")


def test_a_kill_between_any_two_file_operations_leaves_a_complete_checkpoint(tmp_path, monkeypatch):
    """Save three checkpoints and delete the first; kill before the k-th file operation, for every k."""

    def work(folder: Path) -> None:
        writer, buffer = FolderCheckpointIO(folder), Replay(20, "memory")
        for step in (8, 16, 24):
            buffer.extend(transitions(step - 8, step))
            writer.save_checkpoint(make_state(step, buffer), folder / str(step) / checkpoint.STATE)
        writer.remove_checkpoint(folder / "8" / checkpoint.STATE)

    def stop_at(k: int) -> list[str]:
        done = []

        def wrap(name, real):
            def wrapped(*args, **kwargs):
                if len(done) == k:
                    raise Killed
                done.append(name)
                return real(*args, **kwargs)

            return wrapped

        with monkeypatch.context() as patch:
            for name in OPERATIONS:
                patch.setattr(os, name, wrap(name, getattr(os, name)))
            try:
                work(folder)
            except Killed:
                return done
        return [*done, "end"]

    for k in range(1000):
        folder = tmp_path / str(k) / "checkpoints"
        folder.mkdir(parents=True)
        done = stop_at(k)
        complete = checkpoint.list_checkpoints(folder)
        renames = [i for i, name in enumerate(done) if name == "rename"]
        assert len(complete) >= min(2, len(renames))
        for each in complete:
            checkpoint.verify(each, buffer=True)
            step = int(each.name)
            loaded = FolderCheckpointIO(folder).load_checkpoint(each / checkpoint.STATE)
            assert torch.equal(loaded["weights"], torch.full((100,), float(step)))
            stored = torch.cat(list(loaded["buffer"]["data"]))["observation"].flatten()
            assert stored.tolist() == list(range(max(0, step - 20), step))
        checkpoint.remove_partial(folder)
        assert {each.name for each in folder.iterdir()} <= {"8", "16", "24", "last"}
        if done[-1:] == ["end"]:
            break
    assert k > 40
    assert [each.name for each in complete] == ["16", "24"]


def test_only_new_transitions_are_written(tmp_path):
    writer, buffer = FolderCheckpointIO(tmp_path), Replay(1000, "memory")
    for step in range(100, 1301, 100):
        buffer.extend(transitions(step - 100, step))
        writer.save_checkpoint(make_state(step, buffer), tmp_path / str(step) / checkpoint.STATE)
    newest = tmp_path / "1300" / checkpoint.BUFFER
    assert len(list(newest.iterdir())) == 10  # the ring buffer holds 1000 transitions
    before = {path.name: path.stat().st_ino for path in (tmp_path / "1200" / checkpoint.BUFFER).iterdir()}
    shared = [path for path in newest.iterdir() if before.get(path.name) == path.stat().st_ino]
    assert len(shared) == 9
    for old in list(tmp_path.iterdir()):
        if old.name.isdigit() and old.name != "1300":
            checkpoint.discard(old)
    checkpoint.verify(tmp_path / "1300", buffer=True)


def test_a_buffer_is_saved_without_doubling_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(segments, "PIECE_BYTES", 1000)
    largest = []
    real = files.save
    monkeypatch.setattr(
        files, "save", lambda value, path: largest.append(sum(x.nbytes for x in value.values())) or real(value, path)
    )
    buffer = Replay(1000, "memory")
    buffer.extend(transitions(0, 600))
    buffer.extend(transitions(600, 1500))
    (tmp_path / "buffer").mkdir()
    segments.save(buffer.data, 1500, tmp_path / "buffer", tmp_path / "none", {})
    assert max(largest) <= 1000
    restored = Replay(1000, "memory")
    names = [path.name for path in (tmp_path / "buffer").iterdir()]
    data = segments.load(tmp_path / "buffer", names, 1500, 1000)
    restored.load_state_dict({"written": 1500, "length": 1000, "data": data}, torch.device("cpu"))
    assert same(restored.data.to_dict(), buffer.data.to_dict())
    buffer.extend(transitions(1500, 1507)), restored.extend(transitions(1500, 1507))
    assert same(restored.data.to_dict(), buffer.data.to_dict())


def test_a_file_system_without_hard_links_copies(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    writer, buffer = FolderCheckpointIO(tmp_path), Replay(100, "memory")
    for step in (10, 20):
        buffer.extend(transitions(step - 10, step))
        writer.save_checkpoint(make_state(step, buffer), tmp_path / str(step) / checkpoint.STATE)
    checkpoint.discard(tmp_path / "10")
    checkpoint.verify(tmp_path / "20", buffer=True)
    assert len(list((tmp_path / "20" / checkpoint.BUFFER).iterdir())) == 2


def test_a_file_system_without_symbolic_links_has_no_last_and_no_best(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(os, "symlink", refuse)
    run = tmp_path / "run"
    with pytest.warns(UserWarning, match="can't hold links, so there is no last and no best"):
        train(compose([*TINY, "total_env_steps=64", "checkpoint.every=32"]), run)
    assert sorted(each.name for each in (run / "checkpoints").iterdir()) == ["32", "64"]
    resume.resume(run=str(run), total_env_steps=96)
    assert checkpoint.newest_checkpoint(run).parent.name == "96"


def test_a_run_may_be_in_a_folder_named_checkpoints(tmp_path):
    run = tmp_path / "checkpoints" / "exp1"
    train(compose([*TINY, "total_env_steps=64", "checkpoint.every=32"]), run)
    resume.resume(run=str(run), total_env_steps=96)
    assert checkpoint.run_of(run) == run
    assert checkpoint.run_of(run / "checkpoints" / "64") == run
    assert levin.load(str(run)).algorithm.env_steps == 96
    assert levin.load(str(run / "checkpoints" / "64")).algorithm.env_steps == 64


def test_a_link_to_a_checkpoint_is_one(tmp_path, monkeypatch):
    run = tmp_path / "run"
    train(compose([*TINY, "total_env_steps=64", "checkpoint.every=32"]), run)
    (tmp_path / "mine").symlink_to(run / "checkpoints" / "32")
    assert evaluate_run(run=str(tmp_path / "mine"), episodes=1)["env_steps"] == 32
    monkeypatch.chdir(run / "checkpoints")
    assert evaluate_run(run="last", episodes=1)["env_steps"] == 64
    assert (run / "evaluation.json").is_file()


def test_files_of_a_run_are_synced_to_disk(tmp_path, monkeypatch):
    forced, fsync = set(), os.fsync
    monkeypatch.setattr("os.fsync", lambda file: (forced.add(os.readlink(f"/proc/self/fd/{file}")), fsync(file)))
    run = tmp_path / "run"
    train(compose([*TINY, "total_env_steps=64"]), run)
    partial = run / "checkpoints" / ".64.partial"
    expected = {run, run / ".config.*.partial.yaml", run / ".provenance.*.partial.json", run / "metrics.csv"}
    expected |= {run / "checkpoints", partial, partial / "state.ckpt", partial / ".manifest.*.partial.json"}
    assert {str(path) for path in expected} <= {re.sub(r"[0-9a-f]{8}(?=\.partial\.)", "*", path) for path in forced}


def test_checkpoints_may_be_moved_and_linked(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run, symlinks=True)
    (run / "checkpoints").rename(tmp_path / "elsewhere")
    (run / "checkpoints").symlink_to(tmp_path / "elsewhere")
    assert levin.load(run).algorithm.env_steps == levin.load(finished).algorithm.env_steps


def test_evaluate_play_and_load_take_a_checkpoint(finished, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run, symlinks=True)
    oldest, newest = (checkpoint.list_checkpoints(run / "checkpoints")[index] for index in (0, -1))
    best = (run / "checkpoints" / "best").resolve()
    for path, name in (
        (oldest, oldest.name),
        (oldest / "state.ckpt", oldest.name),
        (run / "checkpoints" / "last", newest.name),
        (run / "checkpoints" / "best", best.name),
        (run, newest.name),
    ):
        assert str(levin.load(path).algorithm.env_steps) == name
        assert str(evaluate_run(run=str(path), episodes=1)["env_steps"]) == name
        assert json.loads((run / "evaluation.json").read_text())["env_steps"] == int(name)
    names = ", ".join(each.name for each in checkpoint.list_checkpoints(run / "checkpoints"))
    with pytest.raises(ConfigError, match=f"checkpoints/7 does not exist; checkpoints there: {names}$"):
        evaluate_run(run=str(run / "checkpoints" / "7"), episodes=1)
    (video,) = record_video(run=str(run / "checkpoints" / "best"), out=str(tmp_path / "mine"))
    assert video == tmp_path / "mine" / "videos" / f"{best.name}_0.mp4"


def test_best_is_the_checkpoint_with_the_best_evaluation(tmp_path, monkeypatch):
    returns = iter([-5.0, -1.0, -9.0, -8.0])
    monkeypatch.setattr("levin.training.evaluation.evaluate", lambda *_: ([next(returns)], [1]))
    train(compose([*SMALL, "eval.every=32", "checkpoint.every=32", "total_env_steps=128"]), tmp_path / "run")
    assert os.readlink(tmp_path / "run" / "checkpoints" / "best") == "64"


def test_the_last_evaluation_of_a_run_ranks_its_last_checkpoint(tmp_path, monkeypatch):
    returns = iter([-5.0, -4.0, -3.0, -9.0, -2.0, -7.0])
    monkeypatch.setattr("levin.training.evaluation.evaluate", lambda *_: ([next(returns)], [1]))
    schedule = ["eval.every=64", "checkpoint.every=32", "checkpoint.keep=1"]
    best = tmp_path / "run" / "checkpoints" / "best"
    train(compose([*SMALL, *schedule, "total_env_steps=32"]), tmp_path / "run")
    assert os.readlink(best) == "32"
    resume.resume(run=str(tmp_path / "run"), total_env_steps=96)
    assert os.readlink(best) == "96"
    # A resumed run has no evaluation at 96 env steps, as if it had not stopped there: 64 was the best.
    resume.resume(run=str(tmp_path / "run"), total_env_steps=160)
    assert [each.name for each in checkpoint.list_checkpoints(best.parent)] == ["64", "160"]
    assert os.readlink(best) == "160"


def test_a_best_checkpoint_that_lost_its_evaluation_leaves_no_broken_link(tmp_path):
    (tmp_path / "best").symlink_to("64")
    checkpoint.relink(tmp_path / "best", None)
    checkpoint.relink(tmp_path / "best", None)
    assert not (tmp_path / "best").is_symlink()


def test_a_file_that_a_kill_left_among_the_checkpoints_is_deleted(tmp_path):
    (tmp_path / ".mine.12.partial").touch()
    (tmp_path / ".64.partial").mkdir()
    checkpoint.remove_partial(tmp_path)
    assert not list(tmp_path.iterdir())


def test_two_processes_of_the_same_id_write_a_file_at_the_same_time(tmp_path):
    with files.replace(tmp_path, "a.txt") as one, files.replace(tmp_path, "a.txt") as two:
        one.write_text("one")
        two.write_text("two")
    assert (tmp_path / "a.txt").read_text() == "one"
    assert len(list(tmp_path.iterdir())) == 1


def test_the_number_is_printed_before_it_is_written_and_out_says_where(finished, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run, symlinks=True)
    (run / "evaluation.json").mkdir()
    with pytest.raises(RunError, match=r"evaluation.json can't be written: .*; set out=<another path>"):
        evaluate_run(run=str(run), episodes=2)
    assert "over 2 episodes" in capsys.readouterr().out
    evaluate_run(run=str(run), episodes=2, out=str(tmp_path / "mine.json"))
    assert json.loads((tmp_path / "mine.json").read_text())["episodes"] == 2


def test_a_run_copied_by_a_tool_that_follows_links_can_be_resumed(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    assert not (run / "checkpoints" / "last").is_symlink()
    resume.resume(run=str(run), total_env_steps=384)
    assert os.readlink(run / "checkpoints" / "last") == "384"
