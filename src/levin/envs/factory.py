"""Build the gymnasium `VectorEnv` that `configs/env/*.yaml` describes, in which every episode has a seed of its own.

Autoreset is DISABLED: the last observation of an episode is the true one, and the caller resets the envs that are done
with `reset(options={"reset_mask": done})`.
"""

import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from levin.algorithms.base import Algorithm
from levin.core import rng
from levin.core.errors import ConfigError, valid_names
from levin.core.omega import to_plain
from levin.core.process import ignore_signals
from levin.core.spaces import EnvSpec, observation_dtypes, to_tensors
from levin.core.validate import check_section
from levin.envs.config import TRAINING, EnvConfig, channels_of
from levin.envs.single import make_single_env, registered_limit
from levin.envs.sync import ProcessEnv, SyncEnvs, close_env
from levin.envs.torchrl import TorchRLVectorEnv, import_target
from levin.envs.vector import SeededVectorEnv
from levin.model_based.dream_env import STARTS, DreamEnv, LatentEnv, Model, policy_space
from levin.runs.load import load_algorithm, load_config

# Extras of Levin, and words in the error of an env that needs a package of theirs.
EXTRAS = {
    "mujoco": {"mujoco", "MuJoCo"},
    "box2d": {"Box2D", "box2d", "pygame"},
    "atari": {"ale_py", "ale-py"},
    "dmc": {"dm_control", "shimmy"},
}
# Newest Python that packages of an extra exist for, as in pyproject.toml: labmaze of DM Control, and Box2D.
NEWEST_PYTHON = {"dmc": (3, 12), "box2d": (3, 13)}


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
    """Build the vector env that a config describes.

    Args:
        config: Options of the env.
        seed: Root of all episode seeds, together with `purpose` and `rank`.
        purpose: `TRAINING` or `EVALUATION`. They have different episode seeds; Atari, dreams and the number of batched
            TorchRL envs also differ between them.
        rank: Rank that steps the envs.
        num_envs: Number of envs; None: `config.num_envs`.
        first: Number of the first env, if these envs are a part of the run's.
        render: Whether `env.render()` returns frames.
        copy: Whether `reset` and `step` return copies; otherwise the next step overwrites what they return.

    Raises:
        ConfigError: The env can't be made: its id is unknown, a package is missing, or it rejects a key.
    """
    if config.target is not None and config.family != "torchrl":
        raise ConfigError(f"env.target={config.target} is for env.family=torchrl, not for {config.family}")
    if config.action_mask is not None:
        _check_mask_options(config)
    try:
        with rng.preserved_state():
            env = make_vector(config, num_envs, training=purpose == TRAINING, render=render, copy=copy)
        if config.wrappers:
            env = wrap_latent(env, config)
    except ConfigError:
        raise
    except (gym.error.DependencyNotInstalled, ModuleNotFoundError) as error:
        raise ConfigError(_explain_missing_package(config, error)) from error
    except Exception as error:  # libraries raise errors of every type
        what = f"env.id={config.id}" if config.target is None else f"env.target={config.target}"
        reason = next((line for line in str(error).splitlines() if line.strip()), "")
        unknown = isinstance(error, gym.error.NameNotFound | gym.error.NamespaceNotFound)
        hint = _explain_unregistered(config) if unknown else _location(error)
        if render and "render_mode" in reason:
            hint = "; to be recorded, an env takes render_mode='rgb_array' and returns a picture from render()"
        raise ConfigError(f"{what} can't be made: {type(error).__name__}: {reason}{hint}") from error
    return SeededVectorEnv(env, config, seed=seed, purpose=purpose, rank=rank, first=first)


def _check_mask_options(config: EnvConfig) -> None:
    """Raise a ConfigError if an option does not go with action masks."""
    mask = f"env.action_mask={config.action_mask}"
    unsupported = [
        (
            config.family in ("atari", "dream"),
            f"{mask} is not for env.family={config.family}, whose envs give no masks: set env.action_mask=null",
        ),
        (
            config.family == "torchrl" and config.action_mask == "info",
            f"{mask} needs infos, which TorchRL's envs do not have: name the mask's key in the observation, such as "
            "env.action_mask=action_mask",
        ),
        (
            bool(config.wrappers),
            f"{mask} does not go with env.wrappers, which replace the observation: set env.wrappers=[]",
        ),
        (
            config.action_repeat > 1,
            f"{mask} does not go with env.action_repeat={config.action_repeat}, because a mask may forbid the action "
            "before its last repeat: set env.action_repeat=1",
        ),
    ]
    for is_set, message in unsupported:
        if is_set:
            raise ConfigError(message)


