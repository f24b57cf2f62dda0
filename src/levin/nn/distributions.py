"""Action distributions in plain tensor operations; `torch.distributions` costs about twice as much per update."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad, softplus

from levin.estimators.latent import DiscreteLatent

LOG_2PI = math.log(2 * math.pi)
NEVER = -1e9  # logit of padding: its probability is 0


class Categorical:
    """Categorical distribution over A actions, `p = softmax(logits)`: `logits` `[..., A]`, an action `[...]` int64."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        self._log_probs: Tensor | None = None

    def __getitem__(self, index: Tensor) -> "Categorical":
        return Categorical(self.logits[index])

    def detach(self) -> "Categorical":
        """Return the same distribution without gradients."""
        return Categorical(self.logits.detach())

    @property
    def log_probs(self) -> Tensor:
        """Log-probability of every action, `[..., A]`."""
        # No cached_property: before Python 3.12 it takes a lock, which torch.compile can't compile.
        if self._log_probs is None:
            self._log_probs = self.logits.log_softmax(-1)
        return self._log_probs

    @property
    def mode(self) -> Tensor:
        """Most probable action `[...]`, used in evaluation."""
        return self.logits.argmax(-1)

    def sample(self) -> Tensor:
        """Sample an action `[...]` with the Gumbel-max trick: `-log` of an exponential variable is Gumbel."""
        return (self.logits - torch.empty_like(self.logits).exponential_().log_()).argmax(-1)

    def log_prob(self, action: Tensor) -> Tensor:
        """Return log pi(a|s), `[..., 1]`."""
        return self.log_probs.gather(-1, action.unsqueeze(-1))  # [...] -> [..., 1]

    def entropy(self) -> Tensor:
        """Return the entropy in nats, `[..., 1]`."""
        return -(self.log_probs.exp() * self.log_probs).sum(-1, keepdim=True)  # [..., A] -> [..., 1]

    def kl(self, other: "Categorical") -> Tensor:
        """Return KL(self || other) in nats, `[..., 1]`."""
        return (self.log_probs.exp() * (self.log_probs - other.log_probs)).sum(-1, keepdim=True)  # -> [..., 1]


class MultiCategorical:
    """K independent categorical choices; an action is `[..., K]` int64.

    `logits` is `[..., sum(sizes)]`: those of the first choice, then those of the second, and so on.
    """

    def __init__(self, logits: Tensor, sizes: Sequence[int]) -> None:
        self.logits, self.sizes = logits, list(sizes)
        self.parts = [Categorical(each) for each in logits.split(self.sizes, -1)]  # the distribution of each choice

    def __getitem__(self, index: Tensor) -> "MultiCategorical":
        return MultiCategorical(self.logits[index], self.sizes)

    def detach(self) -> "MultiCategorical":
        """Return the same distribution without gradients."""
        return MultiCategorical(self.logits.detach(), self.sizes)

    @property
    def mode(self) -> Tensor:
        """Most probable action `[..., K]`, used in evaluation."""
        return torch.stack([part.mode for part in self.parts], -1)

    def sample(self) -> Tensor:
        """Sample an action `[..., K]`."""
        return torch.stack([part.sample() for part in self.parts], -1)

    def log_prob(self, action: Tensor) -> Tensor:
        """Return log pi(a|s), `[..., 1]`."""
        return sum_terms(part.log_prob(choice) for part, choice in zip(self.parts, action.unbind(-1), strict=True))

    def entropy(self) -> Tensor:
        """Return the entropy in nats, `[..., 1]`."""
        return sum_terms(part.entropy() for part in self.parts)

    def kl(self, other: "MultiCategorical") -> Tensor:
        """Return KL(self || other) in nats, `[..., 1]`."""
        return sum_terms(part.kl(other_part) for part, other_part in zip(self.parts, other.parts, strict=True))


