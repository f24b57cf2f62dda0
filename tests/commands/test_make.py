"""Makefile: variables reach the commands unchanged, and only quotes in ARGS are read by the shell."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NASTY = (
    "runs/my run",
    "runs/it's (a) try",
    'runs/"quoted"',
    "runs/lr=0.1,tau=[1]",
    "runs/größe",
    "$(touch pwned)",
    "$(shell touch pwned)",
    "`touch pwned`",
    "a;touch pwned",
    "a & touch pwned",
    "${HOME}/$HOME/~",
    "a|b>pwned",
    "*",
    "back\\slash",
)


@pytest.fixture
def checkout(tmp_path):
    """Create a checkout whose python only writes its arguments to a file, and in which every extra is installed."""
    for name in ("Makefile", "pyproject.toml", "requirements.lock"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "experiments" / "worlds").mkdir(parents=True)
    (tmp_path / "experiments" / "worlds" / "run.py").touch()
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text(
        f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]), file=open('arguments.jsonl', 'a'))\n"
    )
    python.chmod(0o755)
    for name in ("core", "dev", "report", "mujoco", "box2d", "dmc", "atari", "tune", "export", "docs", "scale"):
        (tmp_path / ".venv" / f".{name}").touch()
    return tmp_path


def run_make(checkout: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run make in the checkout."""
    return subprocess.run(
        ["make", "--no-print-directory", *arguments], cwd=checkout, capture_output=True, text=True, check=False
    )


