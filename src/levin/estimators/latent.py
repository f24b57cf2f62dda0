"""A discrete latent variable for world models and autoencoders: a torch distribution whose `rsample` has a gradient."""

from torch import Size, Tensor
from torch.distributions import Independent, OneHotCategorical

from levin.estimators.pathwise import Relaxation, StraightThrough, sample_one_hot


class DiscreteLatent(Independent):
    """D choices of K values each, one-hot: `[*B, D, K]`. `rsample` has the gradient of an estimator.

    PyTorch's own OneHotCategorical says that it has no `rsample`, and what asks first, as TorchRL's modules do, takes a
    draw without a gradient.

    Args:
        logits: `[*B, D, K]`.
        estimator: Whose relaxation carries the gradient; without one, straight-through.
        unimix: Share of a uniform distribution that is mixed in. Hafner et al. 2023: 0.01.

    Raises:
        ValueError: `unimix` is not in [0, 1), or the estimator is no relaxation.
    """

    has_rsample = True  # type: ignore[assignment]

    def __init__(self, logits: Tensor, estimator: Relaxation | None = None, unimix: float = 0.0) -> None:
        if not 0 <= unimix < 1:
            raise ValueError(f"unimix is in [0, 1), got {unimix}")
        if unimix:
            logits = ((1 - unimix) * logits.softmax(-1) + unimix / logits.shape[-1]).log()
        self.estimator = estimator or StraightThrough()
        if not isinstance(self.estimator, Relaxation) or self.estimator.num != 1:
            raise ValueError(f"a latent has a relaxation of one draw, rsample says how many, not {self.estimator}")
        super().__init__(OneHotCategorical(logits=logits, validate_args=False), 1, validate_args=False)

    def expand(self, batch_shape: Size | tuple[int, ...], _instance: None = None) -> "DiscreteLatent":
        """The same with another batch shape `[*B]`."""
        return DiscreteLatent(self.logits.expand(*batch_shape, *self.logits.shape[-2:]), self.estimator)

    @property
    def logits(self) -> Tensor:
        """Log-probabilities `[*B, D, K]`."""
        return self.base_dist.logits

    def rsample(self, sample_shape: Size | tuple[int, ...] = ()) -> Tensor:
        """`[*sample_shape, *B, D, K]`."""
        return self.estimator.relaxed_sample(self.logits.expand(*sample_shape, *self.logits.shape))

    def sample(self, sample_shape: Size | tuple[int, ...] = ()) -> Tensor:
        """Draws, without a gradient."""
        return sample_one_hot(self.logits.expand(*sample_shape, *self.logits.shape))
