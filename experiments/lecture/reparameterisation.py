"""Gradient of DDPG through its critic against finite differences of the real discounted return."""

from pathlib import Path
from typing import cast

import matplotlib.pyplot as plt
import torch
from experiments.lecture.critics import checkpoints, train
from experiments.lecture.drawing import COLORS, INK, panels, save
from experiments.study import write_table
from torch import Tensor

from levin.algorithms.ddpg import DDPG
from levin.envs.batched import Pendulum
from levin.lab.pictures import read_csv

HERE = Path(__file__).parent
SEEDS = range(3)
STARTS, STEPS = 48, 300  # at gamma = 0.98 the rewards that are left out have 0.2% of the weight
STEP_SIZE = 0.01  # of the finite differences, in a weight of the last layer


def last_layer(ddpg: DDPG) -> tuple[torch.nn.Module, Tensor]:
    """Return the actor's network without its last layer, and that layer's weights and bias in one row `[P]`."""
    *body, last = ddpg.actor.network
    return torch.nn.Sequential(ddpg.actor.trunk, *body), torch.cat([last.weight[0], last.bias]).detach()


@torch.no_grad()
def play(ddpg: DDPG, weights: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Play episodes with M variants of the last layer `[M, P]`, each from all starts `[N, 2]`.

    Returns:
        The discounted return of each variant `[M]`, and the observations `[STEPS, M, N, 3]`.
    """
    body, _ = last_layer(ddpg)
    env = Pendulum(num_envs=1)
    state, total, seen = starts.repeat(len(weights), 1), torch.zeros(len(weights), dtype=torch.float64), []
    for t in range(STEPS):
        observation = env.observe(state)
        feature = body(observation).view(len(weights), len(starts), -1)
        action = (torch.einsum("mnf,mf->mn", feature, weights[:, :-1]) + weights[:, -1:]).tanh()
        state, reward, _ = env.dynamics(state, env.action_bound * action.flatten().unsqueeze(-1))
        total += ddpg.gamma**t * reward.view(len(weights), -1).mean(1)
        if len(weights) == 1:
            seen.append(observation.view(1, len(starts), -1))
    return total, torch.stack(seen) if seen else torch.empty(0)


def critic_gradient(ddpg: DDPG, weights: Tensor, seen: Tensor, *, discounted: bool) -> Tensor:
    """Return the gradient `[P]` of sum_t gamma^t Q(s_t, mu(s_t)) in the last layer, at visited states `[T, N, 3]`.

    Not discounted: every visited state has the same weight, as in replay; the length then has no meaning.
    """
    body, _ = last_layer(ddpg)
    theta = weights.clone().requires_grad_()
    action = (body(seen).detach() @ theta[:-1] + theta[-1]).tanh().unsqueeze(-1)
    q = ddpg.critic.first(seen.flatten(0, 1), action.flatten(0, 1)).view(seen.shape[:2]).mean(1)  # [T]
    weight = ddpg.gamma ** torch.arange(len(q)) if discounted else torch.ones(len(q))
    return torch.autograd.grad((weight * q).sum(), theta)[0]


def differences(ddpg: DDPG, weights: Tensor, starts: Tensor, step: float) -> Tensor:
    """Return central finite differences of the discounted return in every weight, `[P]`."""
    shift = step * torch.eye(len(weights))
    up, _ = play(ddpg, weights + shift, starts)
    down, _ = play(ddpg, weights - shift, starts)
    return ((up - down) / (2 * step)).float()


@torch.no_grad()
def returns_from(ddpg: DDPG, state: Tensor) -> Tensor:
    """Return the discounted return of the policy from each state, `[N, 2] -> [N]`."""
    env, total = Pendulum(num_envs=1), torch.zeros(len(state), dtype=torch.float64)
    for t in range(STEPS):
        state, reward, _ = env.dynamics(state, env.action_bound * ddpg.actor(env.observe(state)))
        total += ddpg.gamma**t * reward
    return total


@torch.no_grad()
def value_correlation(ddpg: DDPG, starts: Tensor) -> Tensor:
    """Return the correlation of Q(s, mu(s)) with the discounted return over the start states `[N, 2]`."""
    observation = Pendulum(num_envs=1).observe(starts)
    q = ddpg.critic.first(observation, ddpg.actor(observation)).squeeze(-1)
    return torch.corrcoef(torch.stack([q, returns_from(ddpg, starts).float()]))[0, 1]


def slopes(ddpg: DDPG, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return 512 visited states `[512, 3]`, and dQ/da there: finite differences of returns, and the critic's, `[512]`.

    The first action is shifted, and the policy acts from then on. States are sampled in proportion to gamma^t.
    """
    torch.manual_seed(0)
    flat = seen.flatten(0, 1)  # [T N, 3]
    weight = (ddpg.gamma ** torch.arange(len(seen))).repeat_interleave(seen.shape[1])
    observation = flat[torch.multinomial(weight, 512)]
    state = torch.stack([torch.atan2(observation[:, 1], observation[:, 0]), observation[:, 2]], -1).double()
    action = ddpg.actor(observation).detach()
    env, after = Pendulum(num_envs=1), []
    for shift in (STEP_SIZE, -STEP_SIZE):
        then, reward, _ = env.dynamics(state, env.action_bound * (action + shift))
        after.append(reward + ddpg.gamma * returns_from(ddpg, then))
    real = (after[0] - after[1]) / (2 * STEP_SIZE)
    action = action.requires_grad_()
    (critic,) = torch.autograd.grad(ddpg.critic.first(observation, action).sum(), action)
    return observation, real.float(), critic.squeeze(-1)


def action_gradient(ddpg: DDPG, weights: Tensor, observation: Tensor, slope: Tensor) -> Tensor:
    """Return sum_s dQ/da grad mu(s) in the last layer, `[P]`, for given slopes `[B]` at observations `[B, 3]`."""
    body, _ = last_layer(ddpg)
    theta = weights.clone().requires_grad_()
    return torch.autograd.grad(slope @ (body(observation) @ theta[:-1] + theta[-1]).tanh(), theta)[0]


def measure() -> None:
    """Write, for every checkpoint, how the gradient through the critic agrees with finite differences."""
    env, rows = Pendulum(num_envs=STARTS), []
    env.set_seed(0)
    starts = env.initial_states(torch.arange(STARTS), 0)
    for (_, seed), run in train(("ddpg",), SEEDS).items():
        for ddpg in cast(list[DDPG], checkpoints(run)):
            ddpg.requires_grad_(False)
            _, weights = last_layer(ddpg)
            value, seen = play(ddpg, weights.unsqueeze(0), starts)
            real = differences(ddpg, weights, starts, STEP_SIZE)
            through = critic_gradient(ddpg, weights, seen[:, 0], discounted=True)
            flat = critic_gradient(ddpg, weights, seen[:, 0], discounted=False)
            observation, *pair = slopes(ddpg, seen[:, 0])
            ascent = action_gradient(ddpg, weights, observation, pair[0])
            numbers = {
                "correlation of values": value_correlation(ddpg, starts),
                "correlation of slopes": torch.corrcoef(torch.stack(pair))[0, 1],
                "same sign of slopes": (pair[0].sign() == pair[1].sign()).float().mean(),
                "return": value[0],
                "cosine": torch.cosine_similarity(real, through, dim=0),
                "cosine, true slopes": torch.cosine_similarity(real, ascent, dim=0),
                "cosine, equal weights": torch.cosine_similarity(real, flat, dim=0),
                "length ratio": through.norm() / real.norm(),
            }
            step = round(ddpg.env_steps / 1000) * 1000
            rows += [[seed, step, name, f"{float(number):.5g}", ""] for name, number in numbers.items()]
            if seed == 0:
                half = differences(ddpg, weights, starts, STEP_SIZE / 2)  # how exact finite differences are
                cosine = float(torch.cosine_similarity(real, half, dim=0))
                rows.append([seed, step, "cosine, half the step", f"{cosine:.5g}", ""])
                pairs = zip(*(part.tolist() for part in pair), strict=True)
                rows += [[seed, step, "slope", f"{left:.5g}", f"{right:.5g}"] for left, right in pairs]
    write_table(HERE / "reparameterisation.csv", ["seed", "env_steps", "quantity", "value", "critic"], rows)


def draw() -> None:
    """Draw the stochastic graph, derivatives of the critic in the action, and the agreement over the training."""
    table = read_csv(HERE / "reparameterisation.csv")
    figure, (left, middle, right) = panels(3, width=12.0, height=3.9, ratios=(1.1, 1, 1))
    draw_graph(left)
    steps = sorted({int(row["env_steps"]) for row in table})
    for step, color in ((steps[1], COLORS[3]), (steps[-1], COLORS[0])):
        rows = [row for row in table if row["quantity"] == "slope" and int(row["env_steps"]) == step]
        pairs = [(float(row["value"]), float(row["critic"])) for row in rows]
        middle.scatter(*zip(*pairs, strict=True), s=14, color=color, alpha=0.5, lw=0, label=f"{step:,} env steps")
    middle.axline((0, 0), slope=1, color=INK, lw=0.9)
    middle.set(
        xlim=(-8, 8), ylim=(-4, 4), xlabel="slope of the return, finite differences", ylabel="slope of the critic"
    )
    middle.set_title("dQ/da at visited states, seed 0")
    middle.legend(fontsize=8.5, loc="upper left")
    lines = {"cosine": ("gradient through the critic", COLORS[0]), "cosine, true slopes": ("true slopes", COLORS[2])}
    lines["correlation of slopes"] = ("correlation of slopes", COLORS[4])
    for name, (label, color) in lines.items():
        values = {
            step: [float(r["value"]) for r in table if r["quantity"] == name and int(r["env_steps"]) == step]
            for step in steps
        }
        right.plot(steps, [sum(each) / len(each) for each in values.values()], color=color, lw=2, label=label)
        for step, each in values.items():
            right.plot([step] * len(each), each, "o", ms=5, color=color, alpha=0.7)
    right.axhline(0, color=INK, lw=0.8)
    right.set(xlabel="env steps", ylabel="cosine, correlation", title="Agreement with finite differences")
    right.set_ylim(-1.05, 1.75)
    right.legend(fontsize=8.5, loc="upper right")
    save(figure, "reparameterisation")


def draw_graph(axes: plt.Axes) -> None:
    """Draw one step of an episode as a stochastic graph: the gradient stops at the env and passes the critic."""
    places = {
        "theta": (0, 2),
        "s": (0, 1),
        "a": (1.1, 1.45),
        "env": (2, 1),
        "s'": (3, 1),
        "r": (2.6, 0.2),
        "Q": (1.7, 2.4),
    }
    arrows = [("theta", "a", COLORS[2]), ("s", "a", INK), ("a", "env", COLORS[3]), ("s", "env", INK)]
    arrows += [("env", "s'", COLORS[3]), ("env", "r", COLORS[3]), ("a", "Q", COLORS[2]), ("s", "Q", INK)]
    for start, end, color in arrows:
        arrow = {"arrowstyle": "-|>", "color": color, "shrinkA": 14, "shrinkB": 14, "lw": 1.6}
        axes.annotate("", places[end], places[start], arrowprops=arrow)
    for name, place in places.items():
        marker = {"theta": "s", "env": "s", "Q": "s", "r": "D"}.get(name, "o")
        color = {"env": COLORS[3], "Q": COLORS[2]}.get(name, INK)
        axes.plot(*place, marker, ms=24, mfc="none", mec=color, mew=1.8)
        axes.text(*place, r"$\theta$" if name == "theta" else name, ha="center", va="center", color=INK)
    axes.text(1.56, 1.22, "x", color=COLORS[3], fontsize=16, fontweight="bold", ha="center", va="center")
    axes.set(xlim=(-0.4, 3.4), ylim=(-0.2, 2.7), title="No path through the env, one through Q")
    axes.axis("off")
