"""Step envs one after the other in this process, or one env per process, and tolerate careless env code.

Users' envs are not always careful. They return rewards as arrays of one number, raise in `close()`, or use the global
random generators of Python, NumPy and PyTorch, which belong to the run.
"""

import math
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box, Dict, Tuple
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.vector.utils import concatenate

from levin.core import rng

NUMBERS = (bool, int, float, np.bool_, np.integer, np.floating)
# Columns `episode/<name>` and `eval/<name>` of Levin itself.
OWN_NAMES = ("return", "length", "count", "return_mean", "return_std", "length_mean", "dream_return")
ENDED = "levin_ended"  # key of the infos of a `ProcessEnv`
WATCHED_CALLS = 64  # calls of a vector env in which its envs have random streams of their own
WATCH_EVERY = 256  # of the later calls, one in so many is checked


class SyncEnvs(SyncVectorEnv):
    """`SyncVectorEnv` with autoreset DISABLED that keeps the run's random numbers apart.

    It returns no infos. What envs report of an episode in its last info is added to `ended`.

    At first each env has random streams of its own in place of the global generators. Exchanging them takes as long as
    a step of a small env, so it ends after `WATCHED_CALLS` calls in which no env has used them. From then on one call
    in `WATCH_EVERY` is checked, and the streams return for good if an env uses the generators.

    Args:
        make: Functions that build the envs. Their observation spaces may differ in their bounds.
        copy: Whether `reset` and `step` return copies; otherwise the next step overwrites what they return.
    """

    def __init__(self, make: list[Callable[[], gym.Env]], *, copy: bool) -> None:
        super().__init__(make, copy=copy, observation_mode="different", autoreset_mode=AutoresetMode.DISABLED)
        # Env and numbers of episodes that end; the reader clears it.
        self.ended: list[tuple[int, dict[str, float]]] = []
        self.calls = 0
        self.separated = True  # whether each env has random streams of its own
        self.envs = [OwnGenerators(env, i) for i, env in enumerate(self.envs)]
        shape = self.single_observation_space.shape if isinstance(self.single_observation_space, Box) else None
        # View of `_observations` `[N, S, *]` as `[N S, *]`, if they are one array
        self._rows = self._observations.reshape(-1, *shape[1:]) if shape else None  # type: ignore[union-attr]
        self._length = shape[0] if shape else 0

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset the envs of the mask `options["reset_mask"]` `[N]`, or all envs; `seed` is None or a list `[N]`."""
        others = dict(options or {})
        mask = others.pop("reset_mask") if "reset_mask" in others else np.ones(self.num_envs, dtype=bool)
        self._watch(self._reset_envs, mask, [None] * self.num_envs if seed is None else seed, others or None)
        return self._observe(), {}

    def _reset_envs(self, mask: np.ndarray, seeds: list[int | None], options: dict[str, Any] | None) -> None:
        for i in mask.nonzero()[0].tolist():
            self._env_obs[i], _ = self.envs[i].reset(seed=seeds[i], options=options)

    def step(self, actions: Any) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Step all envs with actions `[N, *A]`."""
        self._watch(self._step_envs, actions)
        flags = (self._rewards, self._terminations, self._truncations)
        return self._observe(), *(flags if not self.copy else map(np.copy, flags)), {}  # type: ignore[return-value]

    def _step_envs(self, actions: Any) -> None:
        observations, rewards, terminations = self._env_obs, self._rewards, self._terminations
        truncations = self._truncations
        for i, env in enumerate(self.envs):
            observations[i], reward, terminated, truncated, info = env.step(actions[i])
            if isinstance(reward, np.ndarray):
                reward = as_number("reward", reward)
            if isinstance(terminated, np.ndarray):
                terminated = as_number("terminated", terminated)
            if isinstance(truncated, np.ndarray):
                truncated = as_number("truncated", truncated)
            rewards[i], terminations[i], truncations[i] = reward, terminated, truncated
            if (terminated or truncated) and (numbers := episode_numbers(info)):
                self.ended.append((i, numbers))

    def _observe(self) -> Any:
        if self._rows is not None:  # what `concatenate` does, without its overhead
            for i, observation in enumerate(self._env_obs):
                if len(observation) != self._length:  # type: ignore[arg-type]
                    shapes = (np.shape(observation), self.single_observation_space.shape)  # type: ignore[arg-type]
                    raise ValueError(f"env {i} returned an observation of the shape {shapes[0]}, not {shapes[1]}")
            np.concatenate(self._env_obs, out=self._rows)  # type: ignore[arg-type]
        else:
            space = self.single_observation_space
            self._observations = concatenate(space, self._env_obs, self._observations)  # type: ignore[arg-type, assignment]
        return deepcopy(self._observations) if self.copy else self._observations

    def _watch(self, call: Callable[..., None], *arguments: Any) -> None:
        """Call a function of the envs, and see from time to time whether they use the global generators."""
        self.calls += 1
        if self.separated:
            call(*arguments)
            if self.calls == WATCHED_CALLS and not any(env.used for env in self.envs):  # type: ignore[attr-defined]
                self.envs, self.separated = [env.env for env in self.envs], False  # type: ignore[attr-defined]
        elif self.calls % WATCH_EVERY:
            call(*arguments)
        else:
            before = rng.Generators()
            try:
                call(*arguments)
            finally:
                if rng.Generators() != before:
                    before.restore()
                    self.envs = [OwnGenerators(env, i) for i, env in enumerate(self.envs)]
                    self.separated = True

    def render(self) -> tuple[Any, ...]:
        """Return the frames of all envs."""
        with rng.preserved_state():
            return super().render()

    def close_extras(self, **_: Any) -> None:
        for env in self.envs:
            close_env(env)


