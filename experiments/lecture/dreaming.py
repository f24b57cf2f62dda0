"""Returns in the dream against returns in the env, from the same first observations, for policies of four kinds."""

import gzip
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import cast

import torch
from experiments.lecture.drawing import COLORS, INK, panels, save
from experiments.lecture.world_models import load_dreamer
from experiments.study import write_table
from torch import Tensor

from levin.algorithms.sac import SAC
from levin.envs.batched import Pendulum
from levin.lab.pictures import read_csv
from levin.runs.load import load_algorithm

HERE = Path(__file__).parent
STARTS, STEPS = 128, 200
UNIFORM = 27.7  # mean return of uniform actions in Dodge, experiments/worlds
Policy = Callable[[Tensor, Tensor], Tensor]  # features and observations `[N, *]` to actions `[N, 1]` in [-1, 1]


def policies() -> dict[str, Policy]:
    """Return four policies. In a dream, SAC reads decoded observations; the Dreamer's policy reads features."""
    dreamer, sac = load_dreamer(), cast(SAC, load_algorithm(HERE.parent / "sac_pendulum"))
    return {
        "Dreamer": lambda feature, _: cast(Tensor, dreamer.actor(feature).mode),
        "SAC": lambda _, observation: sac.actor(observation).mode,
        "SAC, half uniform": lambda _, observation: mix(sac.actor(observation).mode),
        "uniform": lambda feature, _: 2 * torch.rand(len(feature), 1) - 1,
    }


def mix(action: Tensor) -> Tensor:
    """Return actions `[N, 1]` of which each is replaced by a uniform one with probability 1/2."""
    return torch.where(torch.rand_like(action) < 0.5, 2 * torch.rand_like(action) - 1, action)


@torch.no_grad()
def returns(policy: Policy) -> tuple[Tensor, Tensor]:
    """Return the returns `[N]` in the dream and in the env, of episodes with the same first observation."""
    torch.manual_seed(0)
    model, env = load_dreamer().model, Pendulum(num_envs=STARTS)
    env.set_seed(0)
    observation = env.reset()["observation"]
    start = model.initial_state(observation)
    state, dreamed = start, torch.zeros(STARTS)
    for _ in range(STEPS):
        action = policy(state.feature, model.decode(state.feature)[""])
        state = model.imagine_step(state, model.encode_action(action))
        dreamed += model.reward_model(state.feature).squeeze(-1)
    state, real = start, torch.zeros(STARTS)
    for _ in range(STEPS):
        action = policy(state.feature, observation)
        after, reward, _ = env.dynamics(env.state, env.action_bound * action)
        env.state.copy_(after)
        observation = env.observe(after)
        state, real = model.observe(state, model.encode_action(action), observation), real + reward
    return dreamed, real


def measure() -> None:
    """Write the two returns of every policy and start."""
    rows = []
    for name, policy in policies().items():
        pairs = torch.stack(returns(policy), 1).tolist()
        rows += [[name, start, f"{dreamed:.2f}", f"{real:.2f}"] for start, (dreamed, real) in enumerate(pairs)]
    write_table(HERE / "dreaming.csv", ["policy", "start", "dream_return", "return"], rows)


def draw() -> None:
    """Draw the returns of each start, and beside them policies that have learned in dreams alone."""
    table = read_csv(HERE / "dreaming.csv")
    figure, (left, middle, right) = panels(3, width=11.0, height=3.9, ratios=(1.5, 1, 1))
    for name, color in zip(("uniform", "SAC, half uniform", "SAC", "Dreamer"), COLORS[3::-1], strict=True):
        pairs = [(float(row["return"]), float(row["dream_return"])) for row in table if row["policy"] == name]
        left.scatter(*zip(*pairs, strict=True), s=16, color=color, alpha=0.55, lw=0, label=name)
        left.plot(*(mean(part) for part in zip(*pairs, strict=True)), "P", ms=11, mfc=color, mec=INK, mew=1.2)
    left.axline((0, 0), slope=1, color=INK, lw=0.9)
    left.set(xlabel="return in the env", ylabel="return in the dream", title="Same first observation, 200 steps")
    left.set_xticks(range(-1500, 1, 500))
    left.legend(loc="upper left")
    learned = read_csv(HERE.parent / "worlds" / "returns.csv")
    for axes, run, title in ((middle, "sac", "SAC, dreams of a Dreamer"), (right, "ppo", "PPO, dreams of V and M")):
        for seed, row in enumerate(row for row in learned if row["run"] == run):
            values = [float(row["dream_return"]), float(row["return"])]
            axes.plot(["dream", "env"], values, "o-", color=COLORS[seed], lw=2, ms=7, label=f"seed {seed}")
        axes.set(title=title, ylabel="return", xlim=(-0.3, 1.3))
    with gzip.open(HERE.parent / "sac_pendulum" / "curves.csv.gz", "rt") as file:
        rows = [line.strip().split(",") for line in file][1:]
    last = {row[0]: float(row[2]) for row in rows}
    middle.axhline(mean(last.values()), color=INK, ls="--", lw=1.5, label="SAC, learned in the env")
    middle.set_ylim(-290, -60)
    right.axhline(UNIFORM, color=INK, ls=":", lw=1.5, label="uniform, in the env")
    middle.legend(loc="lower right", fontsize=8)
    right.legend(loc="center", fontsize=8)
    save(figure, "dreaming")
