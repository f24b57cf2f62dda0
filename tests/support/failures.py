"""Runs that fail on purpose, and what they leave behind."""

import sys
from pathlib import Path

import pytest

from levin import train as command
from levin.runs import checkpoint

FAILING = ("env=gym", "env.id=toy_envs:Failing-v0", "env.action=rescale", "eval.every=100_000", "eval.episodes=1")


def run_and_fail(words: tuple[str, ...], run: Path, monkeypatch, capsys) -> str:
    """The sentence that the run ends in."""
    monkeypatch.setattr(sys, "argv", ["train", *words, f"run={run}"])
    with pytest.raises(SystemExit) as stop:
        command.main()
    said = capsys.readouterr().err.strip()
    assert stop.value.code == 1
    assert said.startswith("levin: ")
    assert "\n" not in said
    assert "Traceback" not in said
    return said


def whole(run: Path) -> list[int]:
    folders = checkpoint.list_checkpoints(run / "checkpoints")
    for folder in folders:
        checkpoint.verify(folder, buffer=True)
    return [int(folder.name) for folder in folders]
