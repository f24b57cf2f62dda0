"""Run folders with random changes: every command answers in one line, in seconds, and writes nowhere else."""

import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import levin
from commands import exit_code_and_errors
from levin import evaluate, play, plot, resume
from levin.config.compose import compose
from levin.core import files
from levin.core.errors import exit_on_user_error
from levin.envs.config import EnvConfig
from levin.envs.factory import make_env
from levin.runs import checkpoint
from levin.training.session import train
from rows import ROWS

CASES = int(os.environ.get("LEVIN_FUZZ_CASES", "80"))
SECONDS = 10  # of the processor; waiting for ever is ended by an alarm
# Replacements for a value: other types, huge and special numbers, paths, odd text, code.
VALUES: tuple[Any, ...] = (
    *(None, True, 0, -1, 3.5, 2**63, 10**30, -(10**30), 1e308, float("nan"), float("inf")),
    *(
        "",
        "x",
        "x" * 5000,
        "../../outside",
        "/etc/passwd",
        "a\0b",
        "\x1b]0;title\x07",
        "日本",
        "${oc.env:HOME}",
        "null",
    ),
    *([], {}, [[1]], [None], {"a": 1}, {1: 2}, {"_target_": "os.system"}, "os:system", "os.system"),
)


def mutate_value(value: Any, dice: random.Random) -> Any:
    """Return nested plain values with one random entry replaced, removed or added."""
    at, parents = value, []
    while isinstance(at, dict | list) and at and (not parents or dice.random() < 0.8):
        key = dice.choice(list(at)) if isinstance(at, dict) else dice.randrange(len(at))
        parents.append((at, key))
        at = at[key]
    if not parents:
        return dice.choice(VALUES)
    parent, key = parents[-1]
    kind = dice.random()
    if kind < 0.7:
        parent[key] = dice.choice(VALUES)
    elif kind < 0.85:
        del parent[key]
    elif isinstance(parent, dict):
        parent[dice.choice(("extra", "", 7, "a.b", "../x"))] = dice.choice(VALUES)
    else:
        parent.append(dice.choice(VALUES))
    return value


def mutate_bytes(data: bytes, dice: random.Random) -> bytes:
    """Return a file's bytes cut, repeated, in another encoding, or with other bytes in them."""
    at = dice.randrange(len(data) + 1)
    return dice.choice(
        (
            data[:at],
            data[:at] + b"\0" + data[at:],
            data[:at] + bytes([dice.randrange(256)]) + data[at + 1 :],
            data[:at] + b"\xff\xfe" + data[at:],
            data[:at] + data[at // 2 :],
            data.decode("latin-1").encode("utf-16"),
            b"[" * 5000,
            b"9" * 5000,
            b"a: &x [1,2]\nb: [*x,*x]\n",
        )
    )


def replace_file(path: Path, outside: Path, dice: random.Random) -> None:
    """Put something other than a file in its place."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True, parents=True)
    kind = dice.randrange(6)
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        path.symlink_to(outside / "file")
    elif kind == 2:
        path.symlink_to(outside)
    elif kind == 3:
        path.symlink_to(path.name)  # a loop
    elif kind == 4:
        os.mkfifo(path)


def update_manifest(folder: Path, file: Path) -> None:
    """Write the new size and checksum of a file into the manifest, as its author would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][str(file.relative_to(folder))] = files.save(torch.load(file, weights_only=True), file)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def mutate(run: Path, outside: Path, dice: random.Random) -> str:
    """Change one thing in a run folder; return a description."""
    newest = checkpoint.list_checkpoints(run / "checkpoints")[-1]
    pieces = sorted(newest.glob("buffer/*"))
    texts = {
        "config": run / "config.yaml",
        "manifest": newest / "manifest.json",
        "provenance": run / "provenance.json",
        "metrics": run / "metrics.csv",
    }
    kind = dice.choice((*texts, "config", "state", "state", "buffer" if pieces else "state", "place"))
    if kind in texts:
        path = texts[kind]
        if kind == "metrics" or dice.random() < 0.3:
            if dice.random() < 0.5:
                rows = [line.split(",") for line in path.read_text().splitlines()]
                mutate_value(rows, dice)
                path.write_text(
                    "\n".join(",".join(map(str, row)) if isinstance(row, list) else str(row) for row in rows)
                )
            else:
                path.write_bytes(mutate_bytes(path.read_bytes(), dice))
        elif kind == "config":
            path.write_text(yaml.safe_dump(mutate_value(yaml.safe_load(path.read_text()), dice), allow_unicode=True))
        else:
            path.write_text(json.dumps(mutate_value(json.loads(path.read_text()), dice), default=str))
    elif kind == "place":
        names = [
            "evaluation.json",
            "videos",
            "pictures",
            "checkpoints",
            "metrics.csv",
            "config.yaml",
            "provenance.json",
        ]
        names += [".lock", "tensorboard", "videos/64_0.mp4", "checkpoints/last", f"checkpoints/{newest.name}"]
        names += [str(newest.relative_to(run) / name) for name in ("state.ckpt", "manifest.json", "buffer")]
        path = run / dice.choice(names)
        replace_file(path, outside, dice)
        kind = f"place of {path.name}"
    else:
        path = newest / "state.ckpt" if kind == "state" else dice.choice(pieces)
        if dice.random() < 0.3:
            path.write_bytes(mutate_bytes(path.read_bytes(), dice))
        else:
            files.save(mutate_value(torch.load(path, weights_only=True), dice), path)
            update_manifest(newest, path)
    return kind


