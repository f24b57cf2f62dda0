"""Optimisers that PyTorch does not have."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from levin.nn.parameters import flatten_parameters


class LaProp(Optimizer):
    """Momentum of normalised gradients, each parameter's clipped by its own norm first; the optimiser of DreamerV3.

        g <- g min(1, clip max(norm_min, |p|) / |g|)            for each parameter p: adaptive gradient clipping
        n <- beta2 n + (1 - beta2) g^2
        m <- beta1 m + (1 - beta1) g / (sqrt(n / (1 - beta2^t)) + eps)
        p <- p - lr min(1, (t - 1) / warm_up) m / (1 - beta1^t)

    All steps but the clipping are on one vector that the parameters become views of. The count of
    steps is on the device, so that a CUDA graph can hold it.

    Source: Ziyin et al. 2020 (arXiv:2002.04839); Brock et al. 2021 (arXiv:2102.06171); Hafner et al. 2023.

    Args:
        parameters: Of networks that are on their device.
        lr: After the warm-up.
        clip: The most that the norm of a gradient is, as a share of its parameter's.
        norm_min: The least that a parameter's norm counts as.
        beta1: Decay of the momentum.
        beta2: Decay of the mean square.
        eps: Added to its root.
        warm_up: Steps until the learning rate is reached, from 0.
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
        self.each: list[Tensor] = [*parameters]
        self.clipped = torch.zeros(())  # the share of them whose gradient was, in the last step
        defaults = {"lr": lr, "clip": clip, "norm_min": norm_min, "warm_up": warm_up}
        super().__init__([flatten_parameters(parameters)], {**defaults, "beta1": beta1, "beta2": beta2, "eps": eps})
        whole = self.param_groups[0]["params"][0]
        self.state[whole] = {
            "step": torch.zeros((), device=whole.device),
            "mean_square": torch.zeros_like(whole),
            "momentum": torch.zeros_like(whole),
        }

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step, by the gradients that are there."""
        group = self.param_groups[0]
        whole = group["params"][0]
        self.clip(group["clip"], group["norm_min"])
        gradient, state = whole.grad, self.state[whole]
        rate = group["lr"] * (state["step"] / group["warm_up"]).clamp(max=1.0) if group["warm_up"] else group["lr"]
        state["step"] += 1
        square, momentum, beta1, beta2 = state["mean_square"], state["momentum"], group["beta1"], group["beta2"]
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = (square / debias(beta2, state["step"])).sqrt_().add_(group["eps"])
        momentum.lerp_(root.reciprocal_().mul_(gradient), 1 - beta1)
        whole.sub_(momentum * (rate / debias(beta1, state["step"])))

    @torch.no_grad()
    def clip(self, share: float, norm_min: float) -> None:
        """Scale the gradient of each parameter to at most a share of the parameter's norm."""
        gradients = [each.grad for each in self.each if each.grad is not None]
        most: list[Tensor] = list(torch._foreach_norm(self.each))
        torch._foreach_clamp_min_(most, norm_min)
        torch._foreach_mul_(most, share)
        norms: list[Tensor] = list(torch._foreach_norm(gradients))
        self.clipped = (torch.stack(norms) > torch.stack(most)).float().mean()
        torch._foreach_mul_(gradients, torch._foreach_div(most, torch._foreach_maximum(norms, most)))


def debias(beta: float, step: Tensor) -> Tensor:
    """1 - beta^step, also where that is hardly above 0."""
    return -torch.expm1(step * math.log(beta))
