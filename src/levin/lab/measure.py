"""Measure gradient estimators on problems whose gradient is known: `python -m levin.lab [out=runs/lab] [rows=20000]`.

For every problem and every estimator that supports it, it measures bias, variance, mean squared error, the cosine
with the exact gradient, and the cost in evaluations and milliseconds. It prints a table and writes lab.csv, lab.png,
curves.csv and curves.png.
"""

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from levin.core.errors import ConfigError
from levin.estimators.base import Estimator, TooManyValuesError
from levin.estimators.binary import ARM, ARMS, DisARM
from levin.estimators.control_variates import LAX, REBAR, RELAX
from levin.estimators.measure_valued import MeasureValued
from levin.estimators.pathwise import GumbelRao, GumbelSoftmax, ReinMax, Reparameterized, StraightThrough
from levin.estimators.score import Exact, LeaveOneOut, OptimalConstant, ScoreFunction, SelfCritical
from levin.estimators.subsets import SumAndSample, UnorderedSet, WithoutReplacement
from levin.lab.problems import Problem, all_problems, choice_of_five, single_coin

TIMED_ESTIMATES = 128  # number of estimates in one timed batch
MAX_POINTS = 200_000  # largest number of points whose cost is evaluated at once
EstimatorFactory = Callable[[Problem], Estimator]


class Critic(nn.Module):
    """Control variate c of RELAX and LAX, `[*B, *E] -> [*B]`.

    Args:
        dims: Number of event dimensions.
        size: Number of entries of an event.
    """

    def __init__(self, dims: int, size: int) -> None:
        super().__init__()
        self.dims = dims
        self.layers = nn.Sequential(nn.Linear(size, 10), nn.Tanh(), nn.Linear(10, 1))

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z.flatten(-self.dims)).squeeze(-1)


