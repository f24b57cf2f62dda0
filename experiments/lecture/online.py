"""Correlation in time of one agent's states and gradients; learning curves of online and batched actor-critic."""

from functools import cache
from itertools import product
from typing import Any

import numpy as np
import torch
from experiments.lecture.agents import HERE, SEEDS, build, iterate, read, write
from experiments.lecture.drawing import COLORS, INK, panels, save
from torch import Tensor
from torch.func import functional_call, grad, vmap

from levin.results.curves import align_curves, read_curves

TRAIN = ["env=cartpole", "algo=a2c", "algo.hidden_sizes=[32,32]"]
TRAIN_STEPS = (2000, 20_000)  # of the fixed policy and its critic: early, half-trained
AGENTS, STEPS, SKIPPED = 64, 256, 256  # the first steps after the common reset are skipped
LAGS = (0, 1, 2, 4, 8, 16, 32, 64, 128)
RESULTS = {"one step, one update": "actor_critic_online_cartpole", "batches of 128 steps": "actor_critic_cartpole"}


def measure() -> None:
    """Measure the correlation of two steps of one agent, by the number of steps between them."""
    rows = []
    for seed, train_steps in product(SEEDS, TRAIN_STEPS):
        for kind, each in step_samples(seed, train_steps).items():
            deviation = each - each.mean((0, 1))  # [N, T, P]
            variance = deviation.square().sum(2).mean()
            for lag in LAGS:
                covariance = (deviation[:, : STEPS - lag] * deviation[:, lag:]).sum(2).mean()
                at = {"seed": seed, "train_steps": train_steps, "kind": kind, "lag": lag}
                rows.append(at | {"correlation": (covariance / variance).item()})
    write("online", rows)


@cache
def step_samples(seed: int, train_steps: int) -> dict[str, Tensor]:
    """Return the state and the two gradients of each step of each agent, `[N, T, *]`, for a fixed policy on CartPole.

    The actor's is A grad log pi and the critic's A grad V, with A = r + gamma V(s') - V(s). States are divided by their
    standard deviations.
    """
    trained, loader = build([*TRAIN, f"seed={seed}"])
    while trained.env_steps < train_steps:
        iterate(trained, loader)
    words = [*TRAIN, f"env.num_envs={AGENTS}", f"algo.steps_per_iteration={STEPS}", f"seed={seed + 100}"]
    algorithm, loader = build(words)
    algorithm.load_state_dict(trained.state_dict())
    for _ in range(SKIPPED // STEPS):
        next(loader)
    rollout: Any = next(loader).flatten(0, 1)  # [N T]
    observation, action = rollout["observation"], rollout["action"]
    with torch.no_grad():
        value, after = algorithm.critic(observation), algorithm.critic(rollout["next", "observation"])
        advantage = rollout["next", "reward"] + algorithm.gamma * after * ~rollout["next", "terminated"] - value

    def log_prob(parameters: dict[str, Tensor], observation: Tensor, action: Tensor) -> Tensor:
        return functional_call(algorithm.actor, parameters, (observation,)).log_prob(action).squeeze()

    def critic(parameters: dict[str, Tensor], observation: Tensor) -> Tensor:
        return functional_call(algorithm.critic, parameters, (observation,)).squeeze()

    actor_parameters, critic_parameters = (
        {name: each.detach() for name, each in network.named_parameters()}
        for network in (algorithm.actor, algorithm.critic)
    )
    parts: dict[str, Any] = {
        "actor": vmap(grad(log_prob), (None, 0, 0), chunk_size=1024)(actor_parameters, observation, action),
        "critic": vmap(grad(critic), (None, 0), chunk_size=1024)(critic_parameters, observation),
    }
    states = {"state": (observation / observation.std(0)).unflatten(0, (AGENTS, STEPS))}
    return states | {
        kind: (advantage * torch.cat([each.flatten(1) for each in part.values()], 1)).unflatten(0, (AGENTS, STEPS))
        for kind, part in parts.items()
    }


def draw() -> None:
    """Draw the correlations, and the stored learning curves of two results."""
    table = read("online")
    figure, (left, right) = panels(2, width=10, height=3.8)
    for kind, train_steps, color, style, label in (
        ("state", TRAIN_STEPS[1], COLORS[4], "-", "states"),
        ("critic", TRAIN_STEPS[0], COLORS[1], "--", "gradients of the critic, early"),
        ("critic", TRAIN_STEPS[1], COLORS[1], "-", "gradients of the critic, half-trained"),
        ("actor", TRAIN_STEPS[0], COLORS[0], "--", "gradients of the actor, early"),
        ("actor", TRAIN_STEPS[1], COLORS[0], "-", "gradients of the actor, half-trained"),
    ):
        rows = table[(table.kind == kind) & (table.train_steps == train_steps) & (table.lag > 0)]
        by_lag = rows.groupby("lag").correlation
        lags = by_lag.median().index
        left.plot(lags, by_lag.median(), style, color=color, marker="o", markersize=4, label=label)
        left.fill_between(lags, by_lag.min(), by_lag.max(), color=color, alpha=0.2, linewidth=0)
    left.axhline(0, color=INK, linewidth=0.9, linestyle=":")
    left.set(xscale="log", xlabel="steps between the two", ylabel="correlation", title="Two steps of one agent")
    left.set_xticks(LAGS[1:], map(str, LAGS[1:]))
    left.minorticks_off()
    left.legend(fontsize=8)
    for (label, name), color in zip(RESULTS.items(), (COLORS[3], COLORS[2]), strict=True):
        steps, returns = align_curves(list(read_curves(HERE.parent / name).values()))
        right.plot(steps / 1000, np.median(returns, 0), color=color, label=label)
        right.fill_between(steps / 1000, returns.min(0), returns.max(0), color=color, alpha=0.2, linewidth=0)
    right.set(
        xlim=(0, 100), xlabel="thousands of env steps", ylabel="return", title="Actor-critic on CartPole, 3 seeds"
    )
    right.legend(loc="lower right")
    save(figure, "online")
