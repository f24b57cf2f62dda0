"""A pinned config, run anew and compared."""

import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import yaml

pytest.importorskip("rliable", reason="the extra `report` computes the intervals")

from levin.core import paths
from levin.core.errors import ConfigError
from levin.pin import pin
from levin.report import report
from levin.reproduce import reproduce
from levin.results import result
from levin.results.curves import CURVES, TRAINING, Curve, read_curves, read_run, write_curves
from levin.results.reproduction import judge_runs, kept_seeds, store_runs
from levin.results.result import CONFIG, PROVENANCE, read_provenance, read_reference
from levin.results.tables import BEGIN, END
from levin.runs import folder as run_folder
from levin.runs.load import POLICY, load_config

WORDS = (
    *("algo=sac", "env=gym", "env.id=toy_envs:Point-v0", "env.action=rescale", "total_env_steps=320"),
    *("algo.learning_starts=64", "algo.batch_size=8", "algo.hidden_sizes=[8]", "eval.every=64", "eval.episodes=2"),
)
REFERENCE = {
    "env_steps": 320,
    "metric": "evaluations",
    "last": 2,
    "gate": -1000.0,
    "gate_from": "far below",
    "random_return": -30.0,
    "published": [
        {"family": "x", "env": "y", "mean": -20.0, "std": 1.0, "seeds": 5, "metric": "z", "source": "a/b@1234567:c"}
    ],
}


