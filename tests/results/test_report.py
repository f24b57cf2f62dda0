"""Reported results: what follows from the curves, and that nothing else can be said.

That every number in git does so is a step of CI, `make report CHECK=1`.
"""

import csv
import gzip
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
from levin.results.curves import CURVES, Curve, align_curves, read_curves
from levin.results.result import (
    CONFIG,
    MAX_POLICY_BYTES,
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
from levin.runs import provenance
from levin.runs.load import POLICY, load_algorithm, load_config

CELLS = [cell for cell in result_folders() if read_curves(cell)]


@pytest.fixture(scope="module")
def two_results(tmp_path_factory):
    """A repository with two results only: the time of these tests is not to grow with their number."""
    folder = tmp_path_factory.mktemp("two_results")
    for name in ("sac_pendulum", "sac_halfcheetah"):
        shutil.copytree(paths.EXPERIMENTS / name, folder / "experiments" / name)
    shutil.copy(paths.EXPERIMENTS / "README.md", folder / "experiments")
    shutil.copy(paths.ROOT / "README.md", folder)
    with pytest.MonkeyPatch.context() as patch:
        work_in(folder, patch)
        report()
    return folder


@pytest.fixture
def copy(two_results, tmp_path, monkeypatch):
    """The two results and the pages that tell of them, free to be spoiled."""
    shutil.copytree(two_results, tmp_path / "copy")
    return work_in(tmp_path / "copy", monkeypatch)


def work_in(folder, patch):
    patch.setattr(paths, "ROOT", folder)
    patch.setattr(paths, "EXPERIMENTS", folder / "experiments")
    return folder


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def remove_a_row(path, index):
    with gzip.open(path, "rt") as file:
        lines = file.read().splitlines(keepends=True)
    del lines[index]
    with gzip.open(path, "wt") as file:
        file.writelines(lines)


SPOILED = {
    "a digit of the config": (
        lambda cell: edit(cell / "config.yaml", "gamma: 0.99", "gamma: 0.98"),
        "sac_pendulum: config.yaml is not the file that provenance.json tells of",
    ),
    "the header of the config": (
        lambda cell: edit(cell / "config.yaml", "# expected: -", "# expected: -9"),
        "experiments/sac_pendulum/config.yaml does not follow from the curves",
    ),
    "a row of the curves": (
        lambda cell: remove_a_row(cell / "curves.csv.gz", 3),
        "sac_pendulum: curves.csv.gz is not the file that provenance.json tells of",
    ),
    "a row of the training returns": (
        lambda cell: remove_a_row(cell / "training.csv.gz", 3),
        "sac_pendulum: training.csv.gz is not the file that provenance.json tells of",
    ),
    "a number of the summary": (
        lambda cell: edit(cell / "summary.json", '"mean": -', '"mean": -9'),
        "experiments/sac_pendulum/summary.json does not follow from the curves",
    ),
    "a number of the README": (
        lambda cell: edit(cell.parents[1] / "README.md", "| 20,000 | 5 | -", "| 20,000 | 5 | -9"),
        "README.md does not follow from the curves",
    ),
    "a number of the table": (
        lambda cell: edit(cell.parent / "README.md", "| 20,000 | 5 | -", "| 20,000 | 5 | -9"),
        "experiments/README.md does not follow from the curves",
    ),
    "a published number": (
        lambda cell: edit(cell / "reference.yaml", "mean: -157", "mean: -158"),
        "experiments/sac_pendulum/curve.png was not drawn from these curves",
    ),
    "a picture": (
        lambda cell: shutil.copy(cell.parent / "sac_halfcheetah" / "curve.png", cell / "curve.png"),
        "experiments/sac_pendulum/curve.png was not drawn from these curves",
    ),
    "the policy": (
        lambda cell: (cell / "policy.ckpt").write_bytes(b""),
        "sac_pendulum: policy.ckpt is not the file that provenance.json tells of",
    ),
}


@pytest.mark.parametrize(("spoil", "sentence"), SPOILED.values(), ids=SPOILED.keys())
def test_what_is_changed_by_hand_is_caught(spoil, sentence, copy):
    spoil(copy / "experiments" / "sac_pendulum")
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    assert sentence in report(check=True)
    assert before == {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}


def test_a_row_that_is_lost_is_caught_also_when_its_fingerprint_is_forged(copy):
    cell = copy / "experiments" / "sac_pendulum"
    remove_a_row(cell / "curves.csv.gz", -1)
    facts = read_provenance(cell)
    (cell / "provenance.json").write_text(json.dumps({**facts, "files": file_fingerprints(cell)}))
    assert "sac_pendulum: the seeds were not evaluated at the same env steps" in report(check=True)


def test_a_number_without_a_source_is_refused(copy):
    edit(copy / "experiments" / "sac_pendulum" / "reference.yaml", "    source:", "    # source:")
    with pytest.raises(ConfigError, match=r"sac_pendulum/reference\.yaml: published\.0\.source: Field required"):
        report(check=True)
    (copy / "experiments" / "sac_pendulum" / "reference.yaml").unlink()
    with pytest.raises(ConfigError, match="a number without a source is no result"):
        report(check=True)


def test_report_rebuilds_what_was_lost(copy):
    cell = copy / "experiments" / "sac_pendulum"
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file() and path.suffix != ".png"}
    edit(copy / "README.md", "| 20,000 | 5 | -", "| 20,000 | 5 | -9")
    for name in ("summary.json", "curve.png"):
        (cell / name).unlink()
    assert report()
    assert before == {path: path.read_bytes() for path in copy.rglob("*") if path.is_file() and path.suffix != ".png"}
    assert report(check=True) == []
    assert imageio.v3.imread(cell / "curve.png").std() > 10


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_every_result_is_whole(cell):
    result = Result.read(cell)
    assert (cell / POLICY).stat().st_size <= MAX_POLICY_BYTES
    torch.load(cell / POLICY, weights_only=True)
    assert all(curve.env_steps[-1] >= result.config.total_env_steps for curve in result.evaluations.values())
    assert {"git_sha", "lock_sha256", "versions", "processor", "command", "seeds"} <= set(result.provenance)
    first = (cell / CONFIG).read_text().splitlines()
    assert first[0] == f"# {result.provenance['command']}"
    assert any(line.startswith("# expected: ") for line in first[:5])
    with gzip.open(cell / CURVES, "rt") as file:
        assert next(csv.reader(file)) == ["seed", "env_steps", "return_mean", "return_std"]


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_every_stored_policy_plays_better_than_uniform_actions(cell):
    cfg = load_config(cell)
    env = make_env(EnvConfig(**to_plain(cfg.env)), seed=1, purpose=EVALUATION, num_envs=5)
    returns, _ = evaluate(load_algorithm(cell).policy(deterministic=True), env, 5)
    env.close()
    assert np.mean(returns) > read_reference(cell).random_return


