"""Use the world model of a run as an env (`env=dream env.run=runs/...`), or add its features (`env.wrappers=[latent]`).

In a dream, a policy sees the features of the model's latent state, and no real env takes a step. `LatentEnv` shows the
same features in the real env: the model updates its latent state with each observation. A policy that was trained in a
dream can therefore act in the real env and be evaluated there.
"""

from typing import Any, ClassVar, Literal, Protocol

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper
from gymnasium.vector.utils import batch_space
from torch import Tensor

from levin.core.errors import ConfigError
from levin.core.network_input import NetworkInput
from levin.core.spaces import Space, action_converter, describe_action, describe_space, to_tensors

STARTS = 64  # number of first observations of real episodes from which dreams begin
BLOCK = 32  # steps for which the noise is sampled at once


class LatentState(Protocol):
    """Latent state of a world model: a named tuple of tensors `[N, *]`."""

    @property
    def feature(self) -> Tensor:
        """Policy input, `[N, F]`."""
        ...


class Model(Protocol):
    """World model that can be used as an env."""

    features: int  # F, size of the policy input
    noise: int  # standard normal numbers that one step needs

    def encode_action(self, action: Tensor) -> Tensor:
        """Convert actions `[N, *A]` of a policy to the input of the model."""
        ...

    def initial_state(self, observation: Any) -> Any:
        """Return the latent state at the first observation of an episode."""
        ...

    def observe(self, latent: Any, action: Tensor, observation: Any) -> Any:
        """Return the latent state after an action and the observation that followed."""
        ...

    def imagine(self, latent: Any, action: Tensor, noise: Tensor, temperature: float) -> tuple[Any, Tensor, Tensor]:
        """Return the latent state after an action, the reward `[N, 1]`, and whether the episode terminates `[N, 1]`."""
        ...


def policy_space(space: Space) -> gym.Space:
    """Return the space of the policy's actions, for the env's action space."""
    return Discrete(space["n"]) if space["type"] == "discrete" else Box(-1.0, 1.0, tuple(space["shape"]))


def where_mask(mask: Tensor, new: Any, old: Any) -> Any:
    """Return the new latent state where the mask `[N]` is true, and the old one elsewhere."""
    pairs = zip(new, old, strict=True)
    return type(old)(*(torch.where(mask.unsqueeze(-1), new_part, old_part) for new_part, old_part in pairs))


