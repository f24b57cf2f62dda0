"""Action distributions, in plain tensor operations: `torch.distributions` costs about twice as much per update."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad, softplus

from levin.estimators.latent import DiscreteLatent

LOG_2PI = math.log(2 * math.pi)
NEVER = -1e9  # the logit of a value that is none


class Categorical:
    """One of A actions, `p = softmax(logits)`. `logits` is `[..., A]`, an action `[...]` int64."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        self._log_probs: Tensor | None = None

    def __getitem__(self, index: Tensor) -> "Categorical":
        return Categorical(self.logits[index])

    def detach(self) -> "Categorical":
        """The same distribution, without a gradient."""
        return Categorical(self.logits.detach())

    @property
    def log_probs(self) -> Tensor:
        """The log-probability of every action, `[..., A]`."""
        if self._log_probs is None:  # a cached_property has a lock before Python 3.12, which can't be compiled
            self._log_probs = self.logits.log_softmax(-1)
        return self._log_probs

    @property
    def mode(self) -> Tensor:
        """The most probable action `[...]`, which evaluation takes."""
        return self.logits.argmax(-1)

    def sample(self) -> Tensor:
        """An action `[...]`, by the Gumbel-max trick: `-log` of an exponential variable is a Gumbel one."""
        return (self.logits - torch.empty_like(self.logits).exponential_().log_()).argmax(-1)

    def log_prob(self, action: Tensor) -> Tensor:
        """`[..., 1]`."""
        return self.log_probs.gather(-1, action.unsqueeze(-1))  # [...] -> [..., 1]

    def entropy(self) -> Tensor:
        """In nats, `[..., 1]`."""
        return -(self.log_probs.exp() * self.log_probs).sum(-1, keepdim=True)  # [..., A] -> [..., 1]

    def kl(self, other: "Categorical") -> Tensor:
        """KL(self || other) in nats, `[..., 1]`."""
        return (self.log_probs.exp() * (self.log_probs - other.log_probs)).sum(-1, keepdim=True)  # -> [..., 1]


class MultiCategorical:
    """K independent choices: `logits` is `[..., sum(sizes)]`, one choice after another; an action `[..., K]` int64."""

    def __init__(self, logits: Tensor, sizes: Sequence[int]) -> None:
        self.logits, self.sizes = logits, list(sizes)
        self.parts = [Categorical(each) for each in logits.split(self.sizes, -1)]  # the distribution of each choice

    def __getitem__(self, index: Tensor) -> "MultiCategorical":
        return MultiCategorical(self.logits[index], self.sizes)

    def detach(self) -> "MultiCategorical":
        """The same distribution, without a gradient."""
        return MultiCategorical(self.logits.detach(), self.sizes)

    @property
    def mode(self) -> Tensor:
        """The most probable action `[..., K]`, which evaluation takes."""
        return torch.stack([part.mode for part in self.parts], -1)

    def sample(self) -> Tensor:
        """An action `[..., K]`."""
        return torch.stack([part.sample() for part in self.parts], -1)

    def log_prob(self, action: Tensor) -> Tensor:
        """`[..., 1]`."""
        return sum_terms(part.log_prob(choice) for part, choice in zip(self.parts, action.unbind(-1), strict=True))

    def entropy(self) -> Tensor:
        """In nats, `[..., 1]`."""
        return sum_terms(part.entropy() for part in self.parts)

    def kl(self, other: "MultiCategorical") -> Tensor:
        """KL(self || other) in nats, `[..., 1]`."""
        return sum_terms(part.kl(their) for part, their in zip(self.parts, other.parts, strict=True))


