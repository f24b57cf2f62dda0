"""From a `configs/env/*.yaml` to a gymnasium `VectorEnv` whose every episode has a seed of its own.

Autoreset is DISABLED: the observation that ends an episode is the true one, and whoever steps the envs resets the ones
that are done with `reset(options={"reset_mask": done})`.
"""

import importlib
import os
import sys
import warnings
from collections.abc import Callable
from ctypes.util import find_library
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.wrappers import AddRenderObservation

from levin.algorithms.base import Algorithm
from levin.core.errors import ConfigError
from levin.core.omega import to_plain
from levin.core.process import ignore_signals
from levin.core.spaces import EnvSpec, observation_dtypes, to_tensors
from levin.envs.config import TRAINING, EnvConfig
from levin.envs.torchrl import TorchRLVectorEnv, import_target
from levin.envs.vector import SeededVectorEnv
from levin.envs.wrappers import ActionRepeat, select_entries, stack_frames
from levin.model_based.dream_env import STARTS, DreamEnv, LatentEnv, Model, policy_space
from levin.runs.load import load_algorithm, load_config


def make_env(
    config: EnvConfig,
    *,
    seed: int,
    purpose: int = TRAINING,
    rank: int = 0,
    num_envs: int | None = None,
    first: int = 0,
    render: bool = False,
    copy: bool = True,
) -> SeededVectorEnv:
    """Build the vector env.

    Args:
        seed: Together with `purpose` and `rank`, the root of all episode seeds.
        purpose: `TRAINING` or `EVALUATION`: Atari differs between them.
        num_envs: Instead of `config.num_envs`.
        first: The number of the first env, where they are a part of a run's.
        render: Whether `env.render()` gives frames.
        copy: Whether observations are copies. Without it the next step overwrites them.

    Raises:
        ConfigError: The env can't be made: the id is unknown, a package behind it is missing, it does not take a key.
    """
    if config.target is not None and config.family != "torchrl":
        raise ConfigError(f"env.target={config.target} is for env.family=torchrl, not for {config.family}")
    try:
        env = make_vector(config, num_envs, training=purpose == TRAINING, render=render, copy=copy)
        if config.wrappers:
            env = wrap_latent(env, config)
    except ConfigError:
        raise
    except (gym.error.DependencyNotInstalled, ImportError) as error:
        raise ConfigError(
            f"env.id={config.id} needs a package that is missing ({error}); "
            "the extras mujoco, box2d, atari and dmc bring them: pip install -e '.[mujoco]'"
        ) from error
    except Exception as error:  # of whatever kind its library chose
        what = f"env.id={config.id}" if config.target is None else f"env.target={config.target}"
        said = (str(error).splitlines() or [""])[0]
        raise ConfigError(f"{what} can't be made: {type(error).__name__}: {said}") from error
    return SeededVectorEnv(env, config, seed=seed, purpose=purpose, rank=rank, first=first)


def make_vector(
    config: EnvConfig, num_envs: int | None, *, training: bool = False, render: bool = False, copy: bool = True
) -> VectorEnv:
    """As `make_env`, without seeds and with the actions of the env."""
    families = {"torchrl": _make_torchrl, "atari": _make_atari, "dream": make_dream}
    return families.get(config.family, _make_gymnasium)(config, num_envs, training=training, render=render, copy=copy)


def registered_limit(config: EnvConfig) -> int | None:
    """Steps of the env before truncation, as its id was registered."""
    if config.family in ("atari", "torchrl"):
        return None
    env = make_single_env(config)
    env.close()
    return env.spec.max_episode_steps if env.spec else None


