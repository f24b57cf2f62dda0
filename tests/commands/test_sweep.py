"""Sweeps: Hydra's multirun of levin.train."""

import os

import pytest
from omegaconf import OmegaConf

from levin.plot import collect_runs
from processes import run_python

SMALL = (
    *("env=gym", "env.id=toy_envs:Point-v0", "total_env_steps=64", "algo.learning_starts=16", "algo.batch_size=4"),
    *("algo.hidden_sizes=[4]", "eval.episodes=1", "trainer.threads=1", "trainer.accelerator=cpu", "logger=csv"),
)


RECORDER = """
from pathlib import Path
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper


class Recorder(BasicSweeper):
    def sweep(self, arguments):
        results = super().sweep(arguments)
        (batch,) = results
        Path("returned.txt").write_text(" ".join(str(job.return_value) for job in batch))
        return results
"""


def train(folder, *overrides):
    """Run levin.train in a folder and return the completed process."""
    path = os.pathsep.join([str(folder), os.environ["PYTHONPATH"]])
    words = ("-m", "levin.train", *SMALL, *overrides)
    return run_python(*words, cwd=folder, env={**os.environ, "PYTHONPATH": path})


def test_every_combination_is_a_run_and_returns_its_last_evaluation(tmp_path):
    (tmp_path / "hydra_plugins").mkdir()  # Hydra looks for plugins here
    (tmp_path / "hydra_plugins" / "recorder.py").write_text(RECORDER)
    sweeper = "hydra.sweeper._target_=hydra_plugins.recorder.Recorder"
    answer = train(tmp_path, "-m", "algo.tau=.005,.01", "seed=0,1", sweeper)
    assert answer.returncode == 0, answer.stderr
    configs = [OmegaConf.load(file) for file in sorted(tmp_path.glob("runs/sweep_*/*/*/config.yaml"))]
    assert [(cfg.algo.tau, cfg.seed) for cfg in configs] == [(0.005, 0), (0.005, 1), (0.01, 0), (0.01, 1)]
    folders = sorted(each.parent.relative_to(tmp_path).parts[2:] for each in tmp_path.glob("runs/*/*/*/config.yaml"))
    assert folders[0] == ("algo.tau=0.005", "s0")
    returns = [line.split()[1] for line in answer.stdout.splitlines() if line.startswith("eval/return_mean")]
    assert (tmp_path / "returned.txt").read_text().split() == returns
    assert len(set(returns)) == 4


def test_values_with_a_slash_are_one_folder_each_and_can_be_drawn(tmp_path):
    (tmp_path / "own_ids.py").write_text(
        "import gymnasium, toy_envs\n"
        "for name in ('One', 'Two'):\n"
        "    gymnasium.register(f'pair/{name}-v0', toy_envs.Point, max_episode_steps=20)\n"
    )
    answer = train(tmp_path, "-m", "env.id=own_ids:pair/One-v0,own_ids:pair/Two-v0", "hydra.sweep.dir=mine")
    assert answer.returncode == 0, answer.stderr
    found = sorted(str(each.parent.relative_to(tmp_path)) for each in tmp_path.glob("mine/**/config.yaml"))
    assert found == [f"mine/env.id=own_ids:pair_{name}-v0/s0" for name in ("One", "Two")]
    assert len(collect_runs(f"{tmp_path}/mine/*")) == 2


@pytest.mark.slow
def test_repeating_a_sweep_with_other_values_is_refused(tmp_path):
    overrides = ("-m", "seed=0,1", "hydra.sweep.dir=mine")
    answer = train(tmp_path, *overrides)
    assert answer.returncode == 0, answer.stderr
    assert sorted(each.parent.name for each in tmp_path.glob("mine/*/config.yaml")) == ["s0", "s1"]
    answer = train(tmp_path, *overrides, "algo.gamma=0.9")
    assert answer.returncode == 2
    assert answer.stderr.startswith("levin: algo.gamma=0.9 would change a run that was started with algo.gamma=0.99")


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [("algo.tau=.005,2", "algo.tau=2: input should be less"), ("algo.tua=.005,.01", "algo.tua is unknown")],
)
def test_an_invalid_value_gives_a_one_line_error_and_starts_no_run(tmp_path, wrong, sentence):
    answer = train(tmp_path, "--multirun", wrong)
    assert answer.returncode == 2
    assert answer.stderr.startswith(f"levin: {sentence}")
    assert not list(tmp_path.iterdir())