def _explain_missing_package(config: EnvConfig, error: ModuleNotFoundError | gym.error.DependencyNotInstalled) -> str:
    """Return a sentence about a package that an env needs, with the extra of Levin that has it, if one does."""
    missing = (getattr(error, "name", None) or "").partition(".")[0]
    words = {missing, *re.findall(r"[\w-]+", str(error))}
    what = f"env.id={config.id} needs a package that is missing ({error})"
    for extra, names in EXTRAS.items():
        if names & words:
            newest = NEWEST_PYTHON.get(extra, sys.version_info[:2])
            if sys.version_info[:2] > newest:
                version = f"{newest[0]}.{newest[1]}"
                return (
                    f"{what}, which exists for Python up to {version}: remove .venv and type "
                    f"make setup PYTHON=python{version}"
                )
            return f"{what}: type make .venv/.{extra}"
    named = config.id.partition(":")[0].partition(".")[0]  # the package of the module before the colon
    if missing and missing == named:
        return f"{what}: install the package that has the module, or set PYTHONPATH to the folder that holds it"
    return f"{what}: install the package that has the module {missing}" if missing else what


def _explain_unregistered(config: EnvConfig) -> str:
    """Return a hint about an id that Gymnasium does not know although the module before the colon was imported."""
    module, _, wanted = config.id.rpartition(":")
    if wanted.startswith("ALE/"):
        return "; Atari games are ENV=atari (env=atari) with env.id=pong"
    if wanted.startswith("dm_control/"):
        return "; tasks of DM Control also need env.family=dm_control"
    if not module:
        return "; if a package registers the id, name the package first: env.id=the_package:TheId-v0"
    package = module.partition(".")[0]
    modules = {each: getattr(spec.entry_point, "__module__", spec.entry_point) for each, spec in gym.registry.items()}
    ids = [each for each, name in modules.items() if re.split("[.:]", str(name))[0] == package]
    if ids:
        return f"; {valid_names(wanted, ids)}"
    functions = [each for each in dir(sys.modules[module]) if each.startswith("register_")]
    if functions:
        return (
            f"; {module} registers its ids in {functions[0]}(): call it in a module of your own, and name that: "
            "env.id=my_module:TheId-v0"
        )
    old = "; it uses the old package gym, whose envs shimmy converts" if "gym" in sys.modules else ""
    return f"; importing {module} registers no ids with Gymnasium{old}"


def _location(error: Exception) -> str:
    """Return where an error was raised, if that is in somebody else's package or module."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = (str(Path(__file__).parents[1]), str(Path(gym.__file__).parent))
    others = [frame for frame in frames if not frame.filename.startswith(ours)]
    return f" ({Path(others[-1].filename).name}, line {others[-1].lineno})" if others else ""


def make_vector(
    config: EnvConfig, num_envs: int | None, *, training: bool = False, render: bool = False, copy: bool = True
) -> VectorEnv:
    """Build the vector env without the episode seeds of `make_env`; its actions are in the env's own units."""
    families = {"torchrl": _make_torchrl, "atari": _make_atari, "dream": make_dream}
    return families.get(config.family, _make_gymnasium)(config, num_envs, training=training, render=render, copy=copy)