class OneHot:
    """Encoding of actions of D discrete choices as joined one-hot vectors, A = sum(sizes), and their distribution.

    Args:
        sizes: Number of values of each choice. K is the largest of them.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes, self.widest = list(sizes), max(sizes)

    @property
    def max_entropy(self) -> float:
        """Entropy of uniform choices, in nats."""
        return sum(math.log(size) for size in self.sizes)

    def allowed_entropy(self, mask: Tensor) -> Tensor:
        """Return the entropy of uniform choices among the allowed values, in nats: masks `[B, A] -> [B, 1]`."""
        return sum_terms(part.sum(-1, keepdim=True).log() for part in mask.float().split(self.sizes, -1))

    @property
    def combinations(self) -> int:
        """Number M of different actions."""
        return math.prod(self.sizes)

    def all_actions(self, device: torch.device) -> Tensor:
        """Return all actions, one-hot `[M, D, K]`."""
        number, places = torch.arange(self.combinations, device=device), []
        for size in reversed(self.sizes):
            places.insert(0, number % size)
            number = number // size
        chosen = torch.stack(places, -1).unsqueeze(-1)  # [M, D, 1]
        return (chosen == torch.arange(self.widest, device=device)).float()

    def encode(self, action: Tensor) -> Tensor:
        """Encode actions: `[B]` or `[B, D]` int64 -> `[B, A]`."""
        parts = zip(action.view(len(action), -1, 1).unbind(1), self.sizes, strict=True)  # D x [B, 1]
        return torch.cat([part == torch.arange(size, device=part.device) for part, size in parts], -1).float()

    def distribution(self, logits: Tensor) -> DiscreteLatent:
        """Return the distribution over one-hot choices `[B, D, K]` with the logits `[B, A]`.

        Choices of fewer than K values are padded with values of probability 0.
        """
        parts = logits.split(self.sizes, -1)
        padded = [pad(part, (0, self.widest - part.shape[-1]), value=NEVER) for part in parts]
        return DiscreteLatent(torch.stack(padded, -2))

    def join(self, choices: Tensor) -> Tensor:
        """Join one-hot choices, without their padding: `[..., D, K] -> [..., A]`."""
        parts = [choices[..., index, :size] for index, size in enumerate(self.sizes)]
        return torch.cat(parts, -1)


def sum_terms(terms: Iterable[Tensor]) -> Tensor:
    """Return the sum of tensors of the same shape."""
    return torch.stack(list(terms)).sum(0)


class Normal:
    """Gaussian with independent components. `loc` and an action are `[..., A]`, `log_std` is `[A]` or `[..., A]`."""

    def __init__(self, loc: Tensor, log_std: Tensor) -> None:
        self.loc, self.log_std = loc, log_std

    def __getitem__(self, index: Tensor) -> "Normal":
        return Normal(self.loc[index], self.log_std.expand_as(self.loc)[index])

    def detach(self) -> "Normal":
        """Return the same distribution without gradients."""
        return Normal(self.loc.detach(), self.log_std.detach())

    @property
    def mode(self) -> Tensor:
        """Mean `[..., A]`, used in evaluation."""
        return self.loc

    def sample(self) -> Tensor:
        """Sample a reparameterised action `[..., A]`."""
        return torch.addcmul(self.loc, self.log_std.exp(), torch.randn_like(self.loc))

    def log_prob(self, action: Tensor) -> Tensor:
        """Return the log-density log pi(a|s), `[..., 1]`."""
        standard = (action - self.loc) * (-self.log_std).exp()
        # Both terms are summed over A first, so that the second is added to one number per action instead of A.
        return -0.5 * standard.square().sum(-1, keepdim=True) - (self.log_std + 0.5 * LOG_2PI).sum(-1, keepdim=True)

    def entropy(self) -> Tensor:
        """Return the entropy in nats, `[..., 1]`."""
        entropy = (self.log_std + 0.5 * (1 + LOG_2PI)).sum(-1, keepdim=True)  # [A] or [..., A] -> [1] or [..., 1]
        return entropy.expand(*self.loc.shape[:-1], 1)

    def kl(self, other: "Normal") -> Tensor:
        """Return KL(self || other) in nats, `[..., 1]`."""
        var, other_var = (2 * self.log_std).exp(), (2 * other.log_std).exp()
        terms = other.log_std - self.log_std + (var + (self.loc - other.loc).square()) / (2 * other_var) - 0.5
        return terms.sum(-1, keepdim=True)  # [..., A] -> [..., 1]


class SquashedNormal:
    """Gaussian squashed into (-1, 1): `a = tanh(u)`, `u ~ Normal(loc, exp(log_std))`.

    Source: Haarnoja et al. 2018 b, appendix C. `loc` and `log_std` are `[..., A]`.
    """

    def __init__(self, loc: Tensor, log_std: Tensor) -> None:
        self.loc, self.log_std = loc, log_std

    @property
    def mode(self) -> Tensor:
        """Action `tanh(loc)` `[..., A]`, used in evaluation."""
        return torch.tanh(self.loc)

    def sample(self) -> Tensor:
        """Sample a reparameterised action `[..., A]`."""
        return torch.tanh(self.loc + self.log_std.exp() * torch.randn_like(self.loc))

    def draw(self) -> tuple[Tensor, Tensor]:
        """Sample u and the action tanh(u), reparameterised, both `[..., A]`."""
        before_tanh = torch.addcmul(self.loc, self.log_std.exp(), torch.randn_like(self.loc))
        return before_tanh, before_tanh.tanh()

    def log_prob_of_draw(self, before_tanh: Tensor) -> Tensor:
        """Return the log-density `[..., 1]` of the action tanh(u), given u: finite even if tanh(u) is rounded to 1."""
        return self._log_prob(before_tanh, (before_tanh - self.loc) * (-self.log_std).exp())

    def sample_with_log_prob(self) -> tuple[Tensor, Tensor]:
        """Sample a reparameterised action `[..., A]`; return it and its log-density `[..., 1]`."""
        noise = torch.randn_like(self.loc)
        before_tanh = self.loc + self.log_std.exp() * noise
        return torch.tanh(before_tanh), self._log_prob(before_tanh, noise)

    def log_prob(self, action: Tensor) -> Tensor:
        """Return the log-density `[..., 1]` of an action `[..., A]` strictly inside (-1, 1)."""
        return self.log_prob_of_draw(torch.atanh(action))

    def _log_prob(self, before_tanh: Tensor, noise: Tensor) -> Tensor:
        normal = -0.5 * noise.square() - self.log_std - 0.5 * LOG_2PI
        # log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2u)), which does not underflow for a large |u|
        squash = 2 * (math.log(2) - before_tanh - softplus(-2 * before_tanh))
        return (normal - squash).sum(-1, keepdim=True)  # [..., A] -> [..., 1]
