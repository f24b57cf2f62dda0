"""The plot of learning curves."""

import gzip
import json
import subprocess
import warnings

import imageio.v3
import numpy as np
import pytest

pytest.importorskip("rliable", reason="the extra `report` draws")

from levin.compare import compare
from levin.core.errors import ConfigError
from levin.plot import collect_runs, plot
from levin.runs import provenance


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
        f"levin: not drawn: the part of the curves in {root} after 100 env steps, where the shortest run ends",
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


def test_a_name_with_an_underscore_is_in_the_legend(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("levin.results.figures.save_figure", lambda figure, *_: drawn.append(figure))
    for name in ("_old", "new"):
        write_run(tmp_path / name / "s0", [1.0, 2.0])
    plot(runs=f"{tmp_path}/*", out=str(tmp_path / "plot.png"))
    (legend,) = [each for axes in drawn[0].axes for each in [axes.get_legend()] if each]
    assert sorted(text.get_text().strip() for text in legend.get_texts()) == ["_old (1 seed)", "new (1 seed)"]


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


@pytest.fixture
def commits(tmp_path, monkeypatch):
    """Return the commits of a repository: a fork, its documentation, its code, and an algorithm of Levin change."""
    root = tmp_path / "repository"
    monkeypatch.setattr(provenance, "ROOT", root)
    root.mkdir()
    git = ("git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    subprocess.run([*git, "init", "-q"], cwd=root, check=True)
    shas = []
    names = ("src/levin/sac.py", "experiments/idea/algorithm.py", "experiments/idea/README.md", "docs/start.md")
    for changed in (names, names[2:], names[1:2], names[:1]):
        for name in changed:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(f"{len(shas)}\n")
        subprocess.run([*git, "add", "-A"], cwd=root, check=True)
        subprocess.run([*git, "commit", "-qm", "x"], cwd=root, check=True)
        shas.append(provenance.run_git("rev-parse", "HEAD"))
    return shas


def write_trained(run, returns, seed, *shas, target="experiments.idea.algorithm.Idea", code=({},)):
    """Write a run of the fork whose sessions had these commits, and this code that was not committed."""
    write_run(run, returns)
    text = f"algo: {{_target_: {target}}}\nenv: {{id: x}}\nseed: {seed}\ntotal_env_steps: 9\n"
    (run / "config.yaml").write_text(text)
    codes = [*code, *[code[-1]] * len(shas)]
    first, *resumed = (
        {"git_sha": sha, "git_dirty": False, "versions": {}, "code": each}
        for sha, each in zip(shas, codes, strict=False)
    )
    facts = {**first, "env_steps": None, "wall_seconds": 0.0, "resumed": resumed}
    (run / "provenance.json").write_text(json.dumps(facts))


def seeds_by_label(runs):
    return {label: sorted(group.seeds) for label, group in collect_runs(str(runs)).items()}


def test_runs_of_different_code_are_different_curves(commits, tmp_path, capsys):
    before, documented, changed, _ = commits
    runs = tmp_path / "idea"
    for seed in range(5):
        write_trained(runs / f"a{seed}", [1.0, 2.0, 3.0], seed, before if seed % 2 else documented)
    assert seeds_by_label(runs) == {"idea": [*"01234"]}
    assert not capsys.readouterr().err
    for seed in range(3):  # a longer run of the earlier code does not replace these
        write_trained(runs / f"b{seed}", [4.0, 5.0], seed, changed)
    old, new = f"idea, commit={documented[:7]}", f"idea, commit={changed[:7]}"
    assert seeds_by_label(runs) == {old: [*"01234"], new: [*"012"]}
    assert capsys.readouterr().err == f"levin: runs of different code were kept apart: {runs}\n"
    write_trained(runs / "c7", [6.0, 7.0], 7, documented, changed)
    write_trained(runs / "d8", [6.0, 7.0], 8, "0" * 40)
    assert seeds_by_label(runs) == {
        old: [*"01234"],
        new: [*"012"],
        f"idea, commit={documented[:7]}+{changed[:7]}": ["7"],
        "idea, commit=0000000": ["8"],
    }
    assert [line.split()[:2] for line in compare(runs=str(runs)).splitlines()[1:3]] == [
        ["idea,", f"commit={documented[:7]}+{changed[:7]}"],
        ["idea,", "commit=0000000"],
    ]


def test_code_that_does_not_train_a_run_splits_no_curve(commits, tmp_path, capsys):
    before, documented, changed, upstream = commits
    for seed, sha in enumerate((before, documented, changed)):
        write_trained(tmp_path / "sac" / f"s{seed}", [1.0], seed, sha, target="levin.algorithms.sac.SAC")
    script = {"__main__/mine.py": "a"}
    write_trained(tmp_path / "idea" / "s0", [1.0], 0, before, before, code=(script, {}))  # a command continued it
    write_trained(tmp_path / "idea" / "s1", [1.0], 1, before, code=(script,))
    assert seeds_by_label(f"{tmp_path}/sac {tmp_path}/idea") == {"sac": [*"012"], "idea": [*"01"]}
    assert not capsys.readouterr().err
    write_trained(tmp_path / "sac" / "s3", [1.0], 3, upstream, target="levin.algorithms.sac.SAC")
    write_trained(tmp_path / "idea" / "s2", [1.0], 2, before, before, code=({}, {"mine.py": "a"}))
    labels = seeds_by_label(f"{tmp_path}/sac {tmp_path}/idea")
    assert labels[f"sac, commit={upstream[:7]}"] == ["3"]
    assert [len(seeds) for label, seeds in labels.items() if label.startswith("idea, code=")] == [2, 1]


def write_values(run, seed, values):
    """Write a run with these values of a metric by env steps."""
    run.mkdir(parents=True)
    rows = "".join(f"{step},{value}\n" for step, value in values.items())
    (run / "metrics.csv").write_text(f"env_steps,eval/return_mean\n{rows}")
    text = f"algo: {{_target_: x}}\nenv: {{id: y}}\nseed: {seed}\ntotal_env_steps: 100\n"
    (run / "config.yaml").write_text(text)


def test_seeds_are_compared_at_the_same_env_steps(tmp_path, capsys):
    write_values(tmp_path / "ppo" / "s0", 0, {100: 0, 200: 100})
    write_values(tmp_path / "ppo" / "s1", 1, {150: 0, 250: 100, 350: 1000})
    cells = compare(runs=str(tmp_path / "ppo")).splitlines()[1].split()
    assert cells[:4] == ["ppo", "2", "200", "75"]
    capsys.readouterr()
    write_values(tmp_path / "ppo" / "s2", 2, {90: 5})  # has just begun
    assert compare(runs=str(tmp_path / "ppo")).splitlines()[1].split()[:4] == cells[:4]
    line = capsys.readouterr().err.splitlines()[0]
    run = tmp_path / "ppo" / "s2"
    assert line == f"levin: not drawn: {run}, which ends after 90 env steps, before another has its first value at 150"


def test_a_folder_with_metrics_alone_has_no_state(tmp_path):
    write_run(tmp_path / "copied" / "s0", [1.0, 2.0])
    assert compare(runs=f"{tmp_path}/*").splitlines()[1].split() == ["copied", "1", "100", "2"]


def test_small_numbers_are_told_apart_and_a_run_with_nan_comes_last(tmp_path):
    for name, value in (("a", 0.95), ("b", float("nan")), ("c", 0.96), ("d", 5794.12)):
        for seed in range(4):
            write_values(tmp_path / name / f"s{seed}", seed, {100: value})
    lines = [line.split() for line in compare(runs=f"{tmp_path}/*").splitlines()[1:]]
    assert [line[0] for line in lines] == ["d", "c", "a", "b"]
    assert [line[3] for line in lines] == ["5794.1", "0.96", "0.95", "nan"]


def test_rows_of_one_env_are_together(tmp_path):
    for name, value, env in (("a", 1.0, "One-v0"), ("b", 900.0, "Two-v0"), ("c", 2.0, "One-v0")):
        run = tmp_path / name / "s0"
        write_configured(run, [value, value], 0, env=env)
        with (run / "config.yaml").open("a") as config:
            config.write("total_env_steps: 1000\n")
    lines = compare(runs=f"{tmp_path}/*").splitlines()[1:]
    assert [line.split()[0].rstrip(",") for line in lines] == ["c", "a", "b"]


def test_the_length_of_schedules_counts_only_if_one_is_linear(tmp_path):
    for kind, curves in (("constant", 1), ("linear", 2)):
        for seed, length in ((0, 100), (1, 200)):
            run = tmp_path / kind / f"s{seed}"
            write_configured(run, [1.0, 2.0], seed)
            text = (run / "config.yaml").read_text()
            values = f"lr_schedule: {kind}, schedule_env_steps: {length}, gamma"
            (run / "config.yaml").write_text(text.replace("gamma", values))
        assert len(collect_runs(str(tmp_path / kind))) == curves


def test_many_curves_differ_in_color_or_line(tmp_path, monkeypatch):
    for number in range(25):
        for seed in range(3):
            write_run(tmp_path / f"algorithm_{number}" / f"s{seed}", [number + seed, number + 1.0])
    drawn = []
    monkeypatch.setattr("levin.results.figures.save_figure", lambda figure, _: drawn.append(figure))
    plot(runs=f"{tmp_path}/*", out=str(tmp_path / "x.png"))
    styles = [(line.get_color(), line.get_linestyle()) for line in drawn[0].axes[0].get_lines()]
    assert len(set(styles)) == 25
    assert all(styles.count(style) == 4 for style in styles)  # the seeds look like their mean
    with warnings.catch_warnings(action="error"):
        drawn[0].savefig(tmp_path / "y.png")  # the legend has room