def _make_gymnasium(
    config: EnvConfig, num_envs: int | None, *, training: bool, render: bool, copy: bool
) -> SyncEnvs | AsyncVectorEnv:
    make_single, count = partial(make_single_env, config, render), num_envs or config.num_envs
    if config.vectorization == "sync":
        return SyncEnvs([make_single] * count, copy=copy)
    single = make_single()  # fails here with a clear message, not with a traceback from an env process
    space = single.observation_space
    close_env(single)
    # TorchRL makes `spawn` the default, with which every env process spends seconds on imports. With pixels, `fork` is
    # not possible: OpenGL has rendered in this process already and does not survive a fork.
    context = "fork" if sys.platform == "linux" and not config.pixels else None
    make_in_process = partial(_make_without_signals, make_single, os.getpid())
    try:
        env = AsyncVectorEnv(
            [make_in_process] * count,
            copy=copy,
            context=context,
            # Workers are not asked whether their spaces are equal: bounds may differ by a rounding. With "different",
            # Gymnasium would also build one more env per process here, and not close it.
            observation_mode=(batch_space(space, count), space),  # type: ignore[arg-type]  # Gymnasium takes both
            autoreset_mode=AutoresetMode.DISABLED,
        )
    except (EOFError, ConnectionError) as error:  # most often a process has ended; its traceback is printed
        raise ConfigError(
            f"env.id={config.id} can't be built in {count} processes at once, though it can in one: set "
            f"env.vectorization=sync ({type(error).__name__}: {error}; the traceback of a process, if any, is above)"
        ) from error
    for process in env.processes:  # they ignore SIGTERM, so end them with SIGKILL
        process._popen.terminate = process._popen.kill  # type: ignore[union-attr]
    return env


def _make_without_signals(make_single: Callable[[], gym.Env], parent: int) -> gym.Env:
    """Build one env in a process that ignores the signals which end a run: the parent handles them."""
    if os.getpid() != parent:  # Gymnasium also makes one env in the parent, to read its spaces
        ignore_signals()
    return ProcessEnv(make_single())


def _make_atari(config: EnvConfig, num_envs: int | None, *, training: bool, render: bool, copy: bool) -> VectorEnv:
    from levin.envs import atari  # needs the extra `atari`

    return atari.make_atari_games(config, num_envs or config.num_envs, training=training, view=render)


def _make_torchrl(config: EnvConfig, num_envs: int | None, *, training: bool, render: bool, copy: bool) -> VectorEnv:
    if config.target is None:
        raise ConfigError("env.family=torchrl needs env.target=my_module:make_env")
    if render and config.target.startswith("levin.envs.batched:"):  # the same env, which Gymnasium can draw
        return _make_gymnasium(replace(config, target=None), num_envs, training=training, render=render, copy=copy)
    unsupported = {
        "vectorization=async": (config.vectorization == "async", "set collector=torchrl-process"),
        "action_repeat": (config.action_repeat > 1, "let env.target add a FrameSkipTransform"),
        "observation_entries": (config.observation_entries is not None, "let env.target select them"),
        "frame_stack": (config.frame_stack > 1, "let env.target add a CatFrames"),
        "pixels": (config.pixels is not None, "let env.target return pixel observations"),
    }
    if render:
        raise ConfigError("runs with env.family=torchrl can't be recorded: TorchRL's envs have no common way to draw")
    for name, (is_set, instead) in unsupported.items():
        if is_set:
            raise ConfigError(f"env.{name} is not for env.family=torchrl: {instead}")
    count = num_envs or config.num_envs
    target, kwargs = import_target(config.target), config.kwargs
    # Not the signature of a class: that of `EnvBase` is the signature of its metaclass.
    if "num_envs" in inspect.signature(target.__init__ if inspect.isclass(target) else target).parameters:
        kwargs = {"num_envs": count, **kwargs}
    return TorchRLVectorEnv(
        partial(_call_target, target, kwargs), count, time_limit=config.time_limit, round_up=not training
    )