def with_learned_critic(kind: type[RELAX] | type[LAX], updates: int = 400) -> EstimatorFactory:
    """Return a factory that trains the critic of a RELAX or LAX estimator for a problem, on samples of its own."""

    def make_estimator(problem: Problem) -> Estimator:
        torch.manual_seed(0)
        theta = problem.theta.expand(256, *problem.theta.shape)
        event = problem.family(theta).event_shape
        estimator = kind(Critic(len(event), event.numel()))
        optimizer = torch.optim.Adam(estimator.parameters(), lr=1e-2)
        for _ in range(updates):
            draws = estimator.sample(problem.family(theta))
            loss = estimator.variance(estimator.gradient(draws, problem.cost(draws.value)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return estimator.requires_grad_(False)

    return make_estimator


def without_critic(estimator: Estimator) -> EstimatorFactory:
    """Return a factory that returns this estimator for every problem."""
    return lambda _: estimator


SCORES: dict[str, EstimatorFactory] = {
    "score": without_critic(ScoreFunction()),
    "self-critical": without_critic(SelfCritical()),
    "leave-one-out, 2": without_critic(LeaveOneOut(2)),
    "leave-one-out, 4": without_critic(LeaveOneOut(4)),
    "optimal constant, 4": without_critic(OptimalConstant(4)),
}
RELAXATIONS: dict[str, EstimatorFactory] = {
    "straight-through": without_critic(StraightThrough()),
    "Gumbel-softmax, 0.5": without_critic(GumbelSoftmax(0.5)),
    "ST Gumbel-softmax, 0.5": without_critic(GumbelSoftmax(0.5, hard=True)),
    "Gumbel-Rao, 0.5": without_critic(GumbelRao()),
    "ReinMax": without_critic(ReinMax()),
}
FINITE: dict[str, EstimatorFactory] = {
    "exact": without_critic(Exact()),
    **SCORES,
    "sum and sample, 3": without_critic(SumAndSample(3)),
    "unordered set, 3": without_critic(UnorderedSet(3)),
    "without replacement, 4": without_critic(WithoutReplacement(4)),
    "measure-valued": without_critic(MeasureValued()),
    "REBAR": without_critic(REBAR()),
    "RELAX": with_learned_critic(RELAX),
    **RELAXATIONS,
}
ESTIMATORS: dict[str, dict[str, EstimatorFactory]] = {
    "choices": FINITE,
    "coins": {
        **FINITE,
        "ARM": without_critic(ARM()),
        "DisARM": without_critic(DisARM()),
        "ARMS, 4": without_critic(ARMS(4)),
    },
    "normal": {
        "reparameterised": without_critic(Reparameterized()),
        **SCORES,
        "measure-valued": without_critic(MeasureValued()),
        "LAX": with_learned_critic(LAX),
    },
}


def collect_estimates(estimator: Estimator, problem: Problem, rows: int) -> Iterator[Tensor]:
    """Yield `rows` estimates of the gradient, in chunks `[n, *P]`."""
    with torch.no_grad():
        points = estimator.sample(problem.family(problem.theta.unsqueeze(0))).value
    chunk = max(1, MAX_POINTS // (points.shape[0] * max(1, problem.cost(points)[0].numel())))
    for start in range(0, rows, chunk):
        leaf = problem.theta.expand(min(chunk, rows - start), *problem.theta.shape).clone().requires_grad_()
        yield torch.autograd.grad(estimator(problem.family(leaf), problem.cost).sum(), leaf)[0]


def measure_estimator(estimator: Estimator, problem: Problem, rows: int) -> dict[str, float]:
    """Return the columns of lab.csv for one estimator on one problem, from `rows` estimates."""
    torch.manual_seed(0)
    estimates = torch.cat(list(collect_estimates(estimator, problem, rows))).double().flatten(1)  # [rows, P]
    exact = problem.gradient.double().flatten()
    mean, variance = estimates.mean(0), float(estimates.var(0).sum())
    bias = float((mean - exact).norm())
    evals = len(estimator.sample(problem.family(problem.theta.unsqueeze(0))).value)
    ms = time_estimates(estimator, problem)
    return {
        "relative_bias": bias / float(exact.norm()),
        "standard_error": (variance / rows) ** 0.5 / float(exact.norm()),
        "variance": variance,
        "mse": variance + bias**2,
        "relative_mse": (variance + bias**2) / float(exact.square().sum()),
        "cosine": float(nn.functional.cosine_similarity(mean, exact, dim=0)),
        "evaluations": evals,
        "ms": ms,
        "variance_x_evaluations": variance * evals,
        "variance_x_ms": variance * ms,
    }


def time_estimates(estimator: Estimator, problem: Problem, repeats: int = 15) -> float:
    """Return the median time of one batch of `TIMED_ESTIMATES` estimates, in ms, with one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times = []
    for _ in range(repeats):
        leaf = problem.theta.expand(TIMED_ESTIMATES, *problem.theta.shape).clone().requires_grad_()
        start = perf_counter()
        estimator(problem.family(leaf), problem.cost).sum().backward()
        times.append(perf_counter() - start)
    torch.set_num_threads(threads)
    return 1000 * median(times)


def measure_all(rows: int) -> list[dict[str, Any]]:
    """Return the rows of lab.csv: every problem with every estimator that supports it. Prints each row."""
    results = []
    for problem in all_problems():
        number = rows if problem.theta.numel() < 100 else max(200, rows // 20)
        for name, make_estimator in ESTIMATORS[problem.kind].items():
            try:
                result = measure_estimator(make_estimator(problem), problem, number)
            except TooManyValuesError:
                continue
            kind = "relaxation" if name in RELAXATIONS else "unbiased"
            results.append({"problem": problem.name, "estimator": name, "kind": kind, **result})
            print("  ".join([f"{problem.name:<30}{name:<26}", *format_row(result)]), flush=True)
    return results


def format_row(result: dict[str, float]) -> list[str]:
    """Return the columns of one printed line: bias, variance, cosine and cost."""
    bias = f"bias {result['relative_bias']:.3f} ± {result['standard_error']:.3f}"
    cost = f"{result['evaluations']:.0f} evaluations, {result['ms']:.2f} ms"
    return [bias, f"variance {result['variance']:.3g}", f"cosine {result['cosine']:.3f}", cost]


def measure_curves(rows: int) -> list[dict[str, Any]]:
    """Return the rows of curves.csv: estimators over theta of a coin, and over the temperature of relaxations."""
    results = []
    for theta in torch.linspace(0.05, 0.95, 13).tolist():
        problem = single_coin(0.45, theta)
        for name in ("score", "leave-one-out, 2", "leave-one-out, 4", "ARM", "DisARM", "REBAR", "measure-valued"):
            result = measure_estimator(ESTIMATORS["coins"][name](problem), problem, rows)
            results.append({"axis": "theta", "x": theta, "estimator": name, **result})
    problem = choice_of_five()
    for tau in (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 4.0):
        relaxed = {
            "Gumbel-softmax": GumbelSoftmax(tau),
            "ST Gumbel-softmax": GumbelSoftmax(tau, hard=True),
            "Gumbel-Rao": GumbelRao(tau),
            "ReinMax": ReinMax(tau),
            "REBAR": REBAR(tau=tau),
        }
        for name, estimator in relaxed.items():
            results.append({"axis": "tau", "x": tau, "estimator": name, **measure_estimator(estimator, problem, rows)})
    return results


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write the rows as CSV, numbers with six significant digits."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def lab(*, out: str = "runs/lab", rows: Annotated[int, Field(ge=2)] = 20_000) -> None:
    """Measure all estimators; write tables and figures.

    Args:
        out: Folder for the results.
        rows: Number of estimates per problem and estimator; a twentieth of it, at least 200, for the autoencoder.

    Raises:
        ConfigError: The folder can't be created.
    """
    from levin.lab.pictures import draw_lab

    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out={out}: {error.strerror}") from None
    write_csv(folder / "lab.csv", measure_all(rows))
    write_csv(folder / "curves.csv", measure_curves(rows))
    draw_lab(folder)
    print(f"{folder}: lab.csv, lab.png, curves.csv, curves.png")
