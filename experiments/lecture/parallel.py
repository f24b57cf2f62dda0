"""Variance of a minibatch's gradient from one agent and from many, and learning with the same number of samples."""

from itertools import product
from typing import Any

import numpy as np
from experiments.lecture.agents import SEEDS, build, iterate, read, write
from experiments.lecture.drawing import COLORS, INK, panels, save
from experiments.lecture.online import TRAIN_STEPS, step_samples

SAMPLES = (1, 2, 4, 8, 16, 32, 64)
LAYOUTS = ((1, 16), (4, 4), (16, 1))  # agents, steps: 16 samples for each update
STEPS, EVERY = 24_000, 2000


def measure() -> None:
    """Measure the variance of mean gradients, and train A2C with three layouts of 16 samples."""
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
    for agents, steps in LAYOUTS:
        for seed in SEEDS:
            words = [f"env.num_envs={agents}", f"algo.steps_per_iteration={steps}", "algo.gae_lambda=0", f"seed={seed}"]
            algorithm, loader = build(["env=cartpole", "algo=a2c", *words])
            for end in range(EVERY, STEPS + 1, EVERY):
                loader.returns.clear()
                while algorithm.env_steps < end:
                    iterate(algorithm, loader)
                at = {"part": "learning", "seed": seed, "layout": f"{agents} x {steps}", "x": end}
                rows.append(at | {"value": np.mean(loader.returns) if loader.returns else np.nan})
    write("parallel", rows)


def draw() -> None:
    """Draw the variance relative to independent samples, and the learning curves."""
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
        by_step = rows.groupby("x").value
        x = by_step.median().index / 1000
        label = f"{agents} {'agents' if agents > 1 else 'agent'}, {steps} {'steps' if steps > 1 else 'step'}"
        axes[2].plot(x, by_step.median(), color=color, label=label)
        axes[2].fill_between(x, by_step.min(), by_step.max(), color=color, alpha=0.2, linewidth=0)
    axes[2].set(xlabel="thousands of env steps", title="A2C on CartPole: return in training")
    axes[2].legend(loc="upper left", fontsize=9)
    save(figure, "parallel")