class OneHot:
    """Actions of D choices as one-hot vectors side by side, A = sum(sizes), and as a torch distribution of them.

    Args:
        sizes: The values of each choice.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes, self.widest = list(sizes), max(sizes)

    @property
    def max_entropy(self) -> float:
        """Of uniform choices, in nats."""
        return sum(math.log(size) for size in self.sizes)

    @property
    def combinations(self) -> int:
        """How many actions there are."""
        return math.prod(self.sizes)

    def all_actions(self, device: torch.device) -> Tensor:
        """All of them: `[M, D, K]`."""
        number, places = torch.arange(self.combinations, device=device), []
        for size in reversed(self.sizes):
            places.insert(0, number % size)
            number = number // size
        chosen = torch.stack(places, -1).unsqueeze(-1)  # [M, D, 1]
        return (chosen == torch.arange(self.widest, device=device)).float()

    def encode(self, action: Tensor) -> Tensor:
        """`[B]` or `[B, D]` int64 -> `[B, A]`."""
        parts = zip(action.view(len(action), -1, 1).unbind(1), self.sizes, strict=True)  # D x [B, 1]
        return torch.cat([part == torch.arange(size, device=part.device) for part, size in parts], -1).float()

    def distribution(self, logits: Tensor) -> DiscreteLatent:
        """`[B, A]` -> D choices of K, `[B, D, K]`; shorter ones are filled up with values that never come."""
        parts = logits.split(self.sizes, -1)
        padded = [pad(part, (0, self.widest - part.shape[-1]), value=NEVER) for part in parts]
        return DiscreteLatent(torch.stack(padded, -2))

    def join(self, choices: Tensor) -> Tensor:
        """`[..., D, K] -> [..., A]`."""
        parts = [choices[..., index, :size] for index, size in enumerate(self.sizes)]
        return torch.cat(parts, -1)


def sum_terms(terms: Iterable[Tensor]) -> Tensor:
    """Of tensors of one shape."""
    return torch.stack(list(terms)).sum(0)


class Normal:
    """A Gaussian with independent components. `loc` and an action are `[..., A]`, `log_std` is `[A]` or `[..., A]`."""

    def __init__(self, loc: Tensor, log_std: Tensor) -> None:
        self.loc, self.log_std = loc, log_std

    def __getitem__(self, index: Tensor) -> "Normal":
        return Normal(self.loc[index], self.log_std.expand_as(self.loc)[index])

    def detach(self) -> "Normal":
        """The same distribution, without a gradient."""
        return Normal(self.loc.detach(), self.log_std.detach())

    @property
    def mode(self) -> Tensor:
        """The mean `[..., A]`, which evaluation takes."""
        return self.loc

    def sample(self) -> Tensor:
        """A reparameterised action `[..., A]`."""
        return torch.addcmul(self.loc, self.log_std.exp(), torch.randn_like(self.loc))

    def log_prob(self, action: Tensor) -> Tensor:
        """Log-density `[..., 1]`."""
        standard = (action - self.loc) * (-self.log_std).exp()
        # Sums first: what does not depend on the action is added to one number, not to A.
        return -0.5 * standard.square().sum(-1, keepdim=True) - (self.log_std + 0.5 * LOG_2PI).sum(-1, keepdim=True)

    def entropy(self) -> Tensor:
        """In nats, `[..., 1]`."""
        each = (self.log_std + 0.5 * (1 + LOG_2PI)).sum(-1, keepdim=True)  # [A] or [..., A] -> [1] or [..., 1]
        return each.expand(*self.loc.shape[:-1], 1)

    def kl(self, other: "Normal") -> Tensor:
        """KL(self || other) in nats, `[..., 1]`."""
        var, other_var = (2 * self.log_std).exp(), (2 * other.log_std).exp()
        terms = other.log_std - self.log_std + (var + (self.loc - other.loc).square()) / (2 * other_var) - 0.5
        return terms.sum(-1, keepdim=True)  # [..., A] -> [..., 1]


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

    def draw(self) -> tuple[Tensor, Tensor]:
        """u and the action tanh(u), reparameterised: both `[..., A]`."""
        before_tanh = torch.addcmul(self.loc, self.log_std.exp(), torch.randn_like(self.loc))
        return before_tanh, before_tanh.tanh()

    def log_prob_of_draw(self, before_tanh: Tensor) -> Tensor:
        """Log-density `[..., 1]` of the action tanh(u), also where rounding makes that 1."""
        return self._log_prob(before_tanh, (before_tanh - self.loc) * (-self.log_std).exp())

    def sample_with_log_prob(self) -> tuple[Tensor, Tensor]:
        """A reparameterised action `[..., A]` and its log-density `[..., 1]`."""
        noise = torch.randn_like(self.loc)
        before_tanh = self.loc + self.log_std.exp() * noise
        return torch.tanh(before_tanh), self._log_prob(before_tanh, noise)

    def log_prob(self, action: Tensor) -> Tensor:
        """Log-density `[..., 1]` of an action `[..., A]`, strictly inside (-1, 1)."""
        return self.log_prob_of_draw(torch.atanh(action))

    def _log_prob(self, before_tanh: Tensor, noise: Tensor) -> Tensor:
        normal = -0.5 * noise.square() - self.log_std - 0.5 * LOG_2PI
        # log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2u)), which does not underflow for a large |u|
        squash = 2 * (math.log(2) - before_tanh - softplus(-2 * before_tanh))
        return (normal - squash).sum(-1, keepdim=True)  # [..., A] -> [..., 1]
