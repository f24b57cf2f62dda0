"""Reproducing a result: run its pinned config (the frozen config of a reported result) and compare the curves."""

import json
import os
import re
import shutil
import signal
import sys

import numpy as np
import pytest
import yaml

pytest.importorskip("rliable", reason="the extra `report` computes the intervals")

from levin.config.compose import compose
from levin.core import paths
from levin.core.errors import ConfigError, RunError
from levin.pin import pin
from levin.report import report
from levin.reproduce import reproduce
from levin.results import reproduction, result
from levin.results.curves import CURVES, TRAINING, Curve, read_curves, read_run, write_curves
from levin.results.reproduction import SHARED_FACTS, is_identical, judge_runs, kept_seeds, store_runs
from levin.results.result import CONFIG, PROVENANCE, read_provenance, read_reference
from levin.results.tables import BEGIN, END
from levin.runs import folder as run_folder
from levin.runs import provenance, trust
from levin.runs.load import POLICY, load_config
from processes import run_python

OVERRIDES = (
    *("algo=sac", "env=gym", "env.id=toy_envs:Point-v0", "env.action=rescale", "total_env_steps=320"),
    *("algo.learning_starts=64", "algo.batch_size=8", "algo.hidden_sizes=[8]", "eval.every=64", "eval.episodes=2"),
)
MUJOCO = provenance.collect_code_facts()["versions"]["mujoco"]
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


def pin_toy_result(folder, monkeypatch):
    """Pin a toy result in a new repository and return its folder in experiments/."""
    (folder / "experiments").mkdir()
    for page in (folder / "README.md", folder / "experiments" / "README.md"):
        page.write_text(f"{BEGIN}\n{END}\n")
    monkeypatch.setattr(paths, "ROOT", folder)
    monkeypatch.setattr(paths, "EXPERIMENTS", folder / "experiments")
    monkeypatch.chdir(folder)
    result_folder = pin("toy", list(OVERRIDES))
    (result_folder / result.REFERENCE).write_text(yaml.safe_dump(REFERENCE))
    return result_folder


@pytest.fixture(scope="module")
def first_run(tmp_path_factory):
    """Run the toy result once; return its folder, the folder of its runs, and the outcome. Nothing is stored yet."""
    with pytest.MonkeyPatch.context() as patch:
        result_folder = pin_toy_result(tmp_path_factory.mktemp("made"), patch)
        outcome = reproduce(exp="toy", seeds="0 1 2")
        (batch,) = result_folder.parents[1].glob("runs/reproduce/*/toy")
        return result_folder, batch, outcome


@pytest.fixture(scope="module")
def stored_result(first_run, tmp_path_factory):
    """Store the runs of `first_run`, as if from a commit without local changes; return the repository."""
    folder = tmp_path_factory.mktemp("stored") / "copy"
    with pytest.MonkeyPatch.context() as patch:
        result_folder, folders = use_copy(first_run[0].parents[1], folder, patch)
        for run in folders.values():
            set_provenance(run, git_dirty=False, code={})
        store_runs(result_folder, folders)
        report()
    return folder


@pytest.fixture
def stored_copy(stored_result, tmp_path, monkeypatch):
    """Copy the repository with the stored result; return the result's folder and the run folder of each seed."""
    return use_copy(stored_result, tmp_path / "copy", monkeypatch)


def use_copy(original, folder, patch):
    shutil.copytree(original, folder, symlinks=True)
    patch.setattr(paths, "ROOT", folder)
    patch.setattr(paths, "EXPERIMENTS", folder / "experiments")
    patch.chdir(folder)
    trust.record(load_config(folder / "experiments" / "toy", code_sections=()))  # as if it was pinned in this copy
    return folder / "experiments" / "toy", {seed: next(folder.glob(f"runs/*/*/toy/s{seed}")) for seed in range(3)}


def set_provenance(run, **facts):
    (run / "provenance.json").write_text(json.dumps({**run_folder.read_provenance(run), **facts}))


def judge(result_folder, folders):
    return judge_runs(result_folder, read_reference(result_folder), folders)


