"""The model of a run in the place of an env: `env=dream env.run=runs/...`; and the way back, `env.wrappers=[latent]`.

In a dream a policy sees what the model believes, and no env takes a step. In the env it sees the same: what the model
makes of each observation. So what was trained in a dream acts in the env, and is evaluated there.
"""

from typing import Any, ClassVar, Protocol

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper
from gymnasium.vector.utils import batch_space
from torch import Tensor

from levin.core.errors import ConfigError
from levin.core.spaces import NetworkInput, Space, action_converter, describe_action, describe_space, to_tensors

STARTS = 64  # first observations of episodes, that dreams begin with
BLOCK = 32  # steps whose chance is drawn at once


class LatentState(Protocol):
    """What a model knows at a moment: a named tuple of tensors `[N, *]`."""

    @property
    def feature(self) -> Tensor:
        """All that a policy reads: `[N, F]`."""
        ...


class Model(Protocol):
    """What can be dreamt in."""

    features: int
    noise: int  # standard normal numbers that one step takes

    def encode_action(self, action: Tensor) -> Tensor:
        """Actions `[N, *A]` of a policy, as the model reads them."""
        ...

    def initial_state(self, observation: Any) -> Any:
        """The mind at the first observation of an episode."""
        ...

    def observe(self, latent: Any, action: Tensor, observation: Any) -> Any:
        """The mind after an action and the observation that it led to."""
        ...

    def imagine(self, latent: Any, action: Tensor, noise: Tensor, temperature: float) -> tuple[Any, Tensor, Tensor]:
        """The mind after an action, the reward `[N, 1]`, and whether the episode ends for good `[N, 1]`."""
        ...


def policy_space(space: Space) -> gym.Space:
    """The actions that a policy gives."""
    return Discrete(space["n"]) if space["type"] == "discrete" else Box(-1.0, 1.0, tuple(space["shape"]))


def where_mask(mask: Tensor, new: Any, old: Any) -> Any:
    """A mind of the new where the mask `[N]` is true, and of the old elsewhere."""
    pairs = zip(new, old, strict=True)
    return type(old)(*(torch.where(mask.unsqueeze(-1), part, before) for part, before in pairs))


