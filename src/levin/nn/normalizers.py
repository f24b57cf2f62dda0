"""Running statistics of observations and returns.

Gymnasium's vector wrappers miscount when autoreset is disabled, so the statistics are ours. Normalisers are modules:
they live in the algorithm, travel in its checkpoint and sit inside its policy. A rollout is collected with frozen
statistics and updates them once. Those of rewards take it in before it is learned from: the first would be far too
large or small. Those of observations do so after that: a policy is improved on the observations that it acted on.
Buffers keep raw values and are normalised when a batch is drawn.
"""

import torch
from torch import Tensor, nn

from levin.core import distributed

EPSILON = 1e-8


class RunningMoments(nn.Module):
    """Mean and variance of all samples seen, in float64. Source: Chan et al. 1979, the parallel update."""

    mean: Tensor
    var: Tensor
    count: Tensor

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("var", torch.ones(shape, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    @torch.no_grad()
    def update(self, samples: Tensor) -> None:
        """Take in `samples` `[B, *shape]`."""
        samples = samples.double()
        mean, var, count = samples.mean(0), samples.var(0, correction=0), len(samples)
        if distributed.world_size() > 1:  # their samples are samples like these
            count = distributed.all_reduce_sum(torch.full_like(self.count, count))
            own, mean = mean, distributed.all_reduce_sum(mean * len(samples)) / count
            var = distributed.all_reduce_sum((var + (own - mean).square()) * len(samples)) / count
        total = self.count + count
        delta = mean - self.mean
        # Before the first sample the variance is a stand-in of 1 with a weight of 0.
        squares = self.var * self.count + var * count + delta.square() * self.count * count / total
        self.mean.add_(delta * count / total)
        self.var.copy_(squares / total)
        self.count.copy_(total)


class ObservationNormalizer(nn.Module):
    """`clamp((s - mean) / std, -clip, clip)`; the identity until the first rollout is complete."""

    def __init__(self, shape: tuple[int, ...], clip: float) -> None:
        super().__init__()
        self.moments = RunningMoments(shape)
        self.clip = clip

    def update(self, observation: Tensor) -> None:
        """Take in the observations `[N, T, *shape]` of one rollout."""
        self.moments.update(observation.flatten(0, 1))

    def forward(self, observation: Tensor) -> Tensor:
        """`[..., *shape] -> [..., *shape]`, float32."""
        scale = (self.moments.var + EPSILON).rsqrt()
        return ((observation - self.moments.mean) * scale).float().clamp(-self.clip, self.clip)


class RewardNormalizer(nn.Module):
    """`clamp(r / std(G), -clip, clip)`, where `G_t = gamma G_{t-1} + r_t` runs through each env's open episode.

    Source: `NormalizeReward` of OpenAI Baselines; the running return is cut at the ends of episodes only.
    """

    running_return: Tensor

    def __init__(self, num_envs: int, gamma: float, clip: float) -> None:
        super().__init__()
        self.moments = RunningMoments(())
        self.gamma, self.clip = gamma, clip
        self.register_buffer("running_return", torch.zeros(num_envs, dtype=torch.float64))

    @torch.no_grad()
    def update(self, reward: Tensor, done: Tensor) -> None:
        """Take in the rewards and ends of one rollout, both `[N, T, 1]`."""
        returns = torch.empty(reward.shape[:2], dtype=torch.float64)  # [N, T]
        running = self.running_return.cpu()
        rewards, alive = reward.squeeze(-1).double().cpu(), 1 - done.squeeze(-1).double().cpu()  # [N, T, 1] -> [N, T]
        for step in range(reward.shape[1]):
            running = running * self.gamma + rewards[:, step]
            returns[:, step] = running
            running = running * alive[:, step]
        self.running_return.copy_(running)
        self.moments.update(returns.flatten().to(self.running_return.device))

    def forward(self, reward: Tensor) -> Tensor:
        """`[..., 1] -> [..., 1]`, float32."""
        scale = (self.moments.var + EPSILON).rsqrt()
        return (reward * scale).float().clamp(-self.clip, self.clip)
