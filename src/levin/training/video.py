"""Record the policy of a run as a video; needs no display."""

import os
from pathlib import Path

import imageio
import numpy as np
import torch

from levin.core.errors import ConfigError
from levin.core.process import silence_libraries
from levin.core.spaces import to_tensors
from levin.core.types import NonNegativeInt, PositiveInt
from levin.data.rollout import act
from levin.envs.config import EVALUATION
from levin.envs.factory import load_env, make_env
from levin.envs.vector import SeededVectorEnv
from levin.runs.policy import Policy


def record_video(*, run: str, episodes: PositiveInt = 1, seed: NonNegativeInt = 1) -> list[Path]:
    """Write `videos/<env_steps>_<episode>.mp4`, one frame per step, and return the paths.

    Of World Models also `..._dream.mp4`: what was seen beside a dream that begins alike.

    Args:
        run: The run folder.
        episodes: How many to record.
        seed: Root of the env's seeds.

    Raises:
        ConfigError: The env can't be drawn here.
    """
    silence_libraries()
    policy = Policy.load(Path(run))
    env = make_env(load_env(Path(run)), seed=seed, purpose=EVALUATION, num_envs=1, render=True)
    folder = Path(run) / "videos"
    folder.mkdir(exist_ok=True)
    paths = []
    for episode in range(episodes):
        first, frames, shown = np.ones(1, dtype=bool), [], []
        observation, done = env.begin([episode], first), ~first
        while not done.any():
            shown.append(observation)
            with torch.inference_mode():
                action = act(policy.policy, to_tensors(env.observation, observation), first).numpy()
            observation, _, terminated, truncated, _ = env.step(action)
            first, done = np.zeros(1, dtype=bool), terminated | truncated
            frames.append(_render_frame(env))
        videos = {f"{policy.algorithm.clock}_{episode}.mp4": frames}
        if (dreamt := policy.algorithm.imagine_pictures(to_tensors(env.observation, shown[0]), len(shown))) is not None:
            videos[f"{policy.algorithm.clock}_{episode}_dream.mp4"] = _side_by_side(
                np.concatenate(shown), dreamt.numpy()
            )
        for name, pictures in videos.items():
            imageio.mimwrite(
                folder / name,
                pictures,
                fps=env.metadata.get("render_fps", 30),
                codec="libx264",
                macro_block_size=2,
                output_params=["-loglevel", "error"],
            )  # type: ignore[arg-type]
            paths.append(folder / name)
    env.close()
    return paths


def _side_by_side(real: np.ndarray, dreamt: np.ndarray) -> list[np.ndarray]:
    """What was seen and what was dreamt, `[T, C, H, W]`, side by side and large enough to look at."""
    both = np.concatenate([real, np.full_like(real[..., :1], 128), dreamt], -1)[:, -3:].transpose(0, 2, 3, 1)
    times = max(1, 256 // both.shape[1])
    large = both.repeat(times, 1).repeat(times, 2)
    return list(large.repeat(3, -1) if large.shape[-1] == 1 else large)


def _render_frame(env: SeededVectorEnv) -> np.ndarray:
    try:
        frame = env.render()[0]  # type: ignore[index]
    except Exception as error:  # each of the many backends fails in its own way
        library = os.environ.get("MUJOCO_GL", "its default")
        raise ConfigError(
            f"{env.config.id} can't be drawn with MUJOCO_GL={library} ({str(error).splitlines()[0]}); "
            "without a display, install libegl1 and leave MUJOCO_GL alone"
        ) from error
    if not isinstance(frame, np.ndarray):
        raise ConfigError(f"{env.config.id} draws no rgb_array")
    return frame
