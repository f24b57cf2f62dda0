"""From a `configs/env/*.yaml` to a gymnasium `VectorEnv` whose every episode has a seed of its own.

Autoreset is DISABLED: the observation that ends an episode is the true one, and whoever steps the envs resets the ones
that are done with `reset(options={"reset_mask": done})`.
"""

import importlib
import multiprocessing
import os
import signal
import sys
import traceback
import warnings
from ctypes.util import find_library
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv, VectorWrapper
from gymnasium.vector.utils import batch_space
from gymnasium.wrappers import AddRenderObservation

from levin.errors import ConfigError, RunError
from levin.hints import PositiveFloat, PositiveInt
from levin.spaces import EnvSpec, action_units, describe_action, describe_space, dtypes, readable, to_gym
from levin.torchrl_envs import TorchRLVectorEnv, target
from levin.wrappers import ActionRepeat, stack_frames

# The first word of an episode's seed: what the episode is for.
TRAINING, EVALUATION = 0, 1


@dataclass(frozen=True, kw_only=True)
class EnvConfig:
    """What a `configs/env/*.yaml` may say.

    Args:
        id: A gymnasium id; `my_module:MyEnv-v0` imports `my_module` first. Of Atari a game, as in `space_invaders`.
        family: The library behind the id; `dm_control` ids are those of Shimmy, `dm_control/walker-walk-v0`; `atari` is
            ale-py's vector env, see `levin.atari`; with `torchrl` the id is only a name.
        target: `my_module:make_env`, what makes a `torchrl.envs.EnvBase`, of one env or a batch of them.
        num_envs: Copies that are stepped together.
        vectorization: `sync` steps them in this process, `async` in one process each (for slow envs).
        timeout: Seconds that async envs may take for a step or a reset.
        action: `rescale` maps the policy's [-1, 1] onto the env's bounds, `clip` cuts at them, `none` does neither.
        time_limit: Steps of the env before truncation; null keeps the limit the id was registered with.
        action_repeat: Env steps per action. The rewards of the repeats are summed; `time_limit` counts env steps, which
            of Atari are frames.
        pixels: Show a picture of the scene, `[3, pixels, pixels]`, instead of the state (MuJoCo and dm_control).
        frame_stack: The newest observations, shown together along the first axis, oldest first; `[C, H, W]` or `[H, W]`
            pixels become `[K * C, H, W]` or `[K, H, W]`. An episode begins with its first observation K times.
        normalize_observation: Subtract the running mean and divide by the running deviation.
        observation_clip: Bound on a normalised observation.
        normalize_reward: Divide by the running deviation of the discounted return.
        reward_clip: Bound on a normalised reward.
        kwargs: Passed on to `gymnasium.make`, `levin.atari.AtariGames`, or the target.
    """

    id: str
    family: Literal["gymnasium", "dm_control", "atari", "torchrl"] = "gymnasium"
    target: str | None = None
    num_envs: PositiveInt = 1
    vectorization: Literal["sync", "async"] = "sync"
    timeout: PositiveFloat = 300.0
    action: Literal["rescale", "clip", "none"] = "none"
    time_limit: PositiveInt | None = None
    action_repeat: PositiveInt = 1
    pixels: PositiveInt | None = None
    frame_stack: PositiveInt = 1
    normalize_observation: bool = False
    observation_clip: PositiveFloat = 10.0
    normalize_reward: bool = False
    reward_clip: PositiveFloat = 10.0
    kwargs: dict[str, Any] = field(default_factory=dict)


