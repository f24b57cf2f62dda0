"""Plans of sweeps: the same command continues a sweep, another one is refused."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from levin.config.compose import compose
from levin.core import files
from levin.core.errors import ConfigError
from levin.resume import find_runs
from levin.runs import folder as run_folder
from levin.runs.load import load_config
from levin.scheduler.plan import open_sweep, planned_runs
from processes import start_python

WORDS = ("env=pendulum", "trainer.threads=1")


def configs(*words, seeds=(0, 1)):
    return {f"s{seed}": compose([*WORDS, *words, f"seed={seed}"]) for seed in seeds}


def open_and_close(*arguments, **options):
    with open_sweep(*arguments, **options) as runs:
        return runs


def end(run, env_steps):
    files.save_json(
        {"git_sha": "", "git_dirty": False, "versions": {}, "env_steps": env_steps, "wall_seconds": 1.0, "resumed": []},
        run,
        "provenance.json",
    )


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_the_same_command_finds_its_unfinished_runs(tmp_path):
    first = open_and_close(configs(), None)
    assert [run.name for run in first] == ["s0", "s1"]
    assert all(run_folder.has_begun(run) for run in first)
    end(first[0], 1_000_000)
    shutil.rmtree(first[1])  # the command was killed before it was written
    assert open_and_close(configs(), None) == first
    assert run_folder.has_begun(first[1])
    end(first[1], 1_000_000)
    assert open_and_close(configs(), None) != first, "a complete sweep is not trained again"


def test_a_sweep_that_another_process_trains_is_left_alone():
    script = "from test_plan import *\nwith open_sweep(configs(), None):\n    print('ready', flush=True); input()"
    path = os.pathsep.join([str(Path(__file__).parent), os.environ["PYTHONPATH"]])
    other = start_python("-c", script, env={**os.environ, "PYTHONPATH": path}, stdin=subprocess.PIPE)
    assert "ready" in other.stdout.readline()
    (theirs,) = Path("runs").glob("sweep_*")
    own = open_and_close(configs(), None)
    assert own[0].parent != theirs
    with pytest.raises(ConfigError, match=f"the sweep {theirs}/sweep.json is being trained by another process"):
        open_and_close(configs(), theirs)
    other.communicate("\n")
    assert other.returncode == 0


def test_seeds_of_one_config_lie_beside_single_runs():
    first = open_and_close(configs(), None, beside_others=True)
    assert {run.parent for run in first} == {Path("runs/sac_pendulum")}
    assert [run.name.partition("_")[0] for run in first] == ["s0", "s1"]
    assert open_and_close(configs(), None, beside_others=True) == first
    (plan,) = Path("runs/sac_pendulum").glob("sweep_*.json")
    assert planned_runs(plan) == first
    assert find_runs(str(plan.rename(plan.with_name("my sweep.json")))) == first


@pytest.mark.parametrize(
    ("others", "sentence"),
    [
        (configs(seeds=(0, 1, 2)), "run=mine holds the sweep of another command"),
        (configs("algo.gamma=0.9"), "run=mine holds a sweep with other values"),
    ],
)
def test_another_command_in_the_same_folder_is_refused(others, sentence, tmp_path):
    folder = Path("mine")
    first = open_and_close(configs(), folder)
    assert open_and_close(configs(), folder) == first
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=sentence):
        open_and_close(others, folder)
    assert sorted(tmp_path.rglob("*")) == before


def test_runs_keep_their_configs_if_seeds_are_typed_in_another_order():
    folder = Path("mine")
    shutil.rmtree(open_and_close(configs(), folder)[0])
    runs = open_and_close(configs(seeds=(1, 0)), folder)
    assert [run.name for run in runs] == ["s1", "s0"]
    assert [load_config(run).seed for run in runs] == [1, 0]


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    with pytest.raises(ConfigError, match="run=mine exists already, and is not a sweep"):
        open_and_close(configs(), Path("mine"))


@pytest.mark.parametrize("content", ["{}", "no json", {"runs": {"../../other": "x"}}, {"runs": {"/etc": "x"}}])
def test_a_damaged_plan_is_a_sentence(content, tmp_path):
    folder = Path("mine")
    open_and_close(configs(), folder)
    plan = tmp_path / "mine" / "sweep.json"
    if isinstance(content, dict):
        content = json.dumps({**json.loads(plan.read_text()), **content})
    plan.write_text(content)
    with pytest.raises(ConfigError, match=r"mine/sweep\.json is damaged"):
        planned_runs(Path("mine/sweep.json"))
    with pytest.raises(ConfigError, match=r"mine/sweep\.json is damaged"):
        open_and_close(configs(), folder)
