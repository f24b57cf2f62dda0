"""Layers that networks are made of: MLPs and residual blocks, single or as ensembles, and their initialisation."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from levin.core.errors import ConfigError
from levin.core.types import VectorNetwork


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
        if layer.bias is not None:
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


class EnsembleLayerNorm(nn.Module):
    """Layer normalisation of each member of an ensemble, with its own scale and shift: `[num, B, D] -> [num, B, D]`."""

    def __init__(self, num: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num, 1, size))
        self.bias = nn.Parameter(torch.zeros(num, 1, size))

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.addcmul(self.bias, layer_norm(inputs, inputs.shape[-1:]), self.weight)

    def first(self, inputs: Tensor) -> Tensor:
        """Return the output of the first member alone: `[B, D] -> [B, D]`."""
        return torch.addcmul(self.bias[0], layer_norm(inputs, inputs.shape[-1:]), self.weight[0])


class Residual(nn.Module):
    """Residual block `x + f(x)`, of which the layers are f. The first of them must not work in place."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + self.layers(inputs)

    def first(self, inputs: Tensor) -> Tensor:
        """Return the output of the first member of an ensemble alone: `[B, D] -> [B, D]`."""
        return inputs + first_member(self.layers, inputs)


def first_member(layers: Iterable[nn.Module], inputs: Tensor) -> Tensor:
    """Return the output of the first member of an ensemble with these layers: `[B, D] -> [B, outputs]`."""
    for layer in layers:
        inputs = layer.first(inputs) if isinstance(layer, ENSEMBLE_LAYERS) else layer(inputs)
    return inputs


ENSEMBLE_LAYERS = (EnsembleLinear, EnsembleLayerNorm, Residual)


def mlp(sizes: Sequence[int], activation: str) -> nn.Sequential:
    """Build linear layers of the given sizes with the activation between them, none after the last.

    `[..., sizes[0]] -> [..., sizes[-1]]`
    """
    return make_layers("mlp", sizes, activation)


def make_layers(network: VectorNetwork, sizes: Sequence[int], activation: str, num: int | None = None) -> nn.Sequential:
    """Build the layers of a network for vectors: `[..., sizes[0]] -> [..., sizes[-1]]`.

    Args:
        network: Kind of the hidden layers, whose sizes are those between the first and the last. `mlp`: linear layer,
            activation. `layer_norm`: linear layer, layer normalisation, activation. `simba`: a linear layer, then for
            each size a residual block of four times its width, normalised before; a last normalisation (Lee et al.
            2024, arXiv:2410.09754, section 4). `resnet`: a linear layer, normalised, then for each size a residual
            block of two linear layers, each normalised after (BroNet: Nauman et al. 2024, arXiv:2405.16158).
        sizes: Sizes of the input, the hidden layers and the output.
        activation: Activation in the hidden layers.
        num: Number of members of an ensemble, whose inputs are `[num, B, sizes[0]]`; None: a single network.

    Raises:
        ConfigError: The residual blocks have different sizes.
    """
    linear: Callable[[int, int], nn.Module] = nn.Linear if num is None else partial(EnsembleLinear, num)
    norm: Callable[[int], nn.Module] = nn.LayerNorm if num is None else partial(EnsembleLayerNorm, num)
    act = ACTIVATIONS[activation]
    layers: list[nn.Module] = []
    hidden = list(sizes[1:-1])
    if network in ("mlp", "layer_norm"):
        for inputs, outputs in pairwise(sizes[:-1]):
            layers += [linear(inputs, outputs), *([norm(outputs)] if network == "layer_norm" else []), act()]
    elif hidden:
        size = hidden[0]
        if set(hidden) != {size}:
            raise ConfigError(
                f"algo.network={network} adds its blocks to one vector, so all algo.hidden_sizes must be equal, "
                f"got {hidden}"
            )
        layers.append(linear(sizes[0], size))
        if network == "simba":
            layers += [Residual(norm(size), linear(size, 4 * size), act(), linear(4 * size, size)) for _ in hidden]
            layers.append(norm(size))
        else:
            layers += [norm(size), act()]
            layers += [Residual(linear(size, size), norm(size), act(), linear(size, size), norm(size)) for _ in hidden]
    layers.append(linear(sizes[-2], sizes[-1]))
    return nn.Sequential(*layers)


class Ensemble(nn.Module):
    """Ensemble of `num` independent networks on the same input, computed in batched products.

    Two networks evaluated one after the other would cost twice the kernel launches. `[B, D] -> [num, B, outputs]`

    Args:
        num: Number of members.
        layers: Layers for inputs `[num, B, D]` (`make_layers`).
    """

    def __init__(self, num: int, layers: nn.Sequential) -> None:
        super().__init__()
        self.num, self.layers = num, layers

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(inputs.expand(self.num, *inputs.shape))  # [B, D] -> [num, B, D]

    def first(self, inputs: Tensor) -> Tensor:
        """Return the output of the first network, without computing the others: `[B, D] -> [B, outputs]`."""
        return first_member(self.layers, inputs)
