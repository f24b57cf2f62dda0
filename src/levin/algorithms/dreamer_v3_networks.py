"""Networks of DreamerV3 (Hafner et al. 2023, arXiv:2301.04104), as in the latest published code.

Source: https://github.com/danijar/dreamerv3

A layer is linear, then RMSNorm, then SiLU. Weights are truncated normal, cut off at two std, with variance 1 / fan-in.
"""

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, interpolate, max_pool2d, rms_norm, silu

from levin.core.spaces import EnvSpec
from levin.model_based.recurrent import OneHotAction, State
from levin.nn.distributions import Normal
from levin.nn.layers import as_float32
from levin.nn.networks import action_size

BLOCKS = 8  # blocks of a block-diagonal matrix
UNIMIX = 0.01  # share of the uniform distribution mixed into the categoricals of states and actions
EPS = 1e-4  # of RMSNorm
BINS = 255  # of the two-hot distributions of rewards and values


class Size(NamedTuple):
    """Widths of the networks.

    A state is `deter` numbers and `stoch` categoricals of `classes` each. `depth` multiplies the channels of the
    convolutions; `hidden` is the width of the transition model and the state encoder, `units` that of other networks.
    """

    deter: int
    hidden: int
    classes: int
    depth: int
    units: int
    stoch: int = 32


SIZES = {
    "micro": Size(128, 64, 8, 4, 64, 8),  # not in the published code; for CPUs
    "1m": Size(512, 64, 4, 4, 64),
    "12m": Size(2048, 256, 16, 16, 256),
    "25m": Size(3072, 384, 24, 24, 384),
    "50m": Size(4096, 512, 32, 32, 512),
    "100m": Size(6144, 768, 48, 48, 768),
    "200m": Size(8192, 1024, 64, 64, 1024),
}


def symlog(x: Tensor) -> Tensor:
    """Return sign(x) log(1 + |x|)."""
    return x.sign() * x.abs().log1p()


def symexp(x: Tensor) -> Tensor:
    """Return sign(x) (exp(|x|) - 1), the inverse of `symlog`."""
    return x.sign() * x.abs().expm1()


@torch.no_grad()
def scaled_normal_(weight: Tensor, inputs: int, scale: float = 1.0) -> Tensor:
    """Fill with a normal distribution cut off at two std, whose std is `scale / sqrt(inputs)` after the cut."""
    if scale == 0:
        return weight.zero_()
    std = 1.1368 * scale / math.sqrt(inputs)
    return nn.init.trunc_normal_(weight, 0.0, std, -2 * std, 2 * std)


def linear(inputs: int, outputs: int, *, scale: float = 1.0, fan_in: int | None = None, bias: bool = True) -> nn.Linear:
    """Build a linear layer with `scaled_normal_` weights; `fan_in`: inputs of the whole layer if this is a part."""
    layer = nn.Linear(inputs, outputs, bias=bias)
    scaled_normal_(layer.weight, fan_in or inputs, scale)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


