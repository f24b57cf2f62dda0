"""Action distributions, in plain tensor operations: `torch.distributions` costs about twice as much per update."""

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus


class SquashedNormal:
    """`a = tanh(u)`, `u ~ Normal(loc, exp(log_std))`: a Gaussian squeezed into (-1, 1).

    Source: Haarnoja et al. 2018 b, appendix C. `loc` and `log_std` are `[..., A]`.
    """

    def __init__(self, loc: Tensor, log_std: Tensor) -> None:
        self.loc, self.log_std = loc, log_std

    @property
    def mode(self) -> Tensor:
        """The action `tanh(loc)` `[..., A]`, which evaluation takes."""
        return torch.tanh(self.loc)

    def sample(self) -> Tensor:
        """A reparameterised action `[..., A]`."""
        return torch.tanh(self.loc + self.log_std.exp() * torch.randn_like(self.loc))

    def sample_with_log_prob(self) -> tuple[Tensor, Tensor]:
        """A reparameterised action `[..., A]` and its log-density `[..., 1]`."""
        noise = torch.randn_like(self.loc)
        before_tanh = self.loc + self.log_std.exp() * noise
        return torch.tanh(before_tanh), self._log_prob(before_tanh, noise)

    def log_prob(self, action: Tensor) -> Tensor:
        """Log-density `[..., 1]` of an action `[..., A]`, strictly inside (-1, 1)."""
        before_tanh = torch.atanh(action)
        return self._log_prob(before_tanh, (before_tanh - self.loc) * (-self.log_std).exp())

    def _log_prob(self, before_tanh: Tensor, noise: Tensor) -> Tensor:
        normal = -0.5 * noise.square() - self.log_std - 0.5 * math.log(2 * math.pi)
        # log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2u)), which does not underflow for a large |u|
        squash = 2 * (math.log(2) - before_tanh - softplus(-2 * before_tanh))
        return (normal - squash).sum(-1, keepdim=True)  # [..., A] -> [..., 1]
