"""Turn any TorchRL `EnvBase` into a gymnasium `VectorEnv`, for `env.family=torchrl`.

So a simulator with a TorchRL wrapper works with every collector, in evaluations and in resumed runs.
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
from torchrl.data import Binary, Bounded, Categorical, MultiCategorical, MultiOneHot, OneHot, TensorSpec
from torchrl.envs import (
    Compose,
    EnvBase,
    InitTracker,
    RewardSum,
    StepCounter,
    Transform,
    TransformedEnv,
)

from levin.core import rng
from levin.core.errors import ConfigError
from levin.envs.sync import close_env

LIMIT = "time_limit_steps"  # key of the step counter for `time_limit`; an env may have a counter of its own


def import_target(name: str) -> Callable[..., EnvBase]:
    """Import the function that `env.target` names, such as `my_module:make_env`.

    Raises:
        ConfigError: It can't be imported.
    """
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"env.target={name} can't be imported ({error}); write it as my_module:make_env") from error


class TorchRLVectorEnv(VectorEnv):
    """Vector env of N envs, made of one or more `EnvBase` objects of B envs each.

    Each `EnvBase` has a random stream of its own in place of torch's global generator, which many envs sample from
    (those whose `_set_seed` is `torch.manual_seed`). So the envs do not affect the random numbers of the run, and an
    unbatched env replays an episode from its seed.

    The envs of a batched `EnvBase` share one random stream. It is seeded only when all its episodes begin at once, with
    the seed of the first of them. When only some begin, the stream continues, because many batched envs can't be seeded
    without a full reset (`SerialEnv` and `ParallelEnv` reset all their envs).

    Args:
        make: Function that makes one `EnvBase`, with batch size `[]` (B = 1) or `[B]`.
        num_envs: Number of envs N, a multiple of B.
        time_limit: Number of steps until an episode is truncated; None: no limit.
        round_up: Whether to round N up to a multiple of B, instead of raising an error.

    Raises:
        ConfigError: N is not a multiple of B, or no algorithm supports the spaces of the env.
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
        if nested := [key for key in first.done_keys if not isinstance(key, str)]:
            raise ConfigError(
                f"env.target makes an env whose end flags are nested, {nested}; valid: done, terminated and truncated "
                "beside each other, one of each per env"
            )
        if not {"done", "terminated"} & set(first.done_keys):
            raise ConfigError(
                f"env.target makes an env whose end flags are {', '.join(map(str, first.done_keys))}; it needs done or "
                "terminated, [..., 1]"
            )
        self.size = math.prod(first.batch_size)  # B
        self.batched = bool(first.batch_size)
        if num_envs % self.size and not round_up:
            raise ConfigError(f"env.target makes {self.size} envs at once: set env.num_envs={self.size}")
        count = -(-num_envs // self.size)
        self.envs = [first, *(make() for _ in range(count - 1))]
        self.unlimited, self.time_limit = list(self.envs), time_limit  # the envs without `time_limit`
        self._is_seeded = [False] * count  # of each `EnvBase` with `seeds_episodes`
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
        self._now: list[TensorDictBase] = [TensorDict()] * count  # current TensorDict of each `EnvBase`
        self._rng = [rng.torch_states()] * count  # random states of each `EnvBase`

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        mask = (options or {}).get("reset_mask", np.ones(self.num_envs, dtype=bool))
        seeds = seed if isinstance(seed, list) else [seed] * self.num_envs
        for k, env in enumerate(self.envs):
            part = slice(k * self.size, (k + 1) * self.size)
            if mask[part].any():
                part_seed = None if self._is_seeded[k] else seeds[part][int(np.argmax(mask[part]))]
                self._is_seeded[k] = getattr(type(bare_env(env)), "seeds_episodes", False)
                self._now[k] = self._with_own_rng(k, partial(self._reset, env, self._now[k], mask[part], part_seed))
        return self._observation(), {}

    def restart(self) -> None:
        """Let the next reset of a whole `EnvBase` seed it, even if it seeds episodes itself."""
        self._is_seeded = [False] * len(self.envs)

    def _reset(self, env: EnvBase, now: TensorDictBase, mask: np.ndarray, seed: int | None) -> TensorDictBase:
        """Reset the envs of the mask `[B]` in one `EnvBase`; `seed` has an effect only if the mask is all True."""
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
            after = self._with_own_rng(k, partial(env.step, now))
            now = after.get("next")
            reward[part] = now.get(env.reward_key).reshape(self.size).cpu()
            terminated[part], truncated[part] = (flag.reshape(self.size).cpu() for flag in end_flags(now))
            self._now[k] = env.step_mdp(after)
        return self._observation(), reward, terminated, truncated, {}

    def _with_own_rng(self, k: int, call: Callable[[], TensorDictBase]) -> TensorDictBase:
        """Call a function with the random streams of the `k`-th `EnvBase` as torch's global ones."""
        states_of_run = rng.torch_states()
        rng.set_torch_states(self._rng[k])
        try:
            with torch.no_grad():
                return call()
        finally:
            self._rng[k] = rng.torch_states()
            rng.set_torch_states(states_of_run)

    def _observation(self) -> Any:
        """Return the observations of all envs, `[N, *S]` or a dict of such arrays."""
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
            close_env(env, partial(env.close, raise_if_closed=False))


def end_flags(after: TensorDictBase) -> tuple[Tensor, Tensor]:
    """Return whether episodes have terminated and been truncated; an env may give only `done` or `terminated`.

    Raises:
        ConfigError: It gives `truncated` without `terminated`, of which TorchRL's own steps make nothing.
    """
    done, terminated, truncated = (after.get(key, None) for key in ("done", "terminated", "truncated"))
    if terminated is None and truncated is not None:
        raise ConfigError("env.target returns truncated without terminated: return both")
    terminated = done if terminated is None else terminated
    if truncated is None:
        truncated = torch.zeros_like(terminated) if done is None else done & ~terminated
    return terminated, truncated


def observation_keys(env: EnvBase) -> list[tuple[str, ...]]:
    """Return the keys of the observation's tensors, without the counters that transforms add."""
    counted = {as_path(key) for each in list_transforms(env) for key in counted_keys(each)}
    keys = [as_path(key) for key in env.observation_spec.keys(include_nested=True, leaves_only=True)]
    return [key for key in keys if key not in counted]


def counted_keys(transform: Transform) -> list[NestedKey]:
    """Return the keys of the counters and flags that a transform adds, which are not part of the observation."""
    if isinstance(transform, StepCounter):
        return transform.step_count_keys
    return list(transform.out_keys) if isinstance(transform, InitTracker | RewardSum) else []


def as_path(key: NestedKey) -> tuple[str, ...]:
    """Return a key as a tuple of strings: `"a"` becomes `("a",)`."""
    return (key,) if isinstance(key, str) else tuple(key)  # type: ignore[arg-type, return-value]


def bare_env(env: EnvBase) -> EnvBase:
    """Return the env without its transforms."""
    while isinstance(env, TransformedEnv):
        env = env.base_env
    return env


def list_transforms(env: EnvBase) -> list[Transform]:
    """List the transforms of an env, those of the outermost env first."""
    transforms: list[Transform] = []
    while isinstance(env, TransformedEnv):
        transforms += env.transform if isinstance(env.transform, Compose) else [env.transform]
        env = env.base_env
    return transforms


def observation_space(spec: TensorSpec) -> gym.Space:
    """Return the space of one observation tensor of one env. Pixels stay uint8, other numbers become float32."""
    if isinstance(spec, MultiCategorical):
        return MultiDiscrete(spec.nvec.reshape(-1).tolist())
    # A Binary is a Categorical with n=2, but its entries are flags; those of a bool Categorical are, too.
    if isinstance(spec, Categorical) and not isinstance(spec, Binary) and spec.dtype != torch.bool:
        entries = math.prod(spec.shape)
        return Discrete(int(spec.n)) if entries == 1 else MultiDiscrete(np.full(tuple(spec.shape), int(spec.n)))
    if spec.dtype == torch.uint8:
        return Box(0, 255, tuple(spec.shape), np.uint8)
    return Box(-np.inf, np.inf, tuple(spec.shape), np.float32)


def action_converter(env: EnvBase) -> tuple[Callable[[Tensor], Tensor], gym.Space]:
    """Return a function that converts actions `[B, *A]` to those of the env, and their gymnasium space.

    Raises:
        ConfigError: The env has several actions, or actions of an unsupported kind.
    """
    if len(env.action_keys) > 1:
        raise ConfigError(
            f"env.target makes an env with several actions, {env.action_keys}; valid: an env with one action"
        )
    spec = env.action_spec_unbatched
    discrete = isinstance(spec, OneHot | MultiCategorical | Categorical)
    # A Binary is a Categorical with n=2, and a MultiOneHot a OneHot.
    if isinstance(spec, Binary | MultiOneHot) or not (discrete or spec.dtype.is_floating_point):
        raise ConfigError(
            f"env.target makes an env with actions of {type(spec).__name__}; valid: continuous or categorical actions"
        )
    if isinstance(spec, OneHot):
        return lambda action: torch.nn.functional.one_hot(action, spec.space.n).to(spec.dtype), Discrete(spec.space.n)
    if isinstance(spec, MultiCategorical):
        return lambda action: action.to(spec.dtype), MultiDiscrete(np.asarray(spec.nvec))
    if isinstance(spec, Categorical):
        num, entries = int(spec.n), spec.shape.numel()
        space = Discrete(num) if entries == 1 else MultiDiscrete([num] * entries)
        return lambda action: action.reshape(-1, *spec.shape).to(spec.dtype), space
    shape = tuple(spec.shape) or (1,)
    low, high = -math.inf, math.inf
    if isinstance(spec, Bounded):
        low, high = (bound.reshape(shape).float().cpu().numpy() for bound in (spec.low, spec.high))
    return lambda action: action.reshape(-1, *spec.shape).to(spec.dtype), Box(low, high, shape, np.float32)
