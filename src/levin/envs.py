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
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import gymnasium as gym
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.wrappers import AddRenderObservation

from levin import dream, signals
from levin.errors import ConfigError
from levin.hints import PositiveFloat, PositiveInt
from levin.spaces import EnvSpec, dtypes
from levin.torchrl_envs import TorchRLVectorEnv, target
from levin.vector_env import SeededVectorEnv
from levin.wrappers import ActionRepeat, show_entries, stack_frames

# The first word of an episode's seed: what the episode is for.
TRAINING, EVALUATION = 0, 1


@dataclass(frozen=True, kw_only=True)
class EnvConfig:
    """What a `configs/env/*.yaml` may say.

    Args:
        id: A gymnasium id; `my_module:MyEnv-v0` imports `my_module` first. Of Atari a game, as in `space_invaders`.
        family: The library behind the id; `dm_control` ids are those of Shimmy, `dm_control/walker-walk-v0`; `atari` is
            ale-py's vector env, see `levin.atari`; with `torchrl` the id is only a name, and with `dream`, which is the
            model of `run`.
        target: `my_module:make_env`, what makes a `torchrl.envs.EnvBase`, of one env or a batch of them.
        num_envs: Copies that are stepped together.
        vectorization: `sync` steps them in this process, `async` in one process each (for slow envs).
        timeout: Seconds that async envs may take for a step or a reset.
        action: `rescale` maps the policy's [-1, 1] onto the env's bounds, `clip` cuts at them, `none` does neither.
        time_limit: Steps of the env before truncation; null keeps the limit the id was registered with.
        action_repeat: Env steps per action. The rewards of the repeats are summed; `time_limit` counts env steps, which
            of Atari are frames.
        pixels: Show a picture of the scene, `[3, pixels, pixels]`, instead of the state (MuJoCo and dm_control).
        observation_entries: The numbers of a vector that are shown, by their places; null: all. `[0, 1]` hides how fast
            Pendulum-v1 turns.
        frame_stack: The newest observations, shown together along the first axis, oldest first; `[C, H, W]` or `[H, W]`
            pixels become `[K * C, H, W]` or `[K, H, W]`. An episode begins with its first observation K times.
        normalize_observation: Subtract the running mean and divide by the running deviation.
        observation_clip: Bound on a normalised observation.
        normalize_reward: Divide by the running deviation of the discounted return.
        reward_clip: Bound on a normalised reward.
        run: Whose model is dreamt in, or seen with: of world_models, dreamer or dreamer_v3. See `levin.dream`.
        temperature: Of a dream's draws, tau.
        wrappers: `[latent]` shows what the model of `run` makes of each observation.
        kwargs: Passed on to `gymnasium.make`, `levin.atari.AtariGames`, or the target.
    """

    id: str
    family: Literal["gymnasium", "dm_control", "atari", "torchrl", "dream"] = "gymnasium"
    target: str | None = None
    num_envs: PositiveInt = 1
    vectorization: Literal["sync", "async"] = "sync"
    timeout: PositiveFloat = 300.0
    action: Literal["rescale", "clip", "none"] = "none"
    time_limit: PositiveInt | None = None
    action_repeat: PositiveInt = 1
    pixels: PositiveInt | None = None
    observation_entries: list[int] | None = None
    frame_stack: PositiveInt = 1
    normalize_observation: bool = False
    observation_clip: PositiveFloat = 10.0
    normalize_reward: bool = False
    reward_clip: PositiveFloat = 10.0
    run: str | None = None
    temperature: PositiveFloat = 1.0
    wrappers: list[Literal["latent"]] = field(default_factory=list)
    kwargs: dict[str, Any] = field(default_factory=dict)


def make(
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
            env = dream.seen(env, config)
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
    """As `make`, without seeds and with the actions of the env."""
    families = {"torchrl": _make_torchrl, "atari": _make_atari, "dream": _make_dream}
    return families.get(config.family, _make_gymnasium)(config, num_envs, training=training, render=render, copy=copy)


def registered_limit(config: EnvConfig) -> int | None:
    """Steps of the env before truncation, as its id was registered."""
    if config.family in ("atari", "torchrl"):
        return None
    env = make_one(config)
    env.close()
    return env.spec.max_episode_steps if env.spec else None


def _make_gymnasium(
    config: EnvConfig, num_envs: int | None, *, training: bool, render: bool, copy: bool
) -> SyncVectorEnv | AsyncVectorEnv:
    one, count = partial(make_one, config, render), num_envs or config.num_envs
    if config.vectorization == "sync":
        return SyncVectorEnv([one] * count, copy=copy, autoreset_mode=AutoresetMode.DISABLED)
    one().close()  # an error inside a worker process would be a traceback
    # TorchRL makes `spawn` the default, and every worker would import all of this for seconds. OpenGL, which has drawn
    # here already, does not survive a fork.
    start = "fork" if sys.platform == "linux" and not config.pixels else None
    deaf = partial(_make_deaf, one, os.getpid())
    env = AsyncVectorEnv([deaf] * count, copy=copy, context=start, autoreset_mode=AutoresetMode.DISABLED)
    for process in env.processes:
        process._popen.terminate = process._popen.kill  # type: ignore[union-attr]
    return env


def _make_deaf(one: Callable[[], gym.Env], parent: int) -> gym.Env:
    if os.getpid() != parent:  # where one is made too, to be looked at
        signals.ignore()
    return one()


def _make_atari(config: EnvConfig, num_envs: int | None, *, training: bool, render: bool, copy: bool) -> VectorEnv:
    from levin import atari  # needs the extra

    return atari.make(config, num_envs or config.num_envs, training=training, view=render)


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
    one, count = partial(target(config.target), **config.kwargs), num_envs or config.num_envs
    return TorchRLVectorEnv(one, count, time_limit=config.time_limit, round_up=not training)


def _make_dream(config: EnvConfig, num_envs: int | None, *, training: bool, render: bool, copy: bool) -> VectorEnv:
    return dream.make(config, num_envs or config.num_envs, training=training, render=render)


def make_one(config: EnvConfig, render: bool = False) -> gym.Env:
    """One copy, without the vector around it."""
    module, _, name = config.id.rpartition(":")
    if module:
        importlib.import_module(module)
    env = gym.make(
        config.id,
        max_episode_steps=config.time_limit,
        disable_env_checker=True,  # one Python call less per step
        **_view(config, name, render),
        **config.kwargs,
    )
    if config.pixels:
        env = AddRenderObservation(env, render_only=True)
    if config.action_repeat > 1:
        env = ActionRepeat(env, config.action_repeat)
    if config.observation_entries is not None:
        env = show_entries(env, config.observation_entries)
    return stack_frames(env, config.frame_stack) if config.frame_stack > 1 else env


def _view(config: EnvConfig, name: str, render: bool) -> dict[str, Any]:
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


def describe(env: SeededVectorEnv) -> EnvSpec:
    """What the algorithm needs to know of the env.

    Raises:
        ConfigError: Pixels are to be normalised.
    """
    config = env.config
    if config.normalize_observation and (dtypes(env.observation) != {"float32"} or "spaces" in env.observation):
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