def test_without_stored_curves_a_run_is_judged_by_the_published_number(first_run):
    result_folder, batch, outcome = first_run
    assert (outcome.verdict, outcome.good) == ("exceeds", True)
    assert outcome.stored == "there are no stored curves yet"
    assert sorted(each.name for each in batch.iterdir()) == ["code_checksum.txt", "s0", "s1", "s2", "verdict.json"]
    assert json.loads((batch / "verdict.json").read_text())["verdict"] == "exceeds"
    assert not (result_folder / CURVES).exists()  # only STORE=1 writes
    assert run_folder.read_provenance(batch / "s0")["threads"] == 1


def test_a_stored_result_is_complete_and_its_runs_are_identical_to_it(stored_copy):
    result_folder, folders = stored_copy
    assert report(check=True) == []
    outcome = judge(result_folder, folders)
    assert outcome.stored == "3 of 3 curves are identical to the stored ones"
    assert outcome.good
    assert [*read_curves(result_folder)] == [0, 1, 2]
    assert read_curves(result_folder)[1].equals(read_run(folders[1]))


def test_a_new_run_reproduces_the_stored_curves_and_a_shorter_one_their_beginning(stored_copy):
    again = reproduce(exp="toy", seeds="1")
    assert again.stored == "1 of 1 curves are identical to the stored ones"
    assert (again.verdict, again.good) == ("partial", True)  # one seed of three
    shorter = reproduce(exp="toy", seeds="2", total_env_steps=150)
    assert shorter.stored == "1 of 1 curves are identical to the stored ones"
    assert (shorter.verdict, shorter.good) == ("none yet", True)
    assert re.match(r"a verdict needs \d+ env steps, and these runs have 1\d\d; return at \d+: ", shorter.published)
    assert re.search(r"\(one seed\), stored -?[\d.]+ \(3 seeds, -?[\d.]+ to -?[\d.]+\)$", shorter.published)


def test_only_a_row_that_the_longer_run_lacks_may_be_left_out():
    stored = Curve(np.array([100, 200, 300]), np.array([1.0, 2.0, 3.0]), np.zeros(3))
    before, at, between = (Curve(np.array([step]), np.array([9.0]), np.zeros(1)) for step in (50, 100, 150))
    assert is_identical(before, stored, 50, 300)
    assert not is_identical(at, stored, 100, 300)
    assert not is_identical(between, stored, 150, 300)


def test_a_changed_value_in_a_curve_fails(stored_copy):
    result_folder, folders = stored_copy
    curves = read_curves(result_folder)
    curves[1].return_mean[0] = np.nextafter(curves[1].return_mean[0], 0)
    write_curves(result_folder, curves)
    outcome = judge(result_folder, folders)
    assert outcome.stored == "2 of 3 curves are identical to the stored ones"
    assert not outcome.good


def test_curves_of_iterations_that_end_with_an_episode_are_compared_in_every_row():
    """A run that leaves the stored curve has rows at other env steps from there on."""
    stored = read_curves(paths.EXPERIMENTS / "reinforce_inverted_pendulum")

    def continued(curve, rows, other):
        """Return the curve, continued after these rows by the rows of another seed."""
        later = other.env_steps > curve.env_steps[rows - 1]
        return Curve(*(np.append(getattr(curve, key)[:rows], getattr(other, key)[later]) for key in vars(curve)))

    for curve, other in ((stored[a], stored[b]) for a in stored for b in stored if a != b):
        assert is_identical(curve, curve, 100, 100)
        assert is_identical(curve.first_rows(3), curve, 50, 100)
        assert is_identical(curve, curve.first_rows(3), 100, 50)
        assert not is_identical(curve.first_rows(3), curve, 100, 100)
        for rows in range(1, len(curve.env_steps)):
            hybrid = continued(curve, rows, other)
            assert not is_identical(hybrid, curve, 100, 100)
            left_out = curve.env_steps[rows] < hybrid.env_steps[rows]  # a row of the stored curve before the last one
            assert is_identical(hybrid.first_rows(rows + 1), curve, 50, 100) == (not left_out)
            assert not is_identical(hybrid.first_rows(rows + 2), curve, 50, 100) or rows + 1 == len(hybrid.env_steps)


