"""Recurrent policies of world models: latent state, memory between steps, and exploration.

The world models themselves are in `levin.algorithms`.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from levin.estimators import StraightThrough
from levin.estimators.pathwise import one_hot_argmax


class State(NamedTuple):
    """Latent state: the deterministic part `deter` `[..., D]` and the sampled part `stoch` `[..., S]`."""

    deter: Tensor
    stoch: Tensor

    @property
    def feature(self) -> Tensor:
        """Input of the other networks, `[..., S + D]`."""
        return torch.cat([self.stoch, self.deter], -1)


def stack_steps(steps: Sequence[tuple[Tensor, ...]]) -> Iterator[Tensor]:
    """Stack each part of T tuples of tensors `[B, *]` to `[B, T, *]`."""
    return (torch.stack(part, 1) for part in zip(*steps, strict=True))


def sample_episode_end(continues: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """Sample whether an imagined episode ends, `[N, 1]`.

    Args:
        continues: Probability that the episode continues, `[N, 1]`.
        noise: Standard normal numbers `[N, 1]`, which determine the sample.
        temperature: Sampling temperature tau, by which the log-odds are divided.
    """
    log_odds = torch.logit(1 - continues.clamp(max=1.0), eps=1e-6) / temperature
    return torch.special.ndtr(noise) < log_odds.sigmoid()


class Sizes(Protocol):
    """Sizes of the tensors that a recurrent policy carries from step to step."""

    deter: int
    stoch: int
    actions: int


class Model(Sizes, Protocol):
    """World model that updates the latent state of a recurrent policy."""

    def step(self, state: State, action: Tensor, observation: Any, *, sample: bool = True) -> State:
        """Return the latent state after an action `[B, A]` and the observation that followed."""
        ...


def mix_with_uniform(logits: Tensor, share: float) -> Tensor:
    """Return log-probabilities `[..., K]`, after mixing in a share of the uniform distribution."""
    if not share:
        return logits.log_softmax(-1)
    return torch.log((1 - share) * logits.softmax(-1) + share / logits.shape[-1])


class OneHotAction:
    """Distribution over A one-hot actions `[..., A]`, with straight-through gradients of samples.

    Args:
        logits: Logits `[..., A]`.
        unimix: Share of the uniform distribution that is mixed in.
    """

    def __init__(self, logits: Tensor, unimix: float = 0.0) -> None:
        self.log_probs = mix_with_uniform(logits, unimix)

    @property
    def mode(self) -> Tensor:
        """Most probable action, `[..., A]`."""
        return one_hot_argmax(self.log_probs)

    def sample(self) -> Tensor:
        """Sample an action `[..., A]`; its gradient is that of the probabilities."""
        return StraightThrough().relaxed_sample(self.log_probs)

    def draw(self) -> tuple[Tensor, Tensor]:
        """Return the input for `log_prob_of_draw` and a sampled action (identical here)."""
        action = self.sample()
        return action, action

    def log_prob(self, action: Tensor) -> Tensor:
        """Return log pi(a|s), `[..., 1]`."""
        return (self.log_probs * action).sum(-1, keepdim=True)

    log_prob_of_draw = log_prob

    def entropy(self) -> Tensor:
        """Return the entropy in nats, `[..., 1]`."""
        return -(self.log_probs.exp() * self.log_probs).sum(-1, keepdim=True)


class Carry(nn.Module):
    """Memory of a recurrent policy: latent state and action of the last step of each env. Saved with the algorithm."""

    deter: Tensor
    stoch: Tensor
    action: Tensor

    def __init__(self, num_envs: int, model: Sizes) -> None:
        super().__init__()
        for name, size in (("deter", model.deter), ("stoch", model.stoch), ("action", model.actions)):
            self.register_buffer(name, torch.zeros(num_envs, size))

    def begin(self, is_first: Tensor) -> None:
        """Set the memory to zero where an episode begins, `is_first` `[N, 1]`, and everywhere if N has changed."""
        for name in ("deter", "stoch", "action"):
            value = getattr(self, name)
            if value.shape[0] != is_first.shape[0]:  # `len` would fix the batch size in an exported policy
                value = value.new_zeros(is_first.shape[0], value.shape[1], device=is_first.device)
            setattr(self, name, value * ~is_first)


class RecurrentPolicy(nn.Module):
    """Policy with a memory: observations `[N, *S]` and `is_first` `[N, 1]` to actions `[N, *A]`.

    Args:
        model: World model that updates the latent state.
        actor: Network from features to the distribution of actions.
        carry: Memory between steps.
        noise: Exploration noise: standard deviation for continuous actions, probability of a uniform one for discrete.
        deterministic: Whether to take the mode of the actor and not to sample the latent state.
        keeps: Function of the latent state whose result is returned with the action; None: return the action alone.
    """

    def __init__(
        self,
        model: "Model",
        actor: nn.Module,
        carry: Carry,
        *,
        noise: float = 0.0,
        deterministic: bool,
        keeps: Callable[[State], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.model, self.actor, self.carry, self.noise, self.deterministic = model, actor, carry, noise, deterministic
        self.keeps = keeps

    def forward(self, observation: Tensor, is_first: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        self.carry.begin(is_first)
        before = State(self.carry.deter, self.carry.stoch)
        state = self.model.step(before, self.carry.action, observation, sample=not self.deterministic)
        distribution = self.actor(state.feature)
        action = distribution.mode if self.deterministic else self.explore(distribution)
        self.carry.deter, self.carry.stoch, self.carry.action = state.deter, state.stoch, action
        chosen = action.argmax(-1) if isinstance(distribution, OneHotAction) else action
        return (chosen, self.keeps(state)) if self.keeps else chosen

    def explore(self, distribution: Any) -> Tensor:
        """Sample an action and add the exploration noise."""
        action = distribution.sample()
        if isinstance(distribution, OneHotAction):
            if not self.noise:
                return action
            uniform = OneHotAction(torch.zeros_like(action)).sample()
            return torch.where(torch.rand(len(action), 1, device=action.device) < self.noise, uniform, action)
        return (action + self.noise * torch.randn_like(action) if self.noise else action).clamp(-1, 1)