def _call_target(target: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
    return target(**deepcopy(kwargs))  # the env may change what it is given


def describe_env(env: SeededVectorEnv) -> EnvSpec:
    """Return the description of the env that an algorithm is built from."""
    config = env.config
    normalized = config.normalize_observation and "float32" in observation_dtypes(env.observation)
    return {
        "id": config.id,
        "num_envs": env.num_envs,
        "observation": env.observation,
        "shown": env.shown,
        "action": env.action,
        "action_units": config.action,
        "action_repeat": config.action_repeat,
        "frame_stack": config.frame_stack,
        "observation_clip": config.observation_clip if normalized else None,
        "reward_clip": config.reward_clip if config.normalize_reward else None,
    }


def load_world_model(run: str) -> tuple[Algorithm, Model]:
    """Load the algorithm of a run and its world model, on the CPU, with frozen model parameters.

    Raises:
        ConfigError: The algorithm has no world model, or has not finished training it.
    """
    algorithm = load_algorithm(Path(run))
    if not hasattr(algorithm, "dream_model"):
        raise ConfigError(
            f"env.run={run} is a run of {type(algorithm).__name__}, which has no world model; "
            "valid: runs of world_models, dreamer or dreamer_v3"
        )
    return algorithm, algorithm.dream_model().requires_grad_(False).eval()  # type: ignore[operator]


def make_dream(config: EnvConfig, num_envs: int | None, *, training: bool, render: bool, copy: bool) -> VectorEnv:
    """Build the dream env of `env.run`, whose episodes are imagined by the world model of that run.

    For evaluation (`training` is False), build the real env that the model was trained in, with the same observations:
    the features of the model's latent state.

    Raises:
        ConfigError: `env.run` is not set or has no trained world model, or no time limit is known.
    """
    if config.run is None:
        raise ConfigError(
            "env.family=dream needs the run of a world model: set env.run=runs/... (world_models, dreamer, dreamer_v3)"
        )
    defaults = EnvConfig(id=config.id)
    for key in ("vectorization", "action_repeat", "frame_stack", "observation_entries", "pixels", "channels"):
        if getattr(config, key) != getattr(defaults, key):
            raise ConfigError(
                f"env.{key} can't be set for env.family=dream, whose env is that of env.run={config.run}: leave it out"
            )
    source, num_envs = load_env(Path(config.run)), num_envs or config.num_envs
    algorithm, model = load_world_model(config.run)
    if not training:
        limit = config.time_limit or source.time_limit
        env = make_vector(replace(source, time_limit=limit, vectorization="sync"), num_envs, render=render)
        return LatentEnv(env, model, source.action, algorithm.env["observation"], channels_of(source))
    limit = config.time_limit or source.time_limit or registered_limit(source)
    if limit is None:
        raise ConfigError(f"{source.id} has no time limit, and a dream needs one: set env.time_limit=...")
    starts = getattr(model, "starts", None)
    if starts is None:
        starts = first_observations(source)
    actions, limit = policy_space(algorithm.env["action"]), -(-limit // source.action_repeat)
    return DreamEnv(model, starts, actions, num_envs=num_envs, temperature=config.temperature, time_limit=limit)


def wrap_latent(env: VectorEnv, config: EnvConfig) -> LatentEnv:
    """Wrap envs so that they show the features of the latent state of `env.run`'s world model.

    Raises:
        ConfigError: `env.run` is not set or has no world model, or the model reads other observations.
    """
    if config.run is None:
        raise ConfigError("env.wrappers=[latent] needs the run of a world model: set env.run=runs/...")
    if config.family == "atari" or config.vectorization == "async":
        raise ConfigError(
            "env.wrappers=[latent] needs envs that this process steps, not Atari's, which have threads of their own: "
            "set env.vectorization=sync"
        )
    algorithm, model = load_world_model(config.run)
    units = load_env(Path(config.run)).action  # the model has seen actions in the units of its own run
    return LatentEnv(env, model, units, algorithm.env["observation"], channels_of(config))


def first_observations(source: EnvConfig) -> Any:
    """Return the first observations of `STARTS` training episodes, `[STARTS, *S]`, without taking a step."""
    env = make_env(source, seed=0, num_envs=1)
    observations = [env.begin([episode], np.ones(1, dtype=bool)) for episode in range(STARTS)]
    env.close()
    return to_tensors(env.observation, _concatenate(observations))


def _concatenate(observations: list[Any]) -> Any:
    """Concatenate batches of observations, arrays or dicts of arrays, along the first axis."""
    if isinstance(observations[0], dict):
        return {name: np.concatenate([each[name] for each in observations]) for name in observations[0]}
    return np.concatenate(observations)


def load_env(run: Path) -> EnvConfig:
    """Return the env options of a run.

    Raises:
        ConfigError: An option is not valid, or the env needs code that was not accepted (`levin.runs.trust`).
    """
    section = load_config(run, code_sections=("env",)).env
    check_section(EnvConfig, "env.", section)
    return EnvConfig(**to_plain(section))
