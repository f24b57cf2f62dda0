"""KL divergence against parameter distance: steps of A2C, natural gradient, TRPO and PPO from one policy."""

import copy
from typing import Any

import numpy as np
import torch
from experiments.lecture.agents import SEEDS, build, iterate, policy_gradient, read, write
from experiments.lecture.drawing import COLORS, INK, panels, save
from tensordict import TensorDict
from torch import Tensor
from torch.nn.utils import parameters_to_vector

from levin.algorithms.trpo import conjugate_gradient
from levin.nn.parameters import assign_parameters

ENV = ["env=cartpole", "env.num_envs=2", "algo.steps_per_iteration=512"]
PPO = ["algo.batch_size=256", "algo.epochs=10", "algo.lr_schedule=constant", "algo.clip_schedule=constant"]
ITERATIONS = (0, 2, 5, 10, 20, 40, 80)  # of TRPO before the steps are measured; 1,024 env steps each
EARLY, LATE = 2, 80
LENGTHS = np.geomspace(1e-3, 1, 10)  # |theta - theta_k| of steps along a fixed direction
DELTAS = (1e-4, 1e-3, 1e-2, 1e-1)
LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3)
FIXED = LENGTHS[6]  # 0.1


def measure() -> None:
    """Train TRPO on CartPole, and at some iterations take all four kinds of step from its policy and one rollout."""
    rows = []
    for seed in SEEDS:
        algorithm, loader = build([*ENV, "algo=trpo", f"seed={seed}"])
        for iteration in range(max(ITERATIONS) + 1):
            if iteration in ITERATIONS:
                rollout = next(loader)
                steps = directions(algorithm, rollout) + trpo_steps(algorithm, rollout) + ppo_steps(algorithm, rollout)
                rows += [{"seed": seed, "iteration": iteration} | step for step in steps]
            iterate(algorithm, loader)
    write("kl", rows)


def directions(algorithm: Any, rollout: TensorDict) -> list[dict[str, Any]]:
    """Steps of several lengths along the policy gradient, and along the natural gradient."""
    batch, _, old, gradient, product = policy_gradient(algorithm, rollout)
    natural = conjugate_gradient(product, gradient, algorithm.cg_iterations)[0]
    start = parameters_to_vector(algorithm.actor_parameters).detach()
    rows = []
    for kind, direction in (("A2C", gradient), ("natural gradient", natural)):
        for length in LENGTHS:
            assign_parameters(algorithm.actor_parameters, start + length * direction / direction.norm())
            rows.append({"kind": kind, "size": length} | effect(algorithm, batch, old, start))
    assign_parameters(algorithm.actor_parameters, start)
    return rows


def trpo_steps(algorithm: Any, rollout: TensorDict) -> list[dict[str, Any]]:
    """Steps of TRPO, with its line search, for several radii delta."""
    batch = algorithm.advantages(rollout)
    start = parameters_to_vector(algorithm.actor_parameters).detach()
    old = algorithm.actor(algorithm.trunk(batch["observation"])).detach()
    rows, target_kl = [], algorithm.target_kl
    for delta in DELTAS:
        algorithm.target_kl = delta
        algorithm.update(batch)
        rows.append({"kind": "TRPO", "size": delta} | effect(algorithm, batch, old, start))
        assign_parameters(algorithm.actor_parameters, start)
    algorithm.target_kl = target_kl
    return rows


def ppo_steps(algorithm: Any, rollout: TensorDict) -> list[dict[str, Any]]:
    """Updates of PPO, ten epochs each, with several learning rates. Its networks are those of TRPO."""
    batch = algorithm.advantages(rollout)
    start = parameters_to_vector(algorithm.actor_parameters).detach()
    old = algorithm.actor(algorithm.trunk(batch["observation"])).detach()
    rows = []
    random_state = torch.get_rng_state()  # TRPO trains on as if PPO had not been here
    for lr in LEARNING_RATES:
        ppo, _ = build([*ENV, "algo=ppo", *PPO, f"algo.lr={lr}"])
        ppo.load_state_dict(copy.deepcopy(algorithm.state_dict()))
        ppo.training_step(rollout, 0)
        rows.append({"kind": "PPO", "size": lr} | effect(ppo, batch, old, start))
    torch.set_rng_state(random_state)
    return rows


@torch.no_grad()
def effect(algorithm: Any, batch: TensorDict, old: Any, start: Tensor) -> dict[str, float]:
    """Return the parameter distance, KL(pi_k || pi) and gain E[(rho - 1) A] of the actor's present parameters."""
    new = algorithm.actor(algorithm.trunk(batch["observation"]))
    ratio = (new.log_prob(batch["action"]) - old.log_prob(batch["action"])).exp()
    distance = (parameters_to_vector(algorithm.actor.parameters()) - start).norm()
    gain = ((ratio - 1) * batch["advantage"]).mean()
    return {"distance": distance.item(), "kl": old.kl(new).mean().item(), "gain": gain.item()}


def draw() -> None:
    """Draw the steps from an early and a late policy, and the KL of a fixed distance during training."""
    table = read("kl")
    figure, axes = panels(3, width=12, height=4)
    kinds = ("A2C", "natural gradient", "TRPO", "PPO")
    for panel, iteration in zip(axes, (EARLY, LATE), strict=False):
        for kind, color in zip(kinds, COLORS, strict=False):
            steps = table[(table.iteration == iteration) & (table.kind == kind)]
            if kind in ("A2C", "natural gradient"):
                middle = steps.groupby("size")[["distance", "kl"]].median()
                panel.plot(middle.distance, middle.kl, color=color, label=kind)
                spread = steps.groupby("size").kl
                panel.fill_between(middle.distance, spread.min(), spread.max(), color=color, alpha=0.2, linewidth=0)
            else:
                panel.scatter(steps.distance, steps.kl, color=color, label=kind, s=22, marker="os"[kind == "PPO"])
        panel.axhline(0.01, color=INK, linewidth=0.8, linestyle=":")
        panel.set(xscale="log", yscale="log", xlabel=r"parameter distance $|\theta - \theta_k|$")
        panel.set(ylim=(1e-8, 10), title=f"Policy after {iteration * 1024:,} env steps")
    axes[0].set(ylabel=r"KL$(\pi_k \| \pi)$, nats")
    axes[0].legend(loc="lower right", fontsize=9)
    axes[0].text(1.2e-3, 0.013, r"TRPO's usual $\delta = 0.01$", fontsize=8, color=INK)
    for kind, size, color, label in (
        ("A2C", FIXED, COLORS[0], "A2C, distance 0.1"),
        ("TRPO", 0.01, COLORS[2], r"TRPO, $\delta = 0.01$"),
        ("PPO", 1e-3, COLORS[3], "PPO, learning rate 1e-3"),
    ):
        steps = table[(table.kind == kind) & np.isclose(table["size"], size, rtol=1e-3)]
        by_time = steps.groupby("iteration").kl
        x = by_time.median().index * 1.024
        axes[2].plot(x, by_time.median(), color=color, label=label, marker="o", markersize=3)
        axes[2].fill_between(x, by_time.min(), by_time.max(), color=color, alpha=0.2, linewidth=0)
    axes[2].set(yscale="log", xlabel="thousands of env steps", title="KL of one step during training")
    axes[2].legend(loc="lower right", fontsize=9)
    save(figure, "kl")
