"""Studies in experiments/: which runs they train, keep and set aside."""

import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

pytest.importorskip("rliable", reason="the extra `report` draws")

from experiments import study
from experiments.batched import run as batched
from experiments.lecture import staleness
from experiments.variance import run as variance
from experiments.worlds import run as worlds

from levin.config.compose import compose
from levin.core import paths
from levin.core.errors import LockedError
from levin.runs import folder as run_folder

WORDS = ["algo=ppo", "env=cartpole", "algo.clip_epsilon=0.3"]


@pytest.fixture
def trained(monkeypatch):
    """Return the list of run folders that studies train; nothing is trained."""
    runs = []
    monkeypatch.setattr(study, "continue_runs", runs.extend)
    return runs


def write_run(run, without=(), **changes):
    """Write the folder of a run with the config of WORDS, less some keys, and a file that takes hours to make."""
    config = OmegaConf.create(OmegaConf.to_container(compose(WORDS)))
    for key in without:
        section, _, name = key.rpartition(".")
        del (OmegaConf.select(config, section) if section else config)[name]
    for key, value in changes.items():
        OmegaConf.update(config, key.replace("__", "."), value)
    run.mkdir(parents=True)
    OmegaConf.save(config, run / "config.yaml")
    (run / "metrics.csv").write_text("hours")


@pytest.mark.parametrize("name", [folder.parent.name for folder in sorted(paths.ROOT.glob("experiments/*/run.py"))])
def test_a_study_refuses_words_that_it_would_ignore(name):
    command = [sys.executable, "-m", f"experiments.{name}.run", "sped"]
    ended = subprocess.run(command, cwd=paths.ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith("levin: sped: this study takes ")


def test_a_run_from_before_a_key_was_added_is_kept(trained, tmp_path):
    run = tmp_path / "s0"
    write_run(run, without=("note", "algo.gae_lambda", "env.channels"), trainer__threads=7)
    study.train_runs({run: WORDS})
    assert trained == [run]
    assert [each.name for each in tmp_path.iterdir()] == ["s0"]
    assert (run / "metrics.csv").exists()


def test_runs_with_another_config_are_renamed_and_never_deleted(trained, tmp_path):
    run = tmp_path / "s0"
    others = [{"algo__gamma": 0.5}, {"algo__removed": 1}, {"without": ("algo.clip_epsilon",)}]  # its default is 0.2
    for name, changes in zip(("s0.old", "s0.old2", "s0.old3"), others, strict=True):
        write_run(run, **changes)
        study.train_runs({run: WORDS})
        assert (tmp_path / name / "metrics.csv").read_text() == "hours"
        assert [each.name for each in run.iterdir()] == ["config.yaml"]
        shutil.rmtree(run)


def test_a_run_that_another_process_trains_is_left_alone(trained, tmp_path, monkeypatch):
    write_run(tmp_path / "s0", algo__gamma=0.5)
    monkeypatch.setattr(run_folder, "is_locked", lambda run: run == tmp_path / "s0")
    with pytest.raises(LockedError, match="s0 is out of date, and another process trains it"):
        study.train_runs({tmp_path / "s0": WORDS})
    assert (tmp_path / "s0" / "metrics.csv").exists()
    assert not trained


def test_interrupted_runs_of_studies_are_continued(trained, tmp_path, monkeypatch):
    policy = SimpleNamespace(actor=torch.nn.Linear(1, 1))
    monkeypatch.setattr(variance, "load_algorithm", lambda run: policy)
    for module in (variance, staleness):
        monkeypatch.setattr(module, "RUNS", tmp_path)
    for run in ("policy", "a3c_w2_s0"):
        (tmp_path / run / "checkpoints").mkdir(parents=True)
        (tmp_path / run / "metrics.csv").write_text("train/staleness,train/stale_pushes\n1,2\n")
    variance.half_trained_policy()
    assert staleness.train_lock_free(2, 0) == {"staleness": 1, "stale_pushes": 2}
    assert trained == [tmp_path / "policy", tmp_path / "a3c_w2_s0"]


def test_runs_that_used_an_earlier_world_model_are_set_aside(tmp_path, monkeypatch):
    monkeypatch.setattr(worlds, "RUNS", tmp_path)
    monkeypatch.setattr(worlds, "train_runs", lambda runs: None)
    dates = {"base_s0": 2, "tau0.1_s0": 1, "tau0.5_s0": 2, "ppo_s0": 1, "base_s1": 2, "ppo_s1": 3, "blind_s0": 1}
    for name, day in dates.items():
        (tmp_path / name).mkdir()
        facts = {"git_sha": "", "git_dirty": False, "versions": {}, "env_steps": None, "wall_seconds": 0.0}
        facts |= {"resumed": [], "date": f"2026-01-0{day}T00:00:00+00:00"}
        (tmp_path / name / "provenance.json").write_text(json.dumps(facts))
    worlds.train_base()
    stale = {name: f"{name}.old" for name in ("tau0.1_s0", "ppo_s0")}
    assert {each.name for each in tmp_path.iterdir()} == {stale.get(name, name) for name in dates}


def test_the_final_policy_is_evaluated_in_evaluation_mode(tmp_path, monkeypatch):
    class Algorithm(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.env = {"action_units": "none"}

        def policy(self, deterministic):
            return self

    monkeypatch.setattr(batched, "load_algorithm", lambda run: Algorithm())
    monkeypatch.setattr(batched, "evaluate", lambda policy, env, episodes: ([float(policy.training)], None))
    assert batched.final_return(tmp_path, "cartpole") == (0, 0)


@pytest.mark.parametrize("script", sorted(paths.EXPERIMENTS.glob("*/run.py")), ids=lambda path: path.parent.name)
def test_a_study_names_the_extra_of_its_envs(script):
    """`make study` installs it."""
    code = "".join(path.read_text() for path in script.parent.glob("*.py"))
    files = [paths.CONFIGS / "env" / f"{name}.yaml" for name in re.findall(r"env=([a-z0-9_]+)", code)]
    needed = {line for file in files for line in re.findall("^# needs the extra: .*", file.read_text(), re.MULTILINE)}
    assert needed <= set(re.findall("^# needs the extra: .*", script.read_text(), re.MULTILINE))
