"""Tests of reported results: scores, verdicts, and the files that `levin.report` generates and checks.

A step of CI, `make report CHECK=1`, checks the generated files in git.
"""

import csv
import gzip
import hashlib
import json
import shutil

import imageio.v3
import numpy as np
import pytest
import torch

pytest.importorskip("rliable", reason="the extra `report` computes the intervals")

from levin.collectors.episodes import evaluate
from levin.core import paths
from levin.core.errors import ConfigError
from levin.core.omega import to_plain
from levin.envs.config import EVALUATION, EnvConfig
from levin.envs.factory import make_env
from levin.report import report
from levin.results import aggregates, figures
from levin.results.curves import CURVES, SOURCE_CURVES, TRAINING, Curve, align_curves, read_curves, write_curves
from levin.results.result import (
    CONFIG,
    MAX_POLICY_BYTES,
    PICTURE,
    PROVENANCE,
    REFERENCE,
    SUMMARY,
    Published,
    Reference,
    Result,
    file_fingerprints,
    judge_scores,
    read_provenance,
    read_reference,
    result_folders,
    score_seeds,
)
from levin.results.tables import HEADLINES
from levin.runs import provenance, trust
from levin.runs.load import POLICY, load_algorithm, load_config

RESULT_FOLDERS = [folder for folder in result_folders() if read_curves(folder)]


@pytest.fixture(scope="module")
def two_results(tmp_path_factory):
    """Return a repository with two results only, so that these tests stay fast when results are added."""
    folder = tmp_path_factory.mktemp("two_results")
    for name in ("sac_pendulum", "sac_halfcheetah"):
        shutil.copytree(paths.EXPERIMENTS / name, folder / "experiments" / name)
    shutil.copy(paths.EXPERIMENTS / "README.md", folder / "experiments")
    shutil.copy(paths.ROOT / "README.md", folder)
    with pytest.MonkeyPatch.context() as patch:
        use_repository(folder, patch)
        report()
    return folder


@pytest.fixture
def repository(two_results, tmp_path, monkeypatch):
    """Return a copy of the repository with two results, which a test may change."""
    shutil.copytree(two_results, tmp_path / "copy")
    return use_repository(tmp_path / "copy", monkeypatch)


def use_repository(folder, patch):
    patch.setattr(paths, "ROOT", folder)
    patch.setattr(paths, "EXPERIMENTS", folder / "experiments")
    return folder


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def remove_row(path, index):
    with gzip.open(path, "rt") as file:
        lines = file.read().splitlines(keepends=True)
    del lines[index]
    with gzip.open(path, "wt") as file:
        file.writelines(lines)


SPOILED = {
    "a digit of the config": (
        lambda folder: edit(folder / "config.yaml", "gamma: 0.99", "gamma: 0.98"),
        "sac_pendulum: config.yaml does not match its checksum in provenance.json",
    ),
    "the header of the config": (
        lambda folder: edit(folder / "config.yaml", "# expected: -", "# expected: -9"),
        "experiments/sac_pendulum/config.yaml does not match the stored data",
    ),
    "a row of the curves": (
        lambda folder: remove_row(folder / "curves.csv.gz", 3),
        "sac_pendulum: curves.csv.gz does not match its checksum in provenance.json",
    ),
    "a row of the training returns": (
        lambda folder: remove_row(folder / "training.csv.gz", 3),
        "sac_pendulum: training.csv.gz does not match its checksum in provenance.json",
    ),
    "a number of the summary": (
        lambda folder: edit(folder / "summary.json", '"mean": -', '"mean": -9'),
        "experiments/sac_pendulum/summary.json does not match the stored data",
    ),
    "a number of the README": (
        lambda folder: edit(folder.parents[1] / "README.md", "| 100,000 | 3 | 5", "| 100,000 | 3 | 9"),
        "README.md does not match the stored data",
    ),
    "a count of the README": (
        lambda folder: edit(folder.parents[1] / "README.md", "1 passed, 1 inconclusive", "2 passed, 0 inconclusive"),
        "README.md does not match the stored data",
    ),
    "a number of the table": (
        lambda folder: edit(folder.parent / "README.md", "| 20,000 | 5 | -", "| 20,000 | 5 | -9"),
        "experiments/README.md does not match the stored data",
    ),
    "a published number": (
        lambda folder: edit(folder / "reference.yaml", "mean: -157", "mean: -158"),
        "experiments/sac_pendulum/curve.png does not match the stored data",
    ),
    "a picture": (
        lambda folder: shutil.copy(folder.parent / "sac_halfcheetah" / "curve.png", folder / "curve.png"),
        "experiments/sac_pendulum/curve.png does not match the stored data",
    ),
    "the policy": (
        lambda folder: (folder / "policy.ckpt").write_bytes(b""),
        "sac_pendulum: policy.ckpt does not match its checksum in provenance.json",
    ),
}


