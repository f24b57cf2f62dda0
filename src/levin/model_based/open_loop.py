"""What a world model foresees, beside what happened: it sees a few moments, and then only the actions.

Every evaluation adds `eval/open_loop_<h>` to the metrics, the mean squared error of the observation h steps ahead, and
`eval/repeat_last_<h>`, that of the last one seen; and writes `pictures/<env_steps>.png`: pixels as a strip, numbers as
curves. Where an observation has several parts, their names are behind those: `eval/open_loop_<h>_<part>`.
"""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from levin.data.replay import to_device
from levin.data.sequences import SequenceReplay

CONTEXT = 5  # moments that are seen
AHEAD = (1, 5, 15, 45)  # steps that are foreseen
WINDOWS = 16
OpenLoopPredictor = Callable[[TensorDict], tuple[dict[str, Tensor], Tensor]]


@torch.no_grad()
def evaluate_open_loop(
    buffer: SequenceReplay, device: torch.device, foresee: OpenLoopPredictor, path: Path
) -> dict[str, float]:
    """The errors, and pictures at `path`; nothing where there is no part of an episode that is long enough.

    Args:
        buffer: Where the windows come from, `[B, L]`.
        device: Of the model.
        foresee: The first CONTEXT moments of a window and all of its actions -> the parts of observations `[B, L, *S]`,
            in the units of those that are stored, and rewards `[B, L, 1]`. What is no dict is one part without a name.
        path: Of the picture.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):  # a run goes on as if nothing had been drawn
        torch.manual_seed(0)
        window = sample_windows(buffer, device)
        if window is None:
            return {}
        observation, reward = foresee(window)
    found = {}
    path.parent.mkdir(exist_ok=True)
    for name, imagined in observation.items():
        real = (window["observation", name] if name else window["observation"]).float()
        part = f"_{name}" if name else ""
        for ahead in AHEAD:
            at = CONTEXT + ahead - 1
            if at < real.shape[1]:
                found[f"eval/open_loop_{ahead}{part}"] = float((imagined[:, at] - real[:, at]).square().mean())
                found[f"eval/repeat_last_{ahead}{part}"] = float((real[:, CONTEXT - 1] - real[:, at]).square().mean())
        picture = path.with_stem(path.stem + part)
        if real.ndim == 5:
            draw_pixels(real[0].cpu(), imagined[0].cpu(), picture)
        elif find_spec("matplotlib"):  # comes with the extra `report`
            draw_numbers(real[0].cpu(), imagined[0].cpu(), window["reward"][0].cpu(), reward[0].cpu(), picture)
    return found


def sample_windows(buffer: SequenceReplay, device: torch.device) -> TensorDict | None:
    """Parts of episodes `[WINDOWS, L]`, as long as there are for AHEAD; None: there are none."""
    for ahead in reversed(AHEAD):
        length = CONTEXT + ahead
        if len(buffer) < length:
            continue
        rows, env = buffer.sample_positions(64 * WINDOWS, length)
        begins: Tensor = buffer.data.get("is_first")[rows[:, 1:], env][..., 0].any(1)
        whole = (~begins).nonzero().squeeze(1)[:WINDOWS]
        if len(whole) == WINDOWS:
            return to_device(buffer.at(rows[whole], env[whole]), device)
    return None


def draw_pixels(real: Tensor, imagined: Tensor, path: Path) -> None:
    """Three rows: what happened, what was foreseen, and how they differ; `[L, C, H, W]`, from 0 to 255."""
    import imageio

    steps = np.unique(np.linspace(0, len(real) - 1, 12).astype(int))
    rows = [real[steps], imagined[steps], 128 + (imagined[steps] - real[steps]) / 2]
    strip = torch.cat([torch.cat(list(row[:, -3:]), -1) for row in rows], -2)  # [C, 3 H, L W]
    imageio.imwrite(path, strip.clamp(0, 255).byte().movedim(0, -1).squeeze(-1).numpy())


def draw_numbers(real: Tensor, imagined: Tensor, reward: Tensor, imagined_reward: Tensor, path: Path) -> None:
    """The first numbers of an observation `[L, D]`, and the reward."""
    import matplotlib.pyplot as plt

    lines = [(f"observation {i}", real[:, i], imagined[:, i]) for i in range(min(5, real.shape[1]))]
    lines.append(("reward", reward[:, 0], imagined_reward[:, 0]))
    figure, panels = plt.subplots(1, len(lines), figsize=(3 * len(lines), 2.6), layout="constrained")
    for axes, (name, happened, foreseen_) in zip(panels, lines, strict=True):
        axes.plot(happened, color="black", label="real")
        axes.plot(foreseen_, color="#c05621", label="foreseen")
        axes.axvline(CONTEXT - 1, color="grey", linestyle=":")
        axes.set(title=name, xlabel="step")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(fontsize=7)
    figure.savefig(path, dpi=80)
    plt.close(figure)
