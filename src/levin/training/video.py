"""Record the policy of a run as a video; needs no display."""

import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
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
from levin.runs import folder as run_folder
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
    out: str | None = None,
    trust: bool = False,
) -> list[Path]:
    """Record episodes as `videos/<clock>_<episode>.mp4`, one frame per step, and return the paths.

    World Models also writes `..._dream.mp4`: the episode beside a dream that starts from the same observation.

    Args:
        run: Run folder; or one of its checkpoints, such as `checkpoints/best`.
        episodes: Number of episodes.
        seed: Seed of the env.
        steps: Maximum number of steps of an episode. The video of a longer one ends there.
        out: Folder that gets the folder `videos`; None: the run folder, and for a result in experiments/
            `runs/results/<name>/`.
        trust: Whether to run code from outside this checkout that the run's config names (`levin.runs.trust`).

    Raises:
        ConfigError: The env can't be rendered here.
    """
    policy, env = load_policy_and_env(run, seed, trust)
    folder = paths.output_folder(checkpoint.run_of(Path(run)), out)
    videos: list[Path] = []
    for episode in range(episodes):
        name, observations = f"{policy.algorithm.clock}_{episode}", []
        videos.append(_write(folder, f"{name}.mp4", env, play(policy, env, episode, steps, observations)))
        if (frames := dream_beside(policy, env, observations)) is not None:
            videos.append(_write(folder, f"{name}_dream.mp4", env, frames))
    env.close()
    return videos


def load_policy_and_env(run: str, seed: int, trust: bool = False) -> tuple["Policy", "SeededVectorEnv"]:
    """Load the policy of a run, and make one env that renders it.

    Args:
        run: Run folder, folder of a result, or one of its checkpoints.
        seed: Seed of the env.
        trust: Whether to run code from outside this checkout that the run's config names (`levin.runs.trust`).
    """
    check_has_policy(run)
    from levin.envs.factory import load_env, make_env  # late: torch is imported after a mistyped command is refused
    from levin.runs.policy import Policy

    silence_libraries()
    with trusted(trust):
        policy = Policy.load(Path(run))
        folder = checkpoint.run_of(Path(run))
        config = replace(load_env(folder), vectorization="sync")  # one env needs no process
        env = make_env(config, seed=seed, purpose=EVALUATION, num_envs=1, render=True)
        run_folder.report_changed_code(folder)
    return policy, env


def play(
    policy: "Policy", env: "SeededVectorEnv", episode: int, steps: int, observations: list[Any], *, every: int = 1
) -> Iterator[np.ndarray]:
    """Play an episode, add its observations `[1, *S]` to a list, and yield frames `[H, W, 3]`.

    Args:
        policy: Policy that acts.
        env: Env that is rendered.
        episode: Number of the episode, which decides its first state.
        steps: Maximum number of steps of the episode.
        observations: List that grows by the observation of each step.
        every: A frame is rendered after the first step and after each further `every` steps.
    """
    import torch

    from levin.core.spaces import to_tensors
    from levin.data.rollout import act

    first = np.ones(1, dtype=bool)
    observation, done = env.begin([episode], first), ~first
    while not done.any():
        if len(observations) == steps:
            print(
                f"levin: an episode of {env.config.id} has not ended after {steps:,} steps, and its video ends here; "
                'steps=<number> (with make: ARGS="steps=<number>") records more, and a run with env.time_limit=<steps> '
                "ends its episodes",
                file=sys.stderr,
            )
            return
        observations.append(observation)
        with torch.inference_mode():
            action = act(policy.policy, to_tensors(env.observation, observation), first).numpy()
        observation, _, terminated, truncated, _ = env.step(action)
        first, done = np.zeros(1, dtype=bool), terminated | truncated
        if (len(observations) - 1) % every == 0:
            yield _render_frame(env)


def dream_beside(policy: "Policy", env: "SeededVectorEnv", observations: list[Any]) -> list[np.ndarray] | None:
    """Return frames with the observations `[1, C, H, W]` of an episode beside those of a dream of the same length.

    The dream starts from the first observation. None if the algorithm dreams no pictures.
    """
    from levin.core.spaces import to_tensors

    dreamt = policy.algorithm.imagine_pictures(to_tensors(env.observation, observations[0]), len(observations))
    return None if dreamt is None else _side_by_side(np.concatenate(observations), dreamt.numpy())


def frames_per_second(env: "SeededVectorEnv") -> float:
    """Return the frame rate at which a video with one frame per env step plays in the env's own time.

    An env step is `env.action_repeat` steps of the env; one that does not say how long they take has 30 in a second.
    """
    steps = env.metadata.get("render_fps", 30)
    if env.config.family == "dm_control":  # Shimmy's value is not that of the env
        steps = 1 / env.base.envs[0].unwrapped.dt  # type: ignore[attr-defined]
    return steps if env.config.family == "atari" else steps / env.config.action_repeat  # Atari's value has it already


def _write(run: Path, name: str, env: "SeededVectorEnv", frames: Iterable[np.ndarray]) -> Path:
    """Write frames `[H, W, 3]` as `videos/<name>` in a run folder, and return the path."""
    import imageio

    options = {"codec": "libx264", "macro_block_size": 2, "output_params": ["-loglevel", "error"]}
    with files.replace(run, f"videos/{name}") as path:
        writer, shown = imageio.get_writer(path, fps=frames_per_second(env), **options), perf_counter()
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
    except NotImplementedError as error:
        raise ConfigError(
            f"{env.config.id} has no render method: to be recorded, it needs one that returns an array [H, W, 3] "
            "(render_mode rgb_array)"
        ) from error
    except Exception as error:  # each rendering backend raises its own errors
        backend, reason = os.environ.get("MUJOCO_GL", "its default"), str(error) or type(error).__name__
        raise ConfigError(
            f"{env.config.id} can't be rendered with MUJOCO_GL={backend} ({reason.splitlines()[0]}); "
            "without a display, install libegl1 and unset MUJOCO_GL"
        ) from error
    if not isinstance(frame, np.ndarray):
        raise ConfigError(f"{env.config.id} can't be recorded: it does not render an rgb_array")
    if frame.dtype.kind == "f" and frame.min() >= 0 and frame.max() <= 1:
        frame = (255 * frame + 0.5).astype(np.uint8)
    if frame.dtype != np.uint8 or not (frame.ndim == 2 or (frame.ndim == 3 and frame.shape[-1] <= 4)):
        raise ConfigError(
            f"{env.config.id} can't be recorded: it renders an array {list(frame.shape)} of {frame.dtype}, "
            "not [H, W, 3] of uint8"
        )
    return frame.copy()  # an env may draw every frame into the same array