@pytest.mark.parametrize(("spoil", "sentence"), SPOILED.values(), ids=SPOILED.keys())
def test_manual_changes_to_a_result_are_detected(spoil, sentence, repository):
    spoil(repository / "experiments" / "sac_pendulum")
    before = {path: path.read_bytes() for path in repository.rglob("*") if path.is_file()}
    assert sentence in report(check=True)
    assert before == {path: path.read_bytes() for path in repository.rglob("*") if path.is_file()}


def test_a_missing_row_is_detected_even_with_a_forged_fingerprint(repository):
    folder = repository / "experiments" / "sac_pendulum"
    remove_row(folder / "curves.csv.gz", -1)
    facts = read_provenance(folder)
    (folder / "provenance.json").write_text(json.dumps({**facts, "files": file_fingerprints(folder)}))
    assert "sac_pendulum: the seeds were not evaluated at the same env steps" in report(check=True)


def test_a_number_without_a_source_is_refused(repository):
    edit(repository / "experiments" / "sac_pendulum" / "reference.yaml", "    source:", "    # source:")
    with pytest.raises(ConfigError, match=r"sac_pendulum/reference\.yaml: published\.0\.source: Field required"):
        report(check=True)
    (repository / "experiments" / "sac_pendulum" / "reference.yaml").unlink()
    with pytest.raises(ConfigError, match="which must name the published numbers and their sources"):
        report(check=True)


def test_report_rebuilds_missing_files(repository):
    folder = repository / "experiments" / "sac_pendulum"
    before = {path: path.read_bytes() for path in repository.rglob("*") if path.is_file() and path.suffix != ".png"}
    edit(repository / "README.md", "| 100,000 | 3 | 5", "| 100,000 | 3 | 9")
    for name in ("summary.json", "curve.png"):
        (folder / name).unlink()
    assert report()
    assert before == {
        path: path.read_bytes() for path in repository.rglob("*") if path.is_file() and path.suffix != ".png"
    }
    assert report(check=True) == []
    assert imageio.v3.imread(folder / "curve.png").std() > 10


def test_a_new_algorithm_makes_the_aggregate_out_of_date(repository, monkeypatch):
    shutil.copytree(paths.CONFIGS, repository / "configs")
    monkeypatch.setattr(paths, "CONFIGS", repository / "configs")
    assert report(check=True) == []
    (repository / "configs/algo/idea.yaml").write_text("algo: {_target_: levin.algorithms.idea.Idea}\n")
    (fault,) = report(check=True)  # the picture names the algorithms that it does not show
    assert "aggregate.png" in fault


def test_the_readme_shows_the_headline_results_and_counts_all(repository):
    readme, page = (repository / name for name in ("README.md", "experiments/README.md"))
    (row,) = (line for line in readme.read_text().splitlines() if line.startswith("| [") and "](experiments/s" in line)
    summary = json.loads((repository / "experiments" / "sac_halfcheetah" / "summary.json").read_text())
    cells = [cell.strip() for cell in row.strip("|").split(" | ")]
    assert cells[:3] == ["[SAC HalfCheetah-v4](experiments/sac_halfcheetah)", "100,000", "3"]
    assert cells[3] == f"{summary['as_the_source_measures']['mean']:.1f}"
    assert cells[4].startswith("5794.1 ± 460.5 ([jaxrl, ")
    assert ";" not in cells[4]  # the first published number only
    assert cells[5] == "inconclusive"
    assert "| result | env steps | seeds | ours | published | verdict |" in readme.read_text()
    assert "\n2 results: 1 passed, 1 inconclusive; [all of them](experiments/README.md)" in readme.read_text()
    assert " measured by | published | required | verdict |" in page.read_text()
    assert page.read_text().count("\n| [SAC ") == 2


