"""Networks that several algorithms share: MLPs, ensembles, CNN encoders, actors, critics and policies."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from levin.core.spaces import ACTION_MASK, EnvSpec, Space, drop_mask, has_mask
from levin.nn.distributions import NEVER, Categorical, MultiCategorical, Normal


class InPlaceTanh(nn.Module):
    """tanh in place; its gradient needs only its output."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.tanh_()


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": partial(nn.ReLU, inplace=True),  # in place: the gradient of a linear layer does not need its output
    "tanh": InPlaceTanh,
    "elu": nn.ELU,
    "silu": nn.SiLU,
}


def mlp(sizes: Sequence[int], activation: str) -> nn.Sequential:
    """Build linear layers of the given sizes with the activation between them, none after the last.

    `[..., sizes[0]] -> [..., sizes[-1]]`
    """
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers[:-1])


@torch.no_grad()
def orthogonal_(network: nn.Module, gain: float = 2**0.5) -> None:
    """Initialise linear layers, convolutions and all members of ensembles with orthogonal weights and zero biases.

    Weights are multiplied by `gain`; the default keeps the scale of activations through ReLUs.

    Source: Saxe et al. 2014.
    """
    for layer in network.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.orthogonal_(layer.weight, gain)
        elif isinstance(layer, EnsembleLinear):
            for weight in layer.weight:  # [inputs, outputs]
                nn.init.orthogonal_(weight, gain)
        else:
            continue
        nn.init.zeros_(layer.bias)  # type: ignore[arg-type]


def as_float32(outputs: Tensor) -> Tensor:
    """Convert half-precision outputs of mixed precision to float32, which densities, values and losses need."""
    return outputs.float() if outputs.dtype.itemsize < 4 else outputs


class EnsembleLinear(nn.Module):
    """Ensemble of `num` independent linear layers in one batched product, initialised like `nn.Linear`.

    `[num, B, inputs] -> [num, B, outputs]`
    """

    def __init__(self, num: int, inputs: int, outputs: int) -> None:
        super().__init__()
        bound = inputs**-0.5
        self.weight = nn.Parameter(torch.empty(num, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(num, 1, outputs).uniform_(-bound, bound))

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, inputs, self.weight)

    def first(self, inputs: Tensor) -> Tensor:
        """Return the output of the first layer alone: `[B, inputs] -> [B, outputs]`."""
        return torch.addmm(self.bias[0], inputs, self.weight[0])


class EnsembleMLP(nn.Module):
    """Ensemble of `num` independent MLPs of the same sizes on the same input, computed in batched products.

    Two networks evaluated one after the other would cost twice the kernel launches.
    `[B, sizes[0]] -> [num, B, sizes[-1]]`
    """

    def __init__(self, num: int, sizes: Sequence[int], activation: str) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(sizes):
            layers += [EnsembleLinear(num, inputs, outputs), ACTIVATIONS[activation]()]
        self.num = num
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(inputs.expand(self.num, *inputs.shape))  # [B, D] -> [num, B, D]

    def first(self, inputs: Tensor) -> Tensor:
        """Return the output of the first network, without computing the others: `[B, sizes[0]] -> [B, sizes[-1]]`."""
        for layer in self.layers:
            inputs = layer.first(inputs) if isinstance(layer, EnsembleLinear) else layer(inputs)
        return inputs


def image_layers(shape: Sequence[int], convolutions: Sequence[nn.Conv2d], num_features: int) -> nn.Sequential:
    """Build the layers of a CNN: the convolutions and a linear layer, each with a ReLU, initialised orthogonally.

    `[B, C, H, W] -> [B, num_features]`, where `shape` is `[C, H, W]`.
    """
    layers = nn.Sequential()
    for convolution in convolutions:
        layers.extend([convolution, nn.ReLU(inplace=True)])
    layers.append(nn.Flatten())
    flat = layers(torch.zeros(1, *shape)).shape[1]
    layers.extend([nn.Linear(flat, num_features), nn.ReLU(inplace=True)])
    orthogonal_(layers)
    return layers


class NatureCNN(nn.Module):
    """Nature CNN, three convolutions and a linear layer: `[B, C, 84, 84]` uint8 `-> [B, 512]`.

    Source: Mnih et al. 2015 (doi:10.1038/nature14236), methods.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        convolutions = nn.Conv2d(shape[0], 32, 8, stride=4), nn.Conv2d(32, 64, 4, stride=2), nn.Conv2d(64, 64, 3)
        self.layers = image_layers(shape, convolutions, 512)

    def forward(self, observation: Tensor) -> Tensor:
        return self.layers(observation / 255)


class SmallCNN(nn.Module):
    """CNN for images that are too small for the Nature CNN: `[B, C, H, W]` uint8 `-> [B, 256]`.

    Three convolutions of 3 x 3 pixels with padding, the last two with a stride of 2, and a linear layer.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        convolutions = (
            nn.Conv2d(shape[0], 16, 3, padding=1),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
        )
        self.layers = image_layers(shape, convolutions, 256)

    def forward(self, observation: Tensor) -> Tensor:
        return self.layers(observation / 255)