def test_a_stored_policy_earns_what_its_summary_says():
    cell = paths.EXPERIMENTS / "sac_pendulum"
    cfg, stored = load_config(cell), read_curves(cell)[0]
    env = make_env(EnvConfig(**to_plain(cfg.env)), seed=cfg.eval.seed, purpose=EVALUATION, num_envs=10)
    algorithm = load_algorithm(cell)
    returns, _ = evaluate(algorithm.policy(deterministic=True), env, cfg.eval.episodes)
    env.close()
    facts, here = read_provenance(cell), provenance.collect_provenance()
    same = all(facts[key] == here[key] for key in ("processor", "cpu_capability", "versions"))
    assert np.mean(returns) == pytest.approx(stored.return_mean[-1], rel=1e-9 if same else 0.05)
    summary = json.loads((cell / SUMMARY).read_text())
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


def test_a_dream_is_scored_at_its_end_though_env_steps_stand_still():
    stands = Curve(np.array([100, 400, 400, 400]), np.array([1.0, 2.0, 3.0, 4.0]), np.zeros(4))
    assert score_seeds({0: stands}, {}, reference()).tolist() == [4]
    continues = Curve(np.append(stands.env_steps, 500), np.append(stands.return_mean, 9), np.zeros(5))
    assert continues.until(400).return_mean.tolist() == continues.until(350).return_mean.tolist() == [1, 2, 3, 4]
    grid, returns = align_curves([stands, stands])
    assert grid.tolist() == [100, 400, 400, 400]
    assert returns.tolist() == 2 * [[1, 2, 3, 4]]


def test_scores_are_measured_as_the_source_measures():
    evaluations = {0: curve([1, 2, 3, 4, 50]), 1: curve([5, 6, 7, 8, 90])}
    training = {0: curve([10, 20, 30, 40, 99], [4, 4, 2, 4, 9]), 1: curve([0, 0, 10, 40, 99], [1, 1, 1, 3, 9])}

    def scores(**changes):
        return score_seeds(evaluations, training, reference(**changes)).tolist()

    assert scores() == [4, 8]  # at 400 env steps, not at the end
    assert scores(last=2) == [3.5, 7.5]
    assert scores(metric="training_episodes", last=4) == [40, 32.5]
    assert scores(metric="training_episodes", last=7) == pytest.approx([(4 * 40 + 2 * 30 + 20) / 7, 130 / 6])
    assert scores(metric="training_env_steps", last=200) == pytest.approx([(4 * 40 + 2 * 30) / 6, 130 / 4])
    with pytest.raises(ConfigError, match="has not come to 600 env steps"):
        scores(env_steps=600)


@pytest.mark.parametrize(
    ("changes", "scores", "verdict"),
    [
        ({}, [], "not run"),
        ({}, [84, 85, 86], "reproduced"),  # the gate itself is reached
        ({}, [84, 85, 85.9], "partial"),
        ({}, [100, 100], "partial"),  # three seeds are needed
        ({"seeds": 2}, [100, 100, 100], "passed"),
        ({"std": None}, [100, 100, 100], "passed"),
        ({"seeds": 1, "std": None}, [85], "passed"),
        ({"seeds": 1, "std": None}, [84], "partial"),
    ],
)
def test_verdicts(changes, scores, verdict):
    published = reference().published[0].model_copy(update=changes)
    said, because = judge_scores(reference(published=[published]), np.array(scores))
    assert said == verdict
    assert "85" in because


def test_the_prediction_interval_holds_19_of_20_means():
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
    alone, ends = aggregates.iqm_with_interval(scores[:1])
    assert alone.tolist() == ends[0].tolist() == ends[1].tolist()
    _, ends_again = aggregates.iqm_with_interval(scores)
    assert np.array_equal(interval, ends_again)  # the same curves, the same numbers


def test_two_algorithms_on_one_task_are_compared(copy):
    first = Result.read(copy / "experiments" / "sac_pendulum")
    config = first.config.copy()
    config.algo._target_ = "experiments.my_idea.algorithm.MyIdea"
    worse = {
        seed: Curve(each.env_steps, each.return_mean - 100, each.second) for seed, each in first.evaluations.items()
    }
    second = Result(first.cell, config, first.reference, first.provenance, worse, first.training)
    ((label, probability, interval),) = figures.algorithm_pairs({"SAC": [first], "MyIdea": [second]})
    assert (label, probability) == ("SAC > MyIdea (1)", 1.0)
    assert interval.tolist() == [1, 1]
    figures.draw_aggregate([first, second])
    assert imageio.v3.imread(copy / "experiments" / "aggregate.png").shape[1] == 3 * 750
