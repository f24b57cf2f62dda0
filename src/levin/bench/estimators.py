"""Speed of gradient estimators, as a share of a floor and against Storchastic.

The floor computes only the costs of as many points and one log-probability, which every estimator needs.
"""

import json
import statistics
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Distribution, Independent, OneHotCategorical
from torch.nn.functional import binary_cross_entropy_with_logits

from levin.bench.peers import PYTHON, Worker
from levin.core.errors import ConfigError
from levin.estimators import (
    ARM,
    ARMS,
    REBAR,
    DisARM,
    Estimator,
    Exact,
    GumbelRao,
    GumbelSoftmax,
    LeaveOneOut,
    ReinMax,
    ScoreFunction,
    StraightThrough,
    SumAndSample,
    UnorderedSet,
    WithoutReplacement,
)
from levin.runs import provenance

CHOICES = {"rows": 128, "choices": 4, "values": 10}
ONE = {"rows": 128, "choices": 1, "values": 10}
COINS = {"rows": 128, "choices": 20, "values": 2}
AUTOENCODER = {"rows": 64, "choices": 20, "values": 10, "pixels": 784}


@dataclass(frozen=True)
class Task:
    """One estimator on one problem.

    Args:
        kind: `choices`, `coins`, or `autoencoder`, whose cost takes most of the time.
        estimator: Levin's estimator.
        peer: Name of the same estimator in peer_storchastic.py; None if Storchastic has no correct one.
        sizes: Sizes of the problem; `rows` is the batch size.
    """

    kind: str
    estimator: Estimator
    peer: str | None = None
    sizes: dict[str, int] = field(default_factory=lambda: CHOICES)

    @property
    def name(self) -> str:
        """Name of the task in the printed table."""
        parts = [f"{self.sizes['choices']} {'coins' if self.kind == 'coins' else 'x ' + str(self.sizes['values'])}"]
        parts += ["autoencoder"] if self.kind == "autoencoder" else []
        return f"{self.estimator}, {' '.join(parts)}"


TASKS = [
    Task("choices", ScoreFunction(), "score"),
    Task("choices", LeaveOneOut(4), "loo"),
    Task("choices", GumbelSoftmax(hard=True), "st-gumbel"),
    Task("choices", Exact(), "exact", ONE),
    Task("choices", SumAndSample(3), "sum-and-sample", ONE),
    Task("coins", ARM(), "arm", COINS),
    Task("autoencoder", LeaveOneOut(4), "loo", AUTOENCODER),
    Task("autoencoder", GumbelSoftmax(hard=True), "st-gumbel", AUTOENCODER),
    Task("choices", StraightThrough()),
    Task("choices", ReinMax()),
    Task("choices", GumbelRao()),
    Task("choices", REBAR()),
    Task("choices", UnorderedSet(4), sizes=ONE),
    Task("choices", WithoutReplacement(4), sizes=ONE),
    Task("coins", DisARM(), sizes=COINS),
    Task("coins", ARMS(4), sizes=COINS),
]


class OwnSide:
    """Repeated estimates by one of Levin's estimators.

    Args:
        task: Estimator and problem.
        number: Estimates per segment.
        floor: Compute only costs and log-probability instead, see `make_floor`.
    """

    def __init__(self, task: Task, number: int, *, floor: bool = False) -> None:
        self.number = number
        self.step = (make_floor if floor else make_step)(task)
        for _ in range(5):
            self.step()

    def segment(self) -> float:
        """Run one segment; return estimates per second."""
        start = perf_counter()
        for _ in range(self.number):
            self.step()
        return self.number / (perf_counter() - start)


def make_problem(task: Task) -> tuple[Callable[[], Distribution], Callable[[Tensor], Tensor], list[Tensor]]:
    """Return a function that builds the distribution, the cost, `[S, B, *E] -> [S, B]`, and all parameters."""
    torch.manual_seed(0)
    rows, choices, values = (task.sizes[key] for key in ("rows", "choices", "values"))
    if task.kind == "autoencoder":
        return make_autoencoder(rows, choices, values, task.sizes["pixels"])
    coins = task.kind == "coins"
    shape = (rows, choices) if coins else (rows, choices, values) if choices > 1 else (rows, values)
    parameter, weight = torch.randn(shape, requires_grad=True), torch.randn(shape[1:])

    def dist() -> Distribution:
        base = Bernoulli if coins else OneHotCategorical
        one = base(logits=parameter, validate_args=False)
        return Independent(one, 1, validate_args=False) if coins or choices > 1 else one

    def cost(z: Tensor) -> Tensor:
        return ((z * weight).flatten(2).sum(-1) - 0.45).square()

    return dist, cost, [parameter]