def test_a_result_that_has_not_been_run_shows_no_number_of_seeds(repository):
    folder = repository / "experiments" / "sac_pendulum"
    for name in (CURVES, TRAINING, PROVENANCE):
        (folder / name).unlink()
    left = "policy.ckpt, summary.json, curve.png, policy.webp"
    assert f"sac_pendulum: {left} without provenance.json: remove them to run the result anew" in report(check=True)
    for name in left.split(", "):
        (folder / name).unlink()
    report()
    assert "| [SAC Pendulum-v1](sac_pendulum) | 20,000 |  |  |  | " in (folder.parent / "README.md").read_text()
    assert "\n2 results: 1 inconclusive, 1 not run; " in (repository / "README.md").read_text()


def test_headline_results_exist():
    names = [folder.name for folder in result_folders()]
    assert len(set(HEADLINES)) == 8
    assert [name for name in HEADLINES if name not in names] == []


@pytest.mark.parametrize("folder", RESULT_FOLDERS, ids=lambda folder: folder.name)
def test_every_result_is_complete(folder):
    result = Result.read(folder)
    assert (folder / POLICY).stat().st_size <= MAX_POLICY_BYTES
    torch.load(folder / POLICY, weights_only=True)
    assert all(curve.env_steps[-1] >= result.config.total_env_steps for curve in result.evaluations.values())
    assert {"git_sha", "lock_sha256", "versions", "processor", "command", "seeds"} <= set(result.provenance)
    first = (folder / CONFIG).read_text().splitlines()
    assert first[0] == f"# {result.provenance['command']}"
    assert any(line.startswith("# expected: ") for line in first[:5])
    with gzip.open(folder / CURVES, "rt") as file:
        assert next(csv.reader(file)) == ["seed", "env_steps", "return_mean", "return_std"]


@pytest.mark.parametrize("folder", RESULT_FOLDERS, ids=lambda folder: folder.name)
def test_every_stored_policy_plays_better_than_uniform_actions(folder):
    with trust.trusted(True):  # results may be of one's own env or network
        cfg = load_config(folder)
        env = make_env(EnvConfig(**to_plain(cfg.env)), seed=1, purpose=EVALUATION, num_envs=5)
        returns, _ = evaluate(load_algorithm(folder).policy(deterministic=True), env, 5)
    env.close()
    assert np.mean(returns) > read_reference(folder).random_return


def test_a_stored_policy_reaches_the_return_in_its_summary():
    folder = paths.EXPERIMENTS / "sac_pendulum"
    cfg, stored = load_config(folder), read_curves(folder)[0]
    env = make_env(EnvConfig(**to_plain(cfg.env)), seed=cfg.eval.seed, purpose=EVALUATION, num_envs=10)
    algorithm = load_algorithm(folder)
    returns, _ = evaluate(algorithm.policy(deterministic=True), env, cfg.eval.episodes)
    env.close()
    facts, here = read_provenance(folder), provenance.collect_provenance()
    same = all(facts[key] == here[key] for key in ("processor", "cpu_capability", "versions"))
    assert np.mean(returns) == pytest.approx(stored.return_mean[-1], rel=1e-9 if same else 0.05)
    summary = json.loads((folder / SUMMARY).read_text())
    assert summary["as_the_source_measures"]["per_seed"][0] == round(stored.return_mean[-1], 2)
    assert algorithm.env_steps == summary["env_steps"]


