"""Signals of one episode of LunarLander-v3: rewards, returns, values and advantages, by the stored PPO policy."""

from typing import Any

import gymnasium as gym
import torch
from experiments.lecture.drawing import COLORS, HERE, INK, panels, read, save
from experiments.study import write_table

from levin.core.paths import EXPERIMENTS
from levin.data import returns
from levin.runs.load import load_algorithm, load_config
from levin.training.session import build_run

NAME = "trajectory"
SEED = 9
FIT_ITERATIONS, FIT_UPDATES = 6, 4000  # of 1,024 vector steps each; of the critic
ACTIONS = ("none", "left engine", "main engine", "right engine")


def fit_critic(algorithm: Any, loader: Any) -> None:
    """Fit the critic to this policy's returns: a stored policy comes without the critic it was trained with."""
    rollout = torch.cat([next(loader) for _ in range(FIT_ITERATIONS)], 1)  # [N, T]: rollouts follow each other
    after = rollout.get("next")
    optimizer = torch.optim.Adam(algorithm.critic.parameters(), lr=3e-3)
    for update in range(FIT_UPDATES):
        if update % (FIT_UPDATES // 8) == 0:  # new targets: V stands for the rest of an episode that is cut
            optimizer.param_groups[0]["lr"] = 3e-3 * (1 - update / FIT_UPDATES)
            with torch.no_grad():
                next_value = algorithm.critic(algorithm.trunk(after["observation"]))
            ends = {"terminated": after["terminated"], "done": after["done"], "gamma": algorithm.gamma}
            target = returns.reward_to_go(reward=after["reward"], next_value=next_value, **ends).flatten()
        batch = torch.randint(len(target), (1024,))
        value = algorithm.critic(algorithm.trunk(rollout["observation"].flatten(0, 1)[batch])).squeeze(-1)
        loss = ((value - target[batch]) / target.std()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def measure() -> None:
    """Write trajectory.csv: one row for each step of an episode."""
    result = EXPERIMENTS / "ppo_lunarlander"
    algorithm, loader = build_run(load_config(result, code_sections=()))
    algorithm.load_state_dict(load_algorithm(result).state_dict())
    fit_critic(algorithm, loader)
    torch.manual_seed(SEED)
    env = gym.make("LunarLander-v3")
    observation, _ = env.reset(seed=SEED)
    values, actions, rewards, contacts, terminated, truncated = [], [], [], [], False, False
    with torch.no_grad():
        while not (terminated or truncated):
            features = algorithm.trunk(torch.as_tensor(observation).unsqueeze(0))
            values.append(float(algorithm.critic(features)))
            actions.append(int(algorithm.actor(features).sample()))
            observation, reward, terminated, truncated, _ = env.step(actions[-1])
            rewards.append(float(reward))
            contacts.append(int(observation[6] + observation[7]))
    assert terminated, "choose a seed whose episode ends by itself: its last state has the value 0"
    reward, value = (torch.tensor(each).view(1, -1, 1) for each in (rewards, values))
    done = torch.zeros_like(reward, dtype=torch.bool)
    done[:, -1] = True
    ends = {"terminated": done, "done": done, "gamma": algorithm.gamma}
    next_value = torch.cat([value[:, 1:], torch.zeros(1, 1, 1)], 1)
    to_go = returns.reward_to_go(reward=reward, next_value=next_value, **ends).flatten()
    advantage = returns.gae(reward=reward, value=value, next_value=next_value, gae_lambda=0.0, **ends).flatten()
    columns = ["step", "action", "legs_on_the_ground", "reward", "return", "value", "advantage"]
    signals = [[f"{number:.4f}" for number in each] for each in (rewards, to_go, values, advantage)]
    rows = zip(range(len(rewards)), [ACTIONS[action] for action in actions], contacts, *signals, strict=True)
    write_table(HERE / f"{NAME}.csv", columns, rows)


def draw() -> None:
    """Draw the signals over time."""
    rows = read(NAME)
    steps = [int(row["step"]) for row in rows]
    landed = next(step for step, row in zip(steps, rows, strict=True) if row["legs_on_the_ground"] == "2")
    figure, (left, middle, right) = panels(3, width=11.0)
    left.plot(steps, [float(row["reward"]) for row in rows], linewidth=1)
    left.set(title="reward", ylabel="$r_{t+1}$")
    middle.plot(steps, [float(row["return"]) for row in rows], label="return $G_t$", linewidth=1.5)
    middle.plot(steps, [float(row["value"]) for row in rows], label="value $V(s_t)$", linewidth=1)
    middle.set(title="return and value")
    middle.legend(loc="lower left")
    right.plot(steps, [float(row["advantage"]) for row in rows], color=COLORS[2], linewidth=1)
    right.set(title="advantage", ylabel=r"$r_{t+1} + \gamma V(s_{t+1}) - V(s_t)$")
    for axes in (left, middle, right):
        axes.set_xlabel("step $t$")
        axes.axvline(landed, color=INK, linewidth=1, linestyle=":")
    left.annotate(
        "both legs touch\nthe ground",
        (landed, 60),
        (-6, 0),
        textcoords="offset points",
        ha="right",
        fontsize=8,
        color=INK,
    )
    save(figure, NAME)