def test_a_missed_required_score_fails(stored_copy):
    result_folder, folders = stored_copy
    (result_folder / result.REFERENCE).write_text(yaml.safe_dump({**REFERENCE, "gate": 0.0}))
    outcome = judge(result_folder, folders)
    assert (outcome.verdict, outcome.good) == ("partial", False)
    assert "below" in outcome.published


@pytest.mark.parametrize(
    ("facts", "why"),
    [
        ({"processor": "Other 9000"}, "different CPU vendor"),
        ({"versions": {"torch": "1.0"}}, "different versions (torch)"),
        ({"cpu_capability": "AVX1"}, "different cpu_capability"),
        ({"threads": 7}, "different threads"),
        ({"gpus": ["H200"]}, "different GPU"),
    ],
)
@pytest.mark.parametrize("session", ["first", "later"])
def test_on_another_machine_the_mean_must_lie_in_the_prediction_interval(session, facts, why, stored_copy):
    result_folder, folders = stored_copy
    if "gpus" in facts:
        assert_a_gpu_that_is_not_used_is_no_difference(*stored_copy)
        text = (result_folder / CONFIG).read_text()
        (result_folder / CONFIG).write_text(text.replace("accelerator: cpu", "accelerator: auto"))
    for run in folders.values():
        change_session(run, session, facts)
    outcome = judge(result_folder, folders)
    assert outcome.good
    assert outcome.stored.endswith(f"of the stored seeds ({why})")
    far = {
        seed: Curve(each.env_steps, each.return_mean + 100, each.second) for seed, each in evaluations(result_folder)
    }
    write_curves(result_folder, far)
    outcome = judge(result_folder, folders)
    assert outcome.good is False  # a Python bool, because JSON has no NumPy bool
    assert "outside" in outcome.stored


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_bfloat16_is_compared_on_the_same_model_of_processor_only(precision, stored_copy):
    """Kernels for bfloat16 differ between models of one vendor that have the same cpu_capability."""
    result_folder, folders = stored_copy
    for folder in (result_folder, *folders.values()):
        text = (folder / CONFIG).read_text()
        (folder / CONFIG).write_text(text.replace("precision: 32-true", f"precision: {precision}"))
    vendor = read_provenance(result_folder)["processor"].split(" ")[0]
    for run in folders.values():
        change_session(run, "first", {"processor": f"{vendor} Other 9000"})
    stored = judge(result_folder, folders).stored
    assert ("identical" in stored) == (precision == "32-true")
    assert stored.endswith("(different processor)") == (precision == "bf16-mixed")


def test_stored_seeds_with_equal_scores_give_no_interval(stored_copy):
    """Such as the maximal return of CartPole: every other mean would lie outside."""
    result_folder, folders = stored_copy
    for run in folders.values():
        change_session(run, "first", {"processor": "Other 9000"})
    equal = {
        seed: Curve(each.env_steps, 0 * each.return_mean, each.second) for seed, each in evaluations(result_folder)
    }
    write_curves(result_folder, equal)
    assert "all stored seeds have 0.0 (different CPU vendor)" in judge(result_folder, folders).stored


def test_a_run_without_an_evaluation_is_a_sentence(stored_copy):
    result_folder, folders = stored_copy
    run = next(iter(folders.values()))
    (run / "metrics.csv").write_text("env_steps,eval/return_mean,eval/return_std\n")
    with pytest.raises(RunError, match="has ended without an evaluation"):
        judge(result_folder, folders)


def assert_a_gpu_that_is_not_used_is_no_difference(result_folder, folders):
    facts = read_provenance(result_folder)
    (result_folder / PROVENANCE).write_text(json.dumps({**facts, "gpus": ["A100"], "mixed": ["gpus", "cores"]}))
    assert judge(result_folder, folders).stored == "3 of 3 curves are identical to the stored ones"
    (result_folder / PROVENANCE).write_text(json.dumps(facts))


