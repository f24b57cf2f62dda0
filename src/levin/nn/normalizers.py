"""Normalise observations, rewards and the returns that a critic learns with running statistics.

Gymnasium's vector wrappers miscount when autoreset is disabled, so Levin has its own. Normalisers are modules of the
algorithm: its checkpoint contains them, and its policy applies them. Statistics are frozen while a rollout is
collected, and every rollout updates them once. Reward statistics are updated before the update that learns from the
rollout, because the first normalised rewards would otherwise be far too large or small. Observation statistics are
updated after it, so that the policy is improved on the same inputs that it acted on. Replay buffers keep raw values;
batches are normalised when they are sampled.
"""

from typing import Any, ClassVar

import numpy as np
import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from levin.core import distributed
from levin.core.spaces import VECTOR, Space

EPSILON = 1e-8


class RunningMoments(nn.Module):
    """Running mean and variance of all samples, in float64. Source: Chan et al. 1979, the parallel update."""

    mean: Tensor
    var: Tensor
    count: Tensor
    scale: Tensor
    not_saved: ClassVar = ("scale",)  # it follows from `var`

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("var", torch.ones(shape, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        # 1 / std, which every step of the policy needs
        self.register_buffer("scale", torch.empty_like(self.var), persistent=False)
        self.update_scale()
        self.register_load_state_dict_post_hook(RunningMoments.update_scale)

    @torch.no_grad()
    def update_scale(self, _: object = None) -> None:
        """Set `scale` after a change of `var`, also by `load_state_dict`."""
        self.scale.copy_((self.var + EPSILON).rsqrt())

    @torch.no_grad()
    def update(self, samples: Tensor) -> None:
        """Add the samples `[B, *shape]` to the statistics."""
        samples = samples.double()
        mean, var, count = samples.mean(0), samples.var(0, correction=0), len(samples)
        if distributed.world_size() > 1:  # pool the samples of all ranks
            count = distributed.all_reduce_sum(torch.full_like(self.count, count))
            own, mean = mean, distributed.all_reduce_sum(mean * len(samples)) / count
            var = distributed.all_reduce_sum((var + (own - mean).square()) * len(samples)) / count
        total = self.count + count
        delta = mean - self.mean
        # The initial variance of 1 has no weight, because the initial count is 0.
        squares = self.var * self.count + var * count + delta.square() * self.count * count / total
        self.mean.add_(delta * count / total)
        self.var.copy_(squares / total)
        self.count.copy_(total)
        self.update_scale()


class ObservationNormalizer(nn.Module):
    """Observation normaliser `clamp((s - mean) / std, -clip, clip)`; before the first update mean is 0 and std is 1."""

    def __init__(self, shape: tuple[int, ...], clip: float) -> None:
        super().__init__()
        self.moments = RunningMoments(shape)
        self.clip = clip

    def update(self, observation: Tensor) -> None:
        """Update the statistics with the observations `[N, T, *shape]` of one rollout."""
        self.moments.update(observation.flatten(0, 1))

    def forward(self, observation: Tensor) -> Tensor:
        """Normalise observations: `[..., *shape] -> [..., *shape]`, float32."""
        moments = self.moments
        return (observation - moments.mean).mul_(moments.scale).float().clamp_(-self.clip, self.clip)


class VectorNormalizer(nn.Module):
    """Observation normaliser of the vector in a dict of a vector and images; networks scale images themselves."""

    def __init__(self, shape: tuple[int, ...], clip: float) -> None:
        super().__init__()
        self.vector = ObservationNormalizer(shape, clip)

    def update(self, observation: TensorDictBase) -> None:
        """Update the statistics with the observations `[N, T]` of one rollout."""
        self.vector.update(observation[VECTOR])

    def forward(self, observation: Any) -> Any:
        """Return the observations, a dict or a TensorDict, with a normalised vector."""
        observation = observation.copy()  # a shallow copy
        observation[VECTOR] = self.vector(observation[VECTOR])
        return observation


def make_observation_normalizer(space: Space, clip: float) -> ObservationNormalizer | VectorNormalizer:
    """Build the normaliser of a network input that is a vector or contains one."""
    if "spaces" in space:
        return VectorNormalizer(tuple(space["spaces"][VECTOR]["shape"]), clip)
    return ObservationNormalizer(tuple(space["shape"]), clip)


class RewardNormalizer(nn.Module):
    """Reward normaliser `clamp(r / std(G), -clip, clip)`, G the running return of each env.

    `G_t = gamma G_{t-1} + r_t` is reset only where an episode ends, not between rollouts.
    Source: `VecNormalize` of OpenAI Baselines.
    """

    running_return: Tensor

    def __init__(self, num_envs: int, gamma: float, clip: float) -> None:
        super().__init__()
        self.moments = RunningMoments(())
        self.gamma, self.clip = gamma, clip
        self.register_buffer("running_return", torch.zeros(num_envs, dtype=torch.float64))

    @torch.no_grad()
    def update(self, reward: Tensor, done: Tensor) -> None:
        """Update the statistics with the rewards and the `done` flags of one rollout, both `[N, T, 1]`."""
        rewards, alive = reward.squeeze(-1).double().cpu().numpy(), ~done.squeeze(-1).cpu().numpy()  # [N, T]
        running = self.running_return.cpu().numpy().copy()  # [N]
        if rewards.shape[:1] != running.shape:
            raise ValueError(f"the rollout has {len(rewards)} envs, and the running return has {len(running)}")
        returns = np.empty_like(rewards)
        for step in range(rewards.shape[1]):  # in NumPy, whose operations on small arrays are much faster than torch's
            running *= self.gamma
            running += rewards[:, step]
            returns[:, step] = running
            running *= alive[:, step]
        self.running_return.copy_(torch.from_numpy(running))
        self.moments.update(torch.from_numpy(returns).flatten().to(self.running_return.device))

    def forward(self, reward: Tensor) -> Tensor:
        """Normalise rewards: `[..., 1] -> [..., 1]`, float32."""
        return (reward * self.moments.scale).float().clamp_(-self.clip, self.clip)


class ReturnNormalizer(nn.Module):
    """Scale of a critic that learns returns divided by their running standard deviation; the mean stays.

    `forward` maps returns to the critic's units, and `inverse` the critic's output to the units of the rewards. If it
    is not enabled, both are the identity. Source: Tianshou.
    """

    def __init__(self, enabled: bool) -> None:
        super().__init__()
        self.moments = RunningMoments(()) if enabled else None

    def forward(self, returns: Tensor) -> Tensor:
        """Return the returns in the critic's units, of the same shape."""
        return returns if self.moments is None else returns * self.moments.scale

    def inverse(self, output: Tensor) -> Tensor:
        """Return the critic's output in the units of the rewards, of the same shape."""
        return output if self.moments is None else output / self.moments.scale

    def update(self, returns: Tensor) -> None:
        """Update the statistics with returns of any shape, in the units of the rewards."""
        if self.moments is not None:
            self.moments.update(returns.flatten())
