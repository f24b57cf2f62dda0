"""scripts/proof.py: comparison of values, measurement of speed, and the stored results that it names."""

import math
from contextlib import nullcontext

import pytest
import torch

from script_modules import load_script


@pytest.fixture(scope="module")
def proof():
    """Load scripts/proof.py as a module."""
    return load_script("proof")


ONE = torch.ones(2, 3)


@pytest.mark.parametrize(
    "other",
    [
        torch.nextafter(ONE, torch.tensor(2.0)),
        ONE.double(),
        ONE.view(3, 2),
        ONE[:1],
        ONE.tolist(),
        ONE * torch.tensor([1, 1, math.nan]),
    ],
    ids=["one bit", "dtype", "shape", "length", "no tensor", "nan"],
)
def test_any_difference_is_not_identical(proof, other):
    assert not proof.identical({"a": [ONE], "b": 1}, {"a": [other], "b": 1})
    assert not proof.identical([ONE, other], [ONE, ONE])


def test_equal_bits_are_identical_and_other_zeros_are_not(proof):
    nan = torch.tensor([math.nan, 1.0])
    assert proof.identical({"a": [nan, 1, "x", None]}, {"a": [nan.clone(), 1, "x", None]})
    assert proof.identical(math.nan, math.nan)
    assert not proof.identical(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not proof.identical({"a": 1}, {"a": 1, "b": 2})
    assert not proof.identical([1, 2], [1, 2, 3])
    assert not proof.identical(1, True)
    assert not proof.identical(1, 1.0)
    assert not proof.identical(0.0, -0.0)


def row(proof):
    """Return the row of SAC."""
    return next(each for each in proof.ROWS if each.algo == "sac")


def test_a_row_that_the_commit_does_not_have_is_new(proof, tmp_path):
    states, ratios = proof.compare(row(proof), {"base": tmp_path, "here": proof.ROOT}, 8, [], 1)
    assert (set(states), ratios) == ({"new"}, [])


@pytest.mark.parametrize("part", [None, 0, 5])
def test_a_difference_in_one_pair_is_reported(proof, part, monkeypatch):
    def read(run):
        pair["reads"] += 1
        spoiled = run.name == "here" and pair["reads"] > 2  # in the second pair
        return {name: int(spoiled and i == part) for i, name in enumerate(proof.PARTS)}

    pair = {"reads": 0}
    monkeypatch.setattr(proof, "train", lambda *_: None)
    monkeypatch.setattr(proof, "read", read)
    monkeypatch.setattr(proof, "steps_per_second", lambda run: {"base": 2.0, "here": 1.0}[run.name])
    states, ratios = proof.compare(row(proof), {"base": proof.ROOT, "here": proof.ROOT}, 8, [], 2)
    assert states == ["DIFFERS" if i == part else "identical" for i in range(len(proof.PARTS))]
    assert ratios == [0.5, 0.5]


def test_a_row_that_failed_is_not_a_changed_number(proof, monkeypatch, capsys):
    monkeypatch.setattr(proof, "compare", lambda row, *_: ([{"sac": "failed"}.get(row.algo, "identical")] * 6, []))
    monkeypatch.setattr(proof, "worktree", lambda base: nullcontext(proof.ROOT))
    monkeypatch.setattr("sys.argv", ["proof.py", "--base", "HEAD", "--rows", "sac", "ppo"])
    with pytest.raises(SystemExit) as stop:
        proof.main()
    assert stop.value.code
    printed = capsys.readouterr().out
    assert "not compared, because a run failed (the reason is above): sac\n" in printed
    assert "every number is identical to the bit in 1 rows" in printed
    assert "changed" not in printed


@pytest.mark.parametrize("arguments", [["--pairs", "0"], ["--rows", "sacc"], []])
def test_invalid_arguments_are_refused(proof, arguments, monkeypatch):
    monkeypatch.setattr("sys.argv", ["proof.py", *(["--base", "HEAD"] if arguments else []), *arguments])
    with pytest.raises(SystemExit) as stop:
        proof.main()
    assert stop.value.code == 2


def test_a_base_that_is_no_commit_is_refused(proof, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["proof.py", "--base", "no-such-branch"])
    with pytest.raises(SystemExit, match="2"):
        proof.main()
    assert "no-such-branch: not a commit" in capsys.readouterr().err


def test_steps_per_second_leave_out_the_first_row_and_evaluations(proof, tmp_path):
    (tmp_path / "metrics.csv").write_text(
        "env_steps,eval/return_mean,time/env_steps_per_second\n100,,1\n200,,50\n300,,100\n400,7.0,1\n"
    )
    assert proof.steps_per_second(tmp_path) == pytest.approx(200 / (2 + 1))


def test_stored_results_are_found_by_algorithm(proof):
    assert proof.stored_results(set()) == []
    names = proof.stored_results({"sac"})
    assert "sac_pendulum" in names
    assert "sac_discrete_cartpole" not in names
