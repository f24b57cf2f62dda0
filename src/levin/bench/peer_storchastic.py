"""Estimate gradients with Storchastic. This script runs in .venv-bench and imports nothing of Levin.

Command-line arguments: kind of task, estimator, threads, estimates per segment, sizes as JSON.
"""

import json
import sys
from time import perf_counter

import storch
import torch
from torch.distributions import Bernoulli, OneHotCategorical

METHODS = {
    "score": lambda: storch.method.ScoreFunction("z"),
    "loo": lambda: storch.method.ScoreFunction("z", n_samples=4, baseline_factory="batch_average"),
    "exact": lambda: storch.method.Expect("z"),
    "sum-and-sample": lambda: storch.method.RaoBlackwellSF("z", n_samples=3),
    "st-gumbel": lambda: storch.method.GumbelSoftmax("z", straight_through=True),
    "arm": lambda: storch.method.ARM("z"),
}


def make_step(kind: str, estimator: str, sizes: dict):
    """Return a function that makes one estimate of the gradient in all parameters."""
    torch.manual_seed(0)
    torch.distributions.Distribution.set_default_validate_args(False)  # as on Levin's side
    method = METHODS[estimator]()
    rows, choices, values = sizes["rows"], sizes["choices"], sizes["values"]
    if kind == "autoencoder":
        width = sizes["pixels"]
        encoder = torch.nn.Sequential(
            *(torch.nn.Linear(width, 512), torch.nn.ReLU(), torch.nn.Linear(512, 256), torch.nn.ReLU()),
            torch.nn.Linear(256, choices * values),
        )
        decoder = torch.nn.Sequential(
            *(torch.nn.Linear(choices * values, 256), torch.nn.ReLU(), torch.nn.Linear(256, 512), torch.nn.ReLU()),
            torch.nn.Linear(512, width),
        )
        data = torch.rand(rows, width).round()
        parameters = [*encoder.parameters(), *decoder.parameters()]

        @storch.deterministic
        def decode(z):
            return decoder(z.flatten(-2))

        @storch.deterministic
        def error(logits, target):
            return torch.nn.functional.binary_cross_entropy_with_logits(
                logits, target.expand_as(logits), reduction="none"
            ).sum(-1)

        def step():
            for parameter in parameters:
                parameter.grad = None
            x = storch.denote_independent(data, 0, "data")
            logits = encoder(data).view(rows, choices, values)
            logits = storch.denote_independent(logits, 0, "data")
            z = method(OneHotCategorical(logits=logits))
            storch.add_cost(error(decode(z), x), "error")
            storch.backward()

        return step

    shape = (rows, choices) if kind == "coins" else (rows, choices, values) if choices > 1 else (rows, values)
    parameter = torch.randn(shape, requires_grad=True)
    weight = torch.randn(shape[1:])

    @storch.deterministic
    def cost(z):
        return ((z * weight).flatten(-(len(shape) - 1)).sum(-1) - 0.45).square()

    def step():
        parameter.grad = None
        logits = storch.denote_independent(parameter, 0, "data")
        z = method(Bernoulli(logits=logits) if kind == "coins" else OneHotCategorical(logits=logits))
        storch.add_cost(cost(z), "cost")
        storch.backward()

    return step


if __name__ == "__main__":
    kind, estimator = sys.argv[1:3]
    threads, number = map(int, sys.argv[3:5])
    torch.set_num_threads(threads)
    step = make_step(kind, estimator, json.loads(sys.argv[5]))
    for _ in range(5):
        step()
    while sys.stdin.readline():
        start = perf_counter()
        for _ in range(number):
            step()
        print(f"segment {number} {perf_counter() - start}", flush=True)