def curve(returns, counts=None, every=100):
    returns = np.array(returns, dtype=float)
    counts = np.zeros(len(returns)) if counts is None else np.array(counts, dtype=float)
    return Curve(every * np.arange(1.0, len(returns) + 1), returns, counts)


def reference(**changes):
    published = Published(family="x", env="y", mean=90, std=5, seeds=10, metric="z", source="a/b@1234567:c")
    values = {"env_steps": 400, "metric": "evaluations", "last": 1, "gate": 85, "gate_from": "mean less deviation"}
    return Reference(**{**values, "random_return": 10, "published": [published], **changes})


def test_a_curve_with_repeated_env_steps_is_scored_at_its_end():
    stands = Curve(np.array([100, 400, 400, 400]), np.array([1.0, 2.0, 3.0, 4.0]), np.zeros(4))
    assert score_seeds({0: stands}, {}, reference()).tolist() == [4]
    continues = Curve(np.append(stands.env_steps, 500), np.append(stands.return_mean, 9), np.zeros(5))
    assert continues.until(400).return_mean.tolist() == continues.until(350).return_mean.tolist() == [1, 2, 3, 4]
    grid, returns = align_curves([stands, stands])
    assert grid.tolist() == [100, 400, 400, 400]
    assert returns.tolist() == 2 * [[1, 2, 3, 4]]


def test_seeds_with_different_env_steps_are_interpolated_where_all_have_values():
    first = Curve(np.array([100, 200, 300]), np.array([0.0, 10.0, 20.0]), np.zeros(3))
    second = Curve(np.array([150, 250, 350]), np.array([5.0, 7.0, 9.0]), np.zeros(3))
    for seeds in ([first, second], [second, first]):
        grid, returns = align_curves(seeds)
        assert grid.tolist() == [150, 200, 250, 300]
        by_seed = dict(zip([each.env_steps[0] for each in seeds], returns.tolist(), strict=True))
        assert by_seed == {100: [5, 10, 15, 20], 150: [5, 6, 7, 8]}
    with pytest.raises(ConfigError, match="a seed ends after 300 env steps, before another begins, after 301"):
        align_curves([first, Curve(second.env_steps + 151, second.return_mean, second.second)])


def test_scores_use_the_metric_of_the_published_source():
    evaluations = {0: curve([1, 2, 3, 4, 50]), 1: curve([5, 6, 7, 8, 90])}
    training = {0: curve([10, 20, 30, 40, 99], [4, 4, 2, 4, 9]), 1: curve([0, 0, 10, 40, 99], [1, 1, 1, 3, 9])}

    def scores(**changes):
        return score_seeds(evaluations, training, reference(**changes)).tolist()

    assert scores() == [4, 8]  # at the 400 env steps of the reference, not at the end
    assert scores(last=2) == [3.5, 7.5]
    assert scores(metric="training_episodes", last=4) == [40, 32.5]
    assert scores(metric="training_episodes", last=7) == pytest.approx([(4 * 40 + 2 * 30 + 20) / 7, 130 / 6])
    assert scores(metric="training_env_steps", last=200) == pytest.approx([(4 * 40 + 2 * 30) / 6, 130 / 4])
    with pytest.raises(ConfigError, match="has not reached 600 env steps"):
        scores(env_steps=600)


@pytest.mark.parametrize(
    ("changes", "scores", "verdict"),
    [
        ({}, [], "not run"),
        ({}, [85, 85, 86], "reproduced"),
        ({}, [85, 105, 111], "reproduced"),  # the interval begins below the published mean plus its deviation
        ({}, [106, 107, 111], "exceeds"),
        ({}, [84, 85, 86], "inconclusive"),  # the required score lies inside the interval
        ({}, [80, 84, 85.9], "inconclusive"),
        ({}, [80, 84, 84.9], "partial"),
        ({}, [100, 100], "partial"),  # three seeds are needed
        ({"seeds": 2}, [100, 100, 100], "passed"),
        ({"std": None}, [100, 100, 100], "passed"),
        ({"std": None}, [200, 200, 200], "passed"),  # without a deviation nothing says what would exceed it
        ({"std": None}, [80, 100, 100], "inconclusive"),
        ({"seeds": 1, "std": None}, [85], "passed"),
        ({"seeds": 1, "std": None}, [84], "partial"),
    ],
)
def test_verdicts(changes, scores, verdict):
    published = reference().published[0].model_copy(update=changes)
    actual, explanation = judge_scores(reference(published=[published]), np.array(scores))
    assert actual == verdict
    assert "required score" in explanation
    assert "85" in explanation


