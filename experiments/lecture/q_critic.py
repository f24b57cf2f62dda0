"""Variance and bias of the policy gradient with learned critics, by the number of updates that fitted the critic."""

import copy
from typing import Any

import numpy as np
import torch
from experiments.lecture.agents import SEEDS, read, true_returns, write
from experiments.lecture.drawing import COLORS, INK, panels, save
from experiments.variance.run import EXACT, FORMS, actor_loss, build, collect_episodes, half_trained_policy
from torch import Tensor

UPDATES = (0, 30, 100, 300, 1000, 2000)
FIT_EPISODES, TRAJECTORIES = 30, 200
STATES, RETURNS = 128, 64
CRITICS = {"Q critic": "q", "advantage": "advantage"}
REFERENCE = "value baseline"  # unbiased if the baseline depends on the state only
GAMMA = 0.99


def measure() -> None:
    """Fit critics to the half-trained policy of experiments/variance, and measure the gradients that they give."""
    policy = half_trained_policy()
    critics = {(form, seed): fitted(form, seed, policy) for form in CRITICS for seed in SEEDS}
    reference = with_policy(REFERENCE, policy)[0]
    reference.critic.load_state_dict(
        critics["advantage", 0][1][max(UPDATES)]
    )  # any V: it does not change the expectation
    loader = with_policy(REFERENCE, policy, "seed=1")[1]
    trajectories = [collect_episodes(loader, 1) for _ in range(TRAJECTORIES)]
    expected = np.stack([gradient(reference, each) for each in trajectories])
    observation = torch.cat([each["observation"].flatten(0, 1) for each in trajectories])[::37][:STATES]
    true_q = measure_q(reference, observation)
    rows = [row(expected, expected) | {"form": "value baseline", "seed": 0, "updates": max(UPDATES)}]
    for (form, seed), (algorithm, states) in critics.items():
        for updates, state in states.items():
            algorithm.critic.load_state_dict(state)
            samples = np.stack([gradient(algorithm, each) for each in trajectories])
            error = value_error(algorithm, observation, true_q)
            rows.append({"form": form, "seed": seed, "updates": updates} | error | row(samples, expected))
    write("q_critic", rows)


def with_policy(form: str, policy: dict[str, Tensor], *words: str) -> tuple[Any, Any]:
    """Build a form of experiments/variance with these parameters of the policy."""
    per_episode = ["algo.episodes_per_update=1"] if form in CRITICS else []
    algorithm, loader = build([*FORMS[form], *EXACT, *per_episode, *words])
    algorithm.actor.load_state_dict(policy)
    return algorithm, loader


def fitted(form: str, seed: int, policy: dict[str, Tensor]) -> tuple[Any, dict[int, dict[str, Tensor]]]:
    """Fit a critic to the policy's values; return the algorithm, and the critic's parameters by number of updates."""
    algorithm, loader = with_policy(form, policy, f"seed={seed + 10}")
    batch = collect_episodes(loader, FIT_EPISODES).flatten(0, 1)
    states = {}
    for update in range(max(UPDATES) + 1):
        if update in UPDATES:
            states[update] = copy.deepcopy(algorithm.critic.state_dict())
        algorithm.step(algorithm.critic_optimizer, algorithm.critic_loss(batch))
    return algorithm, states


def gradient(algorithm: Any, trajectory: Any) -> np.ndarray:
    """Return the gradient of J from one trajectory, `[P]`."""
    parts = torch.autograd.grad(-actor_loss(algorithm, trajectory), list(algorithm.actor.parameters()))
    return torch.cat([part.flatten() for part in parts]).numpy()


@torch.no_grad()
def measure_q(algorithm: Any, observation: Tensor) -> Tensor:
    """Return Q^pi of both actions in these states, `[B, 2]`: means of `RETURNS` sampled returns."""
    start = observation.repeat_interleave(2 * RETURNS, 0)
    first = torch.arange(2).repeat_interleave(RETURNS).repeat(len(observation))
    torch.manual_seed(0)
    returns = true_returns(start, lambda s: algorithm.actor(algorithm.trunk(s)).sample(), GAMMA, first)
    return returns.view(len(observation), 2, RETURNS).mean(2).float()


@torch.no_grad()
def value_error(algorithm: Any, observation: Tensor, true_q: Tensor) -> dict[str, float]:
    """Return the root mean squared error of the critic, Q or V, and its mean error."""
    value = algorithm.critic(observation)
    probability = algorithm.actor(algorithm.trunk(observation)).log_probs.exp()
    true = true_q if value.shape[1] == 2 else (probability * true_q).sum(1, keepdim=True)
    error = value - true
    return {"rmse": error.square().mean().sqrt().item(), "mean_error": error.mean().item()}


def row(samples: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """Variance of gradients `[TRAJECTORIES, P]` and their squared bias, without what the finite number adds to it."""
    difference = samples - expected  # of the same trajectories
    noise = difference.var(0, ddof=1).sum() / len(samples)
    norm = (expected.mean(0) ** 2).sum() - expected.var(0, ddof=1).sum() / len(samples)
    bias = max((difference.mean(0) ** 2).sum() - noise, 0.0)
    return {"variance": samples.var(0, ddof=1).sum(), "bias": bias**0.5, "norm": max(norm, 0.0) ** 0.5}


def draw() -> None:
    """Draw the variances of experiments/variance, and bias and variance of the Q critic as it is fitted."""
    table = read("q_critic")
    figure, axes = panels(3, width=12, height=3.8)
    draw_forms(axes[0])
    baseline = table[table.form == REFERENCE].iloc[0]
    rows = table[table.form == "Q critic"].assign(bias=lambda each: each.bias / each.norm).groupby("updates")
    x = [max(updates, 10) for updates in UPDATES]
    for panel, column, color in ((axes[1], "bias", COLORS[3]), (axes[2], "variance", COLORS[0])):
        panel.plot(x, rows[column].median(), color=color, marker="o", markersize=4)
        panel.fill_between(x, rows[column].min(), rows[column].max(), color=color, alpha=0.2, linewidth=0)
        panel.set(xscale="log", xlabel="updates of the critic")
        panel.set_xticks(x, ["0", "30", "100", "300", "1k", "2k"])
        panel.minorticks_off()
    axes[1].set(ylim=(0, 1.1), title="Q critic: bias, relative to the gradient")
    axes[2].axhline(baseline.variance, color=INK, linestyle=":", linewidth=0.9)
    axes[2].text(10, baseline.variance * 1.15, "value baseline", fontsize=8, color=INK)
    axes[2].set(yscale="log", title="Q critic: variance")
    save(figure, "q_critic")


def draw_forms(axes: Any) -> None:
    """Draw the variances that experiments/variance has measured."""
    table = read("../variance/gradient").iloc[::-1]
    colors = [COLORS[0] if form in CRITICS else INK for form in table.form]
    axes.barh(table.form, table.variance, xerr=1.96 * table.standard_error, color=colors, ecolor=INK)
    axes.set(xscale="log", xlim=(1e3, 3e5), title="Variance of one trajectory's gradient")
