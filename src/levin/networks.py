"""Networks that more than one algorithm uses."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": partial(nn.ReLU, inplace=True),  # a linear layer does not need its own output to differentiate
    "tanh": nn.Tanh,
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
    """Give every linear layer orthogonal weights times `gain`, and no bias; each member of an ensemble its own.

    Source: Saxe et al. 2014; the gain keeps the scale of activations through ReLUs.
    """
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            nn.init.orthogonal_(layer.weight, gain)
        elif isinstance(layer, EnsembleLinear):
            for weight in layer.weight:  # [inputs, outputs]
                nn.init.orthogonal_(weight, gain)
        else:
            continue
        nn.init.zeros_(layer.bias)


@contextmanager
def frozen(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Gradients flow through these parameters, but none are computed for them."""
    parameters = list(parameters)
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


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
