"""Discrete variational autoencoder of small digits, to compare gradient estimators in training.

The data come with scikit-learn. The latent z has eight categorical variables of eight values; q(z|x) and p(x|z) are
two-layer networks, p(z) is uniform:

    -ELBO = E_{q(z|x)}[-log p(x|z)] + KL(q(z|x) || p(z))

The second term is computed exactly; the gradient of the first in the parameters of q needs an estimator.
"""

import math
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from levin.core.errors import ConfigError
from levin.estimators.base import Estimator
from levin.estimators.latent import DiscreteLatent

CHOICES, VALUES, PIXELS, HIDDEN = 8, 8, 64, 128
TRAIN = 1500  # training digits; the other 297 are for testing


@cache
def load_digits() -> tuple[Tensor, Tensor]:
    """Return training and test digits, `[1500, 64]` and `[297, 64]`: 8 x 8 pixels, 0 or 1.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ConfigError(
            "the digits are a data set of scikit-learn, which is not installed: type make .venv/.report"
        ) from None
    data = torch.from_numpy(np.asarray(load_digits(return_X_y=True)[0]) / 16 > 0.5).float()
    data = data[torch.randperm(len(data), generator=torch.Generator().manual_seed(0))]
    return data[:TRAIN], data[TRAIN:]


class Autoencoder(nn.Module):
    """Encoder q(z|x) and decoder p(x|z)."""

    def __init__(self) -> None:
        super().__init__()
        latent = CHOICES * VALUES
        self.encoder = nn.Sequential(nn.Linear(PIXELS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, latent))
        self.decoder = nn.Sequential(nn.Linear(latent, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, PIXELS))

    def posterior(self, x: Tensor) -> DiscreteLatent:
        """Return q(z|x) for images `[B, 64]`: batch shape `[B]`, event shape `[8, 8]`."""
        return DiscreteLatent(self.encoder(x).unflatten(-1, (CHOICES, VALUES)))

    def reconstruction(self, z: Tensor, x: Tensor) -> Tensor:
        """Return -log p(x|z) for latents `[..., B, 8, 8]` and images `[B, 64]`: `[..., B]`."""
        logits = self.decoder(z.flatten(-2))
        return binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").sum(-1)

    def divergence(self, posterior: DiscreteLatent) -> Tensor:
        """Return KL(q || uniform), `[B]`."""
        return CHOICES * math.log(VALUES) - posterior.entropy()

    def loss(self, x: Tensor, estimator: Estimator) -> Tensor:
        """Return -ELBO averaged over the batch; its gradient in the encoder is that of the estimator."""
        posterior = self.posterior(x)
        draws = estimator.sample(posterior)
        cost = estimator.surrogate(draws, self.reconstruction(draws.value, x))
        return (cost + self.divergence(posterior)).mean()


def train_autoencoder(
    estimator: Estimator, seed: int, updates: int = 2500, batch_size: int = 100, lr: float = 1e-3
) -> Autoencoder:
    """Return an autoencoder trained with Adam, the gradient in the encoder estimated by `estimator`."""
    torch.manual_seed(seed)
    model, (data, _) = Autoencoder(), load_digits()
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    for _ in range(updates):
        loss = model.loss(data[torch.randint(len(data), (batch_size,))], estimator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@torch.no_grad()
def evaluate_autoencoder(model: Autoencoder, draws: int = 20) -> float:
    """Return the mean -ELBO of the test digits in nats, with `draws` samples of z for each."""
    _, test = load_digits()
    posterior = model.posterior(test)
    cost = model.reconstruction(posterior.sample((draws,)), test).mean(0)
    return float((cost + model.divergence(posterior)).mean())
