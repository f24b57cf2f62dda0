"""Damaged or malicious run folders are refused with a one-line error and never loaded."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from checks import metrics, saved_state
from levin import resume
from levin.config.compose import compose
from levin.core import files
from levin.core.errors import CheckpointError, ConfigError
from levin.runs import checkpoint, provenance
from levin.runs.load import load_config
from levin.training.session import train
from short_runs import TINY, assert_identical_runs


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """Train without an interruption to 384 env steps, which `finished` has not reached."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    train(compose([*TINY, "total_env_steps=384"]), folder)
    return folder


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """Return a copy of a run of 320 env steps."""
    return Path(shutil.copytree(finished, tmp_path / "run", symlinks=True))


def damage(path: Path, kind: str) -> None:
    """Truncate a file, empty it, flip one of its bits, or delete it."""
    data = path.read_bytes()
    if kind == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "bit-flipped":
        middle = len(data) // 2
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    else:
        path.unlink()


@pytest.mark.parametrize("kind", ["truncated", "bit-flipped", "empty", "missing"])
@pytest.mark.parametrize("part", ["state.ckpt", "manifest.json", "buffer"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_used(kind, part, run, straight, capsys):
    for folder in checkpoint.list_checkpoints(run / "checkpoints"):
        for file in (folder / "buffer").iterdir():  # copying has lost the hard links between checkpoints
            first = next(run.glob(f"checkpoints/*/buffer/{file.name}"))
            if not first.samefile(file):
                file.unlink()
                file.hardlink_to(first)
    newest, before = checkpoint.list_checkpoints(run / "checkpoints")[::-1][:2]
    path = (
        newest / part
        if part != "buffer"
        else max((newest / "buffer").iterdir(), key=lambda file: int(file.name.split("_")[0]))
    )
    damage(path, kind)
    if (part, kind) == ("manifest.json", "bit-flipped"):
        try:
            json.loads(path.read_text())
        except ValueError:
            pass
        else:
            pytest.skip("the manifest is still valid JSON; its checksums are tested with the other files")
    with pytest.raises(CheckpointError) as error:
        checkpoint.newest_checkpoint(newest, buffer=True)
    assert str(newest) in str(error.value)
    assert "\n" not in str(error.value)
    capsys.readouterr()
    resume.resume(run=str(run), total_env_steps=384)
    message = capsys.readouterr().err
    assert "trying the checkpoint before it" in message
    assert str(newest) in message
    assert (newest.parent / f"{newest.name}.damaged").exists()
    assert before.name in {"288", "256"}
    assert_identical_runs(straight, run)


def test_a_second_damaged_checkpoint_of_the_same_name_replaces_the_first(run):
    newest = checkpoint.list_checkpoints(run / "checkpoints")[-1]
    shutil.copytree(newest, newest.with_name(f"{newest.name}.damaged"))
    damage(newest / "state.ckpt", "empty")
    resume.resume(run=str(run), total_env_steps=352)
    assert saved_state(run)["levin"]["env_steps"] == 352


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("provenance.json", b"", "provenance.json is damaged; delete it to continue the run without it"),
        ("config.yaml", b"algo: {gamma: ", "config.yaml is damaged"),
        ("config.yaml", b"", "config.yaml is damaged: it holds no keys"),
    ],
)
def test_a_damaged_file_of_the_run_is_a_config_error(name, content, sentence, run):
    (run / name).write_bytes(content)
    with pytest.raises(ConfigError, match=sentence):
        resume.resume(run=str(run), total_env_steps=384)


def test_damaged_metrics_are_a_warning(run):
    (run / "metrics.csv").write_bytes(b"")
    with pytest.warns(UserWarning, match="has lost"):
        resume.resume(run=str(run), total_env_steps=384)
    assert metrics(run)[-1]["env_steps"] == "384"


def test_the_name_of_a_run_folder_may_be_a_number(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "7", symlinks=True)
    resume.resume(run=str(tmp_path / "7"), total_env_steps=352)
    assert saved_state(tmp_path / "7")["levin"]["env_steps"] == 352


def test_a_run_whose_checkpoints_are_all_damaged_is_not_restarted(run, capsys):
    for folder in checkpoint.list_checkpoints(run / "checkpoints"):
        damage(folder / "state.ckpt", "empty")
    with pytest.raises(CheckpointError, match="has no undamaged checkpoint"):
        resume.resume(run=str(run), total_env_steps=384)


class Evil:
    """Object that creates a file when it is unpickled."""

    def __reduce__(self):
        return (Path.touch, (Path(os.environ["LEVIN_TEST_EVIL"]),))


def test_a_malicious_pickle_is_not_executed(run, tmp_path, monkeypatch):
    monkeypatch.setenv("LEVIN_TEST_EVIL", str(tmp_path / "executed"))
    for folder in checkpoint.list_checkpoints(run / "checkpoints"):
        for file in (folder / "state.ckpt", sorted((folder / "buffer").iterdir())[-1]):
            torch.save({"evil": Evil()}, file)
            manifest = json.loads((folder / "manifest.json").read_text())
            name = str(file.relative_to(folder))
            manifest["files"][name] = {"bytes": file.stat().st_size, "crc32": _crc32(file)}
            (folder / "manifest.json").write_text(json.dumps(manifest))
        checkpoint.verify(folder, buffer=True)  # with valid checksums
        with pytest.raises(CheckpointError, match="can't be read"):
            files.load(file)
        (folder / "state.ckpt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ConfigError):
        resume.resume(run=str(run), total_env_steps=384)
    with pytest.raises(ConfigError):
        checkpoint.env_steps_and_wandb_id(checkpoint.list_checkpoints(run / "checkpoints")[-1] / "state.ckpt")
    assert not (tmp_path / "executed").exists()


def _crc32(file: Path) -> int:
    import zlib

    return zlib.crc32(file.read_bytes())


@pytest.mark.parametrize(
    ("key", "value", "sentence"), [("format", 99, "has format 99"), ("algorithm", "PPO", "was written by PPO")]
)
def test_a_checkpoint_of_another_format_or_algorithm_is_refused_and_kept(key, value, sentence, run):
    newest = checkpoint.list_checkpoints(run / "checkpoints")[-1]
    manifest = json.loads((newest / "manifest.json").read_text())
    (newest / "manifest.json").write_text(json.dumps({**manifest, key: value}))
    with pytest.raises(ConfigError, match=sentence):
        resume.resume(run=str(run), total_env_steps=384)
    assert newest.exists()


@pytest.mark.parametrize("value", ["${oc.env:HOME}", "${seed}", "${${name}:HOME}"])
def test_a_config_with_a_reference_is_refused(value, run):
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("wandb_project: levin", f"wandb_project: {value}"))
    with pytest.raises(ConfigError, match="holds the reference"):
        load_config(run)


@pytest.mark.parametrize(
    ("word", "recorded"),
    [
        ("+callbacks.x.api_key=abc=d, e", "+callbacks.x.api_key=***"),
        ("WANDB_TOKEN=abc", "WANDB_TOKEN=***"),
        ("--password=a", "--password=***"),
        ("+callbacks.x={_target_:a.B,api_key:abc,n:1}", "+callbacks.x={_target_:a.B,api_key:***,n:1}"),
        ("env.kwargs.monkey=3", "env.kwargs.monkey=3"),
        ("algo.gamma=0.98", "algo.gamma=0.98"),
    ],
)
def test_the_recorded_command_line_masks_secrets(word, recorded, monkeypatch):
    monkeypatch.setattr("sys.orig_argv", ["python", "-m", "levin.train", word])
    assert provenance.command_line().split(" ", 3)[3] == recorded
