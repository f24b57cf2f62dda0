"""Measure and plot the open-loop predictions of a world model.

The model observes the first `CONTEXT` records of a stored sequence, and after that reads only the actions. Every
evaluation adds two metrics. `eval/open_loop_<h>` is the mean squared error of the observation predicted h steps ahead.
`eval/repeat_last_<h>` is the error of a baseline that predicts the last observed one. The evaluation also writes
`pictures/<clock>.png`: pixels as a strip, numbers as curves. If an observation has several parts, each has metrics
of its own: `eval/open_loop_<h>_<part>`.
"""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from levin.core import files
from levin.data.replay import to_device
from levin.data.sequences import SequenceReplay

CONTEXT = 5  # records that the model observes
AHEAD = (1, 5, 15, 45)  # prediction horizons, in steps
WINDOWS = 16  # number of sequences
OpenLoopPredictor = Callable[[TensorDict], tuple[dict[str, Tensor], Tensor]]


@torch.no_grad()
def evaluate_open_loop(
    buffer: SequenceReplay, device: torch.device, predict: OpenLoopPredictor, path: Path
) -> dict[str, float]:
    """Return the prediction errors as metrics and write pictures; return {} if few episodes are long enough.

    Args:
        buffer: Replay buffer that the windows `[B, L]` are sampled from.
        device: Device of the model.
        predict: Predicts a window from its first `CONTEXT` records and all of its actions. Returns the observations as
            a dict of parts `[B, L, *S]` in the units of replay, and rewards `[B, L, 1]`. A part with the name "" is the
            whole observation.
        path: Path of the picture; for parts with a name, it is added to the stem.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):  # keep the random numbers of the run
        torch.manual_seed(0)
        window = sample_windows(buffer, device)
        if window is None:
            return {}
        observation, reward = predict(window)
    metrics = {}
    files.subfolder(path.parent.parent, path.parent.name)
    for name, predicted in observation.items():
        real = (window["observation", name] if name else window["observation"]).float()
        part = f"_{name}" if name else ""
        for ahead in AHEAD:
            at = CONTEXT + ahead - 1
            if at < real.shape[1]:
                metrics[f"eval/open_loop_{ahead}{part}"] = float((predicted[:, at] - real[:, at]).square().mean())
                metrics[f"eval/repeat_last_{ahead}{part}"] = float((real[:, CONTEXT - 1] - real[:, at]).square().mean())
        picture = path.with_stem(path.stem + part)
        if real.ndim == 5:
            draw_pixels(real[0].cpu(), predicted[0].cpu(), picture)
        elif find_spec("matplotlib"):  # optional, part of the extra `report`
            draw_numbers(real[0].cpu(), predicted[0].cpu(), window["reward"][0].cpu(), reward[0].cpu(), picture)
    return metrics


def sample_windows(buffer: SequenceReplay, device: torch.device) -> TensorDict | None:
    """Sample windows `[WINDOWS, L]` inside episodes, for the longest possible horizon; None: too few are found."""
    for ahead in reversed(AHEAD):
        length = CONTEXT + ahead
        if len(buffer) < length:
            continue
        positions, env = buffer.sample_positions(64 * WINDOWS, length)
        begins: Tensor = buffer.data.get("is_first")[positions[:, 1:], env][..., 0].any(1)
        within = (~begins).nonzero().squeeze(1)[:WINDOWS]
        if len(within) == WINDOWS:
            return to_device(buffer.select_records(positions[within], env[within]), device)
    return None


def draw_pixels(real: Tensor, predicted: Tensor, path: Path) -> None:
    """Write a strip of up to 12 steps: real and predicted images `[L, C, H, W]` in 0 to 255, and their difference."""
    import imageio

    steps = np.unique(np.linspace(0, len(real) - 1, 12).astype(int))
    rows = [real[steps], predicted[steps], 128 + (predicted[steps] - real[steps]) / 2]
    strip = torch.cat([torch.cat(list(row[:, -3:]), -1) for row in rows], -2)  # [C, 3 H, L W]
    with files.replace(path.parent, path.name) as partial:
        imageio.imwrite(partial, strip.clamp(0, 255).byte().movedim(0, -1).squeeze(-1).numpy())


def draw_numbers(real: Tensor, predicted: Tensor, reward: Tensor, predicted_reward: Tensor, path: Path) -> None:
    """Plot real and predicted curves of the first five numbers of an observation `[L, D]`, and of the reward."""
    import matplotlib.pyplot as plt

    lines = [(f"observation {i}", real[:, i], predicted[:, i]) for i in range(min(5, real.shape[1]))]
    lines.append(("reward", reward[:, 0], predicted_reward[:, 0]))
    figure, panels = plt.subplots(1, len(lines), figsize=(3 * len(lines), 2.6), layout="constrained")
    for axes, (name, real_curve, predicted_curve) in zip(panels, lines, strict=True):
        axes.plot(real_curve, color="black", label="real")
        axes.plot(predicted_curve, color="#c05621", label="predicted")
        axes.axvline(CONTEXT - 1, color="grey", linestyle=":")
        axes.set(title=name, xlabel="step")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(fontsize=7)
    with files.replace(path.parent, path.name) as partial:
        figure.savefig(partial, dpi=80)
    plt.close(figure)