def make_autoencoder(
    rows: int, choices: int, values: int, pixels: int
) -> tuple[Callable[[], Distribution], Callable[[Tensor], Tensor], list[Tensor]]:
    """Return the problem of an autoencoder of a common size for MNIST, see `make_problem`."""
    encoder = nn.Sequential(
        *(nn.Linear(pixels, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, choices * values))
    )
    decoder = nn.Sequential(
        *(nn.Linear(choices * values, 256), nn.ReLU(), nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, pixels))
    )
    data = torch.rand(rows, pixels).round()

    def dist() -> Distribution:
        logits = encoder(data).view(rows, choices, values)
        return Independent(OneHotCategorical(logits=logits, validate_args=False), 1, validate_args=False)

    def cost(z: Tensor) -> Tensor:
        logits = decoder(z.flatten(-2))
        return binary_cross_entropy_with_logits(logits, data.expand_as(logits), reduction="none").sum(-1)

    return dist, cost, [*encoder.parameters(), *decoder.parameters()]


def make_step(task: Task) -> Callable[[], None]:
    """Return a function that makes one estimate of the gradient of the mean over the batch."""
    dist, cost, parameters = make_problem(task)

    def step() -> None:
        for parameter in parameters:
            parameter.grad = None
        task.estimator(dist(), cost).mean().backward()

    return step


def make_floor(task: Task) -> Callable[[], None]:
    """Return a function that computes costs and log-probability of fixed points, with gradients, without sampling.

    There are as many points as the estimator samples.
    """
    dist, cost, parameters = make_problem(task)
    draws = task.estimator.sample(dist())
    points = draws.value.detach().requires_grad_(draws.value.requires_grad)

    def step() -> None:
        for parameter in [*parameters, points]:
            parameter.grad = None
        (cost(points).mean() + dist().log_prob(points).mean()).backward()

    return step


def estimators(*, rounds: int, threads: int, number: int = 100) -> None:
    """Print, for every estimator, the time per estimate, the share of the floor, and the ratio to Storchastic.

    Raises:
        ConfigError: Storchastic is not installed.
    """
    if not PYTHON.exists():
        raise ConfigError("Storchastic is not installed in .venv-bench: run make bench-setup")
    torch.set_num_threads(threads)
    script = Path(__file__).with_name("peer_storchastic.py")
    print(f"{provenance.processor_name()}, {threads} threads; medians of {rounds} rounds, interleaved")
    print(f"{'':<56}{'ms':>8}{'floor':>8}   x Storchastic 0.3.7")
    for task in TASKS:
        count = number // 5 if task.kind == "autoencoder" else number
        with ExitStack() as stack:
            sides: dict[str, OwnSide | Worker] = {
                "levin": OwnSide(task, count),
                "floor": OwnSide(task, count, floor=True),
            }
            if task.peer:
                arguments = [task.kind, task.peer, str(threads), str(count), json.dumps(task.sizes)]
                sides["peer"] = peer = Worker([str(PYTHON), str(script), *arguments])
                stack.callback(peer.stop)
            for side in sides.values():
                side.segment()
            rates = {name: [] for name in sides}
            for _ in range(rounds):
                for name, side in sides.items():
                    rates[name].append(side.segment())
        share = statistics.median(a / b for a, b in zip(rates["levin"], rates["floor"], strict=True))
        ratio = ""
        if task.peer:
            ratios = [a / b for a, b in zip(rates["levin"], rates["peer"], strict=True)]
            ratio = f"{statistics.median(ratios):5.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"{task.name:<56}{1000 / statistics.median(rates['levin']):>8.2f}{share:>8.0%}   {ratio}", flush=True)
