"""Weights of the actions of one episode: return, Q and advantage; and variance against bias of the gradients."""

from typing import Any

import numpy as np
import torch
from experiments.lecture.agents import read, write
from experiments.lecture.drawing import COLORS, INK, panels, save
from experiments.lecture.q_critic import CRITICS, GAMMA, REFERENCE, fitted, measure_q, with_policy
from experiments.variance.run import collect_episodes, half_trained_policy

EPISODES, FITTED = 3, 2000


def measure() -> None:
    """Measure the weights of each step of some episodes, and the true advantage of each action."""
    policy = half_trained_policy()
    fits = {form: fitted(form, 0, policy) for form in CRITICS}
    for algorithm, states in fits.values():
        algorithm.critic.load_state_dict(states[FITTED])
    loader = with_policy(REFERENCE, policy, "seed=2")[1]
    rows = []
    for episode in range(EPISODES):
        batch: Any = collect_episodes(loader, 1).flatten(0, 1)
        q_form, advantage_form = (fits[form][0] for form in ("Q critic", "advantage"))
        observation, action = batch["observation"], batch["action"]
        true_q = measure_q(advantage_form, observation)
        with torch.no_grad():
            probability = advantage_form.actor(advantage_form.trunk(observation)).log_probs.exp()
        true = true_q.gather(1, action.unsqueeze(1)) - (probability * true_q).sum(1, keepdim=True)
        returns, following = [], 0.0
        for reward in reversed(batch["next", "reward"].flatten().tolist()):
            following = reward + GAMMA * following
            returns.append(following)
        columns = {
            "return": torch.tensor(returns[::-1]),
            "q": q_form.weight(batch).flatten(),
            "value": advantage_form.value(batch).detach().flatten(),
            "advantage": advantage_form.weight(batch).flatten(),
            "true_q": true_q.gather(1, action.unsqueeze(1)).flatten(),
            "true_advantage": true.flatten(),
        }
        for step in range(len(batch)):
            rows.append(
                {"episode": episode, "step": step} | {name: each[step].item() for name, each in columns.items()}
            )
    write("advantage", rows, digits=4)


def draw() -> None:
    """Draw the weights of one episode, estimated against true advantages, and variance against bias."""
    table, critics = read("advantage"), read("q_critic")
    figure, (left, middle, right) = panels(3, width=12, height=3.9)
    episode = table[table.episode == table.groupby("episode").size().idxmax()]
    for column, label, color in (
        ("return", "$G_t$", COLORS[1]),
        ("q", r"$Q_\phi(s_t, a_t)$", COLORS[0]),
        ("advantage", r"$A_t = r + \gamma V(s_{t+1}) - V(s_t)$", COLORS[2]),
    ):
        left.plot(episode.step, episode[column], color=color, label=label)
    left.axhline(0, color=INK, linewidth=0.9, linestyle=":")
    left.set(xlabel="step of the episode", ylabel="weight of grad log pi", title="Weights in one episode")
    left.legend(fontsize=9)
    for estimate, label, color in (
        (table["return"] - table.value, "$G_t - V(s_t)$", COLORS[1]),
        (table.advantage, r"$r + \gamma V(s_{t+1}) - V(s_t)$", COLORS[2]),
    ):
        correlation = np.corrcoef(table.true_advantage, estimate)[0, 1]
        middle.scatter(table.true_advantage, estimate, s=7, alpha=0.6, color=color, label=f"{label}: {correlation:.2f}")
    limits = np.array([table.true_advantage.min(), table.true_advantage.max()])
    middle.plot(limits, limits, color=INK, linewidth=0.9, linestyle=":")
    middle.set(xlabel="true advantage", ylabel="estimate", title="Estimates of the advantage: correlation")
    middle.legend(fontsize=9)
    for form, color in (("Q critic", COLORS[0]), ("advantage", COLORS[2])):
        by_updates = critics[critics.form == form].groupby("updates")
        variance, bias = by_updates.variance.median(), by_updates.bias.median()
        right.plot(bias, variance, color=color, marker="o", markersize=4, label=form)
        for updates in variance.index:
            right.annotate(
                f"{updates:,}",
                (bias[updates], variance[updates]),
                (4, 4),
                textcoords="offset points",
                fontsize=7,
                color=INK,
            )
    baseline = critics[critics.form == REFERENCE].iloc[0]
    right.axhline(baseline.variance, color=INK, linewidth=0.9, linestyle=":")
    right.text(0, baseline.variance * 1.2, "value baseline, without bias", fontsize=8, color=INK)
    right.set(yscale="log", xlabel="norm of the bias", ylabel="variance", title="Gradients, by updates of the critic")
    right.legend(fontsize=9, loc="lower left")
    save(figure, "advantage")