class OwnGenerators(gym.Wrapper):
    """Wrapper of an env that puts random streams of its own in place of the global generators during every call.

    The streams are seeded with every episode, so a resumed run can replay the episode.

    Args:
        env: Env to wrap.
        number: Seed of the streams until the next reset; envs that are stepped together have different ones.
    """

    def __init__(self, env: gym.Env, number: int) -> None:
        super().__init__(env)
        with rng.preserved_state():
            seed_generators(number)
            self.streams = rng.Generators()
        self.used = False  # whether the env has used the streams

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        if seed is not None:
            with rng.preserved_state():
                # Not `seed`: an env that seeds the generators with it would leave them unchanged.
                seed_generators(seed ^ 0x5EED)
                self.streams = rng.Generators()
        return self._call(self.env.reset, seed=seed, options=options)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        return self._call(self.env.step, action)

    def render(self) -> Any:
        return self._call(self.env.render)

    def _call(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        with rng.preserved_state():
            self.streams.restore()
            result = function(*arguments, **options)
            after = rng.Generators()
        self.used |= after != self.streams
        self.streams = after
        return result


class EnvProcessError(Exception):
    """Error of an env in another process, as text: the error itself need not survive the way to this process."""


class ProcessEnv(gym.Wrapper):
    """Wrapper of an env in a process of its own, whose global generators are seeded with every episode.

    Gymnasium would cast and repeat the numbers of a wrong observation until they fit, so observations are checked here.
    """

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        if seed is not None:
            seed_generators(seed)
        with _error_as_text():
            observation, _ = self.env.reset(seed=seed, options=options or None)
            check_observation(self.observation_space, observation)
        return observation, {}

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        with _error_as_text():
            return self._step(action)

    def _step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        check_observation(self.observation_space, observation)
        terminated, truncated = as_number("terminated", terminated), as_number("truncated", truncated)
        numbers = episode_numbers(info) if terminated or truncated else {}
        return observation, as_number("reward", reward), terminated, truncated, {ENDED: numbers} if numbers else {}

    def close(self) -> None:
        close_env(self.env)


@contextmanager
def _error_as_text() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of any type: it is the user's code
        raise EnvProcessError(f"{type(error).__name__}: {error}") from error


def check_observation(space: gym.Space, observation: Any) -> None:
    """Check that the arrays of an observation have the shapes of its space, and numbers of their kind.

    Raises:
        ValueError: They have not.
    """
    if isinstance(space, Dict):
        for key, part in space.items():
            check_observation(part, observation[key])
    elif isinstance(space, Tuple):
        for part, value in zip(space, observation, strict=True):
            check_observation(part, value)
    elif space.shape is not None and space.dtype is not None:
        value = np.asarray(observation)
        if value.shape != space.shape:
            raise ValueError(f"an observation has the shape {value.shape}, not {space.shape}")
        if not np.can_cast(value.dtype, space.dtype, "same_kind"):
            raise ValueError(f"an observation has the dtype {value.dtype}, not {space.dtype}")


def episode_numbers(info: dict[str, Any]) -> dict[str, float]:
    """Return what an env reports of an episode in its last info: `is_success`, and the numbers in `episode_metrics`.

    Names that Levin uses itself, such as `return`, begin with `env_`. A number that is not finite is left out.
    """
    values = {"is_success": info.get("is_success")}
    if isinstance(metrics := info.get("episode_metrics"), dict):
        values |= metrics
    numbers = {
        str(name): value.item() if isinstance(value, np.ndarray) and value.size == 1 else value
        for name, value in values.items()
    }
    return {
        f"env_{name}" if name in OWN_NAMES else name: float(value)
        for name, value in numbers.items()
        if isinstance(value, NUMBERS) and math.isfinite(value)
    }


def seed_generators(seed: int) -> None:
    """Seed the global generators of Python, NumPy and PyTorch for an episode."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def as_number(name: str, value: Any) -> Any:
    """Return a number that an env has returned; an array of one number is one.

    Raises:
        ValueError: It is an array of several numbers.
    """
    if not isinstance(value, np.ndarray):
        return value
    if value.size != 1:
        raise ValueError(f"{name} has the shape {value.shape}: an env returns one number")
    return value.item()


def close_env(env: Any, close: Callable[[], Any] | None = None) -> None:
    """Close an env, by default with its `close()`; an error in it is a warning, because nothing is lost by it."""
    try:
        (close or env.close)()
    except Exception as error:  # of any type: it is the user's code
        warnings.warn(f"close() of {env} raised {type(error).__name__}: {error}", stacklevel=1)
