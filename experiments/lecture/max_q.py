"""Overestimation by the max of deep Q-learning: of noisy estimates, and of DQN on CartPole against true returns."""

from typing import Any

import numpy as np
import torch
from experiments.lecture.agents import SEEDS, build, iterate, read, true_returns, write
from experiments.lecture.drawing import COLORS, INK, panels, save

STEPS, EVERY, LEARNING_STARTS = 60_000, 3000, 1000
GAMMA, REPLAY_RATIO, TARGET_UPDATE_EVERY = 0.99, 0.1, 50  # of configs/algo/dqn.yaml
WORDS = ["env=cartpole", "algo=dqn", f"algo.schedule_env_steps={STEPS}", f"algo.learning_starts={LEARNING_STARTS}"]
ACTIONS, TRIALS = (2, 4, 8, 16, 32, 64), 20_000
STATES = 256
FORMS = {"max": "false", "double Q": "true"}  # algo.double_q
LIMIT = r"$1 + \gamma + \ldots + \gamma^{n-1}$, n target copies"


def measure() -> None:
    """Measure the maximum of noise, and train DQN with both targets."""
    rows = noise()
    for form, double_q in FORMS.items():
        for seed in SEEDS:
            algorithm, loader = build([*WORDS, f"algo.double_q={double_q}", f"seed={seed}"])
            while algorithm.env_steps < STEPS:
                iterate(algorithm, loader)
                if algorithm.env_steps % EVERY == 0:
                    at = {"part": "dqn", "form": form, "seed": seed, "x": algorithm.env_steps}
                    rows.append(at | estimates(algorithm, seed))
    write("max_q", rows)


def noise() -> list[dict[str, Any]]:
    """Mean value of the best of n actions that are worth 0, from estimates with noise of standard deviation 1."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number in ACTIONS:
        q, other = torch.randn(2, TRIALS, number, generator=generator)
        values = {"max": q.amax(1), "double Q": q.gather(1, other.argmax(1, keepdim=True))}  # independent estimates
        rows += [
            {"part": "noise", "form": form, "x": number, "estimate": v.mean().item()} for form, v in values.items()
        ]
    return rows


@torch.no_grad()
def estimates(algorithm: Any, seed: int) -> dict[str, float]:
    """Mean of max_a Q(s,a) over states of the replay buffer, and of the true return of the greedy policy from there."""
    index = torch.randperm(len(algorithm.buffer), generator=torch.Generator().manual_seed(seed))[:STATES]
    observation = algorithm.buffer.data["observation"][index]
    true = true_returns(observation, lambda s: algorithm.critic(s).argmax(-1), algorithm.gamma)
    return {"estimate": algorithm.critic(observation).amax(-1).mean().item(), "true": true.mean().item()}


def draw() -> None:
    """Draw the maximum of noise, and estimates and true returns of DQN."""
    table = read("max_q")
    figure, axes = panels(3, width=12, height=3.8)
    colors = dict(zip(FORMS, (COLORS[3], COLORS[0]), strict=True))
    for form, color in colors.items():
        rows = table[(table.part == "noise") & (table.form == form)]
        axes[0].plot(rows.x, rows.estimate, color=color, marker="o", markersize=4, label=form)
    axes[0].axhline(0, color=INK, linewidth=0.9, linestyle=":")
    axes[0].set(xscale="log", xlabel="actions", ylabel="estimated value of the best action", title="True values: all 0")
    axes[0].set_xticks(ACTIONS, map(str, ACTIONS))
    axes[0].minorticks_off()
    axes[0].legend()
    for panel, form in zip(axes[1:], FORMS, strict=True):
        rows = table[(table.part == "dqn") & (table.form == form)]
        for column, color, label in (("estimate", colors[form], r"$\max_a Q(s, a)$"), ("true", INK, "true return")):
            by_step = rows.groupby("x")[column]
            x = by_step.median().index / 1000
            panel.plot(x, by_step.median(), color=color, label=label)
            panel.fill_between(x, by_step.min(), by_step.max(), color=color, alpha=0.2, linewidth=0)
        steps = np.arange(LEARNING_STARTS, STEPS + 1)
        copies = (steps - LEARNING_STARTS) * REPLAY_RATIO / TARGET_UPDATE_EVERY
        panel.plot(
            steps / 1000, (1 - GAMMA**copies) / (1 - GAMMA), color=INK, linewidth=0.9, linestyle=":", label=LIMIT
        )
        panel.set(ylim=(0, 85), xlabel="thousands of env steps", title=f"DQN on CartPole: {form}")
        panel.legend(loc="lower right", fontsize=8.5)
    axes[1].set(ylabel="discounted return")
    save(figure, "max_q")
