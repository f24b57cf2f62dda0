"""The plot of learning curves."""

import gzip
import json

import imageio.v3
import numpy as np
import pytest

pytest.importorskip("rliable", reason="the extra `report` draws")

from levin.core.errors import ConfigError
from levin.plot import collect_runs, plot


def write_run(folder, returns):
    """Write the metrics.csv of a run with these evaluation returns."""
    folder.mkdir(parents=True)
    rows = "".join(f"{100 * i},{value},0.0\n" for i, value in enumerate(returns))
    (folder / "metrics.csv").write_text("env_steps,eval/return_mean,eval/return_std\n" + rows + "1000,,\n")


@pytest.fixture
def two_algorithms(tmp_path):
    """Write three runs of each of two algorithms."""
    for i, name in enumerate(("sac_point", "my_idea_point")):
        for seed in range(3):
            write_run(tmp_path / name / f"s{seed}", np.arange(10) + seed + 5 * i)
    return tmp_path


def test_two_algorithms_are_two_curves(two_algorithms):
    out = two_algorithms / "plot.png"
    picture = imageio.v3.imread(plot(runs=f"{two_algorithms}/sac_* {two_algorithms}/my_idea_*", out=str(out)))
    assert picture.shape[:2] == (600, 1050)
    colors = {tuple(color) for color in np.unique(picture[..., :3].reshape(-1, 3), axis=0)}
    assert {(31, 119, 180), (255, 127, 14)} <= colors  # the colour of each line


def test_seeds_are_found_in_runs_and_in_folders_of_runs(two_algorithms):
    from_parent = collect_runs(f"{two_algorithms}/sac_point")
    from_pattern = collect_runs(f"{two_algorithms}/sac_point/*")
    assert list(from_parent) == list(from_pattern) == ["sac_point"]
    for groups in (from_parent, from_pattern):
        (group,) = groups.values()
        assert [curve.return_mean.tolist() for curve in group.seeds.values()] == [[*range(i, i + 10)] for i in range(3)]


def test_a_stored_result_can_be_plotted(tmp_path):
    with gzip.open(tmp_path / "curves.csv.gz", "wt") as file:
        file.write("seed,env_steps,return_mean,return_std\n0,100,1,0\n0,200,3,0\n1,100,2,0\n1,200,4,0\n")
    (group,) = collect_runs(str(tmp_path)).values()
    assert [(curve.env_steps.tolist(), curve.return_mean.tolist()) for curve in group.seeds.values()] == [
        ([100, 200], [1.0, 3.0]),
        ([100, 200], [2.0, 4.0]),
    ]
    assert plot(runs=str(tmp_path), out=str(tmp_path / "plot.png")).exists()


def test_what_is_not_drawn_is_said(two_algorithms, capsys):
    root = two_algorithms / "sac_point"
    write_run(root / "new", [])
    write_run(root / "short", [1.0, 2.0])
    (root / "empty").mkdir()
    collect_runs(f"{root} {two_algorithms}/none*")
    assert capsys.readouterr().err.splitlines() == [
        f"levin: not drawn: {two_algorithms}/none* matches nothing",
        f"levin: not drawn: {root}/new has no value of eval/return_mean yet",
        f"levin: not drawn: {root}/empty has no metrics.csv",
        f"levin: not drawn: what the runs in {root} have after 100 env steps, where the shortest ends",
    ]
    collect_runs(str(two_algorithms / "my_idea_point"))
    assert not capsys.readouterr().err


def test_nothing_to_plot_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match="matches no folder"):
        plot(runs=f"{tmp_path}/none/*")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="neither a run nor a result"):
        plot(runs=str(tmp_path / "empty"))
    write_run(tmp_path / "sac_point" / "s0", [])
    with pytest.raises(ConfigError, match="no run has a value of eval/return_mean yet"):
        plot(runs=str(tmp_path / "sac_point" / "s0"))
    write_run(tmp_path / "sac_point" / "s1", [1.0])
    with pytest.raises(ConfigError, match="can't be written"):
        plot(runs=str(tmp_path / "sac_point"), out=str(tmp_path / "no_such_folder" / "plot.png"))


@pytest.mark.parametrize("name", ["my run", "algo.hidden_sizes=[8]", "a*b"])
def test_a_folder_can_be_named_as_it_is_called(name, tmp_path):
    run = tmp_path / name / "s0"
    run.mkdir(parents=True)
    (run / "metrics.csv").write_text("env_steps,eval/return_mean,eval/return_std\n10,1,0\n")
    assert list(collect_runs(str(tmp_path / name))) == [name]


def write_configured(run, returns, seed, env="One-v0", gamma=0.9):
    """Write metrics.csv and config.yaml of a run."""
    write_run(run, returns)
    algo = f"{{_target_: levin.algorithms.ppo.PPO, gamma: {gamma}}}"
    (run / "config.yaml").write_text(f"algo: {algo}\nenv: {{id: 'two:{env}'}}\nseed: {seed}\n")