class NormSiLU(nn.Module):
    """SiLU(RMSNorm(x)) over the last axis, with the norm in float32."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return silu(rms_norm(as_float32(x), self.scale.shape, self.scale, EPS))


def norm_mlp(inputs: int, units: int, num: int) -> nn.Sequential:
    """Build `num` layers of linear, RMSNorm and SiLU: `[..., inputs] -> [..., units]`."""
    sizes = pairwise([inputs, *[units] * num])
    return nn.Sequential(*(part for before, after in sizes for part in (linear(before, after), NormSiLU(after))))


def output_head(inputs: int, units: int, num: int, outputs: int, scale: float = 1.0) -> nn.Sequential:
    """Build `norm_mlp` and a linear output layer whose initial weights are multiplied by `scale`."""
    return nn.Sequential(*norm_mlp(inputs, units, num), linear(units, outputs, scale=scale))


class BlockLinear(nn.Module):
    """A linear layer with a block-diagonal matrix: `[B, inputs] -> [BLOCKS, B, outputs / BLOCKS]`.

    Args:
        inputs: Number of inputs, over all blocks.
        outputs: Number of outputs, over all blocks.
        fan_in: Inputs of the whole layer that this matrix is a part of, for the initial weights.
        bias: Whether a bias is added.
    """

    def __init__(self, inputs: int, outputs: int, fan_in: int, *, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(BLOCKS, inputs // BLOCKS, outputs // BLOCKS))
        self.bias = nn.Parameter(torch.zeros(BLOCKS, 1, outputs // BLOCKS)) if bias else None
        scaled_normal_(self.weight, fan_in)

    def forward(self, x: Tensor) -> Tensor:
        blocks = x.unflatten(-1, (BLOCKS, -1)).transpose(0, 1)  # [B, inputs] -> [BLOCKS, B, *]
        return torch.bmm(blocks, self.weight) if self.bias is None else torch.baddbmm(self.bias, blocks, self.weight)


def merge_blocks(blocks: Tensor) -> Tensor:
    """Concatenate the blocks: `[BLOCKS, B, D] -> [B, BLOCKS D]`."""
    return blocks.transpose(0, 1).flatten(1)


class BlockGRU(nn.Module):
    """deter' = GRU(deter, [deter, stoch, action]) with block-diagonal matrices.

    Each block reads its own part of deter, and one input that is the same for all blocks; the matrix of the latter is
    dense.
    """

    def __init__(self, size: Size, actions: int) -> None:
        super().__init__()
        hidden, deter, fan_in = size.hidden, size.deter, size.deter + BLOCKS * 3 * size.hidden
        self.from_deter = norm_mlp(deter, hidden, 1)
        self.from_stoch = norm_mlp(size.stoch * size.classes, hidden, 1)
        self.from_action = norm_mlp(actions, hidden, 1)
        self.mix_deter = BlockLinear(deter, deter, fan_in, bias=False)
        self.mix_state = linear(2 * hidden, deter, fan_in=fan_in)
        self.mix_action = linear(hidden, deter, fan_in=fan_in, bias=False)
        self.norm = NormSiLU(deter)
        self.gates = BlockLinear(deter, 3 * deter, deter)

    def action_part(self, action: Tensor) -> Tensor:
        """Return the contribution of actions, clipped to [-1, 1], to the first layer: `[..., A] -> [..., D]`."""
        return self.mix_action(self.from_action(action / action.detach().abs().clamp(min=1.0)))

    def forward(self, state: State, action_part: Tensor) -> Tensor:
        inputs = torch.cat([self.from_deter(state.deter), self.from_stoch(state.stoch)], -1)
        x = self.norm(merge_blocks(self.mix_deter(state.deter)) + self.mix_state(inputs) + action_part)
        reset, candidate, update = as_float32(self.gates(x)).chunk(3, -1)  # [BLOCKS, B, D / BLOCKS] each
        candidate = torch.tanh(reset.sigmoid() * candidate)
        update = (update - 1).sigmoid()
        before = state.deter.unflatten(-1, (BLOCKS, -1)).transpose(0, 1)
        return merge_blocks(torch.lerp(before, candidate, update))


class ConvNormSiLU(nn.Module):
    """A 5 x 5 convolution that keeps the size (optional 2 x 2 max-pooling), RMSNorm over channels, SiLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(scaled_normal_(torch.empty(outputs, inputs, 5, 5), 25 * inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.norm = NormSiLU(outputs)

    def forward(self, x: Tensor, *, pool: bool = False) -> Tensor:
        x = conv2d(x, self.weight, self.bias, padding="same")
        x = max_pool2d(x, 2) if pool else x
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)


class PixelEncoder(nn.Module):
    """Four convolutions, each with 2 x 2 max-pooling: `[B, C, 64, 64]` uint8 `-> [B, 64 depth]`."""

    def __init__(self, channels: int, depth: int) -> None:
        super().__init__()
        widths = [channels, 2 * depth, 3 * depth, 4 * depth, 4 * depth]
        self.convolutions = nn.ModuleList(ConvNormSiLU(*pair) for pair in pairwise(widths))
        self.size = 16 * widths[-1]

    def forward(self, pixels: Tensor) -> Tensor:
        x = pixels.float() / 255 - 0.5
        for convolution in self.convolutions:
            x = convolution(x, pool=True)
        return x.flatten(1)


class PixelDecoder(nn.Module):
    """Mirror image of `PixelEncoder`: `State -> [B, C, 64, 64]` in (0, 1)."""

    def __init__(self, size: Size, channels: int) -> None:
        super().__init__()
        widths = [4 * size.depth, 4 * size.depth, 3 * size.depth, 2 * size.depth]
        flat = 16 * widths[0]
        self.from_deter = BlockLinear(size.deter, flat, size.deter)
        self.from_stoch = nn.Sequential(
            *norm_mlp(size.stoch * size.classes, 2 * size.units, 1), linear(2 * size.units, flat)
        )
        self.norm = NormSiLU(widths[0])
        self.convolutions = nn.ModuleList(ConvNormSiLU(*pair) for pair in pairwise(widths))
        self.last = nn.Parameter(scaled_normal_(torch.empty(channels, widths[-1], 5, 5), 25 * widths[-1]))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, state: State) -> Tensor:
        blocks = self.from_deter(state.deter).unflatten(-1, (4, 4, -1))  # [BLOCKS, B, H, W, C / BLOCKS]
        deter = blocks.permute(1, 2, 3, 0, 4).flatten(3)  # [B, H, W, C]
        x = self.norm(deter + self.from_stoch(state.stoch).unflatten(-1, (4, 4, -1))).movedim(-1, 1)
        for convolution in self.convolutions:
            x = convolution(interpolate(x, scale_factor=2.0))
        x = conv2d(interpolate(x, scale_factor=2.0), self.last, self.bias, padding="same")
        return as_float32(x).sigmoid()


