"""Sweeps: many runs of levin.train, by the scheduler or by Hydra's sweepers."""

import csv
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from levin.compare import compare
from levin.config.cli import parse_hydra_overrides
from levin.core.errors import ConfigError
from levin.plot import collect_runs
from levin.resume import find_runs
from levin.sweep import list_runs, submit
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


STOP = """
from lightning import Callback


class Stop(Callback):
    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = True
"""


def test_a_run_that_a_callback_ends_does_not_end_the_sweep(tmp_path):
    (tmp_path / "stop.py").write_text(STOP)
    sweeper = "hydra.sweeper._target_=hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
    answer = train(tmp_path, "-m", "seed=0,1", sweeper, "callbacks.stop._target_=stop.Stop")
    assert answer.returncode == 0, answer.stderr
    ends = [json.loads(file.read_text()) for file in tmp_path.glob("runs/sweep_*/*/provenance.json")]
    assert [each["ended_at"] for each in ends] == [64, 64]


def test_runs_of_one_command_accept_its_code_where_the_home_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    answer = train(tmp_path, "seeds=0 1", "run=mine")
    assert answer.returncode == 0, answer.stderr
    assert "can't be written (Not a directory)" in answer.stderr


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


def test_a_sweep_trains_what_is_missing_and_refuses_another_command(tmp_path):
    overrides = ("-m", "algo.tau=.005,.01", "seeds=0 1", "jobs=2", "run=mine")
    answer = train(tmp_path, *overrides)
    assert answer.returncode == 0, answer.stderr
    folders = sorted(each.parent for each in tmp_path.glob("mine/*/*/config.yaml"))
    names = [str(each.relative_to(tmp_path / "mine")) for each in folders]
    assert names == [f"algo.tau={tau}/s{seed}" for tau in (0.005, 0.01) for seed in (0, 1)]
    configs = [OmegaConf.load(run / "config.yaml") for run in folders]
    assert [(cfg.algo.tau, cfg.seed, cfg.trainer.threads) for cfg in configs] == [
        (tau, seed, 1) for tau in (0.005, 0.01) for seed in (0, 1)
    ]
    written = {run: (run / "metrics.csv").read_text() for run in folders}
    shutil.rmtree(folders[2])
    answer = train(tmp_path, *overrides)
    assert answer.returncode == 0, answer.stderr
    for run, text in written.items():
        new = (run / "metrics.csv").read_text()
        assert (new == text) == (run != folders[2])  # times differ
        assert without_times(new) == without_times(text)
    answer = train(tmp_path, *overrides, "algo.gamma=0.9")
    assert answer.returncode == 2
    assert answer.stderr.startswith("levin: run=mine holds a sweep with other values; it was started by: python ")


def without_times(text):
    rows = list(csv.DictReader(text.splitlines()))
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]


