"""Exploration: noise on deterministic policies, epsilon-greedy actions, and pairs of sampled and greedy episodes."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from levin.nn.distributions import NEVER

THETA = 0.15  # Lillicrap et al. 2016, section 7


class GaussianNoise(nn.Module):
    """Gaussian noise, independent for each action: `[N, *A] -> [N, *A]`.

    Args:
        scale: Standard deviation of the noise, in the units of the policy.
    """

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, action: Tensor, is_first: Tensor | None = None) -> Tensor:
        return self.scale * torch.randn_like(action)


class OrnsteinUhlenbeckNoise(nn.Module):
    """Ornstein-Uhlenbeck noise, correlated in time to explore systems with inertia: `[N, *A] -> [N, *A]`.

    x <- x - theta x + scale N(0, 1), starting from 0 in every episode.

    Source: Uhlenbeck and Ornstein 1930; Lillicrap et al. 2016 (arXiv:1509.02971), section 7, with a time step of 1.

    Args:
        scale: Standard deviation of the noise added to x per step; that of x approaches
            `scale / sqrt(theta (2 - theta))`.
        shape: Shape of the actions of all envs, `[N, *A]`.
    """

    state: Tensor

    def __init__(self, scale: float, shape: Sequence[int]) -> None:
        super().__init__()
        self.scale = scale
        self.register_buffer("state", torch.zeros(*shape))  # a resumed run continues with it

    def forward(self, action: Tensor, is_first: Tensor) -> Tensor:
        kept = (1 - THETA) * self.state * ~is_first
        self.state.copy_(kept + self.scale * torch.randn_like(action))
        return self.state


class NoisyPolicy(nn.Module):
    """Deterministic policy with added noise, clamped to [-1, 1]: `[N, *S], [N, 1] -> [N, *A]`.

    The second input, which only noise with a state needs, is whether each observation begins an episode.
    """

    def __init__(self, policy: nn.Module, noise: nn.Module) -> None:
        super().__init__()
        self.policy, self.noise = policy, noise

    def forward(self, observation: Tensor, is_first: Tensor | None = None) -> Tensor:
        action = self.policy(observation)
        return (action + self.noise(action, is_first)).clamp_(-1, 1)


class EpsilonGreedy(nn.Module):
    """Epsilon-greedy: a uniform action with probability epsilon, else the one of the highest value: `[N, A] -> [N]`.

    Args:
        epsilon: Initial probability; the algorithm lowers it.
        action_masks: Whether some values are `NEVER`, those of forbidden actions (`MaskedOutputs`).
    """

    epsilon: Tensor

    def __init__(self, epsilon: float, *, action_masks: bool = False) -> None:
        super().__init__()
        self.action_masks = action_masks
        self.register_buffer("epsilon", torch.tensor(float(epsilon)))

    def forward(self, values: Tensor) -> Tensor:
        explores = torch.rand(values.shape[0], device=values.device) < self.epsilon  # [N]
        best = values.argmax(-1)
        # The usual case once epsilon is small. A GPU would have to be waited for.
        if values.device.type == "cpu" and not explores.any():
            return best
        if self.action_masks:  # the action of the largest of A uniform numbers, of which forbidden actions have none
            uniform = torch.rand_like(values).masked_fill_(values <= NEVER, -1.0).argmax(-1)
        else:
            uniform = torch.randint_like(best, values.shape[1])
        return torch.where(explores, uniform, best)


class Greedy(nn.Module):
    """Greedy action, which has the highest value: `[N, A] -> [N]`."""

    def forward(self, values: Tensor) -> Tensor:
        return values.argmax(-1)


class AlternatingGreedy(nn.Module):
    """Flag of the second episode of each pair, in which the policy acts greedily: `[1, 1] -> [1, 1]`.

    The input is whether an episode begins. The flag is false in the first episode and changes with each new one.
    """

    second: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("second", torch.ones(1, 1, dtype=torch.bool))  # a resumed run continues with it

    def forward(self, is_first: Tensor) -> Tensor:
        self.second ^= is_first
        return self.second


class PairedPolicy(nn.Module):
    """Policy that samples in one episode and takes the mode in the next, in turn: `[1, *S], [1, 1] -> [1, *A]`."""

    def __init__(self, normalizer: nn.Module, trunk: nn.Module, actor: nn.Module, twin: AlternatingGreedy) -> None:
        super().__init__()
        self.normalizer, self.trunk, self.actor, self.twin = normalizer, trunk, actor, twin

    def forward(self, observation: Tensor, is_first: Tensor) -> Tensor:
        distribution = self.actor(self.trunk(self.normalizer(observation)))
        sampled = distribution.sample()
        greedy = self.twin(is_first).view(1, *[1] * (sampled.ndim - 1))
        return torch.where(greedy, distribution.mode, sampled)