class Policy(nn.Module):
    """Policy pi(a | s) on features: a Gaussian, or one-hot actions with a straight-through gradient."""

    def __init__(self, features: int, env: EnvSpec, units: int) -> None:
        super().__init__()
        self.discrete = env["action"]["type"] == "discrete"
        num = action_size(env)
        self.network = output_head(features, units, 3, num if self.discrete else 2 * num, scale=0.01)

    def forward(self, feature: Tensor) -> OneHotAction | Normal:
        numbers = as_float32(self.network(feature))
        if self.discrete:
            return OneHotAction(numbers, UNIMIX)
        loc, std = numbers.chunk(2, -1)
        return Normal(loc.tanh(), (0.9 * (std + 2).sigmoid() + 0.1).log())


class TwoHot(nn.Module):
    """Distributions of real numbers over 255 bins, the symexp of evenly spaced points, thus densest around 0."""

    bins: Tensor

    def __init__(self) -> None:
        super().__init__()
        half = symexp(torch.linspace(-20, 0, BINS // 2 + 1))
        self.register_buffer("bins", torch.cat([half, -half[:-1].flip(0)]), persistent=False)

    def mean(self, logits: Tensor) -> Tensor:
        """Return the mean, `[..., 255] -> [..., 1]`.

        Bins of opposite sign are added in pairs, so that the mean of a symmetric distribution is exactly 0.
        """
        half = BINS // 2
        probs = logits.softmax(-1)
        return ((probs[..., half + 1 :] - probs[..., :half].flip(-1)) * self.bins[half + 1 :]).sum(-1, keepdim=True)

    def encode(self, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the indices of the bins below and above a value, and the weight of the upper one: all `[..., 1]`."""
        value = value.clamp(self.bins[0], self.bins[-1])
        upper = torch.searchsorted(self.bins, value).clamp(1, BINS - 1)
        below, above = self.bins[upper - 1], self.bins[upper]
        return upper - 1, upper, (value - below) / (above - below)

    def loss(self, log_probs: Tensor, value: Tensor) -> Tensor:
        """Return the cross-entropy with the two-hot target of a value: `[..., 255], [..., 1] -> [..., 1]`."""
        lower, upper, weight = self.encode(value)
        lower_log, upper_log = log_probs.gather(-1, torch.cat([lower, upper], -1)).chunk(2, -1)
        return -torch.lerp(lower_log, upper_log, weight)


def sample_one_hot(logits: Tensor) -> Tensor:
    """Sample a one-hot vector from each categorical `[..., K]` mixed with a uniform distribution; no gradient.

    It inverts the distribution function with one random number per sample. One random number per class, and PyTorch's
    softmax over so few classes, would take ten times as long.
    """
    classes = logits.shape[-1]
    cumulative = (logits - logits.amax(-1, keepdim=True)).exp().cumsum(-1)
    uniform = torch.arange(1, classes + 1, device=logits.device) * (UNIMIX / classes)
    cumulative = (1 - UNIMIX) * cumulative / cumulative[..., -1:] + uniform
    index = (torch.rand_like(cumulative[..., :1]) >= cumulative[..., :-1]).sum(-1, keepdim=True)
    return torch.zeros_like(logits).scatter_(-1, index, 1.0)


def categorical_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p || q) of categoricals given as log-probabilities `[..., S, K]`, summed over S: `[..., 1]`."""
    return (log_p.exp() * (log_p - log_q)).sum((-1, -2)).unsqueeze(-1)
