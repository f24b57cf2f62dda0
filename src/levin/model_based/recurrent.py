"""Policies that remember: what they believe, and how it is carried from step to step. No mathematics of any of them."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from levin.estimators import StraightThrough
from levin.estimators.pathwise import one_hot_argmax


class State(NamedTuple):
    """What the model believes: `deter` `[..., D]` remembers, `stoch` `[..., S]` is drawn."""

    deter: Tensor
    stoch: Tensor

    @property
    def feature(self) -> Tensor:
        """All that the other networks read: `[..., S + D]`."""
        return torch.cat([self.stoch, self.deter], -1)


def stack_steps(steps: Sequence[tuple[Tensor, ...]]) -> Iterator[Tensor]:
    """Each part of T tuples: `[B, T, *]`."""
    return (torch.stack(part, 1) for part in zip(*steps, strict=True))


def sample_episode_end(continues: Tensor, chance: Tensor, temperature: float) -> Tensor:
    """Whether a dreamt episode ends, of the probability that it goes on and a standard normal number; all `[N, 1]`."""
    log_odds = torch.logit(1 - continues.clamp(max=1.0), eps=1e-6) / temperature
    return torch.special.ndtr(chance) < log_odds.sigmoid()


class Sizes(Protocol):
    """How many numbers there are of each that a policy carries."""

    deter: int
    stoch: int
    actions: int


class Model(Sizes, Protocol):
    """What a policy remembers with."""

    def step(self, state: State, action: Tensor, observation: Any, *, sample: bool = True) -> State:
        """The state after an action `[B, A]` and the observation that it led to."""
        ...


def mix_with_uniform(logits: Tensor, share: float) -> Tensor:
    """The log-probabilities `[..., K]` of a mixture with a uniform distribution."""
    if not share:
        return logits.log_softmax(-1)
    return torch.log((1 - share) * logits.softmax(-1) + share / logits.shape[-1])


class OneHotAction:
    """One of A actions as `[..., A]`, the gradient of a draw that of its probabilities (straight-through).

    Args:
        logits: `[..., A]`.
        unimix: Share of a uniform distribution that is mixed in.
    """

    def __init__(self, logits: Tensor, unimix: float = 0.0) -> None:
        self.log_probs = mix_with_uniform(logits, unimix)

    @property
    def mode(self) -> Tensor:
        """The most probable action."""
        return one_hot_argmax(self.log_probs)

    def sample(self) -> Tensor:
        """A draw."""
        return StraightThrough().relaxed_sample(self.log_probs)

    def draw(self) -> tuple[Tensor, Tensor]:
        """The same twice: what `log_prob_of_draw` is asked with, and the action."""
        action = self.sample()
        return action, action

    def log_prob(self, action: Tensor) -> Tensor:
        """`[..., 1]`."""
        return (self.log_probs * action).sum(-1, keepdim=True)

    log_prob_of_draw = log_prob

    def entropy(self) -> Tensor:
        """In nats, `[..., 1]`."""
        return -(self.log_probs.exp() * self.log_probs).sum(-1, keepdim=True)


class Carry(nn.Module):
    """What a policy remembers of the step before, for each env: state and action. It is saved with the algorithm."""

    deter: Tensor
    stoch: Tensor
    action: Tensor

    def __init__(self, num_envs: int, model: Sizes) -> None:
        super().__init__()
        for name, size in (("deter", model.deter), ("stoch", model.stoch), ("action", model.actions)):
            self.register_buffer(name, torch.zeros(num_envs, size))

    def begin(self, is_first: Tensor) -> None:
        """Forget, where an episode begins `[N, 1]`. For another number of envs: everything."""
        for name in ("deter", "stoch", "action"):
            value = getattr(self, name)
            if len(value) != len(is_first):
                value = value.new_zeros(len(is_first), value.shape[1], device=is_first.device)
            setattr(self, name, value * ~is_first)


class RecurrentPolicy(nn.Module):
    """What the collector asks for an action: `[N, *S], [N, 1] -> [N, *A]`.

    Args:
        model: Encodes what is seen.
        actor: The policy on its features.
        carry: Its memory.
        noise: Exploration: the deviation of what is added to an action, or the probability of a uniform one.
        deterministic: The most probable action, of the mean state.
        keeps: What to give of the state beside the action; without it, the action alone.
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
        """A draw, with the noise."""
        action = distribution.sample()
        if isinstance(distribution, OneHotAction):
            if not self.noise:
                return action
            uniform = OneHotAction(torch.zeros_like(action)).sample()
            return torch.where(torch.rand(len(action), 1, device=action.device) < self.noise, uniform, action)
        return (action + self.noise * torch.randn_like(action) if self.noise else action).clamp(-1, 1)
