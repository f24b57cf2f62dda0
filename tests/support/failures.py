"""Runs that fail on purpose, and the checkpoints they leave."""

import sys
from pathlib import Path

import pytest

from levin import train as command
from levin.runs import checkpoint

FAILING = ("env=gym", "env.id=toy_envs:Failing-v0", "env.action=rescale", "eval.every=100_000", "eval.episodes=1")


def run_and_fail(overrides: tuple[str, ...], run: Path, monkeypatch, capsys) -> str:
    """Run `levin.train`, check that it ends with exit code 1 and a one-line error, and return that line."""
    last = {word.partition("=")[0]: word for word in overrides}  # a repeated key would be announced on stderr
    monkeypatch.setattr(sys, "argv", ["train", *last.values(), f"run={run}"])
    with pytest.raises(SystemExit) as stop:
        command.main()
    message = capsys.readouterr().err.strip()
    assert stop.value.code == 1
    assert message.startswith("levin: ")
    assert "\n" not in message
    assert "Traceback" not in message
    return message


def complete_checkpoints(run: Path) -> list[int]:
    """Return the env steps of all checkpoints of a run, after verifying that each is undamaged."""
    folders = checkpoint.list_checkpoints(run / "checkpoints")
    for folder in folders:
        checkpoint.verify(folder, buffer=True)
    return [int(folder.name) for folder in folders]