def recorded_arguments(checkout: Path) -> list[list[str]]:
    """Return the arguments of every call of the checkout's python."""
    return [json.loads(line) for line in (checkout / "arguments.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("path", NASTY)
@pytest.mark.parametrize("command", ["train", "resume", "evaluate", "play"])
def test_a_run_folder_of_any_name_reaches_the_command(command, path, checkout):
    answer = run_make(checkout, command, f"RUN={path}", "STEPS=64", "ENV=pendulum")
    assert answer.returncode == 0, answer.stderr
    (arguments,) = recorded_arguments(checkout)
    assert arguments[:2] == ["-m", f"levin.{command}"]
    assert f"run={path}" in arguments
    assert not (checkout / "pwned").exists()


PAYLOADS = (
    "$(touch${IFS}pwned)",
    "$(shell touch pwned)",
    "`touch${IFS}pwned`",
    "worlds;touch${IFS}pwned;",
    "x>pwned|y",
)
TYPED = {  # command -> variables that it passes to python
    "train": ("ALGO", "ENV", "EXP", "STEPS", "SEED", "SEEDS", "ARGS", "RUN", "TRUST"),
    "resume": ("RUN", "STEPS", "ARGS"),
    "config": ("ALGO", "ENV", "STEPS", "ARGS"),
    "evaluate": ("RUN", "EXP", "EPISODES", "SEED", "ARGS", "TRUST"),
    "play": ("RUN", "EXP", "EPISODES", "SEED", "ARGS"),
    "export": ("RUN", "EXP", "FORMAT", "SEED", "ARGS"),
    "plot": ("RUNS", "ARGS"),
    "tune": ("SHOW", "ARGS"),
    "fork": ("ALGO", "NAME", "ARGS"),
    "reproduce": ("EXP", "SEED", "SEEDS", "STEPS", "JOBS", "STORE", "ARGS"),
    "pin": ("EXP", "ALGO", "ENV", "STEPS", "ARGS"),
    "report": ("CHECK", "ARGS"),
    "study": ("NAME",),
    "bench": ("WHAT", "ARGS"),
    "drill": ("ARGS",),
    "proof": ("BASE", "ARGS"),
    "test": ("ARGS",),
    "help": ("ALGO", "ENV", "EXP", "NAME"),
}


@pytest.mark.parametrize("text", PAYLOADS)
@pytest.mark.parametrize(("command", "name"), [(command, name) for command, names in TYPED.items() for name in names])
def test_no_variable_is_executed(command, name, text, checkout):
    run_make(checkout, command, f"{name}={text}")
    run_make(checkout, command, f"{name}=worlds {text}")
    assert not (checkout / "pwned").exists()


@pytest.mark.parametrize(
    ("name", "word"),
    [("ALGO", "algo={}"), ("ENV", "env={}"), ("STEPS", "total_env_steps={}"), ("SEED", "seed={}"), ("ARGS", "{}")],
)
def test_special_characters_in_a_variable_reach_the_command(name, word, checkout):
    text = "[1,2]*$HOME\\größe"
    assert run_make(checkout, "train", f"{name}={text}").returncode == 0
    assert word.format(text) in recorded_arguments(checkout)[0]


@pytest.mark.parametrize("command", [command for command, names in TYPED.items() if "ARGS" in names])
def test_args_reach_the_command(command, checkout):
    assert run_make(checkout, command, "ARGS=steps=20000 a.b=[1,2]").returncode == 0
    assert {"steps=20000", "a.b=[1,2]"} <= set(recorded_arguments(checkout)[0])


def test_every_other_command_refuses_args(checkout):
    (names,) = re.findall(r"^\.PHONY: (.*)", (checkout / "Makefile").read_text(), re.MULTILINE)
    refusing = set()
    for name in set(names.split()) - {"help"}:
        answer = run_make(checkout, "--dry-run", name, "NAME=worlds", "ARGS=a.b=1")
        if answer.returncode:
            assert f"make {name}: ARGS has no effect here: leave it out" in answer.stderr
            refusing.add(name)
        else:
            assert "'a.b=1'" in answer.stdout, name
    assert refusing == {"setup", "docs", "lint", "format", "lock", "clean", "bench-setup"}


@pytest.mark.parametrize(("typed", "passed"), [("1", "true"), ("true", "true"), ("0", "0"), ("false", "false")])
@pytest.mark.parametrize(
    ("command", "name"),
    [
        *((command, "TRUST") for command in ("train", "resume", "evaluate", "play", "export", "tune", "pin")),
        *(("reproduce", "TRUST"), ("reproduce", "STORE"), ("report", "CHECK"), ("tune", "SHOW")),
    ],
)
def test_only_1_and_true_say_yes(command, name, typed, passed, checkout):
    assert run_make(checkout, command, "RUN=theirs", f"{name}={typed}").returncode == 0
    assert f"{name.lower()}={passed}" in recorded_arguments(checkout)[0]


def test_a_result_is_not_resumed(checkout):
    assert run_make(checkout, "resume", "EXP=theirs").returncode == 0
    assert run_make(checkout, "resume", "EXP=theirs", "RUN=mine").returncode == 0
    assert recorded_arguments(checkout) == [["-m", "levin.resume"], ["-m", "levin.resume", "run=mine"]]


@pytest.mark.parametrize("text", ["- override /env: pendulum$(touch pwned)", "- override /env: a;touch${IFS}pwned"])
def test_nothing_in_a_yaml_is_executed(text, checkout):
    idea = checkout / "experiments" / "idea $(touch pwned)" / "algo"
    idea.mkdir(parents=True)
    (idea / "sac.yaml").write_text(text)
    (checkout / "configs" / "algo" / "sac.yaml").write_text(text)
    (checkout / "configs" / "env" / "pendulum.yaml").write_text("# needs the extra: `touch pwned`\n")
    assert run_make(checkout).returncode == 0
    assert run_make(checkout, "train").returncode == 0
    assert not (checkout / "pwned").exists()


def test_a_config_names_an_extra_and_nothing_else(checkout):
    folder = checkout / "experiments" / "theirs"
    folder.mkdir(parents=True)
    for extra in ("box2d", "dmc", "dev"):
        (checkout / ".venv" / f".{extra}").unlink()
    lines = ("box2d", "clean", "lock", "dev")
    (folder / "config.yaml").write_text("".join(f"# needs the extra: {line}\n" for line in lines))
    answer = run_make(checkout, "--dry-run", "evaluate", "EXP=theirs")
    assert answer.returncode == 0
    assert "[box2d]" in answer.stdout
    for word in ("rm -rf", "lock.py", "[dev]"):
        assert word not in answer.stdout
    (folder / "config.yaml").write_text("# needs the extra: dev\n")
    assert "[dev]" not in run_make(checkout, "--dry-run", "evaluate", "EXP=theirs").stdout


@pytest.mark.parametrize("command", ["evaluate", "play", "resume"])
def test_the_config_of_a_run_names_the_extra_of_its_env(command, checkout):
    extras = ("mujoco", "box2d", "dmc", "atari")
    for extra in extras:
        (checkout / ".venv" / f".{extra}").unlink()
    run = checkout / "it's a $(touch pwned) run"
    (run / "checkpoints" / "best").mkdir(parents=True)
    cases = {
        "  family: gymnasium\n  id: Pendulum-v1\n": None,
        "  family: gymnasium\n  id: HalfCheetah-v4\n": "mujoco",
        "  family: atari\n  id: a_game_without_a_file\n": "atari",
        "  family: dm_control\n  id: dm_control/walker-run-v0\n": "dmc",
        "  family: gymnasium\n  id: my.envs:Own-v0'$(touch pwned)`touch pwned`\n": None,
    }
    for text, needed in cases.items():
        (run / "config.yaml").write_text(f"env:\n{text}")
        for path in (run, run / "checkpoints" / "best"):
            output = run_make(checkout, "--dry-run", command, f"RUN={path}").stdout
            assert [each for each in extras if f"[{each}]" in output] == ([needed] if needed else [])
    assert not (checkout / "pwned").exists()


def test_the_script_of_a_study_names_its_extra(checkout):
    (checkout / "experiments" / "worlds" / "run.py").write_text('"""Study."""\n# needs the extra: box2d\n')
    (checkout / ".venv" / ".box2d").unlink()
    assert "[box2d]" in run_make(checkout, "--dry-run", "study", "NAME=worlds").stdout
    assert "[box2d]" not in run_make(checkout, "--dry-run", "study", "NAME=lab").stdout
    assert "[box2d]" not in run_make(checkout, "--dry-run", "train", "NAME=worlds").stdout


def test_a_fork_does_not_choose_the_env_of_another_algorithm(checkout):
    folder = checkout / "experiments" / "theirs" / "algo"
    folder.mkdir(parents=True)
    (folder / "sac.yaml").write_text("  - override /env: other_env\n")
    (checkout / ".venv" / ".dmc").unlink()
    (checkout / "configs" / "env" / "other_env.yaml").write_text("# needs the extra: dmc\n")
    assert "[dmc]" not in run_make(checkout, "--dry-run", "train", "ALGO=sac").stdout


def test_all_seeds_are_one_command_and_the_shell_reads_quotes_in_args(checkout):
    answer = run_make(checkout, "train", "RUN=my run", "SEEDS=0 1", 'ARGS=+callbacks.x.y="a b" algo.tau=.1')
    assert answer.returncode == 0, answer.stderr
    (words,) = recorded_arguments(checkout)  # one process, which trains each seed in run=my run/s<seed>
    assert words == ["-m", "levin.train", "algo=sac", "+callbacks.x.y=a b", "algo.tau=.1", "run=my run", "seeds=0 1"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["ARGS=seed=5"], ["seed=5"]),
        (["ARGS=-m seed=0,1,2"], ["-m", "seed=0,1,2"]),
        (["ARGS=-m launcher=slurm seed=0,1"], ["-m", "launcher=slurm", "seed=0,1"]),
        (["SEED=3"], ["seed=3"]),
        (["SEEDS=0 1", "JOBS=2"], ["seeds=0 1", "jobs=2"]),
        ([], []),
    ],
)
def test_seeds_are_passed_on_as_typed(given, expected, checkout):
    assert run_make(checkout, "train", *given).returncode == 0
    assert recorded_arguments(checkout) == [["-m", "levin.train", "algo=sac", *expected]]


