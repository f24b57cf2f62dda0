"""Discrete latent variable for world models and autoencoders: a torch distribution with a differentiable `rsample`."""

from torch import Size, Tensor
from torch.distributions import Independent, OneHotCategorical

from levin.estimators.pathwise import Relaxation, StraightThrough, sample_one_hot


class DiscreteLatent(Independent):
    """D independent categorical variables of K values each, one-hot, `[*B, D, K]`, with a differentiable `rsample`.

    PyTorch's own OneHotCategorical has `has_rsample=False`. Code that checks this flag, such as TorchRL's modules,
    would sample from it without a gradient.

    Args:
        logits: Logits `[*B, D, K]`.
        estimator: Relaxation that gives the gradient of `rsample`; None: straight-through.
        unimix: Weight of a uniform distribution mixed into the probabilities. Hafner et al. 2023: 0.01.

    Raises:
        ValueError: `unimix` is not in [0, 1), or the estimator is not a relaxation with one sample.
    """

    has_rsample = True  # type: ignore[assignment]

    def __init__(self, logits: Tensor, estimator: Relaxation | None = None, unimix: float = 0.0) -> None:
        if not 0 <= unimix < 1:
            raise ValueError(f"unimix must be in [0, 1), got {unimix}")
        if unimix:
            logits = ((1 - unimix) * logits.softmax(-1) + unimix / logits.shape[-1]).log()
        self.estimator = estimator or StraightThrough()
        if not isinstance(self.estimator, Relaxation) or self.estimator.num != 1:
            raise ValueError(f"the estimator of a latent must be a relaxation with num=1, got {self.estimator}")
        super().__init__(OneHotCategorical(logits=logits, validate_args=False), 1, validate_args=False)

    def expand(self, batch_shape: Size | tuple[int, ...], _instance: None = None) -> "DiscreteLatent":
        """Return this distribution expanded to another batch shape `[*B]`."""
        return DiscreteLatent(self.logits.expand(*batch_shape, *self.logits.shape[-2:]), self.estimator)

    @property
    def logits(self) -> Tensor:
        """Normalised logits, which are log-probabilities, `[*B, D, K]`."""
        return self.base_dist.logits

    def rsample(self, sample_shape: Size | tuple[int, ...] = ()) -> Tensor:
        """Return differentiable samples, `[*sample_shape, *B, D, K]`."""
        return self.estimator.relaxed_sample(self.logits.expand(*sample_shape, *self.logits.shape))

    def sample(self, sample_shape: Size | tuple[int, ...] = ()) -> Tensor:
        """Return samples without a gradient, `[*sample_shape, *B, D, K]`."""
        return sample_one_hot(self.logits.expand(*sample_shape, *self.logits.shape))
