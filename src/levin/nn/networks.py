"""Networks that several algorithms share: actors, critics and policies, and the architecture they are built by."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast, get_args

import torch
from torch import Tensor, nn

from levin.core.spaces import EnvSpec, has_mask
from levin.core.types import Network, VectorNetwork
from levin.nn.distributions import NEVER, Categorical, MultiCategorical, Normal
from levin.nn.encoders import make_trunk
from levin.nn.layers import Ensemble, as_float32, make_layers, orthogonal_


@dataclass(frozen=True)
class Architecture:
    """Architecture of an algorithm's networks: a trunk, which reads observations, and heads with hidden layers.

    Args:
        network: Kind of the hidden layers (`levin.nn.layers.make_layers`), CNN, or your own trunk
            (`levin.nn.encoders.make_trunk`). The hidden layers after a CNN or your own trunk are an MLP.
        hidden_sizes: Widths of the hidden layers of each head.
        activation: Activation between the layers.
    """

    network: Network
    hidden_sizes: Sequence[int]
    activation: str

    def make_trunk(self, env: EnvSpec) -> tuple[nn.Module, int]:
        """Build a trunk, `[B, *S] -> [B, F]`; return it and F."""
        return make_trunk(env, self.network)

    def make_head(self, inputs: int, outputs: int, num: int | None = None) -> nn.Sequential:
        """Build the layers of a head: `[..., inputs] -> [..., outputs]`; with `num`, of an ensemble."""
        kind = self.network if self.network in get_args(VectorNetwork) else "mlp"
        return make_layers(cast(VectorNetwork, kind), [inputs, *self.hidden_sizes, outputs], self.activation, num)

    def make_ensemble(self, num: int, inputs: int, outputs: int) -> Ensemble:
        """Build an ensemble of `num` heads: `[B, inputs] -> [num, B, outputs]`."""
        return Ensemble(num, self.make_head(inputs, outputs, num))


def action_size(env: EnvSpec) -> int:
    """Return the number of values in an action, with discrete choices one-hot."""
    action = env["action"]
    return sum(action.get("nvec") or [0]) or action["n"] or math.prod(action["shape"])


class MaskedOutputs(nn.Module):
    """Network whose outputs for forbidden actions are `NEVER`: features and a mask `[B, F + A] -> [..., B, A]`.

    A logit of `NEVER` is a probability of exactly 0, with a gradient of 0, and a value of `NEVER` is never the largest.
    Everything stays finite for a mask that allows nothing, which many envs give after the end of an episode.
    """

    def __init__(self, network: nn.Module, num_actions: int) -> None:
        super().__init__()
        self.network, self.num_actions = network, num_actions

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = as_float32(self.network(inputs[..., : -self.num_actions]))
        return outputs.masked_fill(inputs[..., -self.num_actions :] == 0, NEVER)


def obey_mask(network: nn.Module, env: EnvSpec) -> nn.Module:
    """Return a network of logits or values with `NEVER` for forbidden actions; without masks, the network itself."""
    return MaskedOutputs(network, action_size(env)) if has_mask(env["observation"]) else network


def without_mask(features: Tensor, num_features: int) -> Tensor:
    """Return the features alone, `[..., F]`, without the action mask that may follow them."""
    return features if features.shape[-1] == num_features else features[..., :num_features]


class Actor(nn.Module):
    """Actor pi(a|s): features `[B, F]` to the distribution of actions; those that a mask forbids have probability 0.

    The distribution is Categorical `[B]` for a discrete space, MultiCategorical `[B, K]` for a multi-discrete one, and
    Normal `[B, A]` for a box. The standard deviation of the Normal is a parameter that does not depend on s.
    The last layer's gain of 0.01 makes the first actions almost independent of s (Andrychowicz et al. 2021,
    arXiv:2006.05990).
    """

    def __init__(
        self,
        num_features: int,
        env: EnvSpec,
        architecture: Architecture,
        initial_log_std: float = 0.0,
    ) -> None:
        super().__init__()
        self.discrete = env["action"]["type"] == "discrete"
        self.sizes = env["action"].get("nvec")
        outputs = action_size(env)
        network = architecture.make_head(num_features, outputs)
        orthogonal_(network)
        orthogonal_(network[-1], gain=0.01)
        self.network = obey_mask(network, env)
        if env["action"]["type"] == "box":
            self.log_std = nn.Parameter(torch.full((outputs,), initial_log_std))

    def forward(self, features: Tensor) -> Categorical | MultiCategorical | Normal:
        outputs = as_float32(self.network(features))
        if self.sizes:
            return MultiCategorical(outputs, self.sizes)
        return Categorical(outputs) if self.discrete else Normal(outputs, self.log_std)


class Critic(nn.Module):
    """Critic V(s): features `[B, F] -> [B, outputs]`."""

    def __init__(self, num_features: int, architecture: Architecture, outputs: int = 1) -> None:
        super().__init__()
        self.num_features = num_features
        self.network = architecture.make_head(num_features, outputs)
        orthogonal_(self.network)
        orthogonal_(self.network[-1], gain=1.0)

    def forward(self, features: Tensor) -> Tensor:
        return as_float32(self.network(without_mask(features, self.num_features)))


class StochasticPolicy(nn.Module):
    """Policy of a stochastic actor: `[N, *S] -> [N, *A]`, the mode if `deterministic`, else a sample."""

    def __init__(self, normalizer: nn.Module, trunk: nn.Module, actor: nn.Module, *, deterministic: bool) -> None:
        super().__init__()
        self.normalizer, self.trunk, self.actor, self.deterministic = normalizer, trunk, actor, deterministic

    def forward(self, observation: Tensor) -> Tensor:
        distribution = self.actor(self.trunk(self.normalizer(observation)))
        return distribution.mode if self.deterministic else distribution.sample()


class DeterministicActor(nn.Module):
    """Deterministic actor mu(s): observations `[B, *S]` to actions `[B, A]` in [-1, 1]."""

    def __init__(self, env: EnvSpec, architecture: Architecture) -> None:
        super().__init__()
        self.trunk, num_features = architecture.make_trunk(env)
        self.network = architecture.make_head(num_features, math.prod(env["action"]["shape"]))

    def forward(self, observation: Tensor) -> Tensor:
        return as_float32(self.network(self.trunk(observation))).tanh()


class DeterministicPolicy(nn.Module):
    """Policy of a deterministic actor, without noise: `[N, *S] -> [N, A]`."""

    def __init__(self, normalizer: nn.Module, actor: nn.Module) -> None:
        super().__init__()
        self.normalizer, self.actor = normalizer, actor

    def forward(self, observation: Tensor) -> Tensor:
        return self.actor(self.normalizer(observation))


class ActionCritic(nn.Module):
    """Ensemble of `num` critics Q_i(s, a): `[B, *S], [B, A] -> [num, B, 1]`. All of them share one trunk.

    For several actions in each state, `[S, B, A]`, the values are `[num, S, B, 1]`.
    """

    def __init__(self, num: int, env: EnvSpec, architecture: Architecture) -> None:
        super().__init__()
        self.trunk, num_features = architecture.make_trunk(env)
        self.num_features = num_features
        self.ensemble = architecture.make_ensemble(num, num_features + action_size(env), 1)

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        features = without_mask(self.trunk(observation), self.num_features)
        if action.ndim > 2:
            inputs = torch.cat([features.expand(*action.shape[:-1], -1), action], -1)  # [S, B, F + A]
            return as_float32(self.ensemble(inputs.flatten(0, -2))).unflatten(1, action.shape[:-1])
        return as_float32(self.ensemble(torch.cat([features, action], -1)))

    def first(self, observation: Tensor, action: Tensor) -> Tensor:
        """Return Q_1(s, a), without computing the other critics: `[B, 1]`."""
        return as_float32(self.ensemble.first(torch.cat([self.trunk(observation), action], -1)))
