"""Build one env of an id: its wrappers, its time limit, and how it is rendered."""

import ctypes
import importlib
import inspect
import os
import warnings
from copy import deepcopy
from ctypes.util import find_library
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import load_env_creator
from gymnasium.spaces import Box
from gymnasium.wrappers import AddRenderObservation, NormalizeObservation, NormalizeReward

from levin.core.errors import ConfigError
from levin.envs.config import EnvConfig
from levin.envs.sync import close_env
from levin.envs.wrappers import ActionRepeat, InfoMask, drop_texts, select_entries, stack_frames


def registered_limit(config: EnvConfig) -> int | None:
    """Return the time limit that the env id was registered with, in steps of the env; None: it has none."""
    if config.family in ("atari", "torchrl"):
        return None
    env = make_single_env(config)
    close_env(env)
    return env.spec.max_episode_steps if env.spec else None


def make_single_env(config: EnvConfig, render: bool = False) -> gym.Env:
    """Build one env, not vectorized."""
    module, _, name = config.id.rpartition(":")
    if module:
        importlib.import_module(module)
    # The constructor of LQR samples the system itself: without a seed every env and session would have another one.
    system = {"task_kwargs": {"random": 0}} if config.id.startswith("dm_control/lqr") else {}
    env = gym.make(
        config.id,
        max_episode_steps=config.time_limit,
        disable_env_checker=True,  # it costs a Python call per step
        # Copies, as the env may change what it is given. Rendering replaces some arguments.
        **(deepcopy({**system, **config.kwargs}) | _render_options(config, name, render)),
    )
    _check_wrappers(env, config.id)
    if config.action_repeat > 1:
        env = ActionRepeat(env, config.action_repeat)
    if config.pixels:  # after the repeated steps, of which only the last is drawn
        env = AddRenderObservation(env, render_only=True)
    if config.observation_entries is not None:
        env = select_entries(env, config.observation_entries)
    env = drop_texts(env)
    if config.frame_stack > 1:
        env = stack_frames(env, config.frame_stack, config.channels)
    return InfoMask(env) if config.action_mask == "info" else env


def _check_wrappers(env: gym.Env, name: str) -> None:
    """Check that no wrapper of the env keeps running statistics, and that it gives one reward.

    Raises:
        ConfigError: The env can't be used as it is.
    """
    rewards = getattr(env.unwrapped, "reward_space", None)
    sums_rewards = False
    while isinstance(env, gym.Wrapper):
        if isinstance(env, NormalizeObservation | NormalizeReward) and env.update_running_mean:
            key = "observation" if isinstance(env, NormalizeObservation) else "reward"
            raise ConfigError(
                f"env.id={name} has the wrapper {type(env).__name__}, whose statistics evaluations, checkpoints and "
                f"exports do not see: remove it, and set env.normalize_{key}=true"
            )
        own_step = "step" in vars(type(env)) and not type(env).__module__.startswith("gymnasium.")
        sums_rewards |= isinstance(env, gym.RewardWrapper) or own_step
        env = env.env
    if isinstance(rewards, Box) and np.prod(rewards.shape) > 1 and not sums_rewards:
        raise ConfigError(
            f"env.id={name} has several rewards, {rewards.shape}, and algorithms here learn from one: wrap the "
            "env in a module of your own so that it returns their weighted sum"
        )


def _render_options(config: EnvConfig, name: str, render: bool) -> dict[str, Any]:
    """Return the rendering arguments for `gymnasium.make`: only those that the env accepts, none without rendering."""
    side = config.pixels
    options: dict[str, Any] = {"render_mode": "rgb_array"} if render or side else {}
    if (options or config.family == "dm_control") and not _has_display():
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
        if find_library("EGL"):
            os.environ.setdefault("MUJOCO_GL", "egl")  # must be set before dm_control is imported
    if config.family == "dm_control":
        gym.register_envs(importlib.import_module("shimmy"))
        own = config.kwargs.get("render_kwargs", {})
        return options | ({"render_kwargs": {"camera_id": 0, **own, "height": side, "width": side}} if side else {})
    entry_point = gym.spec(name).entry_point
    gymnasiums = "gymnasium.envs.mujoco" in str(entry_point)
    if gymnasiums or _is_mujoco(entry_point):
        if gymnasiums and options and not {"camera_name", "camera_id"} & config.kwargs.keys():
            options["camera_name"] = "track"  # the default camera does not follow the robot
        importlib.import_module("mujoco").set_mju_user_warning(_mujoco_warning)
        return options | ({"height": side, "width": side} if side else {})
    if side:
        raise ConfigError(f"env.pixels={side} is for MuJoCo and dm_control: {config.id} renders at one size only")
    return options


def _is_mujoco(entry_point: Any) -> bool:
    """Return whether an env is a subclass of Gymnasium's MuJoCo envs."""
    creator = load_env_creator(entry_point) if isinstance(entry_point, str) else entry_point
    bases = creator.__mro__ if inspect.isclass(creator) else ()
    return any(base.__module__.startswith("gymnasium.envs.mujoco.") for base in bases)


def _has_display() -> bool:
    """Return whether the display that DISPLAY names can be opened; it may be left over from a closed session."""
    library = find_library("X11") if "DISPLAY" in os.environ else None
    if library is None:
        return False
    x11 = ctypes.CDLL(library)
    x11.XOpenDisplay.restype = ctypes.c_void_p
    display = x11.XOpenDisplay(None)
    if display:
        x11.XCloseDisplay(ctypes.c_void_p(display))
    return bool(display)


def _mujoco_warning(message: str) -> None:
    """Issue MuJoCo's warning as a Python warning; MuJoCo would print it and write it to a file."""
    if "settotalmass" not in message:  # the XML files of the v4 envs cause this one
        warnings.warn(f"MuJoCo: {message}", stacklevel=1)