@pytest.mark.parametrize(
    ("scores", "source", "verdict"),
    [
        ([80, 84, 86], [70, 80, 90], "matched"),  # the mean less the deviation is 70
        ([70, 70, 70], [70, 80, 90], "matched"),
        ([69, 70, 70], [70, 80, 90], "partial"),
        ([56, 56, 56], [50, 80, 80, 80], "partial"),  # below the mean less the deviation, not below the worst
        ([64, 64, 64], [65, 65, 95], "partial"),  # the other way round
        ([80, 84, 86], [85, 85, 85], "inconclusive"),  # the source's code reaches the required score here
        ([80, 84, 86], [70, 90], "inconclusive"),  # three seeds are needed, of both
        ([80, 84, 86], [70], "inconclusive"),
        ([84, 84], [70, 80, 90], "partial"),
        ([106, 107, 111], [0, 1, 2], "exceeds"),  # what the published number says has priority
        ([], [70, 80, 90], "not run"),
    ],
)
def test_a_result_is_matched_within_the_spread_of_the_sources_own_code_run_here(scores, source, verdict):
    run = {"family": "theirs 1.0", "env": "CartPole-v1", "command": "python train.py", "sha256": ""}
    actual, explanation = judge_scores(reference(source_run=run), np.array(scores), np.array(source))
    assert actual == verdict
    number = f"theirs 1.0 here: mean of {len(source)} seed{'s' * (len(source) > 1)} {np.mean(source):.1f}"
    assert (number in explanation) == bool(scores)
    assert "nan" not in explanation


def test_curves_of_the_sources_own_code_are_scored_and_drawn(repository):
    folder = repository / "experiments/sac_halfcheetah"
    picture = (folder / PICTURE).read_bytes()
    curves = {
        seed: Curve(each.env_steps, each.return_mean - 300, each.second) for seed, each in read_curves(folder).items()
    }
    write_curves(folder, curves, SOURCE_CURVES)
    faults = report(check=True)
    assert (
        "sac_halfcheetah: source_curves.csv.gz and source_run in reference.yaml belong together, and one is missing"
        in faults
    )
    with (folder / REFERENCE).open("a") as file:
        file.write("source_run:\n  family: theirs\n  env: HalfCheetah-v4\n  command: python a.py\n  sha256: '0'\n")
    fault = "sac_halfcheetah: source_curves.csv.gz does not match its checksum in reference.yaml"
    assert fault in report(check=True)
    checksum = hashlib.sha256((folder / SOURCE_CURVES).read_bytes()).hexdigest()
    edit(folder / REFERENCE, "sha256: '0'", f"sha256: {checksum}")
    assert report()
    assert report(check=True) == []
    summary = json.loads((folder / SUMMARY).read_text())
    assert summary["source_run"]["mean"] == pytest.approx(summary["as_the_source_measures"]["mean"] - 300)
    assert summary["verdict"] == "matched"
    assert (folder / PICTURE).read_bytes() != picture


def test_the_prediction_interval_covers_95_percent_of_means():
    draw = np.random.default_rng(0)
    hits = 0
    for _ in range(2000):
        low, high = aggregates.prediction_interval(draw.normal(7, 3, 4), others=3)
        hits += low <= draw.normal(7, 3, 3).mean() <= high
    assert 0.93 < hits / 2000 < 0.97