class DreamEnv(VectorEnv):
    """Vector env of N episodes inside a world model; observations are the features of its latent state, `[N, F]`.

    All randomness of an episode comes from its seed, so that it can be replayed whatever the other envs do. An env that
    is done continues until it is reset; its outputs after the end must be ignored.

    Args:
        model: World model to step; its parameters are only read.
        starts: First observations of real episodes `[K, *S]`; each dream begins with one of them.
        actions: Space of the policy's actions.
        num_envs: Number of envs N.
        temperature: Sampling temperature tau; above 1 the dream is less certain than the model.
        time_limit: Number of steps before truncation.
    """

    autoreset_mode = AutoresetMode.DISABLED  # TorchRL reads this one, gymnasium the metadata
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
            self.start_states = model.initial_state(starts)  # [K, *]
            self.latent = type(self.start_states)(*(part[:1].repeat(num_envs, 1) for part in self.start_states))
        self.length = np.zeros(num_envs, dtype=np.int64)
        self.rngs = [np.random.default_rng(0)] * num_envs
        self.noise = torch.zeros(num_envs, BLOCK, model.noise)
        self.device = self.latent[0].device

    @torch.inference_mode()
    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin an episode in the envs of the mask `options["reset_mask"]` `[N]`, or in all envs without it.

        `seed` is a list of one seed for each env, or one seed for all.
        """
        mask = np.ones(self.num_envs, dtype=bool) if not options else options["reset_mask"]
        seeds = seed if isinstance(seed, list) else [seed] * self.num_envs
        start = np.zeros(self.num_envs, dtype=np.int64)
        for i in np.flatnonzero(mask):
            self.rngs[i] = np.random.default_rng(seeds[i])
            start[i] = self.rngs[i].integers(len(self.start_states[0]))
        self.length[mask] = 0
        rows = torch.from_numpy(start).to(self.device)
        begin = type(self.start_states)(*(part[rows] for part in self.start_states))
        self.latent = where_mask(torch.from_numpy(mask).to(self.device), begin, self.latent)
        return self.latent.feature.cpu().numpy(), {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Step all envs with actions `[N, *A]`."""
        feature, *rest = self.advance(torch.as_tensor(actions, device=self.device))
        return feature.cpu().numpy(), *rest, {}  # type: ignore[return-value]

    @torch.inference_mode()
    def advance(self, actions: Tensor) -> tuple[Tensor, np.ndarray, np.ndarray, np.ndarray]:
        """Step all envs with tensors; return features `[N, F]`, and reward, terminated and truncated, each `[N]`."""
        at = self.length % BLOCK
        for i in np.flatnonzero(at == 0):
            self.noise[i] = torch.from_numpy(self.rngs[i].standard_normal(self.noise[i].shape, np.float32))
        noise = self.noise[torch.arange(self.num_envs), torch.from_numpy(at)].to(self.device)
        self.latent, reward, terminated = self.model.imagine(
            self.latent, self.model.encode_action(actions), noise, self.temperature
        )
        self.length += 1
        outcome = (part.squeeze(-1).cpu().numpy() for part in (reward, terminated))
        return self.latent.feature, *outcome, self.length >= self.time_limit  # type: ignore[return-value]


class LatentEnv(VectorWrapper):
    """Wrapper of a vector env that replaces observations by the features of a model's latent state, `[N, F]`.

    Actions are those of a policy; the wrapper converts them to the env's units.

    Args:
        env: Vector env to wrap.
        model: World model that observes the env; its parameters are only read.
        units: Value of `env.action` in the run of the model, see `levin.core.spaces.action_converter`.
        expected: Space of the network input that the model was trained with.
        channels: Axis of the channels of all images; None: guess it.

    Raises:
        ConfigError: The env has other observations than `expected`.
    """

    def __init__(
        self,
        env: VectorEnv,
        model: Model,
        units: str,
        expected: Space,
        channels: Literal["first", "last"] | None = None,
    ) -> None:
        super().__init__(env)
        self.model = model
        self.read = NetworkInput(describe_space(env.single_observation_space, channels))
        self.space = self.read.space
        if self.space != expected:
            raise ConfigError(
                f"the model of env.run needs the observations {_space_text(expected)}, but the env has "
                f"{_space_text(self.space)}"
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
        """Reset the envs; return the features `[N, F]` at their first observations."""
        mask = torch.from_numpy(options["reset_mask"] if options else np.ones(self.num_envs, dtype=bool))
        observation, info = self.env.reset(seed=seed, options=options)
        begin = self.model.initial_state(to_tensors(self.space, self.read(observation)))
        self.latent = begin if self.latent is None else where_mask(mask, begin, self.latent)
        return self.latent.feature.numpy(), info

    @torch.inference_mode()
    def step(self, actions: np.ndarray) -> tuple[np.ndarray, Any, Any, Any, dict[str, Any]]:  # type: ignore[override]
        """Step the envs; return the features `[N, F]` instead of their observations."""
        observation, *rest = self.env.step(self.to_env(actions))
        action = self.model.encode_action(torch.as_tensor(actions))
        self.latent = self.model.observe(self.latent, action, to_tensors(self.space, self.read(observation)))
        return self.latent.feature.numpy(), *rest  # type: ignore[return-value]


def _space_text(space: Space) -> str:
    """Return a short description of a space for an error message."""
    if "spaces" in space:
        return ", ".join(f"{name}: {_space_text(part)}" for name, part in space["spaces"].items())
    return f"{space['dtype']} {space['shape']}"