def test_runs_are_continued_together_and_compared(tmp_path):
    assert train(tmp_path, "seeds=0 1", "run=mine", "eval.every=64").returncode == 0
    words = ("-m", "levin.resume", "runs=mine", "total_env_steps=128", "jobs=2")
    answer = run_python(*words, cwd=tmp_path, env={**os.environ})
    assert answer.returncode == 0, answer.stderr
    rows = [len((tmp_path / "mine" / run / "metrics.csv").read_text().splitlines()) for run in ("s0", "s1")]
    answer = run_python(*words, cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert rows == [len((tmp_path / "mine" / run / "metrics.csv").read_text().splitlines()) for run in ("s0", "s1")]
    for named in ("mine/s*", "mine/sweep.json"):
        assert len(find_runs(str(tmp_path / named))) == 2
    table = compare(runs=str(tmp_path / "mine/*")).splitlines()
    assert table[0].split()[:2] == ["runs", "seeds"]
    assert table[1].split()[:3] == ["mine", "2", "128"]
    assert table[1].endswith("complete")
    assert run_python("-m", "levin.resume", "run=mine/s0", "total_env_steps=256", cwd=tmp_path).returncode == 0
    assert (
        compare(runs=str(tmp_path / "mine/*")).splitlines()[1].split()[:4] == table[1].split()[:4]
    )  # at 128 env steps
    with pytest.raises(ConfigError, match="holds no run"):
        find_runs(str(tmp_path))
    with pytest.raises(ConfigError, match=r"mine/s2 matches nothing"):  # a typo must not train the others alone
        find_runs(f"{tmp_path}/mine/s0 {tmp_path}/mine/s2")


def test_a_wildcard_after_a_space_is_one_word(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for run in ("my runs/a", "runs/b"):
        (tmp_path / run).mkdir(parents=True)
        (tmp_path / run / "config.yaml").touch()
    monkeypatch.setattr("levin.runs.folder.has_begun", lambda run: (run / "config.yaml").exists())
    assert find_runs("my runs/*") == [Path("my runs/a")]


def test_a_wildcard_in_a_folder_with_brackets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("sizes=[64,64]/s0", "s6/s1"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.yaml").touch()
    assert find_runs("sizes=[64,64]/*") == [Path("sizes=[64,64]/s0")]
    assert find_runs("s[0-9]/*") == [Path("s6/s1")]


def test_many_runs_can_be_named(tmp_path, monkeypatch):
    """Also where the whole text is longer than a path may be."""
    monkeypatch.chdir(tmp_path)
    names = [f"runs/a_run_with_a_long_name_{i:03}" for i in range(200)]
    for name in names:
        Path(name).mkdir(parents=True)
        Path(name, "config.yaml").touch()
    assert find_runs(" ".join(names)) == [Path(name) for name in names]
    monkeypatch.chdir(tmp_path / "runs")
    short = [Path(name).name for name in names[:20]]  # a part of a path is even shorter
    assert find_runs(" ".join(short)) == [Path(name) for name in short]


def test_a_study_is_left_to_make_tune(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for run in ("tune_x/base", "tune_x/trials/0000/s0", "b"):
        (tmp_path / "runs" / run).mkdir(parents=True)
        (tmp_path / "runs" / run / "config.yaml").touch()
    (tmp_path / "runs/tune_x/study.json").touch()
    assert find_runs("runs/*") == [Path("runs/b")]
    assert "runs/tune_x is left alone: it belongs to a search, which make tune continues" in capsys.readouterr().out
    for words in ("runs/tune_x", "runs/tune_x/*", "runs/tune_x/trials/0000"):
        with pytest.raises(ConfigError, match="holds no run but those of a search: continue it with make tune"):
            find_runs(words)


@pytest.mark.parametrize(
    ("words", "seeds"),
    [
        (["seed=5"], [5]),
        (["seeds=5"], [5]),
        (["seeds=3 4"], [3, 4]),
        (["-m", "seed=1,2"], [1, 2]),
        (["-m", "seeds=1 2"], [1, 2]),
        (["-m", "seed=range(3)"], [0, 1, 2]),
        (["-m", "algo.tau=.005"], [0]),
    ],
)
def test_seeds_can_be_named_in_every_way(words, seeds, tmp_path):
    answer = train(tmp_path, *words)
    assert answer.returncode == 0, answer.stderr
    assert sorted(OmegaConf.load(each).seed for each in tmp_path.glob("runs/**/config.yaml")) == seeds


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["seeds=0 1", "seed=5"], "seed= and seeds= are both given"),
        (["seeds=0 0"], "seeds=0 0 holds 0 twice"),
        (["seed=0,1"], "seed=0,1 has several values: to train all of them, add -m"),
        (["seeds=0 1", "log_every=2,500"], "log_every=2,500 has several values: to train all of them, add -m"),
        (["-m", "seed=0,0"], "two runs of the sweep have the same name, s0"),
        (["seeds=0 1", "jobs=0"], "jobs=0 must be a whole number of 1 or more"),
        (
            ["-m", "launcher=local", "seed=0,1", "jobs=2"],
            "jobs=2 has no effect on runs that Hydra starts: leave it out\n",
        ),
        (
            ["-m", "launcher=slurm", "seed=0,1", "jobs=2"],
            "jobs=2 has no effect on runs that Hydra starts: write hydra.launcher.array_parallelism=2 instead\n",
        ),
        (
            ["-m", "algo.tau=interval(0,1)"],
            "algo.tau=interval(0,1): only lists, such as algo.tau=1,2, and range() work",
        ),
    ],
)
def test_words_that_contradict_one_another_are_refused(words, sentence, tmp_path):
    answer = train(tmp_path, *words)
    assert answer.returncode == 2, answer.stderr
    assert answer.stderr.startswith(f"levin: {sentence}")
    assert "Traceback" not in answer.stderr
    assert not list(tmp_path.iterdir())


def test_texts_and_paths_are_as_typed_with_several_seeds_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    world = Path("runs/sweep_x/algo.lr=0.1,algo.tau=0.005/s0")
    world.mkdir(parents=True)
    texts = ["name=größe", f"env.run={world}", "note=a, b"]
    runs, _ = list_runs(["env=dream", *texts], ["0", "1"])
    assert runs == {f"s{seed}": ["env=dream", f"seed={seed}", *texts] for seed in (0, 1)}
    worlds, _ = list_runs(["-m", "env=dream", "env.run=a,b"], [])
    assert len(worlds) == 2


def test_a_launcher_gets_texts_as_typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train"])
    monkeypatch.setattr("hydra.main", lambda **_: lambda job: lambda: None)
    words = ["hydra.verbose=false", "algo=sac", "env=pendulum", "name=größe", 'note=a, "b"']
    submit(["-m", *words], ["0", "1"])
    assert "hydra.job.config.override_dirname.exclude_keys=[name,note,algo,env,seed]" in sys.argv
    assert {'name="größe"', r'note="a, \"b\""', "seed=0,1"} <= set(sys.argv)
    assert [each.value() for each in parse_hydra_overrides(sys.argv[-2:])] == ["größe", 'a, "b"']
    with pytest.raises(ConfigError, match="log_every=2,500 has several values"):
        submit([*words, "log_every=2,500"], ["0", "1"])


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [("algo.tau=.005,2", "algo.tau=2: input should be less"), ("algo.tua=.005,.01", "algo.tua is unknown")],
)
def test_an_invalid_value_gives_a_one_line_error_and_starts_no_run(tmp_path, wrong, sentence):
    answer = train(tmp_path, "--multirun", wrong)
    assert answer.returncode == 2
    assert answer.stderr.startswith(f"levin: {sentence}")
    assert not list(tmp_path.iterdir())
