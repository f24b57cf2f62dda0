"""Record the policy of a run as a video; needs no display."""

import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from levin.core import files, paths
from levin.core.errors import ConfigError
from levin.core.process import silence_libraries
from levin.core.types import NonNegativeInt, PositiveInt
from levin.envs.config import EVALUATION
from levin.runs import checkpoint
from levin.runs.load import check_has_policy
from levin.runs.trust import trusted

if TYPE_CHECKING:
    from levin.envs.vector import SeededVectorEnv
    from levin.runs.policy import Policy

SECONDS_BETWEEN_LINES = 5.0


def record_video(
    *,
    run: str,
    episodes: PositiveInt = 1,
    seed: NonNegativeInt = 1,
    steps: PositiveInt = 10_000,
    trust: bool = False,
) -> list[Path]:
    """Record episodes as `videos/<clock>_<episode>.mp4`, one frame per step, and return the paths.

    The videos of a result in experiments/ are written into `runs/results/<name>/`.

    World Models also writes `..._dream.mp4`: the episode beside a dream that starts from the same observation.

    Args:
        run: Run folder; or one of its checkpoints, such as `checkpoints/best`.
        episodes: Number of episodes.
        seed: Seed of the env.
        steps: Maximum number of steps of an episode. The video of a longer one ends there.
        trust: Whether to run code from outside this checkout that the run's config names (`levin.runs.trust`).

    Raises:
        ConfigError: The env can't be rendered here.
    """
    check_has_policy(run)
    from levin.core.spaces import to_tensors  # late: a command that is mistyped is refused before torch is imported
    from levin.envs.factory import load_env, make_env
    from levin.runs.policy import Policy

    silence_libraries()
    run_folder = checkpoint.run_of(Path(run))
    folder = paths.output_folder(run_folder)
    with trusted(trust):
        policy = Policy.load(Path(run))
        env = make_env(load_env(run_folder), seed=seed, purpose=EVALUATION, num_envs=1, render=True)
    videos: list[Path] = []
    for episode in range(episodes):
        name, observations = f"{policy.algorithm.clock}_{episode}", []
        videos.append(_write(folder, f"{name}.mp4", env, _play(policy, env, episode, steps, observations)))
        first = to_tensors(env.observation, observations[0])
        if (dreamt := policy.algorithm.imagine_pictures(first, len(observations))) is not None:
            frames = _side_by_side(np.concatenate(observations), dreamt.numpy())
            videos.append(_write(folder, f"{name}_dream.mp4", env, frames))
    env.close()
    return videos


def _play(
    policy: "Policy", env: "SeededVectorEnv", episode: int, steps: int, observations: list[Any]
) -> Iterator[np.ndarray]:
    """Play an episode, add its observations `[1, *S]` to a list, and yield a frame `[H, W, 3]` for each step."""
    import torch

    from levin.core.spaces import to_tensors
    from levin.data.rollout import act

    first = np.ones(1, dtype=bool)
    observation, done = env.begin([episode], first), ~first
    while not done.any():
        if len(observations) == steps:
            print(
                f"levin: an episode of {env.config.id} has not ended after {steps:,} steps, and its video ends here; "
                "steps=<number> records more, and a run with env.time_limit=<steps> ends its episodes",
                file=sys.stderr,
            )
            return
        observations.append(observation)
        with torch.inference_mode():
            action = act(policy.policy, to_tensors(env.observation, observation), first).numpy()
        observation, _, terminated, truncated, _ = env.step(action)
        first, done = np.zeros(1, dtype=bool), terminated | truncated
        yield _render_frame(env)


def _write(run: Path, name: str, env: "SeededVectorEnv", frames: Iterable[np.ndarray]) -> Path:
    """Write frames `[H, W, 3]` as `videos/<name>` in a run folder, and return the path."""
    import imageio

    options = {"codec": "libx264", "macro_block_size": 2, "output_params": ["-loglevel", "error"]}
    with files.replace(run, f"videos/{name}") as path:
        writer, shown = imageio.get_writer(path, fps=env.metadata.get("render_fps", 30), **options), perf_counter()
        with writer:
            for number, frame in enumerate(frames, start=1):
                writer.append_data(frame)  # type: ignore[attr-defined]
                if perf_counter() > shown + SECONDS_BETWEEN_LINES:
                    shown = perf_counter()
                    print(f"{run / 'videos' / name}: {number:,} frames so far", file=sys.stderr, flush=True)
    return run / "videos" / name


def _side_by_side(real: np.ndarray, dreamt: np.ndarray) -> list[np.ndarray]:
    """Return frames with real and dreamt pictures `[T, C, H, W]` side by side, enlarged by a whole factor."""
    pictures = np.concatenate([real, np.full_like(real[..., :1], 128), dreamt], -1)[:, -3:].transpose(0, 2, 3, 1)
    scale = max(1, 256 // pictures.shape[1])
    enlarged = pictures.repeat(scale, 1).repeat(scale, 2)
    return list(enlarged.repeat(3, -1) if enlarged.shape[-1] == 1 else enlarged)


def _render_frame(env: "SeededVectorEnv") -> np.ndarray:
    try:
        frame = env.render()[0]  # type: ignore[index]
    except Exception as error:  # each rendering backend raises its own errors
        backend = os.environ.get("MUJOCO_GL", "its default")
        raise ConfigError(
            f"{env.config.id} can't be rendered with MUJOCO_GL={backend} ({str(error).splitlines()[0]}); "
            "without a display, install libegl1 and unset MUJOCO_GL"
        ) from error
    if not isinstance(frame, np.ndarray):
        raise ConfigError(f"{env.config.id} can't be recorded: it does not render an rgb_array")
    return frame.copy()  # an env may draw every frame into the same array