def test_another_make_started_by_a_command_gets_no_variables(checkout):
    (checkout / ".venv" / "bin" / "python").write_text('#!/bin/sh\necho "flags: $MAKEFLAGS"\n')
    answer = run_make(checkout, "train", "ARGS=algo.tau=.1", "SEED=3")  # as the tests do in `make test ARGS=...`
    (flags,) = (line for line in answer.stdout.splitlines() if line.startswith("flags:"))
    assert "tau" not in flags
    assert "SEED" not in flags


def test_make_tune_passes_its_words_on(checkout):
    answer = run_make(
        checkout, "tune", "ALGO=sac", "TRIALS=4", "SEEDS_PER_TRIAL=2", "RETRAIN=0", "RUN=my run", "SHOW=1"
    )
    assert answer.returncode == 0, answer.stderr
    words = ["run=my run", "trials=4", "seeds_per_trial=2", "retrain=0", "show=true"]
    assert recorded_arguments(checkout) == [["-m", "levin.tune", "algo=sac", *words]]


def test_environment_variables_are_ignored(checkout, monkeypatch):
    monkeypatch.setenv("ALGO", "ppo")
    assert run_make(checkout, "train").returncode == 0
    assert "algo=sac" in recorded_arguments(checkout)[0]


def test_make_study_needs_a_known_name(checkout):
    assert run_make(checkout, "study", "NAME=worlds").returncode == 0
    assert run_make(checkout, "study", "NAME=lab", "ARGS=rows=20").returncode == 0
    assert recorded_arguments(checkout) == [["-m", "experiments.worlds.run"], ["-m", "levin.lab", "rows=20"]]
    assert run_make(checkout, "study", "NAME=worlds lab").returncode == 2
    answer = run_make(checkout, "study", "NAME=world;touch pwned")
    assert "levin: NAME=world;touch pwned is not a study; valid: worlds lab" in answer.stderr
    assert not (checkout / "pwned").exists()


def test_the_help_fits_on_one_screen(checkout):
    lines = run_make(checkout).stdout.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 120
    assert [line for line in lines if line in ("Use", "Results", "Develop")] == ["Use", "Results", "Develop"]