def results(folder, monkeypatch):
    """An empty experiments/ in a working folder of its own."""
    (folder / "experiments").mkdir()
    for page in (folder / "README.md", folder / "experiments" / "README.md"):
        page.write_text(f"{BEGIN}\n{END}\n")
    monkeypatch.setattr(paths, "ROOT", folder)
    monkeypatch.setattr(paths, "EXPERIMENTS", folder / "experiments")
    monkeypatch.chdir(folder)
    cell = pin("toy", list(WORDS))
    (cell / result.REFERENCE).write_text(yaml.safe_dump(REFERENCE))
    return cell


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A result that was run once, before anything was stored, and its runs."""
    with pytest.MonkeyPatch.context() as patch:
        cell = results(tmp_path_factory.mktemp("made"), patch)
        outcome = reproduce(exp="toy", seeds="0 1 2")
        (batch,) = cell.parents[1].glob("runs/reproduce/*/toy")
        return cell, batch, outcome


@pytest.fixture(scope="module")
def stored_once(made, tmp_path_factory):
    """The same result, stored as from a commit without changes."""
    folder = tmp_path_factory.mktemp("stored") / "copy"
    with pytest.MonkeyPatch.context() as patch:
        cell, folders = work_in_a_copy(made[0].parents[1], folder, patch)
        for run in folders.values():
            say(run, git_dirty=False)
        store_runs(cell, folders)
        report()
    return folder


@pytest.fixture
def stored(stored_once, tmp_path, monkeypatch):
    """A stored result to spoil, and the folders of its runs by seed."""
    return work_in_a_copy(stored_once, tmp_path / "copy", monkeypatch)


def work_in_a_copy(original, folder, patch):
    shutil.copytree(original, folder, symlinks=True)
    patch.setattr(paths, "ROOT", folder)
    patch.setattr(paths, "EXPERIMENTS", folder / "experiments")
    patch.chdir(folder)
    return folder / "experiments" / "toy", {seed: next(folder.glob(f"runs/*/*/toy/s{seed}")) for seed in range(3)}


def say(run, **facts):
    (run / "provenance.json").write_text(json.dumps({**run_folder.read_provenance(run), **facts}))


def judged(cell, folders):
    return judge_runs(cell, read_reference(cell), folders)


def test_a_first_run_is_judged_by_the_published_number(made):
    cell, batch, outcome = made
    assert (outcome.verdict, outcome.good) == ("reproduced", True)
    assert outcome.stored == "there are no stored curves yet"
    assert sorted(each.name for each in batch.iterdir()) == ["s0", "s1", "s2", "verdict.json"]
    assert json.loads((batch / "verdict.json").read_text())["verdict"] == "reproduced"
    assert not (cell / CURVES).exists()  # only STORE=1 writes
    assert run_folder.read_provenance(batch / "s0")["threads"] == 1


def test_what_is_stored_is_whole_and_the_same_run_is_identical(stored):
    cell, folders = stored
    assert report(check=True) == []
    outcome = judged(cell, folders)
    assert outcome.stored == "3 of 3 curves are identical to the stored ones"
    assert outcome.good
    assert [*read_curves(cell)] == [0, 1, 2]
    assert read_curves(cell)[1].equals(read_run(folders[1]))


def test_a_fresh_run_gives_the_stored_curves_and_a_shorter_one_their_beginning(stored):
    again = reproduce(exp="toy", seeds="1")
    assert again.stored == "1 of 1 curves are identical to the stored ones"
    assert (again.verdict, again.good) == ("partial", True)  # one seed of three
    shorter = reproduce(exp="toy", seeds="2", total_env_steps=150)
    assert shorter.stored == "1 of 1 curves are identical to the stored ones"
    assert (shorter.verdict, shorter.good) == ("not run", True)


def test_another_number_in_a_curve_is_a_miss(stored):
    cell, folders = stored
    curves = read_curves(cell)
    curves[1].return_mean[0] = np.nextafter(curves[1].return_mean[0], 0)
    write_curves(cell, curves)
    outcome = judged(cell, folders)
    assert outcome.stored == "2 of 3 curves are identical to the stored ones"
    assert not outcome.good


def test_a_missed_gate_is_a_miss(stored):
    cell, folders = stored
    (cell / result.REFERENCE).write_text(yaml.safe_dump({**REFERENCE, "gate": 0.0}))
    outcome = judged(cell, folders)
    assert (outcome.verdict, outcome.good) == ("partial", False)
    assert "below" in outcome.published


@pytest.mark.parametrize(
    ("facts", "why"),
    [
        ({"processor": "Other 9000"}, "another CPU vendor"),
        ({"versions": {"torch": "1.0"}}, "another versions"),
        ({"cpu_capability": "AVX1"}, "another cpu_capability"),
        ({"threads": 7}, "another threads"),
        ({"gpus": ["H200"]}, "another GPU"),
    ],
)
def test_elsewhere_the_mean_must_lie_in_the_interval(facts, why, stored):
    cell, folders = stored
    for run in folders.values():
        say(run, **facts)
    outcome = judged(cell, folders)
    assert outcome.good
    assert outcome.stored.endswith(f"where 95% of such means lie ({why})")
    far = {seed: Curve(each.env_steps, each.return_mean + 100, each.second) for seed, each in evaluations(cell)}
    write_curves(cell, far)
    outcome = judged(cell, folders)
    assert outcome.good is False  # verdict.json takes no bool of NumPy
    assert "outside" in outcome.stored


def evaluations(cell):
    return read_curves(cell).items()


@pytest.mark.parametrize("facts", [{"git_dirty": True}, {"git_sha": "another"}])
def test_what_is_not_of_one_commit_is_not_stored(facts, stored):
    cell, folders = stored
    before = {path: path.read_bytes() for path in cell.iterdir()}
    say(folders[1], **facts)
    with pytest.raises(ConfigError, match="what one commit gives"):
        store_runs(cell, folders)
    assert before == {path: path.read_bytes() for path in cell.iterdir()}


def test_seeds_are_added_to_those_that_are_stored(stored):
    cell, folders = stored
    whole = {kind: (cell / kind).read_bytes() for kind in (CURVES, TRAINING, POLICY)}
    for kind in (*whole, PROVENANCE):
        (cell / kind).unlink()
    store_runs(cell, {seed: folders[seed] for seed in (0, 2)})
    report()
    assert (cell / CURVES).read_bytes() != whole[CURVES]
    earlier = read_provenance(cell)
    earlier["seeds"]["0"]["git_sha"] = "another"
    del earlier["seeds"]["2"]["git_sha"]  # results of older commits say it once, for all
    (cell / PROVENANCE).write_text(json.dumps({**earlier, "git_sha": "earlier"}))
    kept = kept_seeds(cell, [1])
    assert kept == [0, 2]
    added = {1: folders[1]}
    assert judge_runs(cell, read_reference(cell), added).verdict == "partial"  # one seed of three
    assert judge_runs(cell, read_reference(cell), added, kept).verdict == "reproduced"
    store_runs(cell, added, kept)
    report()
    assert whole == {kind: (cell / kind).read_bytes() for kind in whole}
    found = read_provenance(cell)["seeds"]
    assert [*found] == ["0", "1", "2"]
    assert [each["git_sha"] for each in found.values()] == ["another", earlier["git_sha"], "earlier"]
    assert report(check=True) == []
    assert kept_seeds(cell, [0, 1, 2]) == []


def test_seeds_of_another_config_or_machine_are_not_added_to(stored):
    cell, _ = stored
    facts = read_provenance(cell)
    (cell / PROVENANCE).write_text(json.dumps({**facts, "cores": 1000}))
    with pytest.raises(ConfigError, match=r'another cores; run them, too: seeds="0 1 2 3"'):
        reproduce(exp="toy", seeds="3", store=True)
    (cell / PROVENANCE).write_text(json.dumps(facts))
    text = (cell / CONFIG).read_text()
    (cell / CONFIG).write_text(text.replace("gamma: 0.99", "gamma: 0.98"))
    with pytest.raises(ConfigError, match=r"seeds 1 2 are of another config.yaml"):
        reproduce(exp="toy", seeds="0", store=True)


def test_what_is_stopped_goes_on(stored, tmp_path):
    """The verdict of an interrupted reproduction is that of one that was left alone."""
    cell, _ = stored
    folder = cell.parents[1]
    script = f"""