def change_session(run, session, facts):
    """Change facts of the first training process of a run, or add a later one with these facts."""
    later = {"resumed": [{**run_folder.read_provenance(run), **facts}]}
    set_provenance(run, **(facts if session == "first" else later))


def evaluations(result_folder):
    return read_curves(result_folder).items()


@pytest.mark.parametrize("session", ["first", "later"])
@pytest.mark.parametrize("facts", [{"git_dirty": True}, {"git_sha": "another"}])
def test_runs_with_local_changes_or_of_two_commits_are_not_stored(session, facts, stored_copy):
    result_folder, folders = stored_copy
    before = {path: path.read_bytes() for path in result_folder.iterdir()}
    change_session(folders[1], session, facts)
    with pytest.raises(ConfigError, match="needs runs of one commit"):
        store_runs(result_folder, folders)
    assert before == {path: path.read_bytes() for path in result_folder.iterdir()}


def test_runs_of_code_in_no_commit_are_not_stored(stored_copy):
    result_folder, folders = stored_copy
    set_provenance(folders[2], code={"__main__/my_script.py": "0123"})
    store_runs(result_folder, folders)
    set_provenance(folders[2], code={"my_module.py": "0123"})
    with pytest.raises(ConfigError, match=r"my_module\.py is in no commit"):
        store_runs(result_folder, folders)


@pytest.mark.parametrize(("package", "version"), [("levin", "9.0"), ("mujoco", MUJOCO), ("mujoco", None)])
def test_levin_itself_and_packages_that_are_not_installed_are_not_compared(package, version, stored_copy):
    """The code of Levin has a commit; and the clone of a user without the extra `mujoco` runs the same code."""
    result_folder, folders = stored_copy
    for run in folders.values():
        own = run_folder.read_provenance(run)["versions"]
        set_provenance(run, versions={**own, "mujoco": None if version else MUJOCO})
    facts = read_provenance(result_folder)
    facts["versions"][package] = version
    (result_folder / PROVENANCE).write_text(json.dumps(facts))
    assert kept_seeds(result_folder, [1]) == [0, 2]
    assert judge(result_folder, folders).stored == "3 of 3 curves are identical to the stored ones"


def test_runs_without_git_are_not_stored(stored_copy, monkeypatch):
    result_folder, folders = stored_copy
    for run in folders.values():
        set_provenance(run, git_sha="")
    with pytest.raises(ConfigError, match="or without git"):
        store_runs(result_folder, folders)
    monkeypatch.setattr(provenance, "run_git", lambda *_: "")
    with pytest.raises(ConfigError, match="git does not answer"):
        reproduce(exp="toy", seeds="0 1 2", store=True)


@pytest.mark.parametrize("session", ["first", "later"])
def test_a_result_of_several_machines_says_so_and_is_compared_by_its_mean(session, stored_copy):
    result_folder, folders = stored_copy
    change_session(folders[1], session, {"processor": "Other 9000", "versions": {"torch": "1.0"}})
    store_runs(result_folder, folders)
    assert read_provenance(result_folder)["mixed"] == ["processor", "versions"]
    set_provenance(folders[1], resumed=[], **{key: run_folder.read_provenance(folders[0])[key] for key in SHARED_FACTS})
    assert "processor of the stored sessions, versions of the stored sessions" in judge(result_folder, folders).stored