def _make_gymnasium(
    config: EnvConfig, num_envs: int | None, *, training: bool, render: bool, copy: bool
) -> SyncVectorEnv | AsyncVectorEnv:
    one, count = partial(make_single_env, config, render), num_envs or config.num_envs
    if config.vectorization == "sync":
        return SyncVectorEnv([one] * count, copy=copy, autoreset_mode=AutoresetMode.DISABLED)
    one().close()  # an error inside a worker process would be a traceback
    # TorchRL makes `spawn` the default, and every worker would import all of this for seconds. OpenGL, which has drawn
    # here already, does not survive a fork.
    start = "fork" if sys.platform == "linux" and not config.pixels else None
    deaf = partial(_make_without_signals, one, os.getpid())
    env = AsyncVectorEnv([deaf] * count, copy=copy, context=start, autoreset_mode=AutoresetMode.DISABLED)
    for process in env.processes:
        process._popen.terminate = process._popen.kill  # type: ignore[union-attr]
    return env


def _make_without_signals(one: Callable[[], gym.Env], parent: int) -> gym.Env:
    if os.getpid() != parent:  # where one is made too, to be looked at
        ignore_signals()
    return one()


def _make_atari(config: EnvConfig, num_envs: int | None, *, training: bool, render: bool, copy: bool) -> VectorEnv:
    from levin.envs import atari  # needs the extra

    return atari.make_atari_games(config, num_envs or config.num_envs, training=training, view=render)


def _make_torchrl(
    config: EnvConfig, num_envs: int | None, *, training: bool, render: bool, copy: bool
) -> TorchRLVectorEnv:
    if config.target is None:
        raise ConfigError("env.family=torchrl needs env.target=my_module:make_env")
    refused = {
        "vectorization=async": (config.vectorization == "async", "take collector=torchrl-process"),
        "action_repeat": (config.action_repeat > 1, "let env.target add a FrameSkipTransform"),
        "observation_entries": (config.observation_entries is not None, "let env.target select them"),
        "frame_stack": (config.frame_stack > 1, "let env.target add a CatFrames"),
        "pixels": (config.pixels is not None, "let env.target show them"),
        "render": (render, "let env.target make its own pictures"),
    }
    for name, (wanted, instead) in refused.items():
        if wanted:
            raise ConfigError(f"env.{name} is not for env.family=torchrl: {instead}")
    one, count = partial(import_target(config.target), **config.kwargs), num_envs or config.num_envs
    return TorchRLVectorEnv(one, count, time_limit=config.time_limit, round_up=not training)


def make_single_env(config: EnvConfig, render: bool = False) -> gym.Env:
    """One copy, without the vector around it."""
    module, _, name = config.id.rpartition(":")
    if module:
        importlib.import_module(module)
    env = gym.make(
        config.id,
        max_episode_steps=config.time_limit,
        disable_env_checker=True,  # one Python call less per step
        **_render_options(config, name, render),
        **config.kwargs,
    )
    if config.pixels:
        env = AddRenderObservation(env, render_only=True)
    if config.action_repeat > 1:
        env = ActionRepeat(env, config.action_repeat)
    if config.observation_entries is not None:
        env = select_entries(env, config.observation_entries)
    return stack_frames(env, config.frame_stack) if config.frame_stack > 1 else env


def _render_options(config: EnvConfig, name: str, render: bool) -> dict[str, Any]:
    """What `gymnasium.make` must be told of the picture, if there is to be one: not every env knows the words."""
    side = config.pixels
    view: dict[str, Any] = {"render_mode": "rgb_array"} if render or side else {}
    if (view or config.family == "dm_control") and "DISPLAY" not in os.environ:
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
        if find_library("EGL"):
            os.environ.setdefault("MUJOCO_GL", "egl")  # read when dm_control is imported: it can't change its mind
    if config.family == "dm_control":
        gym.register_envs(importlib.import_module("shimmy"))
        return view | ({"render_kwargs": {"height": side, "width": side, "camera_id": 0}} if side else {})
    if "mujoco" in str(gym.spec(name).entry_point):
        if view and not {"camera_name", "camera_id"} & config.kwargs.keys():
            view["camera_name"] = "track"  # the default camera stays where the runner began
        importlib.import_module("mujoco").set_mju_user_warning(_mujoco_warning)
        return view | ({"height": side, "width": side} if side else {})
    if side:
        raise ConfigError(f"env.pixels={side} is for MuJoCo and dm_control: {config.id} draws at one size only")
    return view


