"""Any TorchRL `EnvBase` as a gymnasium `VectorEnv`: what `env.family=torchrl` is.

Simulators that have a TorchRL wrapper run unchanged, with every collector, in evaluations and when a run resumes.
"""

import importlib
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Bounded, Categorical, MultiCategorical, OneHot, TensorSpec
from torchrl.envs import (
    Compose,
    EnvBase,
    InitTracker,
    RewardSum,
    StepCounter,
    Transform,
    TransformedEnv,
)

from levin.core.errors import ConfigError

LIMIT = "time_limit_steps"  # counts them; an env may have a count of its own


def import_target(name: str) -> Callable[..., EnvBase]:
    """`my_module:make_env`.

    Raises:
        ConfigError: There is none of that name.
    """
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"env.target={name} can't be imported ({error}); say my_module:make_env") from error


class TorchRLVectorEnv(VectorEnv):
    """N envs: one batched `EnvBase`, or as many as it takes.

    What an env draws from torch's global generator, as those do whose `_set_seed` is `torch.manual_seed`, it draws from
    a stream of its own: the run's is not touched, and an unbatched env whose episode is begun with the same seed goes
    the same way. The envs of a batched one share their random numbers. A seed, that of the first of them, is given to
    one when all of its episodes begin. When only some begin, they go on with the stream of the others: many such envs
    can't be seeded without beginning anew (`SerialEnv` and `ParallelEnv` reset all that they hold).

    Args:
        make: Makes one `EnvBase`, of the batch size `[]` or `[B]`.
        num_envs: N, a multiple of B.
        time_limit: Steps until an episode is truncated.
        round_up: Whether N may become the next multiple of B.

    Raises:
        ConfigError: It is not, or the env has what no algorithm here can take.
    """

    def __init__(
        self,
        make: Callable[[], EnvBase],
        num_envs: int,
        *,
        time_limit: int | None = None,
        round_up: bool = False,
    ) -> None:
        first = make()
        if not isinstance(first, EnvBase):
            raise ConfigError(f"env.target makes a {type(first).__name__}, not a torchrl.envs.EnvBase")
        if len(first.batch_size) > 1:
            raise ConfigError(f"the envs of env.target have the batch size {list(first.batch_size)}; valid: [], [N]")
        self.size = math.prod(first.batch_size)  # B
        self.batched = bool(first.batch_size)
        if num_envs % self.size and not round_up:
            raise ConfigError(f"env.target makes {self.size} envs at once: set env.num_envs={self.size}")
        count = -(-num_envs // self.size)
        self.envs = [first, *(make() for _ in range(count - 1))]
        if time_limit is not None:
            self.envs = [TransformedEnv(env, StepCounter(time_limit, step_count_key=LIMIT)) for env in self.envs]
            first = self.envs[0]
        self.num_envs = count * self.size
        self.metadata = {"autoreset_mode": AutoresetMode.DISABLED}
        self.keys = observation_keys(first)
        self.to_action, self.single_action_space = action_converter(first)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        spaces = {".".join(key): observation_space(first.observation_spec_unbatched[key]) for key in self.keys}
        self.single_observation_space = Dict(spaces) if len(spaces) > 1 else next(iter(spaces.values()))
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self._now: list[TensorDictBase] = [TensorDict()] * count  # what each shows
        self._rng = [torch.get_rng_state()] * count

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        mask = (options or {}).get("reset_mask", np.ones(self.num_envs, dtype=bool))
        seeds = seed if isinstance(seed, list) else [seed] * self.num_envs
        for k, env in enumerate(self.envs):
            part = slice(k * self.size, (k + 1) * self.size)
            if mask[part].any():
                given = seeds[part][int(np.argmax(mask[part]))]
                self._now[k] = self._alone(k, partial(self._reset, env, self._now[k], mask[part], given))
        return self._observation(), {}

    def _reset(self, env: EnvBase, now: TensorDictBase, mask: np.ndarray, seed: int | None) -> TensorDictBase:
        if mask.all():
            if seed is not None:
                torch.manual_seed(seed)
                env.set_seed(seed)
            return env.reset()
        reset = torch.from_numpy(mask.copy()).unsqueeze(-1).to(env.device or "cpu")  # [B, 1]
        now = now.copy()
        for key in env.reset_keys:
            now.set(key, reset)
        return env.reset(now, select_reset_only=True).exclude(*env.reset_keys)

    def step(self, actions: Any) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        reward = np.empty(self.num_envs, np.float32)
        terminated, truncated = np.empty((2, self.num_envs), bool)
        for k, env in enumerate(self.envs):
            part = slice(k * self.size, (k + 1) * self.size)
            now = self._now[k].copy()
            action = self.to_action(torch.from_numpy(np.ascontiguousarray(actions[part])))  # [B, *A]
            now.set(env.action_key, action if self.batched else action[0])
            after = self._alone(k, partial(env.step, now))
            now = after.get("next")
            done, ends, cuts = (now.get(key, None) for key in ("done", "terminated", "truncated"))
            ends = done if ends is None else ends
            reward[part] = now.get(env.reward_key).reshape(self.size).cpu()
            terminated[part] = ends.reshape(self.size).cpu()
            truncated[part] = (done & ~ends if cuts is None else cuts).reshape(self.size).cpu()
            self._now[k] = env.step_mdp(after)
        return self._observation(), reward, terminated, truncated, {}

    def _alone(self, k: int, act: Callable[[], TensorDictBase]) -> TensorDictBase:
        """Let the `k`-th env act with its own random stream."""
        run = torch.get_rng_state()
        torch.set_rng_state(self._rng[k])
        try:
            with torch.no_grad():
                return act()
        finally:
            self._rng[k] = torch.get_rng_state()
            torch.set_rng_state(run)

    def _observation(self) -> Any:
        """What all envs show: `[N, *S]`, or a dict of such."""
        parts = []
        for key in self.keys:
            values = torch.stack([now[key] for now in self._now]).cpu()  # [K, B, *S] or [K, *S]
            values = values.flatten(0, 1) if self.batched else values
            parts.append(values.numpy() if values.dtype == torch.uint8 else values.float().numpy())
        if len(parts) > 1:
            return {".".join(key): part for key, part in zip(self.keys, parts, strict=True)}
        return parts[0]

    def close_extras(self, **kwargs: Any) -> None:
        for env in self.envs:
            env.close(raise_if_closed=False)


def observation_keys(env: EnvBase) -> list[tuple[str, ...]]:
    """The leaves of what an env shows, without what transforms count."""
    counted = {as_path(key) for each in list_transforms(env) for key in counted_keys(each)}
    keys = [as_path(key) for key in env.observation_spec.keys(include_nested=True, leaves_only=True)]
    return [key for key in keys if key not in counted]


def counted_keys(transform: Transform) -> list[NestedKey]:
    """The keys of what a transform only counts: it is no observation."""
    if isinstance(transform, StepCounter):
        return transform.step_count_keys
    return list(transform.out_keys) if isinstance(transform, InitTracker | RewardSum) else []


def as_path(key: NestedKey) -> tuple[str, ...]:
    """`"a" -> ("a",)`"""
    return (key,) if isinstance(key, str) else tuple(key)  # type: ignore[arg-type, return-value]


def list_transforms(env: EnvBase) -> list[Transform]:
    """All of them, outermost env first."""
    found: list[Transform] = []
    while isinstance(env, TransformedEnv):
        found += env.transform if isinstance(env.transform, Compose) else [env.transform]
        env = env.base_env
    return found


def observation_space(spec: TensorSpec) -> gym.Space:
    """Of one leaf and one env. Numbers of every kind become float32, pixels stay uint8."""
    if isinstance(spec, Categorical) and spec.dtype != torch.bool:
        return Discrete(int(spec.n))
    if spec.dtype == torch.uint8:
        return Box(0, 255, tuple(spec.shape), np.uint8)
    return Box(-np.inf, np.inf, tuple(spec.shape), np.float32)


def action_converter(env: EnvBase) -> tuple[Callable[[Tensor], Tensor], gym.Space]:
    """The door from actions `[B, *A]` to those of an env, and their space.

    Raises:
        ConfigError: It has several, or of a kind that no gymnasium space is.
    """
    if len(env.action_keys) > 1:
        raise ConfigError(f"env.target makes an env with the actions {env.action_keys}; valid here: one")
    spec = env.action_spec_unbatched
    if isinstance(spec, OneHot):
        return lambda action: torch.nn.functional.one_hot(action, spec.space.n).to(spec.dtype), Discrete(spec.space.n)
    if isinstance(spec, MultiCategorical):
        return lambda action: action.to(spec.dtype), MultiDiscrete(np.asarray(spec.nvec))
    if isinstance(spec, Categorical):
        return lambda action: action.reshape(-1, *spec.shape).to(spec.dtype), Discrete(int(spec.n))
    if not spec.dtype.is_floating_point:
        raise ConfigError(
            f"env.target makes an env with actions of {type(spec).__name__}; valid here: numbers, choices"
        )
    shape = tuple(spec.shape) or (1,)
    low, high = -math.inf, math.inf
    if isinstance(spec, Bounded):
        low, high = (bound.reshape(shape).float().cpu().numpy() for bound in (spec.low, spec.high))
    return lambda action: action.reshape(-1, *spec.shape).to(spec.dtype), Box(low, high, shape, np.float32)