def load_and_act(run: str) -> None:
    """Load the policy of a run."""
    with exit_on_user_error():
        levin.load(run)


def dream(run: str) -> None:
    """Take a step in the dreams of a run's world model."""
    with exit_on_user_error():
        env = make_env(EnvConfig(id="dream", family="dream", run=run, time_limit=5), seed=0)
        env.begin([0], np.ones(1, dtype=bool))


# What each command is called with, for a run.
COMMANDS: dict[str, tuple[Callable[..., None], tuple[str, ...]]] = {
    "evaluate": (evaluate.main, ("run={run}", "episodes=1")),
    "play": (play.main, ("run={run}",)),
    "resume": (resume.main, ("run={run}", "total_env_steps={total}")),
    "plot": (plot.main, ("runs={run}", "out={run}/plot.png")),
    "load": (load_and_act, ()),
    "dream": (dream, ()),
}

FEW = ("logger=csv", "eval.episodes=1", "env.time_limit=8", "checkpoint.every=32", "eval.every=32", "log_every=32")
# Algorithm -> its overrides, and env steps of the run and of its continuation.
RUNS: dict[str, tuple[tuple[str, ...], int, int]] = {
    "sac": (("algo.learning_starts=16",), 64, 96),
    "ppo": (("env.normalize_observation=true", "env.normalize_reward=true", "algo.compile=false"), 64, 96),
    "dreamer_v3": (("algo.learning_starts=16",), 96, 128),
    "world_models": (("algo.collect_env_steps=60",), 120, 180),
}


@pytest.fixture(scope="module", autouse=True)
def _limited_memory():
    """Let an allocation of more than 6 GB fail, so that a change that asks for it is an error of the command."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 6 * 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture(scope="module")
def small_runs(tmp_path_factory) -> dict[str, Path]:
    folders = {}
    for row in ROWS:
        if row.algo in RUNS:
            more, total, _ = RUNS[row.algo]
            folders[row.algo] = tmp_path_factory.mktemp(row.algo) / "run"
            words = [f"algo={row.algo}", f"env={row.env}", *row.small, *FEW, *more, f"total_env_steps={total}"]
            train(compose(words), folders[row.algo])
    return folders


WRITES: list[str] = []


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Audit hook: remember the paths that this process writes, creates, renames or links."""
    if event == "open" and isinstance(arguments[0], str) and isinstance(arguments[2], int):
        if arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            WRITES.append(arguments[0])
    elif event in ("os.link", "os.symlink"):
        WRITES.append(str(arguments[1]))
    elif event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate") and arguments[-1] in (-1, None):
        WRITES.extend(str(each) for each in arguments[:2] if isinstance(each, str))


sys.addaudithook(watch)


def answer(command: str, run: Path, total: int, monkeypatch, capsys) -> tuple[int, str]:
    """Run a command in this process; return its exit code and what it wrote to stderr."""
    main, words = COMMANDS[command]
    monkeypatch.setattr("sys.argv", [command, *(word.format(run=run, total=total) for word in words)])
    return exit_code_and_errors(main if words else partial(main, str(run)), capsys)


@pytest.mark.parametrize("seed", range(CASES))
def test_a_changed_run_folder_gives_a_one_line_answer(seed, small_runs, tmp_path, monkeypatch, capsys):
    dice = random.Random(seed)
    run, outside = tmp_path / "run", tmp_path / "outside"
    algo = dice.choice(list(RUNS))
    shutil.copytree(small_runs[algo], run, symlinks=True)
    outside.mkdir()
    (outside / "file").write_text("untouched")
    monkeypatch.chdir(tmp_path)
    changed = mutate(run, outside, dice)
    for command in dice.sample(sorted(COMMANDS), 2):
        WRITES.clear()
        begun = time.process_time()
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(12 * SECONDS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            code, message = answer(command, run, RUNS[algo][2], monkeypatch, capsys)
        signal.alarm(0)
        case = f"{command} after a change of {algo}'s {changed}: exit {code}, {message!r}"
        assert time.process_time() - begun < SECONDS, case
        assert code in (0, 1, 2), case
        assert "Traceback" not in message, case
        if code:
            assert message.splitlines()[-1].startswith("levin: "), case
            assert len(message.splitlines()[-1]) < 2000, case
        here = (os.path.realpath(run), "/dev", f"{tempfile.gettempdir()}/levin-", f"{tempfile.gettempdir()}/tmp")
        for path in WRITES:
            inside = os.path.realpath(os.path.dirname(os.path.abspath(path))).startswith(here)
            assert inside or path == here[0] or "__pycache__" in path or "/.cache/" in path, f"{case}: wrote {path}"
        assert [each.name for each in outside.iterdir()] == ["file"], case
        assert (outside / "file").read_text() == "untouched", case
