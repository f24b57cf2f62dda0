"""Categorical distribution with prescribed samples, to enumerate every outcome of an estimator."""

from torch import Tensor
from torch.distributions import OneHotCategorical
from torch.nn.functional import one_hot


class FixedSamples(OneHotCategorical):
    """One-hot distribution whose `sample` returns the prescribed `indices`, in the order of `[S, *B]`."""

    def __init__(self, logits: Tensor, indices: Tensor) -> None:
        super().__init__(logits=logits, validate_args=False)
        self.indices = indices

    def sample(self, sample_shape=()):
        return one_hot(self.indices.view(*sample_shape, *self.batch_shape), self.event_shape[0]).to(self.logits)
