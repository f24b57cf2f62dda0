"""Networks of CrossQ, with batch renormalisation before every linear layer."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from levin.core import distributed
from levin.core.spaces import EnvSpec
from levin.nn.distributions import SquashedNormal
from levin.nn.encoders import make_trunk
from levin.nn.layers import ACTIVATIONS, EnsembleLinear, as_float32

# All values here are those of the authors' code.
LOG_STD_MIN, LOG_STD_MAX = -20, 2
EPSILON = 1e-3  # added to the variance
R_MAX, D_MAX = 3.0, 5.0  # bounds of r and d


class BatchRenorm(nn.Module):
    """Batch renormalisation of each feature in each of `num` networks: `[num, B, F] -> [num, B, F]`, float32.

    With the mean m and the standard deviation s of a batch, and the running ones M and S:

        training:   scale ((x - m) / s r + d) + bias,  r = clip(s / S, 1 / 3, 3),  d = clip((m - M) / S, -5, 5)
        otherwise:  scale  (x - M) / S        + bias

    r and d have no gradient. They are 1 and 0 in the first `warm_up` batches, which makes this batch normalisation.

    Source: Ioffe 2017 (arXiv:1702.03275), algorithm 1.
    """

    mean: Tensor
    var: Tensor
    count: Tensor

    def __init__(self, num: int, features: int, momentum: float, warm_up: int) -> None:
        super().__init__()
        self.momentum, self.warm_up = momentum, warm_up
        self.scale = nn.Parameter(torch.ones(num, 1, features))
        self.bias = nn.Parameter(torch.zeros(num, 1, features))
        self.register_buffer("mean", torch.zeros(num, 1, features))
        self.register_buffer("var", torch.ones(num, 1, features))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))  # batches seen

    def forward(self, inputs: Tensor, *, training: bool) -> Tensor:
        inputs = as_float32(inputs)
        running_std = (self.var + EPSILON).sqrt()
        if training:
            var, mean = torch.var_mean(inputs, -2, correction=0, keepdim=True)  # [num, B, F] -> [num, 1, F]
            std = (var + EPSILON).sqrt()
            with torch.no_grad():
                warm = self.count >= self.warm_up
                r = torch.where(warm, (std / running_std).clamp(1 / R_MAX, R_MAX), 1.0)
                d = torch.where(warm, ((mean - self.mean) / running_std).clamp(-D_MAX, D_MAX), 0.0)
                self.mean.lerp_(mean, 1 - self.momentum)
                self.var.lerp_(var, 1 - self.momentum)
                self.count.add_(1)
            factor = r / std
            offset = d - mean * factor
        else:
            factor = 1 / running_std
            offset = -self.mean * factor
        # One product and one sum over the batch, because passes over it are what a norm costs.
        return torch.addcmul(self.bias + self.scale * offset, inputs, self.scale * factor)


@torch.no_grad()
def average_statistics(network: nn.Module) -> None:
    """Average the running statistics of a network over the ranks."""
    if distributed.world_size() > 1:
        for layer in network.modules():
            if isinstance(layer, BatchRenorm):
                layer.mean.copy_(distributed.all_reduce_mean(layer.mean))
                layer.var.copy_(distributed.all_reduce_mean(layer.var))


class NormalizedMLP(nn.Module):
    """Ensemble of `num` MLPs with a norm before every linear layer: `[B, sizes[0]] -> [num, B, sizes[-1]]`."""

    def __init__(self, num: int, sizes: Sequence[int], activation: str, momentum: float, warm_up: int) -> None:
        super().__init__()
        self.num = num
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(sizes):
            norm, linear = BatchRenorm(num, inputs, momentum, warm_up), EnsembleLinear(num, inputs, outputs)
            layers += [norm, linear, ACTIVATIONS[activation]()]
        self.layers = nn.ModuleList(layers[:-1])

    def forward(self, inputs: Tensor, *, training: bool) -> Tensor:
        outputs = inputs.expand(self.num, *inputs.shape)  # [B, D] -> [num, B, D]
        for layer in self.layers:
            outputs = layer(outputs, training=training) if isinstance(layer, BatchRenorm) else layer(outputs)
        return as_float32(outputs)


class Critic(nn.Module):
    """Twin critics Q_i(s, a), normalised by their running statistics: `[B, *S], [B, A] -> [2, B, 1]`."""

    def __init__(
        self, env: EnvSpec, hidden_sizes: Sequence[int], activation: str, momentum: float, warm_up: int
    ) -> None:
        super().__init__()
        self.trunk, num_features = make_trunk(env, "mlp")
        sizes = [num_features + math.prod(env["action"]["shape"]), *hidden_sizes, 1]
        self.network = NormalizedMLP(2, sizes, activation, momentum, warm_up)

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        return self.network(torch.cat([self.trunk(observation), action], -1), training=False)

    def joint(
        self, observation: Tensor, action: Tensor, next_observation: Tensor, next_action: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return Q_i(s, a) and Q_i(s', a'), both `[2, B, 1]`, from one batch that is normalised by its statistics."""
        now = torch.cat([self.trunk(observation), action], -1)  # [B, F + A]
        after = torch.cat([self.trunk(next_observation), next_action], -1)
        q, q_next = self.network(torch.cat([now, after]), training=True).chunk(2, 1)  # [2, 2 B, 1] -> 2 x [2, B, 1]
        return q, q_next


class Actor(nn.Module):
    """Policy pi(a|s): squashed Gaussian over actions `[B, A]`, given observations `[B, *S]`."""

    def __init__(
        self, env: EnvSpec, hidden_sizes: Sequence[int], activation: str, momentum: float, warm_up: int
    ) -> None:
        super().__init__()
        self.trunk, num_features = make_trunk(env, "mlp")
        sizes = [num_features, *hidden_sizes, 2 * math.prod(env["action"]["shape"])]
        self.network = NormalizedMLP(1, sizes, activation, momentum, warm_up)

    def forward(self, observation: Tensor, *, training: bool = False) -> SquashedNormal:
        outputs = self.network(self.trunk(observation), training=training).squeeze(0)  # [1, B, 2 A] -> [B, 2 A]
        loc, log_std = outputs.chunk(2, -1)  # 2 x [B, A]
        return SquashedNormal(loc, log_std.clamp(LOG_STD_MIN, LOG_STD_MAX))