@pytest.fixture
def fresh(tmp_path):
    """Create a checkout without `.venv`."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("pyproject.toml", "requirements.lock"):
        (tmp_path / name).touch()
    return tmp_path


def test_nothing_is_installed_through_a_link(fresh):
    (fresh / "elsewhere").mkdir()
    (fresh / ".venv").symlink_to("elsewhere")
    answer = run_make(fresh, ".venv/.core")
    assert answer.returncode == 2
    assert "levin: .venv is a link" in answer.stderr
    assert not list((fresh / "elsewhere").iterdir())


def test_an_old_python_is_refused_before_a_venv_is_made_of_it(fresh):
    (least,) = re.findall(r'requires-python = ">=(.*)"', (ROOT / "pyproject.toml").read_text())
    old = fresh / "python3.10"
    old.write_text(
        f"#!{sys.executable}\nimport os, sys\nsys.version_info = (3, 10, 12)\n"
        "exec(sys.argv[2]) if sys.argv[1] == '-c' else os.mkdir('.venv')\n"
    )
    old.chmod(0o755)
    answer = run_make(fresh, ".venv/.core", f"PYTHON={old}")
    assert answer.returncode == 2
    assert f"levin: {old} is older than Python {least}: type make setup PYTHON=python3.12" in answer.stderr
    assert not (fresh / ".venv").exists()
    assert "is older" not in run_make(fresh, ".venv/.core", f"PYTHON={fresh}/missing").stderr


@pytest.mark.parametrize("maker", ["venv", "uv"])
def test_a_venv_whose_making_was_interrupted_is_completed(maker, fresh):
    """`python -m venv` adds pip last. uv adds none."""
    (fresh / ".venv/bin").mkdir(parents=True)
    (fresh / ".venv/pyvenv.cfg").write_text("home = /usr/bin\n" + "uv = 0.9.1\n" * (maker == "uv"))
    for path in (python := fresh / ".venv/bin/python", new := fresh / "python"):
        path.write_text('#!/bin/sh\necho "$@" >&2\ntest "$1" = -c\n')
        path.chmod(0o755)
    answer = run_make(fresh, ".venv/.core", f"PYTHON={new}")
    assert ("-m venv .venv" in answer.stderr) == (maker == "venv")
    assert python.exists() == (maker == "uv")


def test_a_venv_that_could_not_be_made_is_made_again(fresh):
    python = fresh / "python"  # as Debian's without the package python3-venv
    python.write_text(
        '#!/bin/sh\ntest "$1" = -c && exit 0\nmkdir -p .venv/bin && cp "$0" .venv/bin/python\necho "$@" >&2\nexit 1\n'
    )
    python.chmod(0o755)
    for _ in range(2):
        answer = run_make(fresh, ".venv/.core", f"PYTHON={python}")
        assert answer.returncode == 2
        assert "-m venv --clear .venv" in answer.stderr


@pytest.fixture
def installable(fresh):
    """Create a checkout whose python writes to `calls` what it is to install, in a second and a bit."""
    (fresh / "checkout/.venv/bin").mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "requirements.lock"):
        (fresh / name).rename(fresh / "checkout" / name)
        os.utime(fresh / "checkout" / name, (0, 0))
    for name in ("python", "pip"):
        path = fresh / "checkout/.venv/bin" / name
        path.write_text(f'#!/bin/sh\nsleep 1.1\necho "$@" >> "{fresh}/calls"\n')
        path.chmod(0o755)
    return fresh / "checkout"


def test_a_venv_that_was_moved_with_its_folder_is_installed_again(installable):
    calls = installable.parent / "calls"
    for folder in ("checkout", "my other checkout"):
        moved = installable.rename(installable.with_name(folder))
        for _ in range(2):
            assert run_make(moved, ".venv/.dev").returncode == 0
        lines = calls.read_text().splitlines()
        assert [line.rpartition("--editable ")[2] for line in lines] == [".", ".[dev]"]
        calls.unlink()
        installable = moved


def test_a_venv_whose_python_is_gone_is_made_again(installable):
    assert run_make(installable, ".venv/.dev").returncode == 0
    (installable / ".venv/bin/python").unlink()
    (installable / ".venv/bin/python").symlink_to("removed")
    new = installable.parent / "python"
    new.write_text('#!/bin/sh\necho "$@" >&2\n')
    new.chmod(0o755)
    assert "-m venv --clear .venv" in run_make(installable, ".venv/.dev", f"PYTHON={new}").stderr


def test_commands_side_by_side_install_once(installable):
    command = ["make", ".venv/.dev"]
    processes = [subprocess.Popen(command, cwd=installable, stdout=subprocess.DEVNULL) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    lines = (installable.parent / "calls").read_text().splitlines()
    assert [line.rpartition("--editable ")[2] for line in lines] == [".", ".[dev]"]
