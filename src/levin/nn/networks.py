"""Networks that more than one algorithm uses."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from levin.core.errors import ConfigError
from levin.core.spaces import EnvSpec, Space
from levin.nn.distributions import Categorical, MultiCategorical, Normal


class InPlaceTanh(nn.Module):
    """tanh, whose own output is all that it is differentiated by."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.tanh_()


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": partial(nn.ReLU, inplace=True),  # a linear layer does not need its own output to differentiate
    "tanh": InPlaceTanh,
    "elu": nn.ELU,
    "silu": nn.SiLU,
}


def mlp(sizes: Sequence[int], activation: str) -> nn.Sequential:
    """Linear layers of the given sizes with the activation between them, none behind the last.

    `[..., sizes[0]] -> [..., sizes[-1]]`
    """
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers[:-1])


@torch.no_grad()
def orthogonal_(network: nn.Module, gain: float = 2**0.5) -> None:
    """Give every linear layer orthogonal weights times `gain`, and no bias; also convolutions, and each of an ensemble.

    Source: Saxe et al. 2014; the gain keeps the scale of activations through ReLUs.
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
    """Densities, values and losses are float32, also where mixed precision runs a network in half of it."""
    return outputs.float() if outputs.dtype.itemsize < 4 else outputs


class EnsembleLinear(nn.Module):
    """`num` independent linear layers in one batched product; initialised like `nn.Linear`.

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
        """The first layer alone: `[B, inputs] -> [B, outputs]`."""
        return torch.addmm(self.bias[0], inputs, self.weight[0])


class EnsembleMLP(nn.Module):
    """`num` independent networks of the same shape over the same input, as batched products.

    Two critics evaluated one after the other cost twice the kernel launches.
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
        """The first network alone, at its own cost: `[B, sizes[0]] -> [B, sizes[-1]]`."""
        for layer in self.layers:
            inputs = layer.first(inputs) if isinstance(layer, EnsembleLinear) else layer(inputs)
        return inputs


class NatureCNN(nn.Module):
    """Three convolutions and a linear layer: `[B, C, 84, 84]` uint8 `-> [B, 512]`.

    Source: Mnih et al. 2015 (doi:10.1038/nature14236), methods.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Conv2d(shape[0], 32, 8, stride=4), nn.ReLU(inplace=True)),
            *(nn.Conv2d(32, 64, 4, stride=2), nn.ReLU(inplace=True)),
            *(nn.Conv2d(64, 64, 3, stride=1), nn.ReLU(inplace=True), nn.Flatten()),
        )
        features = self.layers(torch.zeros(1, *shape)).shape[1]
        self.layers.extend([nn.Linear(features, 512), nn.ReLU(inplace=True)])
        orthogonal_(self)

    def forward(self, observation: Tensor) -> Tensor:
        return self.layers(observation / 255)


