"""Open-loop predictions of a stored Dreamer against the env, by the number of steps ahead."""

from pathlib import Path
from typing import cast

import torch
from experiments.lecture.drawing import COLORS, INK, panels, save
from experiments.study import write_table
from torch import Tensor

from levin.algorithms.dreamer import Dreamer
from levin.algorithms.dreamer_networks import WorldModel
from levin.envs.batched import Pendulum
from levin.lab.pictures import read_csv
from levin.model_based.recurrent import State
from levin.runs.load import load_algorithm

HERE = Path(__file__).parent
RUN = HERE.parent / "dreamer_pendulum"
EPISODES, CONTEXT, AHEAD = 256, 5, 50  # the model observes CONTEXT observations, then none
FUTURES = 24  # imagined from the same state, in the left panel


def load_dreamer() -> Dreamer:
    """Return the stored Dreamer of Pendulum-v1, its first seed; it has no critic."""
    return cast(Dreamer, load_algorithm(RUN).requires_grad_(False))


@torch.no_grad()
def play(dreamer: Dreamer, *, uniform: bool, seed: int = 0) -> dict[str, Tensor]:
    """Play episodes in the env with the Dreamer's policy or with uniform actions.

    Returns:
        Observations, actions and rewards `[N, T, *]`, each reward that of the action beside it, and the state that the
        model has when it has observed the first `CONTEXT` observations.
    """
    torch.manual_seed(seed)
    env = Pendulum(num_envs=EPISODES)
    env.set_seed(seed)
    observation, records = env.reset()["observation"], []
    state = dreamer.model.initial_state(observation)
    for t in range(CONTEXT + AHEAD):
        if t == CONTEXT - 1:
            context = state
        mode = cast(Tensor, dreamer.actor(state.feature).mode)
        action = 2 * torch.rand(EPISODES, 1) - 1 if uniform else mode
        after, reward, _ = env.dynamics(env.state, env.action_bound * action)
        env.state.copy_(after)
        records.append((observation, action, reward.float().unsqueeze(-1)))
        observation = env.observe(env.state)
        state = dreamer.model.observe(state, action, observation)
    parts = (torch.stack(part, 1) for part in zip(*records, strict=True))
    return dict(zip(("observation", "action", "reward"), parts, strict=True)) | {
        "deter": context[0],
        "stoch": context[1],
    }


@torch.no_grad()
def predict(model: WorldModel, played: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the observations and rewards `[N, AHEAD, *]` that the model predicts from the actions alone."""
    state, observations, rewards = State(played["deter"], played["stoch"]), [], []
    for t in range(CONTEXT - 1, CONTEXT - 1 + AHEAD):
        state = model.imagine_step(state, played["action"][:, t])  # p(z'|z, a)
        observations.append(model.decode(state.feature)[""])
        rewards.append(model.reward_model(state.feature))  # p(r|z')
    return torch.stack(observations, 1), torch.stack(rewards, 1)


def measure() -> None:
    """Write the errors by horizon and kind of actions, and some imagined futures of one episode."""
    dreamer, rows = load_dreamer(), []
    for actions in ("policy", "uniform"):
        played = play(dreamer, uniform=actions == "uniform")
        real, real_reward = played["observation"][:, CONTEXT:], played["reward"][:, CONTEXT - 1 : -1]
        observation, reward = predict(dreamer.model, played)
        repeated = played["observation"][:, CONTEXT - 1 : CONTEXT].expand_as(real)
        previous = played["reward"][:, CONTEXT - 2 : CONTEXT - 1].expand_as(real_reward)
        spread = real.flatten(0, 1).std(0), real_reward.flatten().std()
        for ahead in range(AHEAD):
            for name, guess, reward_guess in (("model", observation, reward), ("repeat", repeated, previous)):
                error = ((guess - real)[:, ahead] / spread[0]).square().mean().sqrt()
                reward_error = ((reward_guess - real_reward)[:, ahead] / spread[1]).square().mean().sqrt()
                rows.append([actions, name, ahead + 1, f"{error:.4f}", f"{reward_error:.4f}"])
    # Futures of one episode with uniform actions, whose pendulum swings freely
    episode = {key: value[:1].expand(FUTURES, *value.shape[1:]) for key, value in played.items()}
    cosines = predict(dreamer.model, episode)[0][..., 0]
    for t in range(AHEAD):
        rows.append(["future", "real", t + 1, f"{played['observation'][0, CONTEXT + t, 0]:.4f}", ""])
        rows += [["future", f"dream {i}", t + 1, f"{cosines[i, t]:.4f}", ""] for i in range(FUTURES)]
    write_table(HERE / "world_models.csv", ["actions", "prediction", "ahead", "error", "reward_error"], rows)


def draw() -> None:
    """Draw imagined futures beside the real one, and the errors of observation and reward."""
    table = read_csv(HERE / "world_models.csv")
    figure, (left, middle, right) = panels(3, width=11.5, height=3.6, ratios=(1.25, 1, 1))
    for name in dict.fromkeys(row["prediction"] for row in table if row["actions"] == "future"):
        line = [(int(row["ahead"]), float(row["error"])) for row in table if row["prediction"] == name]
        dream = name != "real"
        style = {"color": COLORS[0], "lw": 0.9, "alpha": 0.45} if dream else {"color": COLORS[1], "lw": 2.4}
        label = {"real": "env", "dream 0": f"{FUTURES} dreams"}.get(name)
        left.plot(*zip(*line, strict=True), label=label, zorder=2 if dream else 3, **style)
    left.set(xlabel="steps ahead", ylabel="cosine of the angle (1: upright)", title="One episode, uniform actions")
    for axes, column, title in ((middle, "error", "Observation"), (right, "reward_error", "Reward")):
        for actions, color in (("policy", COLORS[0]), ("uniform", COLORS[2])):
            for name, style in (("model", "-"), ("repeat", ":")):
                rows = [row for row in table if row["actions"] == actions and row["prediction"] == name]
                line = [(int(row["ahead"]), float(row[column])) for row in rows]
                label = f"{actions}, {'model' if name == 'model' else 'repeat the last'}"
                axes.plot(*zip(*line, strict=True), style, color=color, lw=2, label=label)
        axes.axhline(1, color=INK, lw=0.8)
        axes.set(xlabel="steps ahead", ylabel="RMS error / standard deviation", title=title, ylim=(0, 1.75))
    left.legend(loc="lower center", bbox_to_anchor=(0.42, 0))
    middle.legend(loc="lower right", fontsize=8)
    save(figure, "world_models")
