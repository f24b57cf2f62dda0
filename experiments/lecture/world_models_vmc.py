"""Dreams of World Models in the dodge game at several temperatures, beside the env, and controllers evolved in them."""

from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import cast

import gymnasium as gym
import numpy as np
import torch
from experiments.lecture.drawing import COLORS, INK, panels, save
from experiments.study import write_table

from levin.algorithms.world_models import WorldModels
from levin.envs.dodge import Dodge
from levin.lab.pictures import read_csv
from levin.runs.load import load_algorithm

HERE = Path(__file__).parent
RUN = HERE.parent / "world_models_dodge"
TEMPERATURES = (0.1, 0.5, 1.0, 1.15, 1.3)
EPISODES, STEPS, FRAMES = 256, 60, range(8, 20, 2)  # FRAMES: steps of which images are kept
NEAR = 100  # brightness that only a ball has which is more than 40% of the way to the player


@torch.no_grad()
def dream_pictures(model: torch.nn.Module, starts: torch.Tensor, temperature: float) -> np.ndarray:
    """Return decoded images `[N, STEPS, 16, 16]` of dreams with uniform actions, 0 to 255; the end is ignored."""
    torch.manual_seed(0)
    state, images = model.initial_state(starts), []
    for _ in range(STEPS):
        action = model.encode_action(torch.randint(3, (len(starts),)))
        state, _, _ = model.imagine(state, action, torch.randn(len(starts), model.noise), temperature)
        images.append(model.decode(state)[:, 0])
    return torch.stack(images, 1).numpy()


def env_pictures() -> tuple[np.ndarray, np.ndarray]:
    """Return the first images `[N, 16, 16]` of the env and those of 60 steps with uniform actions, hits ignored."""
    rng, starts, images = np.random.default_rng(0), [], []
    for seed in range(EPISODES):
        env: gym.Env = Dodge()
        starts.append(env.reset(seed=seed)[0])
        images.append([env.step(action)[0] for action in rng.integers(3, size=STEPS)])
    return np.array(starts), np.array(images)


@torch.no_grad()
def reconstruct(model: torch.nn.Module, images: np.ndarray) -> np.ndarray:
    """Return images `[N, STEPS, 16, 16]` as V encodes and decodes them."""
    z, _ = model.vision.encode(torch.from_numpy(images).flatten(0, 1).unsqueeze(1))
    return 255 * model.vision.decode(z).view(images.shape).numpy()


def measure() -> None:
    """Write the share of lit images that show a near ball, by time, and the pixels of some images."""
    model = cast(WorldModels, load_algorithm(RUN)).model
    starts, real = env_pictures()
    images = {"env": real.astype(float)}
    first = torch.from_numpy(starts).unsqueeze(1)
    images |= {str(temperature): dream_pictures(model, first, temperature) for temperature in TEMPERATURES}
    rows = []
    images["env, through V"] = reconstruct(model, real)
    for name, stack in images.items():
        lit = stack[:, 1::2]  # the others are dark
        near = (lit.max((2, 3)) > NEAR).mean(0)
        rows += [["near", name, 2 * step + 2, f"{share:.4f}"] for step, share in enumerate(near)]
        if name in ("env", "0.1", "1.15"):
            for step in FRAMES:
                pixels = " ".join(str(round(value)) for value in stack[0, step - 1].flatten())
                rows.append(["picture", name, step, pixels])
    write_table(HERE / "world_models_vmc.csv", ["kind", "dream", "step", "value"], rows)


def draw() -> None:
    """Draw the stored returns by temperature and by generation, the share of near balls, and the images."""
    table = read_csv(HERE / "world_models_vmc.csv")
    figure, (pictures, by_temperature, by_generation, near) = panels(4, width=13.0, height=3.7, ratios=(1.9, 1, 1, 1))
    rows = []
    for name in ("env", "0.1", "1.15"):
        frames = [row["value"].split() for row in table if row["kind"] == "picture" and row["dream"] == name]
        frames = [np.pad(np.array(frame, float).reshape(16, 16), 1, constant_values=np.nan) for frame in frames]
        rows.append(np.concatenate(frames, 1))
    pictures.imshow(np.concatenate(rows), cmap="inferno", vmin=0, vmax=255)
    pictures.set_yticks([9, 27, 45], ["env", "dream, 0.1", "dream, 1.15"])
    pictures.set_xticks([18 * i + 8.5 for i in range(len(FRAMES))], [*FRAMES])
    pictures.tick_params(length=0)
    pictures.spines[["left", "bottom"]].set_visible(False)
    pictures.set(xlabel="step", title="What V decodes from the states of M")

    returns = read_csv(HERE.parent / "worlds" / "returns.csv")
    for column, color, label in (("dream_return", COLORS[0], "dream"), ("return", COLORS[1], "env")):
        values = [[float(row[column]) for row in returns if row["run"] == f"tau{tau}"] for tau in TEMPERATURES]
        by_temperature.plot(TEMPERATURES, [mean(each) for each in values], color=color, lw=2, label=label)
        for tau, each in zip(TEMPERATURES, values, strict=True):
            by_temperature.plot([tau] * len(each), each, "o", color=color, ms=5, alpha=0.7)
    by_temperature.set(xlabel="temperature", ylabel="return", title="C, evolved in the dream", ylim=(0, 210))
    by_temperature.legend()

    curves: dict[tuple[str, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in read_csv(HERE.parent / "worlds" / "generations.csv"):
        for column in ("dream_return", "return"):
            generation = round(float(row["generation"]) / 5) * 5
            curves[row["temperature"], column][generation].append(float(row[column]))
    for tau, style in (("0.1", "--"), ("1.15", "-")):
        for column, color in (("dream_return", COLORS[0]), ("return", COLORS[1])):
            line = sorted((step, mean(values)) for step, values in curves[tau, column].items())
            label = f"{'dream' if column == 'dream_return' else 'env'}, {tau}"
            by_generation.plot(*zip(*line, strict=True), style, color=color, lw=1.8, label=label)
    by_generation.set(xlabel="generation of CMA-ES", ylabel="return", title="Over the generations", ylim=(0, 210))
    by_generation.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, 0.8))

    for name, color in zip(("env", "env, through V", "0.1", "0.5", "1.0", "1.15"), (INK, *COLORS[:5]), strict=True):
        line = [
            (int(row["step"]), float(row["value"])) for row in table if row["kind"] == "near" and row["dream"] == name
        ]
        near.plot(*zip(*line, strict=True), color=color, lw=3 if name == "env" else 1.6, label=name)
    near.set(xlabel="step", ylabel="share of images", title="Images with a near ball", ylim=(0, 1.2))
    near.legend(fontsize=8, ncols=2, loc="upper right")
    save(figure, "world_models_vmc")