def episode_seed(seed: int, purpose: int, rank: int, env: int, episode: int) -> int:
    """The seed of one episode. No two of (seed, purpose, rank, env, episode) share a stream."""
    return int(np.random.SeedSequence(seed, spawn_key=(purpose, rank, env, episode)).generate_state(1)[0])


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
) -> "SeededVectorEnv":
    """Build the vector env.

    Args:
        seed: Together with `purpose` and `rank`, the root of all episode seeds.
        purpose: `TRAINING` or `EVALUATION`: Atari differs between them.
        num_envs: Instead of `config.num_envs`.
        first: The number of the first env, where they are a part of a run's.
        render: Whether `env.render()` gives frames.
        copy: Whether observations are copies. Without it the next step overwrites them.

    Raises:
        ConfigError: The id is unknown, or a package behind it is missing.
    """
    if config.family == "torchrl":
        env = _make_torchrl(config, num_envs, render)
        return SeededVectorEnv(env, config, seed=seed, purpose=purpose, rank=rank, first=first)
    if config.target is not None:
        raise ConfigError(f"env.target={config.target} is for env.family=torchrl, not for {config.family}")
    # TorchRL makes `spawn` the default, and every worker would import all of this for seconds. OpenGL, which has drawn
    # here already, does not survive a fork.
    start = "fork" if sys.platform == "linux" and not config.pixels else None
    vectors = {"sync": partial(SyncVectorEnv, copy=copy), "async": partial(AsyncVectorEnv, copy=copy, context=start)}
    one = partial(make_one, config, render)
    num_envs = num_envs or config.num_envs
    try:
        if config.family == "atari":
            from levin import atari  # needs the extra

            games = atari.make(config, num_envs, training=purpose == TRAINING, view=render)
            return SeededVectorEnv(games, config, seed=seed, purpose=purpose, rank=rank, first=first)
        if config.vectorization == "async":
            one().close()  # an error inside a worker process would be a traceback
        env = vectors[config.vectorization]([one] * num_envs, autoreset_mode=AutoresetMode.DISABLED)
        if isinstance(env, AsyncVectorEnv):
            for process in env.processes:  # `make_one` made them deaf to what `terminate` sends
                process._popen.terminate = process._popen.kill  # type: ignore[union-attr]
    except (gym.error.DependencyNotInstalled, ImportError) as error:
        raise ConfigError(
            f"env.id={config.id} needs a package that is missing ({error}); "
            "the extras mujoco, box2d, atari and dmc bring them: pip install -e '.[mujoco]'"
        ) from error
    except (gym.error.Error, TypeError) as error:
        raise ConfigError(f"env.id={config.id} can't be made: {error}") from error
    return SeededVectorEnv(env, config, seed=seed, purpose=purpose, rank=rank, first=first)


def _make_torchrl(config: EnvConfig, num_envs: int | None, render: bool) -> TorchRLVectorEnv:
    if config.target is None:
        raise ConfigError("env.family=torchrl needs env.target=my_module:make_env")
    refused = {
        "vectorization=async": (config.vectorization == "async", "take collector=torchrl-process"),
        "time_limit": (config.time_limit is not None, "let env.target add a StepCounter"),
        "action_repeat": (config.action_repeat > 1, "let env.target add a FrameSkipTransform"),
        "frame_stack": (config.frame_stack > 1, "let env.target add a CatFrames"),
        "render": (render, "let env.target make its own pictures"),
    }
    for name, (wanted, instead) in refused.items():
        if wanted:
            raise ConfigError(f"env.{name} is not for env.family=torchrl: {instead}")
    one = partial(target(config.target), **config.kwargs)
    return TorchRLVectorEnv(one, num_envs or config.num_envs, round_up=num_envs is not None)


def make_one(config: EnvConfig, render: bool = False) -> gym.Env:
    """One copy, without the vector around it."""
    if multiprocessing.parent_process() is not None:
        # Ctrl-C and SLURM signal every process of the run: its own is to save, and the workers live until it is done.
        for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(each, signal.SIG_IGN)
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


