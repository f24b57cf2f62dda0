"""The plot of learning curves."""

import gzip

import imageio.v3
import numpy as np
import pytest

pytest.importorskip("rliable", reason="the extra `report` draws")

from levin.core.errors import ConfigError
from levin.plot import collect_curves, plot


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
    from_parent = collect_curves(f"{two_algorithms}/sac_point")
    from_pattern = collect_curves(f"{two_algorithms}/sac_point/*")
    assert list(from_parent) == list(from_pattern) == [f"{two_algorithms}/sac_point"]
    for curves in (from_parent, from_pattern):
        (seeds,) = curves.values()
        assert [curve.return_mean.tolist() for curve in seeds] == [[*range(i, i + 10)] for i in range(3)]


def test_a_stored_result_can_be_plotted(tmp_path):
    with gzip.open(tmp_path / "curves.csv.gz", "wt") as file:
        file.write("seed,env_steps,return_mean,return_std\n0,100,1,0\n0,200,3,0\n1,100,2,0\n1,200,4,0\n")
    (curves,) = collect_curves(str(tmp_path)).values()
    assert [(curve.env_steps.tolist(), curve.return_mean.tolist()) for curve in curves] == [
        ([100, 200], [1.0, 3.0]),
        ([100, 200], [2.0, 4.0]),
    ]
    assert plot(runs=str(tmp_path), out=str(tmp_path / "plot.png")).exists()


def test_what_is_not_drawn_is_said(two_algorithms, capsys):
    root = two_algorithms / "sac_point"
    write_run(root / "new", [])
    write_run(root / "short", [1.0, 2.0])
    (root / "empty").mkdir()
    collect_curves(f"{root} {two_algorithms}/none*")
    assert capsys.readouterr().err.splitlines() == [
        f"levin: not drawn: {two_algorithms}/none* matches nothing",
        f"levin: not drawn: {root}/empty has no metrics.csv",
        f"levin: not drawn: 1 of the 5 runs in {root} have no evaluation yet",
        f"levin: not drawn: what the runs in {root} have after 100 env steps, where the shortest ends",
    ]
    collect_curves(str(two_algorithms / "my_idea_point"))
    assert not capsys.readouterr().err


def test_nothing_to_plot_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match="matches no folder"):
        plot(runs=f"{tmp_path}/none/*")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="neither a run nor a result"):
        plot(runs=str(tmp_path / "empty"))
    write_run(tmp_path / "sac_point" / "s0", [])
    with pytest.raises(ConfigError, match="no evaluation yet"):
        plot(runs=str(tmp_path / "sac_point" / "s0"))
    write_run(tmp_path / "sac_point" / "s1", [1.0])
    with pytest.raises(ConfigError, match="can't be written"):
        plot(runs=str(tmp_path / "sac_point"), out=str(tmp_path / "no_such_folder" / "plot.png"))


@pytest.mark.parametrize("name", ["my run", "algo.hidden_sizes=[8]", "a*b"])
def test_a_folder_can_be_named_as_it_is_called(name, tmp_path):
    run = tmp_path / name / "s0"
    run.mkdir(parents=True)
    (run / "metrics.csv").write_text("env_steps,eval/return_mean,eval/return_std\n10,1,0\n")
    assert list(collect_curves(str(tmp_path / name))) == [str(tmp_path / name)]


def test_runs_of_two_configs_are_not_seeds_of_one_curve(tmp_path):
    for seed, env in (("s0", "One-v0"), ("s1", "Two-v0")):
        run = tmp_path / "ppo" / seed
        run.mkdir(parents=True)
        (run / "metrics.csv").write_text("env_steps,eval/return_mean,eval/return_std\n10,1,0\n")
        config = f"algo: {{_target_: levin.algorithms.ppo.PPO}}\nenv: {{id: 'two:{env}'}}\nseed: {seed[1]}\n"
        (run / "config.yaml").write_text(config)
    with pytest.raises(ConfigError, match=r"not seeds of one curve: env.id is two:One-v0 \(s0\) and two:Two-v0 \(s1\)"):
        collect_curves(str(tmp_path / "ppo"))
    assert len(collect_curves(f"{tmp_path}/ppo/s0")) == 1