def test_seeds_can_be_added_to_a_stored_result(stored_copy):
    result_folder, folders = stored_copy
    original = {kind: (result_folder / kind).read_bytes() for kind in (CURVES, TRAINING, POLICY)}
    for kind in (*original, PROVENANCE):
        (result_folder / kind).unlink()
    store_runs(result_folder, {seed: folders[seed] for seed in (0, 2)})
    report()
    assert (result_folder / CURVES).read_bytes() != original[CURVES]
    earlier = read_provenance(result_folder)
    earlier["seeds"]["0"]["git_sha"] = "another"
    del earlier["seeds"]["2"]["git_sha"]  # older results have one git_sha for all seeds
    (result_folder / PROVENANCE).write_text(json.dumps({**earlier, "git_sha": "earlier"}))
    kept = kept_seeds(result_folder, [1])
    assert kept == [0, 2]
    added = {1: folders[1]}
    assert judge_runs(result_folder, read_reference(result_folder), added).verdict == "partial"  # one seed of three
    assert judge_runs(result_folder, read_reference(result_folder), added, kept).verdict == "exceeds"
    store_runs(result_folder, added, kept)
    report()
    assert original == {kind: (result_folder / kind).read_bytes() for kind in original}
    seeds = read_provenance(result_folder)["seeds"]
    assert [*seeds] == ["0", "1", "2"]
    assert [each["git_sha"] for each in seeds.values()] == ["another", earlier["git_sha"], "earlier"]
    assert report(check=True) == []
    assert kept_seeds(result_folder, [0, 1, 2]) == []


def test_seeds_can_be_added_on_another_machine(stored_copy, monkeypatch):
    """Each seed then has the facts that differ, whatever the order in which the seeds were added."""
    result_folder, folders = stored_copy
    store_runs(result_folder, {seed: folders[seed] for seed in (0, 2)})
    here = run_folder.read_provenance(folders[1])
    # Asking for the GPU would initialise CUDA, and then the scheduler could not fork.
    monkeypatch.setattr(provenance, "collect_provenance", None)
    elsewhere = {"processor": "Other 9000", "cores": 1000}
    set_provenance(folders[1], **elsewhere)
    kept = kept_seeds(result_folder, [1])
    store_runs(result_folder, {1: folders[1]}, kept)
    facts = read_provenance(result_folder)
    assert facts["mixed"] == ["cores", "processor"]
    assert {key: facts["seeds"]["1"][key] for key in elsewhere} == elsewhere
    for seed in ("0", "2"):
        assert {key: facts["seeds"][seed][key] for key in elsewhere} == {key: here[key] for key in elsewhere}
    report()
    assert "and other machines: " in (result_folder / CONFIG).read_text()
    store_runs(result_folder, {2: folders[2]}, kept_seeds(result_folder, [2]))  # 2 again, after the other machine
    assert read_provenance(result_folder)["seeds"] == facts["seeds"]


def test_seeds_are_not_added_to_a_result_of_another_config_or_software(stored_copy):
    result_folder, _ = stored_copy
    facts = read_provenance(result_folder)
    (result_folder / PROVENANCE).write_text(json.dumps({**facts, "python": "2.7"}))
    with pytest.raises(ConfigError, match=r'differ in python; run them again, too: seeds="0 1 2 3"'):
        reproduce(exp="toy", seeds="3", store=True)
    (result_folder / PROVENANCE).write_text(json.dumps(facts))
    text = (result_folder / CONFIG).read_text()
    (result_folder / CONFIG).write_text(text.replace("gamma: 0.99", "gamma: 0.98"))
    with pytest.raises(ConfigError, match=r"seeds 1 2 differ in config\.yaml"):
        reproduce(exp="toy", seeds="0", store=True)


def test_own_code_in_no_commit_is_refused_before_the_runs_begin(stored_copy, monkeypatch):
    monkeypatch.setattr(provenance, "collect_code_facts", lambda: {"git_sha": "1", "git_dirty": False, "versions": {}})
    monkeypatch.setattr("levin.runs.code._committed_files", set)
    monkeypatch.delitem(sys.modules, "toy_envs", raising=False)
    with pytest.raises(ConfigError, match=r"but \S+toy_envs\.py is in no commit"):
        reproduce(exp="toy", seeds="0 1 2", store=True)
    assert "toy_envs" not in sys.modules  # an import could ask for the GPU, before the runs are forked