def _mujoco_warning(message: str) -> None:
    """MuJoCo prints warnings and writes them into a file where one stands; let python's filters see them instead."""
    if "settotalmass" not in message:  # in the XML of the v4 envs, whoever makes them
        warnings.warn(f"MuJoCo: {message}", stacklevel=2)


def describe_env(env: SeededVectorEnv) -> EnvSpec:
    """What the algorithm needs to know of the env.

    Raises:
        ConfigError: Pixels are to be normalised.
    """
    config = env.config
    if config.normalize_observation and (
        observation_dtypes(env.observation) != {"float32"} or "spaces" in env.observation
    ):
        raise ConfigError(f"{config.id} shows pixels, which are not normalised: env.normalize_observation=false")
    return {
        "id": config.id,
        "num_envs": env.num_envs,
        "observation": env.observation,
        "shown": env.shown,
        "action": env.action,
        "action_units": config.action,
        "action_repeat": config.action_repeat,
        "frame_stack": config.frame_stack,
        "observation_clip": config.observation_clip if config.normalize_observation else None,
        "reward_clip": config.reward_clip if config.normalize_reward else None,
    }


def load_world_model(run: str) -> tuple[Algorithm, Model]:
    """The algorithm of a run and its model, on the CPU, the parameters frozen.

    Raises:
        ConfigError: There is none, or its training is not over.
    """
    algorithm = load_algorithm(Path(run))
    if not hasattr(algorithm, "dream_model"):
        raise ConfigError(f"env.run={run} is of {type(algorithm).__name__}, which has no model to dream in")
    return algorithm, algorithm.dream_model().requires_grad_(False).eval()  # type: ignore[operator]


def make_dream(config: EnvConfig, num_envs: int | None, *, training: bool, render: bool, copy: bool) -> VectorEnv:
    """The dream of `env.run`; for evaluation the env that its model was trained in, seen as in the dream.

    Raises:
        ConfigError: No run is named, it can't be dreamt in, or nothing says when a dream is over.
    """
    if config.run is None:
        raise ConfigError("a dream is that of a run: env.run=runs/..., of world_models, dreamer or dreamer_v3")
    source, num_envs = load_env(Path(config.run)), num_envs or config.num_envs
    algorithm, model = load_world_model(config.run)
    if not training:
        env = make_vector(replace(source, time_limit=config.time_limit or source.time_limit), num_envs, render=render)
        return LatentEnv(env, model, source.action, algorithm.env["observation"])
    limit = config.time_limit or source.time_limit or registered_limit(source)
    if limit is None:
        raise ConfigError(f"nothing says when an episode of {source.id} is over: env.time_limit=...")
    starts = getattr(model, "starts", None)
    if starts is None:
        starts = first_observations(source)
    actions, limit = policy_space(algorithm.env["action"]), -(-limit // source.action_repeat)
    return DreamEnv(model, starts, actions, num_envs=num_envs, temperature=config.temperature, time_limit=limit)


def wrap_latent(env: VectorEnv, config: EnvConfig) -> LatentEnv:
    """Envs as the model of `env.run` sees them. Raises ConfigError when no run is named, or it reads something else."""
    if config.run is None:
        raise ConfigError("env.wrappers=[latent] is what the model of a run sees: env.run=runs/...")
    algorithm, model = load_world_model(config.run)
    return LatentEnv(env, model, config.action, algorithm.env["observation"])


def first_observations(source: EnvConfig) -> Any:
    """What training episodes of an env begin with: `[STARTS, *S]`. It takes no step."""
    env = make_env(source, seed=0, num_envs=1)
    each = [env.begin([episode], np.ones(1, dtype=bool)) for episode in range(STARTS)]
    env.close()
    return to_tensors(env.observation, _stack_observations(each))


def _stack_observations(observations: list[Any]) -> Any:
    if isinstance(observations[0], dict):
        return {name: np.concatenate([each[name] for each in observations]) for name in observations[0]}
    return np.concatenate(observations)


def load_env(run: Path) -> EnvConfig:
    """The env that a run was made in."""
    return EnvConfig(**to_plain(load_config(run).env))