class Encoder(nn.Module):
    """Encoder of dict observations: `{"vector": [B, D], name: [B, C, H, W] uint8, ...} -> [B, F]`.

    Each image has its own CNN. Their features are concatenated with the vector.
    """

    def __init__(self, parts: Mapping[str, Space]) -> None:
        super().__init__()
        trunks = {name: make_box_trunk(part) for name, part in parts.items()}
        self.parts = nn.ModuleDict({name: part for name, (part, _) in trunks.items()})
        self.num_features = sum(num_features for _, num_features in trunks.values())

    def forward(self, observation: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([part(observation[name]) for name, part in self.parts.items()], -1)


class MaskedTrunk(nn.Module):
    """Trunk of observations with an action mask `[B, A]`, which follows the features: `-> [B, F + A]`.

    The mask is no feature: it is on its way to the networks that obey it (`MaskedOutputs`).

    Args:
        trunk: Trunk of the observations without the mask.
        part: Name of the only other part of the observations, which `trunk` reads; None: `trunk` reads a dict.
    """

    def __init__(self, trunk: nn.Module, part: str | None) -> None:
        super().__init__()
        self.trunk, self.part = trunk, part

    def forward(self, observation: Mapping[str, Tensor]) -> Tensor:
        features = self.trunk(observation[self.part] if self.part else observation)
        return torch.cat([features, observation[ACTION_MASK].float()], -1)


class MaskedOutputs(nn.Module):
    """Network whose outputs for forbidden actions are `NEVER`: features and a mask `[B, F + A] -> [..., B, A]`.

    A logit of `NEVER` is a probability of exactly 0, with a gradient of 0, and a value of `NEVER` is never the largest.
    Where a mask allows nothing, as after the end of many episodes, everything stays finite.
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


def make_trunk(env: EnvSpec) -> tuple[nn.Module, int]:
    """Build the trunk of a network, which maps observations to features `[B, F]`; return it and F.

    The trunk is a CNN for pixels, the Nature CNN if both sides have 36 or more, and an `Encoder` for dicts. Boxes of
    numbers are only flattened. An action mask follows the features and is not counted in F.
    """
    space = env["observation"]
    if has_mask(space):
        rest = drop_mask(space)
        trunk, num_features = make_trunk({**env, "observation": rest})
        part = None if "spaces" in rest else next(iter(space.get("spaces", {})))
        return MaskedTrunk(trunk, part), num_features
    if "spaces" not in space:
        return make_box_trunk(space)
    encoder = Encoder(space["spaces"])
    return encoder, encoder.num_features


def make_box_trunk(space: Space) -> tuple[nn.Module, int]:
    """Build the trunk of a single box, as `make_trunk` does."""
    shape = space["shape"]
    if space["dtype"] != "uint8":
        return (nn.Identity() if len(shape) == 1 else nn.Flatten()), math.prod(shape)
    return (SmallCNN(shape), 256) if min(shape[1:]) < 36 else (NatureCNN(shape), 512)


def action_size(env: EnvSpec) -> int:
    """Return the number of values in an action, with discrete choices one-hot."""
    action = env["action"]
    return sum(action.get("nvec") or [0]) or action["n"] or math.prod(action["shape"])


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
        hidden_sizes: Sequence[int],
        activation: str,
        initial_log_std: float = 0.0,
    ) -> None:
        super().__init__()
        self.discrete = env["action"]["type"] == "discrete"
        self.sizes = env["action"].get("nvec")
        outputs = action_size(env)
        network = mlp([num_features, *hidden_sizes, outputs], activation)
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

    def __init__(self, num_features: int, hidden_sizes: Sequence[int], activation: str, outputs: int = 1) -> None:
        super().__init__()
        self.num_features = num_features
        self.network = mlp([num_features, *hidden_sizes, outputs], activation)
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

    def __init__(self, env: EnvSpec, hidden_sizes: Sequence[int], activation: str) -> None:
        super().__init__()
        self.trunk, num_features = make_trunk(env)
        self.network = mlp([num_features, *hidden_sizes, math.prod(env["action"]["shape"])], activation)

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

    def __init__(self, num: int, env: EnvSpec, hidden_sizes: Sequence[int], activation: str) -> None:
        super().__init__()
        self.trunk, num_features = make_trunk(env)
        self.num_features = num_features
        self.ensemble = EnsembleMLP(num, [num_features + action_size(env), *hidden_sizes, 1], activation)

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        features = without_mask(self.trunk(observation), self.num_features)
        if action.ndim > 2:
            inputs = torch.cat([features.expand(*action.shape[:-1], -1), action], -1)  # [S, B, F + A]
            return as_float32(self.ensemble(inputs.flatten(0, -2))).unflatten(1, action.shape[:-1])
        return as_float32(self.ensemble(torch.cat([features, action], -1)))

    def first(self, observation: Tensor, action: Tensor) -> Tensor:
        """Return Q_1(s, a), without computing the other critics: `[B, 1]`."""
        return as_float32(self.ensemble.first(torch.cat([self.trunk(observation), action], -1)))
