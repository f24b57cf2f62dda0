"""The estimator lab: its measurements equal closed forms."""

import csv

import pytest
import torch

from levin.core.errors import ConfigError
from levin.estimators import LeaveOneOut, ReinMax, ScoreFunction, StraightThrough
from levin.lab import measure, problems
from levin.lab.digits import evaluate_autoencoder, train_autoencoder


def read_rows(path):
    """Read the rows of a CSV file."""
    with path.open() as file:
        return list(csv.DictReader(file))


def test_the_lab_writes_tables_and_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        measure, "all_problems", lambda: [problems.single_coin(), problems.choice_of_five(), problems.gaussian_mean()]
    )
    measure.lab(out=str(tmp_path), rows=300)
    rows = {(row["problem"], row["estimator"]): row for row in read_rows(tmp_path / "lab.csv")}
    assert float(rows["a choice of five", "exact"]["variance"]) < 1e-12
    assert float(rows["a choice of five", "exact"]["relative_bias"]) < 1e-5
    assert int(rows["a choice of five", "leave-one-out, 4"]["evaluations"]) == 4
    assert ("a Gaussian and a square", "ARM") not in rows
    for name in ("lab.png", "curves.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert {row["axis"] for row in read_rows(tmp_path / "curves.csv")} == {"theta", "tau"}
    assert "leave-one-out, 4" in capsys.readouterr().out


def test_an_invalid_output_folder_is_a_config_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file: File exists"):
        measure.lab(out=str(tmp_path / "file"))


def test_measured_bias_and_variance_equal_the_closed_forms():
    problem = problems.choice_of_five()
    measured = measure.measure_estimator(LeaveOneOut(2), problem, 20_000)
    assert measured["variance"] == pytest.approx(0.988253, rel=0.05)
    assert measured["relative_bias"] < 4 * measured["standard_error"]
    assert measured["variance_x_evaluations"] == pytest.approx(2 * measured["variance"])
    biased = measure.measure_estimator(StraightThrough(), problem, 20_000)
    assert biased["relative_bias"] == pytest.approx(0.98388, abs=0.03)
    assert biased["mse"] == pytest.approx(
        biased["variance"] + (0.98388 * float(problem.gradient.norm())) ** 2, rel=0.05
    )


def test_exact_gradients_of_the_problems():
    assert problems.single_coin(0.499, 0.3).gradient.item() == pytest.approx(4.2e-4, rel=1e-4)
    assert problems.shared_coins().gradient.item() == pytest.approx(-0.045, rel=1e-5)
    expected = torch.tensor([-0.19385, 0.21157, 0.29045, -0.30337, -0.00480])
    torch.testing.assert_close(problems.choice_of_five().gradient, expected, rtol=0, atol=6e-6)
    for make_problem in (problems.fixed_critic, problems.imagined_step):
        problem = make_problem()
        measured = measure.measure_estimator(LeaveOneOut(8), problem, 20_000)
        assert measured["relative_bias"] < 5 * measured["standard_error"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("estimator", "elbo"),
    [(LeaveOneOut(4), 19.12), (ReinMax(), 19.38), (StraightThrough(), 21.06), (ScoreFunction(4), 22.92)],
)
def test_elbo_of_the_digits_autoencoder(estimator, elbo):
    """The mean over three seeds is within 0.6 nats of an earlier implementation."""
    elbos = [evaluate_autoencoder(train_autoencoder(estimator, seed)) for seed in range(3)]
    assert sum(elbos) / 3 == pytest.approx(elbo, abs=0.6)