class DreamEnv(VectorEnv):
    """Episodes inside of a model, N at a time: observations are the features of its minds, `[N, F]`.

    All chance of an episode comes from its seed, so that it replays, whatever the others do. An env that is done goes
    on until it is reset, and what it says counts for nothing.

    Args:
        model: What is dreamt in; its parameters are only read.
        starts: First observations of real episodes `[K, *S]`; each dream begins with one of them.
        actions: The policy's.
        num_envs: N.
        temperature: Of all draws, tau: above 1 the dream is less certain than the model.
        time_limit: Steps before truncation.
    """

    autoreset_mode = AutoresetMode.DISABLED
    metadata: ClassVar[dict[str, Any]] = {"autoreset_mode": autoreset_mode}

    def __init__(
        self,
        model: Model,
        starts: Any,
        actions: gym.Space,
        *,
        num_envs: int,
        temperature: float,
        time_limit: int,
    ) -> None:
        self.model, self.num_envs, self.temperature, self.time_limit = model, num_envs, temperature, time_limit
        self.single_observation_space = Box(-np.inf, np.inf, (model.features,), np.float32)
        self.single_action_space = actions
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(actions, num_envs)
        with torch.inference_mode():
            self.first = model.initial_state(starts)  # [K, *]
            self.latent = type(self.first)(*(part[:1].repeat(num_envs, 1) for part in self.first))
        self.length = np.zeros(num_envs, dtype=np.int64)
        self.chance = [np.random.default_rng(0)] * num_envs
        self.noise = torch.zeros(num_envs, BLOCK, model.noise)
        self.device = self.latent[0].device

    @torch.inference_mode()
    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin an episode in the envs of `options["reset_mask"]` `[N]`, in all without it; one seed for each env."""
        mask = np.ones(self.num_envs, dtype=bool) if not options else options["reset_mask"]
        seeds = seed if isinstance(seed, list) else [seed] * self.num_envs
        start = np.zeros(self.num_envs, dtype=np.int64)
        for i in np.flatnonzero(mask):
            self.chance[i] = np.random.default_rng(seeds[i])
            start[i] = self.chance[i].integers(len(self.first[0]))
        self.length[mask] = 0
        rows = torch.from_numpy(start).to(self.device)
        begun = type(self.first)(*(part[rows] for part in self.first))
        self.latent = where_mask(torch.from_numpy(mask).to(self.device), begun, self.latent)
        return self.latent.feature.cpu().numpy(), {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """One step of all envs, with actions `[N, *A]`."""
        feature, *rest = self.advance(torch.as_tensor(actions, device=self.device))
        return feature.cpu().numpy(), *rest, {}  # type: ignore[return-value]

    @torch.inference_mode()
    def advance(self, actions: Tensor) -> tuple[Tensor, np.ndarray, np.ndarray, np.ndarray]:
        """The same between tensors: features `[N, F]`, rewards `[N]`, and both kinds of ends `[N]`."""
        at = self.length % BLOCK
        for i in np.flatnonzero(at == 0):
            self.noise[i] = torch.from_numpy(self.chance[i].standard_normal(self.noise[i].shape, np.float32))
        noise = self.noise[torch.arange(self.num_envs), torch.from_numpy(at)].to(self.device)
        self.latent, reward, ends = self.model.imagine(
            self.latent, self.model.encode_action(actions), noise, self.temperature
        )
        self.length += 1
        outcome = (part.squeeze(-1).cpu().numpy() for part in (reward, ends))
        return self.latent.feature, *outcome, self.length >= self.time_limit  # type: ignore[return-value]


class LatentEnv(VectorWrapper):
    """Shows what a model makes of what the envs show, `[N, F]`; takes the actions of a policy.

    Args:
        env: The envs.
        model: Its parameters are only read.
        units: What `env.action` says of them.
        reads: The observations that the model reads.

    Raises:
        ConfigError: The envs show others.
    """

    def __init__(self, env: VectorEnv, model: Model, units: str, reads: Space) -> None:
        super().__init__(env)
        self.model = model
        self.read = NetworkInput(describe_space(env.single_observation_space))
        self.space = self.read.space
        if self.space != reads:
            raise ConfigError(
                f"the model of env.run reads {_describe_space(reads)}, and the env shows {_describe_space(self.space)}"
            )
        action = describe_action(env.single_action_space)
        self.to_env = action_converter(action, units)
        self.single_observation_space = Box(-np.inf, np.inf, (model.features,), np.float32)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.single_action_space = policy_space(action)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self.latent: Any = None

    @torch.inference_mode()
    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """As of the envs."""
        mask = torch.from_numpy(options["reset_mask"] if options else np.ones(self.num_envs, dtype=bool))
        observation, info = self.env.reset(seed=seed, options=options)
        begun = self.model.initial_state(to_tensors(self.space, self.read(observation)))
        self.latent = begun if self.latent is None else where_mask(mask, begun, self.latent)
        return self.latent.feature.numpy(), info

    @torch.inference_mode()
    def step(self, actions: np.ndarray) -> tuple[np.ndarray, Any, Any, Any, dict[str, Any]]:  # type: ignore[override]
        """As of the envs."""
        observation, *rest = self.env.step(self.to_env(actions))
        action = self.model.encode_action(torch.as_tensor(actions))
        self.latent = self.model.observe(self.latent, action, to_tensors(self.space, self.read(observation)))
        return self.latent.feature.numpy(), *rest  # type: ignore[return-value]


def _describe_space(space: Space) -> str:
    """An observation in words."""
    if "spaces" in space:
        return ", ".join(f"{name}: {_describe_space(part)}" for name, part in space["spaces"].items())
    return f"{space['dtype']} {space['shape']}"