import sys
from pathlib import Path
from levin import reproduce
from levin.core import paths
paths.ROOT, paths.EXPERIMENTS = Path({str(folder)!r}), Path({str(folder / "experiments")!r})
sys.argv = ["reproduce", "exp=toy", "seeds=0", "jobs=1"]
reproduce.main()
"""
    batches = set(folder.glob("runs/reproduce/*/toy"))
    first = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 180
    while not any((batch / "s0" / "provenance.json").exists() for batch in new(folder, batches)):
        assert first.poll() is None, first.communicate(timeout=300)
        assert time.monotonic() < end
        time.sleep(0.02)
    (batch,) = new(folder, batches)
    first.send_signal(signal.SIGINT)
    said = first.communicate(timeout=300)
    assert first.returncode == 1
    assert said[1].startswith("levin: stopped; the runs are saved, and the same command goes on")
    assert not (batch / "verdict.json").exists()
    second = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert second.returncode == 0, second
    assert f"{batch.relative_to(folder)}: goes on" in second.stdout
    assert "1 of 1 curves are identical to the stored ones" in second.stdout
    assert "verdict: partial" in second.stdout


def new(folder, before):
    return set(folder.glob("runs/reproduce/*/toy")) - before


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ({"exp": "toyy"}, "exp=toyy is no result in experiments/; valid: toy"),
        ({"exp": "toy", "seeds": "0 x"}, "seeds=0 x: whole numbers"),
        ({"exp": "toy", "store": True, "total_env_steps": 64}, "keeps whole runs only"),
    ],
)
def test_wrong_words_are_one_sentence(words, sentence, stored):
    with pytest.raises(ConfigError, match=sentence):
        reproduce(**words)


def test_pin_writes_a_config_that_leaves_nothing_open_and_refuses_a_second(tmp_path, monkeypatch):
    cell = results(tmp_path, monkeypatch)
    cfg = load_config(cell)
    assert (cfg.trainer.threads, cfg.trainer.accelerator, cfg.algo.gamma) == (1, "cpu", 0.99)
    with pytest.raises(ConfigError, match="is pinned already"):
        pin("toy", list(WORDS))
    (cell / result.REFERENCE).unlink()
    (cell / CONFIG).unlink()
    pin("toy", list(WORDS))
    written = yaml.safe_load((cell / result.REFERENCE).read_text())
    assert -100 < written["random_return"] < 0
    with pytest.raises(ConfigError, match=r"toy/reference\.yaml"):  # what was published is still to be said
        read_reference(cell)
