"""Variance of a minibatch's gradient from one agent and from many, and learning with the same number of samples."""

from itertools import product
from typing import Any

import numpy as np
from experiments.lecture.agents import SEEDS, build, iterate, read, write
from experiments.lecture.drawing import COLORS, INK, panels, save
from experiments.lecture.online import TRAIN_STEPS, step_samples

SAMPLES = (1, 2, 4, 8, 16, 32, 64)
LAYOUTS = ((1, 16), (4, 4), (16, 1))  # agents, steps: 16 samples for each update
RATES = (1.75e-4, 3.5e-4, 7e-4, 1.4e-3)  # learning rates; 7e-4 is the default
STEPS, EVERY, LAST = 24_000, 2000, 20_000


def measure() -> None:
    """Measure the variance of mean gradients, and train A2C with three layouts of 16 samples and four rates."""
    rows: list[dict[str, Any]] = []
    for seed, train_steps in product(SEEDS, TRAIN_STEPS):
        samples_of = step_samples(seed, train_steps)
        for kind in ("actor", "critic"):
            deviation = samples_of[kind] - samples_of[kind].mean((0, 1))  # [N, T, P]
            for samples in SAMPLES:
                for layout, blocks in (
                    ("one agent", deviation.unfold(1, samples, samples)),  # [N, T / M, P, M]
                    ("many agents", deviation.unfold(0, samples, samples)),
                ):
                    variance = blocks.mean(-1).square().sum(-1).mean().item()
                    at = {"part": "variance", "seed": seed, "train_steps": train_steps, "kind": kind}
                    rows.append(at | {"layout": layout, "x": samples, "value": variance})
    for lr, (agents, steps), seed in product(RATES, LAYOUTS, SEEDS):
        words = [f"env.num_envs={agents}", f"algo.steps_per_iteration={steps}", "algo.gae_lambda=0", f"seed={seed}"]
        algorithm, loader = build(["env=cartpole", "algo=a2c", f"algo.lr={lr}", *words])
        for end in range(EVERY, STEPS + 1, EVERY):
            loader.returns.clear()
            while algorithm.env_steps < end:
                iterate(algorithm, loader)
            at = {"part": "learning", "seed": seed, "layout": f"{agents} x {steps}", "lr": lr, "x": end}
            rows.append(at | {"value": np.mean(loader.returns) if loader.returns else np.nan})
    write("parallel", rows)


def draw() -> None:
    """Draw the variance relative to independent samples, and the returns at the end of training."""
    table: Any = read("parallel")
    figure, axes = panels(3, width=12, height=3.8)
    for panel, kind in zip(axes, ("actor", "critic"), strict=False):
        for (layout, color), (train_steps, style) in product(
            (("one agent", COLORS[3]), ("many agents", COLORS[2])), zip(TRAIN_STEPS, ("--", "-"), strict=True)
        ):
            rows = table[(table.part == "variance") & (table.kind == kind) & (table.layout == layout)]
            rows = rows[rows.train_steps == train_steps]
            relative = rows.pivot(index="x", columns="seed", values="value")
            relative = relative.mul(relative.index, axis=0) / relative.loc[1]
            label = "M steps of one agent" if layout == "one agent" else "one step of M agents"
            label += ", early" if train_steps == TRAIN_STEPS[0] else ", half-trained"
            panel.plot(
                relative.index, relative.median(axis=1), style, color=color, marker="o", markersize=4, label=label
            )
            panel.fill_between(
                relative.index, relative.min(axis=1), relative.max(axis=1), color=color, alpha=0.2, linewidth=0
            )
        panel.axhline(1, color=INK, linewidth=0.9, linestyle=":")
        panel.set(xscale="log", ylim=(0, 4), xlabel="samples M in the minibatch", title=f"Gradient of the {kind}")
        panel.set_xticks(SAMPLES, map(str, SAMPLES))
        panel.minorticks_off()
    axes[0].set(ylabel="variance, relative to M independent samples")
    axes[0].legend(loc="upper left", fontsize=8.5)
    for (agents, steps), color in zip(LAYOUTS, (COLORS[3], COLORS[1], COLORS[2]), strict=True):
        rows = table[(table.part == "learning") & (table.layout == f"{agents} x {steps}")]
        end = rows[rows.x > LAST].groupby(["lr", "seed"]).value.mean().unstack()  # [learning rates, seeds]
        label = f"{agents} {'agents' if agents > 1 else 'agent'}, {steps} {'steps' if steps > 1 else 'step'}"
        axes[2].plot(end.index, end.median(axis=1), color=color, marker="o", markersize=4, label=label)
        axes[2].fill_between(end.index, end.min(axis=1), end.max(axis=1), color=color, alpha=0.2, linewidth=0)
    axes[2].set(xscale="log", xlabel="learning rate, in units of 0.0001", title="A2C on CartPole: return at the end")
    axes[2].set_xticks(RATES, [f"{lr * 1e4:g}" for lr in RATES])
    axes[2].minorticks_off()
    axes[2].legend(loc="upper left", fontsize=9)
    save(figure, "parallel")
