"""Optimisers that PyTorch does not have."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from levin.nn.parameters import flatten_parameters


class LaProp(Optimizer):
    """LaProp with adaptive gradient clipping, the optimiser of DreamerV3: momentum of normalised gradients.

        g <- g min(1, clip max(norm_min, |p|) / |g|)            for each parameter p: adaptive gradient clipping
        n <- beta2 n + (1 - beta2) g^2
        m <- beta1 m + (1 - beta1) g / (sqrt(n / (1 - beta2^t)) + eps)
        p <- p - lr min(1, (t - 1) / warm_up) m / (1 - beta1^t)

    The parameters become views of one vector, and everything but the clipping is computed on that. The step count is on
    the device, so that a CUDA graph can update it.

    Source: Ziyin et al. 2020 (arXiv:2002.04839); Brock et al. 2021 (arXiv:2102.06171); Hafner et al. 2023.

    Args:
        parameters: Parameters to optimise, of networks that are on their device already.
        lr: Learning rate after the warm-up.
        clip: Maximum norm of a gradient, as a fraction of the norm of its parameter.
        norm_min: Lower bound on the norm of a parameter, for the clipping.
        beta1: Decay of the momentum.
        beta2: Decay of the mean square.
        eps: Added to the root of the mean square.
        warm_up: Steps in which the learning rate rises linearly from 0 to `lr`.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        lr: float,
        clip: float = 0.3,
        norm_min: float = 1e-3,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-20,
        warm_up: int = 0,
    ) -> None:
        parameters = list(parameters)
        self.views: list[Tensor] = [*parameters]  # they become views of the flat vector below
        self.clipped = torch.zeros(())  # fraction of the parameters whose gradient the last step clipped
        defaults = {"lr": lr, "clip": clip, "norm_min": norm_min, "warm_up": warm_up}
        super().__init__([flatten_parameters(parameters)], {**defaults, "beta1": beta1, "beta2": beta2, "eps": eps})
        flat = self.param_groups[0]["params"][0]
        self.state[flat] = {
            "step": torch.zeros((), device=flat.device),
            "mean_square": torch.zeros_like(flat),
            "momentum": torch.zeros_like(flat),
        }

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update the parameters once with their current gradients."""
        group = self.param_groups[0]
        flat = group["params"][0]
        self.clip(group["clip"], group["norm_min"])
        gradient, state = flat.grad, self.state[flat]
        rate = group["lr"] * (state["step"] / group["warm_up"]).clamp(max=1.0) if group["warm_up"] else group["lr"]
        state["step"] += 1
        square, momentum, beta1, beta2 = state["mean_square"], state["momentum"], group["beta1"], group["beta2"]
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = (square / debias(beta2, state["step"])).sqrt_().add_(group["eps"])
        momentum.lerp_(root.reciprocal_().mul_(gradient), 1 - beta1)
        flat.sub_(momentum * (rate / debias(beta1, state["step"])))

    @torch.no_grad()
    def clip(self, fraction: float, norm_min: float) -> None:
        """Scale the gradient of each parameter to a norm of at most `fraction` times the parameter's norm."""
        gradients = [each.grad for each in self.views if each.grad is not None]
        max_norms: list[Tensor] = list(torch._foreach_norm(self.views))
        torch._foreach_clamp_min_(max_norms, norm_min)
        torch._foreach_mul_(max_norms, fraction)
        norms: list[Tensor] = list(torch._foreach_norm(gradients))
        self.clipped = (torch.stack(norms) > torch.stack(max_norms)).float().mean()
        torch._foreach_mul_(gradients, torch._foreach_div(max_norms, torch._foreach_maximum(norms, max_norms)))


def debias(beta: float, step: Tensor) -> Tensor:
    """Return 1 - beta^step, accurate also where it is close to 0."""
    return -torch.expm1(step * math.log(beta))