class SeededVectorEnv(VectorWrapper):
    """Seeds every episode of every env, and turns the policy's actions into the env's units.

    `episodes[i]` is the number of the episode that env `i` is in. Resetting an env that has not moved since its last
    reset begins the same episode again, so that a library which resets twice at the start changes nothing.

    Not every episode of every family has a seed of its own: see `goes_on`. `episodes` counts those that have.
    """

    def __init__(
        self, env: VectorEnv, config: EnvConfig, *, seed: int, purpose: int, rank: int, first: int = 0
    ) -> None:
        super().__init__(env)
        self.config, self.first = config, first
        self.seed_of = partial(episode_seed, seed, purpose, rank)
        self.episodes = [-1] * self.num_envs
        # Returns and lengths of the games that ended, where an episode is less than a game; whoever reads it clears it.
        self.games: list[tuple[float, int]] | None = getattr(env, "games", None)
        self.steps = np.ones(self.num_envs, dtype=np.int64)  # [N]: since each was reset; no reset yet counts as one
        self._actions: np.ndarray | None = None  # sent, in the env's units
        self.action = describe_action(env.single_action_space)
        self._to_env = action_units(self.action, config.action)
        if config.action == "rescale" and isinstance(env.single_action_space, Box):  # the space is the policy's too
            self.single_action_space = Box(-1.0, 1.0, env.single_action_space.shape)
            self.action_space = batch_space(self.single_action_space, self.num_envs)
        self.shown = describe_space(env.single_observation_space)
        self.observation, read = readable(self.shown)
        self.read = read or (lambda observation: observation)
        if read is not None:
            self.single_observation_space = to_gym(self.observation)
            self.observation_space = batch_space(self.single_observation_space, self.num_envs)

    @property
    def autoreset_mode(self) -> AutoresetMode:
        return self.metadata["autoreset_mode"]

    @property
    def goes_on(self) -> np.ndarray:
        """`[N]`: whose episode is over, and the next one goes on without a seed: after a lost life, say."""
        return getattr(self.env, "goes_on", np.zeros(self.num_envs, dtype=bool))

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin the next episode of the envs in `options["reset_mask"]` `[N]`, of all without it. `seed` is ours."""
        mask = np.ones(self.num_envs, dtype=bool) if not options else options.get("reset_mask", True)
        seeds: list[int | None] = [None if on else 0 for on in self.goes_on]
        for i in np.flatnonzero(mask & ~self.goes_on):
            self.episodes[i] += int(self.steps[i] > 0)
            self.steps[i] = 0
            seeds[i] = self.seed_of(self.first + int(i), self.episodes[i])
        options = dict(options) if options else None
        try:
            if isinstance(self.env, AsyncVectorEnv):
                self.env.reset_async(seed=seeds, options=options)
                observation, info = self.env.reset_wait(timeout=self.config.timeout)
            else:
                observation, info = self.env.reset(seed=seeds, options=options)  # type: ignore[arg-type]
            return self.read(observation), info
        except Exception as error:
            raise self._failure("reset", error) from error

    def step(self, actions: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """One step of all envs. Raises RunError when one raises, or an async one takes longer than the timeout."""
        self.send(actions)
        return self.receive()

    def send(self, actions: np.ndarray) -> None:
        """The first half of a step. Atari begins now, while what it showed last is copied; others share that memory."""
        self.steps += 1
        self._actions = self._to_env(actions)
        if self.config.family == "atari":
            self.env.send(self._actions)  # type: ignore[attr-defined]

    def receive(self) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """The second half."""
        try:
            if isinstance(self.env, AsyncVectorEnv):
                self.env.step_async(self._actions)  # type: ignore[arg-type]
                observation, *rest = self.env.step_wait(timeout=self.config.timeout)
            elif self.config.family == "atari":
                observation, *rest = self.env.receive()  # type: ignore[attr-defined]
            else:
                observation, *rest = self.env.step(self._actions)  # type: ignore[arg-type]
            return self.read(observation), *rest  # type: ignore[return-value]
        except Exception as error:
            raise self._failure("step", error) from error

    def _failure(self, what: str, error: Exception) -> RunError:
        culprit, said = self._culprit(error), f"raised {type(error).__name__}: {error}"
        if isinstance(error, multiprocessing.TimeoutError):
            said = f"did not come back within env.timeout={self.config.timeout:g} seconds"
        elif isinstance(error, EOFError | ConnectionError):
            said = "lost its process"
        elif isinstance(self.env, AsyncVectorEnv):
            said += " (env.vectorization=sync shows where)"
        if isinstance(self.env, AsyncVectorEnv):
            self.env.close(terminate=True)  # a worker that hangs would be waited for
        if culprit is not None:
            env, episode = self.first + culprit, self.episodes[culprit]
            said += f"; env {env}, step {self.steps[culprit]} of episode {episode}, seed {self.seed_of(env, episode)}"
        return RunError(f"the {what} of {self.config.id} {said}")

    def _culprit(self, error: Exception) -> int | None:
        """Which env it was, as far as one can tell."""
        if isinstance(self.env, AsyncVectorEnv):
            for i, (pipe, process) in enumerate(zip(self.env.parent_pipes, self.env.processes, strict=True)):
                if pipe is None:  # closed by Gymnasium when its env raised
                    return i
                if isinstance(error, multiprocessing.TimeoutError):
                    if not pipe.poll():
                        return i
                elif isinstance(error, EOFError | ConnectionError):
                    process.join(0.2)  # its pipe is closed before it has ended
                    if process.exitcode is not None:
                        return i
        for frame, _ in traceback.walk_tb(error.__traceback__):  # where the loop over the envs stands
            if frame.f_code in (SyncVectorEnv.step.__code__, SyncVectorEnv.reset.__code__):
                return frame.f_locals["i"]
            if frame.f_code in (TorchRLVectorEnv.step.__code__, TorchRLVectorEnv.reset.__code__):
                return frame.f_locals["part"].start
        return None

    def begin(self, episodes: list[int], mask: np.ndarray) -> Any:
        """Begin episode `episodes[i]` in every env of the mask `[N]`; returns the observations `[N, *shape]`."""
        for i in np.flatnonzero(mask):
            self.episodes[i], self.steps[i] = episodes[i], 0
        self.goes_on[mask] = False
        return self.reset(options={"reset_mask": mask})[0]


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