def test_runs_of_two_configs_are_two_curves_that_name_the_difference(tmp_path):
    for seed in range(2):
        write_configured(tmp_path / "ppo" / f"s{seed}", [1.0, 2.0], seed)
        write_configured(tmp_path / "ppo" / f"t{seed}", [3.0, 4.0], seed, gamma=0.5)
        write_configured(tmp_path / "ppo" / f"u{seed}", [5.0, 6.0], seed, env="Two-v0")
    groups = collect_runs(str(tmp_path / "ppo"))
    first = {label: group.seeds["0"].return_mean[0] for label, group in groups.items()}
    one, two = "ppo, gamma=0.9, id=two:One-v0", "ppo, gamma=0.9, id=two:Two-v0"
    assert first == {one: 1.0, "ppo, gamma=0.5, id=two:One-v0": 3.0, two: 5.0}
    assert all(len(group.seeds) == 2 for group in groups.values())
    assert list(collect_runs(f"{tmp_path}/ppo/s0")) == ["ppo"]


def test_runs_that_differ_in_most_values_have_their_own_names(tmp_path):
    for number, name in enumerate(("first", "parking")):
        write_run(tmp_path / name, [float(number)])
        values = ", ".join(f"v{i}: {number}" for i in range(10))
        (tmp_path / name / "config.yaml").write_text(
            f"algo: {{_target_: levin.algorithms.ppo.PPO, {values}}}\nenv: {{id: x}}\nseed: 0\n"
        )
    labels = list(collect_runs(f"{tmp_path}/first {tmp_path}/parking"))
    assert labels == [f"{tmp_path.name}/first", f"{tmp_path.name}/parking"]


def test_a_seed_counts_once_and_its_longest_run_is_drawn(tmp_path, capsys):
    write_configured(tmp_path / "ppo" / "s0_early", [1.0, 2.0], 0)
    write_configured(tmp_path / "ppo" / "s0_late", [3.0, 4.0, 5.0], 0)
    write_configured(tmp_path / "ppo" / "s1", [6.0, 7.0, 8.0], 1)
    (group,) = collect_runs(str(tmp_path / "ppo")).values()
    assert {seed: curve.return_mean.tolist() for seed, curve in group.seeds.items()} == {"0": [3, 4, 5], "1": [6, 7, 8]}
    assert "s0_early, another run of seed 0 that is not longer" in capsys.readouterr().err


def test_any_metric_can_be_drawn(tmp_path):
    write_configured(tmp_path / "ppo" / "s0", [1.0, 2.0], 0)
    (group,) = collect_runs(str(tmp_path / "ppo"), "eval/return_std").values()
    assert group.seeds["0"].return_mean.tolist() == [0, 0]
    sentence = r"no run has a value of eval/mean yet; valid: env_steps, eval/return_mean, eval/return_std"
    with pytest.raises(ConfigError, match=sentence):
        collect_runs(str(tmp_path / "ppo"), "eval/mean")


def test_one_evaluation_is_visible_and_the_picture_lies_beside_the_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_configured(tmp_path / "runs" / "ppo" / "s0", [1.0], 0)
    write_configured(tmp_path / "runs" / "sac" / "s0", [2.0], 0)
    path = plot(runs="runs/ppo runs/sac")
    assert str(path) == "runs/plot.png"
    colors = {tuple(color) for color in np.unique(imageio.v3.imread(path)[..., :3].reshape(-1, 3), axis=0)}
    assert {(31, 119, 180), (255, 127, 14)} <= colors
    assert str(plot(runs="runs/ppo/s0")) == "runs/ppo/plot.png"


def test_runs_of_other_code_or_precision_are_other_curves(tmp_path, capsys):
    configs = ["precision: 32-true", "precision: 32-true", "precision: bf16-mixed", "precision: 32-true"]
    for seed, trainer in enumerate(configs):
        folder = tmp_path / "sac_point" / f"s{seed}"
        write_run(folder, np.arange(10) + seed)
        text = f"seed: {seed}\nalgo:\n  _target_: x\nenv:\n  id: y\ntrainer:\n  {trainer}\n"
        (folder / "config.yaml").write_text(text)
        code = {"my_module.py": "a" if seed < 3 else "b"}
        facts = {"git_sha": "", "git_dirty": True, "versions": {}, "code": code, "env_steps": None, "wall_seconds": 0.0}
        (folder / "provenance.json").write_text(json.dumps({**facts, "resumed": []}))
    groups = collect_runs(str(tmp_path / "sac_point"))
    assert sorted(len(group.seeds) for group in groups.values()) == [1, 1, 2]
    assert sum("precision=bf16-mixed" in label for label in groups) == 1
    assert len({label.partition("code=")[2][:6] for label in groups}) == 2


def test_a_wildcard_may_match_folders_that_are_no_runs(two_algorithms, capsys):
    (two_algorithms / "results").mkdir()
    assert set(collect_runs(f"{two_algorithms}/*")) == {"sac_point", "my_idea_point"}
    assert "results is neither a run nor a result" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="results is neither a run nor a result"):
        collect_runs(f"{two_algorithms}/results")