def test_a_fault_of_another_result_costs_no_verdict(stored_copy, monkeypatch, capsys):
    result_folder, folders = stored_copy
    other = result_folder.with_name("other")
    other.mkdir()
    shutil.copy(result_folder / CONFIG, other)  # just pinned: its reference.yaml is not written yet
    monkeypatch.setattr("levin.reproduce._find_or_create_runs", lambda *_: folders)
    monkeypatch.setattr("levin.runs.code.is_in_a_commit", lambda _: True)
    clean = provenance.collect_code_facts()
    monkeypatch.setattr(provenance, "collect_code_facts", lambda: {**clean, "git_dirty": False})
    (folders[0].parent / "verdict.json").unlink()
    assert reproduce(exp="toy", seeds="0 1 2", store=True).verdict == "exceeds"
    assert json.loads((folders[0].parent / "verdict.json").read_text())["verdict"] == "exceeds"
    assert "toy is stored, but not in the tables: other has no reference.yaml" in capsys.readouterr().err


def test_a_signal_does_not_come_between_the_files_of_a_result(stored_copy, monkeypatch):
    write, handler = reproduction.write_curves, signal.getsignal(signal.SIGTERM)

    def write_and_signal(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return write(*arguments)

    monkeypatch.setattr(reproduction, "write_curves", write_and_signal)
    result_folder, folders = stored_copy
    before = read_provenance(result_folder)
    store_runs(result_folder, folders)
    assert read_provenance(result_folder)["files"] == before["files"]
    assert signal.getsignal(signal.SIGTERM) == handler


def test_changed_files_are_refused_before_the_runs_begin(stored_copy, monkeypatch):
    result_folder, _ = stored_copy
    batches = set(result_folder.parents[1].glob("runs/reproduce/*"))
    clean = provenance.collect_code_facts()
    monkeypatch.setattr(provenance, "collect_code_facts", lambda: {**clean, "git_dirty": True})
    with pytest.raises(ConfigError, match="store=true needs runs of committed files"):
        reproduce(exp="toy", seeds="0 1 2", store=True)
    assert set(result_folder.parents[1].glob("runs/reproduce/*")) == batches


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_an_interrupted_reproduction_can_be_continued(number, stored_copy, tmp_path):
    """The verdict is the same as without the interruption, and no run goes on."""
    result_folder, _ = stored_copy
    folder = result_folder.parents[1]
    script = f"""
import sys
from pathlib import Path
from levin import reproduce
from levin.config.compose import compose
from levin.core import paths
paths.ROOT, paths.EXPERIMENTS = Path({str(folder)!r}), Path({str(folder / "experiments")!r})
sys.argv = ["reproduce", "exp=toy", "seeds=0", "jobs=1"]
"""
    interruption = f"""
import os, time
from levin.training.guards import Preemption
begin, parent = Preemption.on_train_start, os.getpid()


def begin_and_signal(self, trainer, *others):
    begin(self, trainer, *others)
    os.kill(parent, {int(number)})
    while self.received is None:
        time.sleep(0.01)


Preemption.on_train_start = begin_and_signal
"""
    batches = set(folder.glob("runs/reproduce/*/toy"))
    first = run_python("-c", f"{script}{interruption}reproduce.main()")
    (batch,) = set(folder.glob("runs/reproduce/*/toy")) - batches
    assert first.returncode == 1
    assert first.stderr.endswith("levin: stopped; the runs are saved, and the same command continues them\n")
    assert not (batch / "verdict.json").exists()
    with run_folder.lock(batch / "s0"):  # no process trains it
        pass
    second = run_python("-c", f"{script}reproduce.main()")
    assert second.returncode == 0, second
    assert f"{batch.relative_to(folder)}: continuing" in second.stdout
    assert "1 of 1 curves are identical to the stored ones" in second.stdout
    assert "verdict: partial" in second.stdout


def test_only_a_reproduction_with_the_same_code_is_continued(tmp_path, monkeypatch, capsys):
    pin_toy_result(tmp_path, monkeypatch)
    facts = {"git_sha": provenance.run_git("rev-parse", "HEAD"), "versions": {}, "env_steps": None, "wall_seconds": 1.0}

    def reproduce_and_stop(code):
        def begin_and_stop(configs, _):
            for run in configs:
                text = json.dumps({**facts, "git_dirty": True, "resumed": []})
                (run / "provenance.json").write_text(text)

        monkeypatch.setattr("levin.reproduce.resume_side_by_side", begin_and_stop)
        monkeypatch.setattr("levin.runs.code.checksum_of", lambda _: code)
        with pytest.raises(RunError, match="stopped"):
            reproduce(exp="toy", seeds="0 1")
        batch, done = capsys.readouterr().out.strip().split(": ")
        return tmp_path / batch, done

    first, done = reproduce_and_stop("edited")
    assert done == "starting"
    assert reproduce_and_stop("edited") == (first, "continuing")
    second, done = reproduce_and_stop("corrected")
    assert (second != first, done) == (True, "starting")


def test_a_result_without_a_number_of_threads_is_continued(tmp_path, monkeypatch, capsys):
    result_folder = pin_toy_result(tmp_path, monkeypatch)
    text = (result_folder / CONFIG).read_text()

    def begin_and_stop(configs, _):
        for run in configs:  # as `folder.create` does
            config = load_config(run, code_sections=())
            config.trainer.threads = 3
            run_folder.begin(run, config)

    monkeypatch.setattr("levin.reproduce.resume_side_by_side", begin_and_stop)
    for threads, done in (("null", "starting"), ("null", "continuing"), ("2", "starting")):
        (result_folder / CONFIG).write_text(text.replace("threads: 1", f"threads: {threads}"))
        with pytest.raises(RunError, match="stopped"):
            reproduce(exp="toy", seeds="0")
        assert capsys.readouterr().out.endswith(f": {done}\n")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"exp": "toyy"}, "exp=toyy is not a result in experiments/; valid: toy"),
        ({"exp": "toy", "seeds": "0 x"}, "seeds=0 x must be whole numbers"),
        ({"exp": "toy", "seeds": "0 \u00b2"}, "seeds=0 \u00b2 must be whole numbers"),
        ({"exp": "toy", "seeds": "0 0"}, "seeds=0 0 holds 0 twice"),
        ({"exp": "toy", "store": True, "total_env_steps": 64}, "stores complete runs only"),
    ],
)
def test_invalid_arguments_are_config_errors(arguments, sentence, stored_copy):
    with pytest.raises(ConfigError, match=sentence):
        reproduce(**arguments)


