"""The run folder keeps the code that neither the commit nor a package gives back, and a resume compares it."""

import json
import shutil
import subprocess

import pytest

from levin.config.compose import compose
from levin.core import paths
from levin.runs import code
from levin.runs import folder as run_folder
from processes import run_python

ENV = """
import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box
from code_helper import SCALE

class Line(gym.Env):
    observation_space, action_space = Box(-1, 1, (1,), np.float32), Box(-1, 1, (1,), np.float32)
    def reset(self, *, seed=None, options=None):
        return np.zeros(1, np.float32), {}
    def step(self, action):
        return np.zeros(1, np.float32), SCALE * float(action[0]), False, False, {}

gym.register("Line-v0", Line, max_episode_steps=8)
"""
RUN = (
    "algo=ppo",
    "env=gym",
    "env.id=code_env:Line-v0",
    "env.num_envs=1",
    "algo.steps_per_iteration=16",
    "algo.epochs=1",
)
RUN = (*RUN, "algo.batch_size=16", "total_env_steps=32", "eval.episodes=1", "logger=csv", "run=run")


def levin(command, *words, cwd):
    answer = run_python("-m", f"levin.{command}", *words, cwd=cwd)
    assert answer.returncode == 0, answer.stderr
    return answer.stderr


def test_a_users_modules_are_copied_and_compared(tmp_path):
    (tmp_path / "code_env.py").write_text(ENV)
    (tmp_path / "code_helper.py").write_text("SCALE = 1.0\n")
    levin("train", *RUN, cwd=tmp_path)
    assert (tmp_path / "run/code/code_env.py").read_text() == ENV
    assert (tmp_path / "run/code/code_helper.py").read_text() == "SCALE = 1.0\n"  # which no config names
    facts = json.loads((tmp_path / "run/provenance.json").read_text())
    assert {"code_env.py", "code_helper.py"} <= set(facts["code"])

    assert "has changed" not in levin("resume", "run=run", "total_env_steps=48", cwd=tmp_path)
    assert not (tmp_path / "run/code_resumed_1").exists()

    (tmp_path / "code_helper.py").write_text("SCALE = 2.0\n")
    said = levin("resume", "run=run", "total_env_steps=64", cwd=tmp_path)
    assert "code_helper.py has changed: numbers may differ" in said
    assert "code_env.py" not in said
    assert (tmp_path / "run/code/code_helper.py").read_text() == "SCALE = 1.0\n"
    assert (tmp_path / "run/code_resumed_2/code_helper.py").read_text() == "SCALE = 2.0\n"

    assert "code_" not in levin("evaluate", "run=run", "episodes=1", cwd=tmp_path)
    (tmp_path / "code_helper.py").write_text("SCALE = 3.0\n")
    for command, words in (("evaluate", ("episodes=1",)), ("export", ("format=torch",))):
        said = levin(command, "run=run", *words, cwd=tmp_path)
        assert "code_helper.py has changed: numbers may differ from those of the run" in said


def test_without_git_one_line_says_that_code_is_not_compared(monkeypatch):
    monkeypatch.setattr(code, "run_git", lambda *_: "")
    changed = code.collect_code()
    assert len(changed) > 10  # all modules, as git names none
    (line,) = code.describe_changes({}, changed, "0123456789")
    assert line == "git does not answer, so that other code can't be compared with commit 01234567"


def test_without_a_commit_all_code_is_kept(monkeypatch):
    """As after `git init` and `git add` in an archive that was unpacked."""
    monkeypatch.setattr(code, "run_git", lambda *words: "src/levin/runs/code.py" if words[0] == "ls-files" else "")
    assert "levin/runs/code.py" in code.collect_code()


@pytest.mark.parametrize("name", ["levin/envs/new.py", "experiments/idea/algorithm.py", "my_env.py"])
def test_a_module_that_changed_after_the_commit_was_read_counts_as_dirty(name, tmp_path, monkeypatch):
    monkeypatch.setattr("levin.runs.code.collect_code", lambda: {name: b"pass"})
    facts = {"git_sha": "0" * 40, "git_dirty": False, "versions": {}}
    run_folder.create(tmp_path, compose(["algo=ppo", "env=cartpole"]), facts, resumed=False)
    assert run_folder.read_provenance(tmp_path)["git_dirty"] == (name != "my_env.py")
    assert (tmp_path / "code" / name).read_text() == "pass"


@pytest.fixture
def checkout(tmp_path):
    """Copy of this checkout as a git repository of its own."""
    root = tmp_path / "checkout"
    shutil.copytree(paths.ROOT / "src", root / "src", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(paths.ROOT / "configs", root / "configs")
    (root / "experiments").mkdir()
    (root / "experiments/__init__.py").write_text("")
    (root / ".gitignore").write_text("/runs\n__pycache__\n")
    git = ("git", "-c", "user.name=a", "-c", "user.email=a@b.c", "-C", str(root))
    for words in (("init", "-q"), ("add", "."), ("commit", "-qm", "first")):
        subprocess.run([*git, *words], check=True)
    return root, git


def run_in(root, command, *words):
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(root / "src"), "XDG_STATE_HOME": str(root / "runs/state")}
    answer = run_python("-m", f"levin.{command}", *words, cwd=root, env=env)
    assert answer.returncode == 0, answer.stderr
    return answer.stderr


def test_a_fork_that_is_not_committed_is_kept_and_counts_as_dirty(checkout):
    root, git = checkout
    tiny = ("env=cartpole", "env.num_envs=1", "algo.steps_per_iteration=16", "algo.epochs=1", "algo.batch_size=16")
    tiny = (*tiny, "total_env_steps=32", "eval.episodes=1", "logger=csv")

    def provenance(run):
        return json.loads((root / run / "provenance.json").read_text())

    run_in(root, "train", "algo=ppo", *tiny, "run=runs/clean")
    assert (provenance("runs/clean")["git_dirty"], provenance("runs/clean")["code"]) == (False, {})
    assert not (root / "runs/clean/code").exists()

    run_in(root, "fork", "algo=ppo", "name=idea")
    run_in(root, "train", "algo=idea", *tiny, "run=runs/dirty")
    assert provenance("runs/dirty")["git_dirty"]
    algorithm = (root / "experiments/idea/algorithm.py").read_text()
    assert (root / "runs/dirty/code/experiments/idea/algorithm.py").read_text() == algorithm
    assert (root / "runs/dirty/code/experiments/idea/algo/idea.yaml").exists()

    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "second"], check=True)
    assert "idea" not in run_in(root, "resume", "run=runs/dirty", "total_env_steps=48")  # committed as it was

    changed = root / "src/levin/data/returns.py"
    changed.write_text(changed.read_text() + "\n")
    said = run_in(root, "resume", "run=runs/dirty", "total_env_steps=64")
    assert "levin/data/returns.py is new, or has changed since commit" in said
    assert "idea" not in said