class Encoder(nn.Module):
    """Pixels and numbers side by side: `{"vector": [B, D], name: [B, C, H, W] uint8, ...} -> [B, F]`.

    Each image has a Nature CNN of its own, whose features stand beside the vector.
    """

    def __init__(self, parts: Mapping[str, Space], env_id: str) -> None:
        super().__init__()
        trunks = {name: make_box_trunk(part, env_id) for name, part in parts.items()}
        self.parts = nn.ModuleDict({name: part for name, (part, _) in trunks.items()})
        self.num_features = sum(num_features for _, num_features in trunks.values())

    def forward(self, observation: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([part(observation[name]) for name, part in self.parts.items()], -1)


def make_trunk(env: EnvSpec) -> tuple[nn.Module, int]:
    """What reads an observation, and how many features `[B, F]` it gives: the Nature CNN for pixels, else nothing.

    Raises:
        ConfigError: Pixels that are not `[C, H, W]`, or too few for the convolutions.
    """
    if "spaces" not in env["observation"]:
        return make_box_trunk(env["observation"], env["id"])
    encoder = Encoder(env["observation"]["spaces"], env["id"])
    return encoder, encoder.num_features


def make_box_trunk(space: Space, env_id: str) -> tuple[nn.Module, int]:
    """`trunk` of one box."""
    shape = space["shape"]
    if space["dtype"] != "uint8":
        return (nn.Identity() if len(shape) == 1 else nn.Flatten()), math.prod(shape)
    if len(shape) != 3 or min(shape[1:]) < 36:
        raise ConfigError(f"the Nature CNN reads [C, H, W] of 36 x 36 pixels or more; those of {env_id} are {shape}")
    return NatureCNN(shape), 512


def action_size(env: EnvSpec) -> int:
    """How many numbers an action is, the finite ones one-hot."""
    action = env["action"]
    return sum(action.get("nvec") or [0]) or action["n"] or math.prod(action["shape"])


class Actor(nn.Module):
    """pi(a|s): features `[B, F]` -> categorical `[B]` of a discrete space, or Gaussian `[B, A]` of a box.

    Of a multi-discrete space, one categorical for each of its actions, `[B, K]`.

    The deviation of the Gaussian is a parameter of its own and does not depend on s.
    The first actions hardly depend on s: the last layer's gain is 0.01 (Andrychowicz et al. 2021, arXiv:2006.05990).
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
        self.network = mlp([num_features, *hidden_sizes, outputs], activation)
        orthogonal_(self.network)
        orthogonal_(self.network[-1], gain=0.01)
        if env["action"]["type"] == "box":
            self.log_std = nn.Parameter(torch.full((outputs,), initial_log_std))

    def forward(self, features: Tensor) -> Categorical | MultiCategorical | Normal:
        outputs = as_float32(self.network(features))
        if self.sizes:
            return MultiCategorical(outputs, self.sizes)
        return Categorical(outputs) if self.discrete else Normal(outputs, self.log_std)


class Critic(nn.Module):
    """V(s): features `[B, F] -> [B, 1]`. With more `outputs`, one value for each of them."""

    def __init__(self, num_features: int, hidden_sizes: Sequence[int], activation: str, outputs: int = 1) -> None:
        super().__init__()
        self.network = mlp([num_features, *hidden_sizes, outputs], activation)
        orthogonal_(self.network)
        orthogonal_(self.network[-1], gain=1.0)

    def forward(self, features: Tensor) -> Tensor:
        return as_float32(self.network(features))


class StochasticPolicy(nn.Module):
    """What the collector asks for an action: `[N, *S] -> [N, *A]`, a draw or the mode."""

    def __init__(self, normalizer: nn.Module, trunk: nn.Module, actor: nn.Module, *, deterministic: bool) -> None:
        super().__init__()
        self.normalizer, self.trunk, self.actor, self.deterministic = normalizer, trunk, actor, deterministic

    def forward(self, observation: Tensor) -> Tensor:
        distribution = self.actor(self.trunk(self.normalizer(observation)))
        return distribution.mode if self.deterministic else distribution.sample()


class DeterministicActor(nn.Module):
    """mu(s): the action `[B, A]` in [-1, 1] of an observation `[B, *S]`."""

    def __init__(self, env: EnvSpec, hidden_sizes: Sequence[int], activation: str) -> None:
        super().__init__()
        self.trunk, num_features = make_trunk(env)
        self.network = mlp([num_features, *hidden_sizes, math.prod(env["action"]["shape"])], activation)

    def forward(self, observation: Tensor) -> Tensor:
        return as_float32(self.network(self.trunk(observation))).tanh()


class DeterministicPolicy(nn.Module):
    """What an evaluation asks for an action: `[N, *S] -> [N, A]`."""

    def __init__(self, normalizer: nn.Module, actor: nn.Module) -> None:
        super().__init__()
        self.normalizer, self.actor = normalizer, actor

    def forward(self, observation: Tensor) -> Tensor:
        return self.actor(self.normalizer(observation))


class ActionCritic(nn.Module):
    """Q_i(s, a) of `num` critics: `[B, *S], [B, A] -> [num, B, 1]`. Pixels are read by one trunk for all of them.

    Of several actions in each state, `[S, B, A]`, their values are `[num, S, B, 1]`.
    """

    def __init__(self, num: int, env: EnvSpec, hidden_sizes: Sequence[int], activation: str) -> None:
        super().__init__()
        self.trunk, num_features = make_trunk(env)
        self.ensemble = EnsembleMLP(num, [num_features + action_size(env), *hidden_sizes, 1], activation)

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        features = self.trunk(observation)
        if action.ndim > 2:
            several = torch.cat([features.expand(*action.shape[:-1], -1), action], -1)  # [S, B, F + A]
            return as_float32(self.ensemble(several.flatten(0, -2))).unflatten(1, action.shape[:-1])
        return as_float32(self.ensemble(torch.cat([features, action], -1)))

    def first(self, observation: Tensor, action: Tensor) -> Tensor:
        """Q_1(s, a) alone, at its own cost: `[B, 1]`."""
        return as_float32(self.ensemble.first(torch.cat([self.trunk(observation), action], -1)))
