"""How an algorithm that does not sample from its policy finds out what other actions do."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

THETA = 0.15  # Lillicrap et al. 2016, section 7


class GaussianNoise(nn.Module):
    """Independent noise of each action: `[N, *A] -> [N, *A]`.

    Args:
        scale: Its standard deviation, in the units of the policy.
    """

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, action: Tensor, is_first: Tensor | None = None) -> Tensor:
        return self.scale * torch.randn_like(action)


class OrnsteinUhlenbeckNoise(nn.Module):
    """Noise that remembers itself, so that a body with inertia gets somewhere: `[N, *A] -> [N, *A]`.

    x <- x - theta x + scale N(0, 1), from 0 at the beginning of an episode.

    Source: Uhlenbeck and Ornstein 1930; Lillicrap et al. 2016 (arXiv:1509.02971), section 7, with a time step of 1.

    Args:
        scale: Deviation of what is added in each step; that of x approaches `scale / sqrt(theta (2 - theta))`.
        shape: Of the actions of all envs, `[N, *A]`.
    """

    state: Tensor

    def __init__(self, scale: float, shape: Sequence[int]) -> None:
        super().__init__()
        self.scale = scale
        self.register_buffer("state", torch.zeros(*shape))  # a resumed run goes on with it

    def forward(self, action: Tensor, is_first: Tensor) -> Tensor:
        kept = (1 - THETA) * self.state * ~is_first
        self.state.copy_(kept + self.scale * torch.randn_like(action))
        return self.state


class NoisyPolicy(nn.Module):
    """A deterministic policy with noise on top, inside of [-1, 1].

    `[N, *S], [N, 1] -> [N, *A]`: an observation and, for noise that has a state, whether it begins an episode.
    """

    def __init__(self, policy: nn.Module, noise: nn.Module) -> None:
        super().__init__()
        self.policy, self.noise = policy, noise

    def forward(self, observation: Tensor, is_first: Tensor | None = None) -> Tensor:
        action = self.policy(observation)
        return (action + self.noise(action, is_first)).clamp_(-1, 1)


class EpsilonGreedy(nn.Module):
    """The action of the highest value, and with probability epsilon a uniform one: `[N, A] -> [N]`.

    Args:
        epsilon: At the start; the algorithm lowers it.
    """

    epsilon: Tensor

    def __init__(self, epsilon: float) -> None:
        super().__init__()
        self.register_buffer("epsilon", torch.tensor(float(epsilon)))

    def forward(self, values: Tensor) -> Tensor:
        explores = torch.rand(values.shape[0], device=values.device) < self.epsilon  # [N]
        best = values.argmax(-1)
        if not explores.any():  # as a rule, once epsilon is small
            return best
        return torch.where(explores, torch.randint_like(best, values.shape[1]), best)


class Greedy(nn.Module):
    """The action of the highest value: `[N, A] -> [N]`."""

    def forward(self, values: Tensor) -> Tensor:
        return values.argmax(-1)


class AlternatingGreedy(nn.Module):
    """Whether an episode is the second of a pair, whose actions are not drawn: `[1, 1] -> [1, 1]`, in turns."""

    second: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("second", torch.ones(1, 1, dtype=torch.bool))  # a resumed run goes on with it

    def forward(self, is_first: Tensor) -> Tensor:
        self.second ^= is_first
        return self.second


class PairedPolicy(nn.Module):
    """One episode with draws from the policy, the next one with its modes: `[1, *S], [1, 1] -> [1, *A]`."""

    def __init__(self, normalizer: nn.Module, trunk: nn.Module, actor: nn.Module, twin: AlternatingGreedy) -> None:
        super().__init__()
        self.normalizer, self.trunk, self.actor, self.twin = normalizer, trunk, actor, twin

    def forward(self, observation: Tensor, is_first: Tensor) -> Tensor:
        distribution = self.actor(self.trunk(self.normalizer(observation)))
        drawn = distribution.sample()
        greedy = self.twin(is_first).view(1, *[1] * (drawn.ndim - 1))
        return torch.where(greedy, distribution.mode, drawn)