def test_iqm_and_its_interval():
    scores = np.arange(8.0)[:, None, None] * np.array([1.0, 10.0])  # [seeds, tasks, frames]
    iqm, interval = aggregates.iqm_with_interval(scores)
    assert iqm.tolist() == [3.5, 35.0]
    assert (interval[0] < iqm).all()
    assert (iqm < interval[1]).all()
    alone, interval_of_one = aggregates.iqm_with_interval(scores[:1])
    assert alone.tolist() == interval_of_one[0].tolist() == interval_of_one[1].tolist()
    _, same_interval = aggregates.iqm_with_interval(scores)
    assert np.array_equal(interval, same_interval)  # the bootstrap has a fixed seed


@pytest.mark.parametrize("seeds", [1, 3, 4, 8])
def test_a_score_that_is_not_a_number_is_not_the_best(seeds):
    scores = np.arange(2.0 * seeds).reshape(seeds, 1, 2)
    scores[-1, 0, 0] = np.nan
    iqm, interval = aggregates.iqm_with_interval(scores)
    assert np.isnan([iqm[0], *interval[:, 0]]).all()
    assert np.isfinite([iqm[1], *interval[:, 1]]).all()
    wins, _ = aggregates.probability_of_improvement(scores[..., 0], scores[..., 1])
    assert np.isnan(wins)


def test_two_algorithms_on_one_task_are_compared(repository):
    first = Result.read(repository / "experiments" / "sac_pendulum")
    config = first.config.copy()
    config.algo._target_ = "experiments.my_idea.algorithm.MyIdea"
    worse = {
        seed: Curve(each.env_steps, each.return_mean - 100, each.second) for seed, each in first.evaluations.items()
    }
    second = Result(first.folder, config, first.reference, first.provenance, worse, first.training, {})
    ((*names, tasks, probability, interval),) = figures.algorithm_pairs({"SAC": [first], "MyIdea": [second]})
    assert (names, tasks, probability) == (["SAC", "MyIdea"], 1, 1.0)
    assert interval.tolist() == [1, 1]
    figures.draw_aggregate([first, second])
    assert imageio.v3.imread(repository / "experiments" / "aggregate.png").shape[1] == 1500


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 1, 4), (5, 2, 3), (10, 7, 20)])
def test_statistics_equal_those_of_the_libraries(shape):
    from rliable import metrics
    from scipy import stats

    dice = np.random.default_rng(0)
    scores, others = dice.normal(size=shape).round(1), dice.normal(size=(4, *shape[1:])).round(1)  # rounded: draws
    flat = scores.reshape(-1, shape[-1])
    assert aggregates.iqm(scores).tolist() == stats.trim_mean(flat, proportiontocut=0.25, axis=0).tolist()
    ours, _ = aggregates.probability_of_improvement(scores[..., 0], others[..., 0])
    assert ours == pytest.approx(metrics.probability_of_improvement(scores[..., 0], others[..., 0]), abs=1e-12)


def test_an_env_that_shows_less_is_another_task():
    results = {name: Result.read(paths.EXPERIMENTS / name) for name in ("ppo_cartpole", "recurrent_ppo_cartpole_novel")}
    assert len({each.task[0] for each in results.values()}) == 1
    assert len({each.task for each in results.values()}) == 2


@pytest.mark.parametrize("every", [1000, 5000, 30_000])
def test_the_end_of_a_run_is_its_last_tenth_however_often_it_is_evaluated(every, repository):
    result = Result.read(repository / "experiments" / "sac_pendulum")
    total = result.config.total_env_steps
    env_steps = np.array([*range(every, total, every), total])
    curve = Curve(env_steps, (env_steps > 0.9 * total).astype(float), np.zeros(len(env_steps)))
    only = Result(result.folder, result.config, result.reference, result.provenance, {0: curve}, result.training, {})
    assert only.last_tenth.tolist() == [1]


def test_one_result_of_an_algorithm_stands_for_a_task():
    names = ("sac_halfcheetah_layer_norm", "sac_halfcheetah", "sac_halfcheetah_1m")
    results = [Result.read(paths.EXPERIMENTS / name) for name in names]
    assert [each.name for each in figures.one_per_task(results).values()] == ["sac_halfcheetah"]  # 1M has one seed
