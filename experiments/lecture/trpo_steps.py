"""TRPO's steps during training: predicted and true KL, gain of the surrogate, residual of conjugate gradient."""

import copy
from typing import Any

import numpy as np
import torch
from experiments.lecture.agents import SEEDS, build, policy_gradient, read, write
from experiments.lecture.drawing import COLORS, INK, panels, save
from torch.nn.utils import parameters_to_vector

from levin.algorithms.trpo import conjugate_gradient
from levin.nn.parameters import assign_parameters

WORDS = ["env=cartpole", "algo=trpo"]
ITERATIONS, EARLY, LATE = 40, 2, 39
CG_ITERATIONS = (1, 2, 3, 4, 5, 7, 10, 15, 20, 25)
DAMPINGS = (1e-3, 1e-1)


def measure() -> None:
    """Train TRPO on CartPole and measure each of its steps."""
    rows: list[dict[str, Any]] = []
    for seed in SEEDS:
        algorithm, loader = build([*WORDS, f"seed={seed}"])
        rollout = next(loader)
        for iteration in range(ITERATIONS):
            at = {"seed": seed, "iteration": iteration}
            rows += [at | row for row in measure_step(algorithm, rollout, residuals=iteration in (EARLY, LATE))]
            actor = copy.deepcopy(algorithm.actor)
            algorithm.on_train_batch_start(rollout, 0)
            algorithm.training_step(rollout, 0)
            metrics = algorithm.pop_metrics()
            for kind in ("kl", "surrogate", "line_search_steps"):
                rows.append(at | {"kind": kind, "value": metrics[f"train/{kind}"]})
            rollout = next(loader)  # collected by the new policy
            with torch.no_grad():
                features = algorithm.trunk(rollout["observation"].flatten(0, 1))
                fresh = actor(features).kl(algorithm.actor(features)).mean().item()
            rows.append(at | {"kind": "kl_of_new_states", "value": fresh})
    write("trpo_steps", rows, digits=4)


def measure_step(algorithm: Any, rollout: Any, *, residuals: bool) -> list[dict[str, Any]]:
    """Measure the step before the line search: its KL, its gain to first order, and residuals of conjugate gradient."""
    _, features, old, gradient, product = policy_gradient(algorithm, rollout)
    direction, _ = conjugate_gradient(product, gradient, algorithm.cg_iterations)
    rows: list[dict[str, Any]] = []
    damping = algorithm.cg_damping
    for algorithm.cg_damping in DAMPINGS if residuals else ():
        for iterations in CG_ITERATIONS:
            residual = conjugate_gradient(product, gradient, iterations)[1] / gradient.norm()
            kind = f"residual_damping_{algorithm.cg_damping}"
            rows.append({"kind": kind, "cg_iterations": iterations, "value": residual.item()})
    algorithm.cg_damping = damping
    step = (2 * algorithm.target_kl / (direction @ product(direction))).sqrt() * direction
    start = parameters_to_vector(algorithm.actor_parameters).detach()
    assign_parameters(algorithm.actor_parameters, start + step)
    with torch.no_grad():
        kl = old.kl(algorithm.actor(features)).mean()
    assign_parameters(algorithm.actor_parameters, start)
    rows.append({"kind": "kl_of_full_step", "value": kl.item()})
    rows.append({"kind": "predicted_gain", "value": (gradient @ step).item()})
    return rows


def draw() -> None:
    """Draw the KL of the steps, predicted and true gain, and the residuals."""
    table = read("trpo_steps")
    figure, (left, middle, right) = panels(3, width=12, height=4)
    kinds = {
        "kl_of_full_step": "full step",
        "kl": "step taken",
        "kl_of_new_states": "step taken, states of the new policy",
    }
    for (kind, label), color in zip(kinds.items(), (COLORS[1], COLORS[0], COLORS[2]), strict=True):
        rows = table[table.kind == kind]
        left.scatter((rows.iteration + 1) * 1.024, rows.value, s=9, color=color, alpha=0.75, label=label)
    left.axhline(0.01, color=INK, linewidth=0.9, linestyle=":")
    left.text(1, 0.0103, r"predicted: $\delta = 0.01$", fontsize=8, color=INK)
    left.set(
        yscale="log",
        xlabel="thousands of env steps",
        ylabel="KL, nats",
        ylim=(2e-4, 0.2),
        title="KL of each step, 3 seeds",
    )
    left.legend(fontsize=8, loc="lower left")

    by_step = table[table.cg_iterations.isna()].pivot(index=["seed", "iteration"], columns="kind", values="value")
    tried = by_step.line_search_steps
    for condition, color, label in (
        (tried == 1, COLORS[0], "first candidate taken"),
        ((tried > 1) & (tried <= 10), COLORS[1], "shrunk by the line search"),
    ):
        some = by_step[condition]
        middle.scatter(
            some.predicted_gain, some.surrogate, s=12, color=color, alpha=0.8, label=f"{label} ({len(some)})"
        )
    limits = np.array([by_step.predicted_gain.min(), by_step.predicted_gain.max()])
    middle.plot(limits, limits, color=INK, linewidth=0.9, linestyle=":")
    middle.set(xlabel="gain predicted for the full step, $g^T s$", ylabel=r"gain of the step taken, $E[(\rho - 1) A]$")
    middle.set(title="Surrogate: predicted and true")
    middle.legend(fontsize=8, loc="upper left")

    for damping, style in zip(DAMPINGS, ("-", "--"), strict=True):
        for iteration, color in ((EARLY, COLORS[0]), (LATE, COLORS[3])):
            rows = table[(table.kind == f"residual_damping_{damping}") & (table.iteration == iteration)]
            by_count = rows.groupby("cg_iterations").value
            label = f"{'early' if iteration == EARLY else 'late'}, damping {damping:g}"
            right.plot(by_count.median().index, by_count.median(), style, color=color, label=label)
            right.fill_between(
                by_count.median().index, by_count.min(), by_count.max(), color=color, alpha=0.15, linewidth=0
            )
    right.set(yscale="log", xlabel="iterations of conjugate gradient", ylabel=r"$|F x - g| \, / \, |g|$")
    right.set(ylim=(1e-6, 2), title="Residual")
    right.legend(fontsize=8)
    save(figure, "trpo_steps")
