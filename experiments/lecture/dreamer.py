"""Gradient of the imagined return by backpropagation and by the score function, and learning curves."""

from collections import defaultdict
from pathlib import Path
from statistics import mean

import torch
from experiments.lecture.drawing import COLORS, INK, panels, save
from experiments.lecture.world_models import load_dreamer, play
from experiments.study import write_table
from torch import Tensor

from levin.algorithms.dreamer import Dreamer
from levin.algorithms.dreamer_networks import Policy
from levin.lab.pictures import read_csv
from levin.model_based.recurrent import State
from levin.results.curves import align_curves, read_curves

HERE = Path(__file__).parent
HORIZONS = (1, 2, 5, 10, 15, 20, 30, 40)
DREAMS, ESTIMATES = 256, 40  # dreams of one estimate, and estimates
REINFORCE = "algo=dreamer algo.actor_gradient=reinforce"  # name of the run in experiments/dreaming
METHODS = ("dynamics", "through the policy too", "score", "score, leave-one-out")


def imagined_rewards(dreamer: Dreamer, state: State, horizon: int, method: str) -> tuple[Tensor, Tensor]:
    """Return the discounted rewards of imagined steps, and the log-probability of their actions: both `[N, H]`.

    The gradient flows through the model for `dynamics`, which is Dreamer's: there the policy's input is detached. With
    `through the policy too`, it is not. For the score function, the actions are detached.
    """
    rewards, log_probs = [], []
    for t in range(horizon):
        feature = state.feature if method == "through the policy too" else state.feature.detach()
        policy = dreamer.actor(feature)
        draw, action = policy.draw()
        if method.startswith("score"):
            log_probs.append(policy.log_prob_of_draw(draw.detach()))
            action = action.detach()
        state = dreamer.model.imagine_step(state, action)
        rewards.append(dreamer.gamma**t * dreamer.model.reward_model(state.feature))
    return torch.cat(rewards, 1), torch.cat(log_probs, 1) if log_probs else torch.zeros(())


def gradient(dreamer: Dreamer, starts: State, horizon: int, method: str) -> Tensor:
    """Return one estimate `[P]` of the gradient of the imagined return, averaged over the start states."""
    if method.startswith("score"):
        pairs = [imagined_rewards(dreamer, starts, horizon, method) for _ in range(2 if "leave" in method else 1)]
        to_go = [reward.detach().flip(1).cumsum(1).flip(1) for reward, _ in pairs]
        if len(pairs) == 2:  # two dreams from each start: the return of the other one is the baseline
            to_go = [to_go[0] - to_go[1], to_go[1] - to_go[0]]
        objective = sum((log_prob * weight).sum(1).mean() for (_, log_prob), weight in zip(pairs, to_go, strict=True))
        objective = objective / len(pairs)
    else:
        objective = imagined_rewards(dreamer, starts, horizon, method)[0].sum(1).mean()
    return torch.cat([part.flatten() for part in torch.autograd.grad(objective, list(dreamer.actor.parameters()))])


def measure() -> None:
    """Estimate the gradients of a new and of the stored policy in the stored model, by horizon and method."""
    dreamer, rows = load_dreamer(), []
    played = play(dreamer, uniform=True)
    starts = State(played["deter"][:DREAMS], played["stoch"][:DREAMS])
    torch.manual_seed(0)
    new = Policy(dreamer.model.features, dreamer.env, 64, "elu", 1.0)
    for name, policy, horizons, methods in (
        ("new", new, HORIZONS, METHODS),
        ("stored", dreamer.actor.requires_grad_(), (1, 2, 5, 10, 15, 20), METHODS[:2]),
    ):
        dreamer.actor = policy
        for horizon in horizons:
            estimates = {
                method: torch.stack([gradient(dreamer, starts, horizon, method) for _ in range(ESTIMATES)])
                for method in methods
            }
            full = estimates[METHODS[1]].mean(0)
            for method, each in estimates.items():
                std = (each - each.mean(0)).square().sum(1).mean().sqrt()
                cosine = torch.cosine_similarity(each.mean(0), full, dim=0)
                numbers = (f"{number:.5g}" for number in (std, each.mean(0).norm(), cosine))
                rows.append([name, method, horizon, *numbers])
    write_table(HERE / "dreamer.csv", ["policy", "method", "horizon", "std", "length", "cosine"], rows)


def mean_curve(path: Path, run: str | None = None) -> tuple[list[int], list[float]]:
    """Return env steps and mean return over the seeds of a stored result, or of one run of a study's learning.csv."""
    if run is None:
        steps, returns = align_curves(list(read_curves(path).values()))
        return steps.tolist(), returns.mean(0).tolist()
    by_step: dict[int, list[float]] = defaultdict(list)
    for row in read_csv(path / "learning.csv"):
        if row["run"] == run:
            by_step[int(row["env_steps"])].append(float(row["return_mean"]))
    return sorted(by_step), [mean(by_step[step]) for step in sorted(by_step)]


def draw() -> None:
    """Draw noise and agreement of the gradients over the horizon, and stored learning curves."""
    table = read_csv(HERE / "dreamer.csv")
    figure, (left, middle, right) = panels(3, width=11.5, height=3.7)
    full = {(row["policy"], row["horizon"]): float(row["length"]) for row in table if row["method"] == METHODS[1]}
    for method, color in zip(METHODS, (COLORS[0], COLORS[4], COLORS[3], COLORS[1]), strict=True):
        for policy, style in (("new", "o-"), ("stored", "o--")):
            rows = [row for row in table if row["method"] == method and row["policy"] == policy]
            horizons = [int(row["horizon"]) for row in rows]
            if policy == "new":
                noise = [float(row["std"]) / full["new", row["horizon"]] for row in rows]
                left.plot(horizons, noise, style, ms=4, lw=2, color=color, label=method)
            if method == "dynamics" or (method == METHODS[3] and rows):
                cosines = [float(row["cosine"]) for row in rows]
                middle.plot(horizons, cosines, style, ms=4, lw=2, color=color, label=f"{method}, {policy} policy")
    left.set(xlabel="imagined steps H", ylabel="standard deviation / length of the gradient", yscale="log")
    left.set_title(f"One estimate from {DREAMS} starts, new policy")
    left.legend(fontsize=8)
    middle.axhline(1, color=INK, lw=0.8)
    middle.set(
        xlabel="imagined steps H", ylabel="cosine with the full gradient", title=f"Means of {ESTIMATES} estimates"
    )
    middle.set_ylim(-0.1, 1.1)
    middle.legend(fontsize=8, loc="lower left")
    experiments = HERE.parent
    curves = {
        "Dreamer": mean_curve(experiments / "dreamer_pendulum"),
        "Dreamer, score": mean_curve(experiments / "dreaming", REINFORCE),
        "SAC": mean_curve(experiments / "sac_pendulum"),
    }
    for (name, curve), color in zip(curves.items(), (COLORS[0], COLORS[3], COLORS[2]), strict=True):
        right.plot(*curve, lw=2, color=color, label=name)
    right.set(xlabel="env steps", ylabel="return", title="Pendulum-v1, mean over seeds")
    right.legend()
    save(figure, "dreamer")