def test_pin_writes_a_complete_config_and_does_not_overwrite_it(tmp_path, monkeypatch):
    result_folder = pin_toy_result(tmp_path, monkeypatch)
    cfg = load_config(result_folder)
    assert (cfg.trainer.threads, cfg.trainer.accelerator, cfg.algo.gamma) == (1, "cpu", 0.99)
    with pytest.raises(ConfigError, match="exists already"):
        pin("toy", list(OVERRIDES))
    (result_folder / result.REFERENCE).unlink()
    (result_folder / CONFIG).unlink()
    pin("toy", list(OVERRIDES))
    written = yaml.safe_load((result_folder / result.REFERENCE).read_text())
    assert -100 < written["random_return"] < 0
    with pytest.raises(ConfigError, match=r"toy/reference\.yaml"):  # the published numbers are still missing
        read_reference(result_folder)


def test_an_env_that_fails_leaves_no_half_pinned_result(tmp_path, monkeypatch):
    def fail(*_):
        raise RunError("the env failed")

    monkeypatch.setattr(paths, "EXPERIMENTS", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("levin.collectors.uniform.random_return", fail)
        with pytest.raises(RunError):
            pin("toy", list(OVERRIDES))
    assert not list(tmp_path.iterdir())
    assert pin("toy", list(OVERRIDES)) == tmp_path / "toy"


def test_pin_refuses_environment_variables(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "EXPERIMENTS", tmp_path)
    monkeypatch.setenv("LEVIN_SECRET", "abc")
    override = "wandb_project=${oc.env:LEVIN_SECRET}"
    with pytest.raises(ConfigError, match="must not read the environment variable LEVIN_SECRET"):
        pin("toy", [*OVERRIDES, override])
    assert not list(tmp_path.iterdir())
    assert compose([*OVERRIDES, override]).wandb_project == "abc"
