"""A discrete variational autoencoder on small digits: the estimators' common task, on data that a package ships.

Eight choices of eight values, q(z|x) and p(x|z) by networks of two layers, p(z) uniform:

    -ELBO = E_{q(z|x)}[-log p(x|z)] + KL(q(z|x) || p(z))

The second term is a sum; the gradient of the first in q is what an estimator is for.
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
TRAIN = 1500  # of 1,797


@cache
def load_digits() -> tuple[Tensor, Tensor]:
    """8 x 8 pixels, 0 or 1: `[1500, 64]` to train on, `[297, 64]` to test on. Raises ConfigError without the data."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ConfigError("the digits come with scikit-learn: pip install -e '.[report]'") from None
    data = torch.from_numpy(np.asarray(load_digits(return_X_y=True)[0]) / 16 > 0.5).float()
    data = data[torch.randperm(len(data), generator=torch.Generator().manual_seed(0))]
    return data[:TRAIN], data[TRAIN:]


class Autoencoder(nn.Module):
    """q(z|x) and p(x|z)."""

    def __init__(self) -> None:
        super().__init__()
        latent = CHOICES * VALUES
        self.encoder = nn.Sequential(nn.Linear(PIXELS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, latent))
        self.decoder = nn.Sequential(nn.Linear(latent, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, PIXELS))

    def posterior(self, x: Tensor) -> DiscreteLatent:
        """q(z|x): `[B, 64] -> [B]` of `[8, 8]`."""
        return DiscreteLatent(self.encoder(x).unflatten(-1, (CHOICES, VALUES)))

    def reconstruction(self, z: Tensor, x: Tensor) -> Tensor:
        """-log p(x|z): `[..., B, 8, 8] -> [..., B]`."""
        logits = self.decoder(z.flatten(-2))
        return binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").sum(-1)

    def divergence(self, posterior: DiscreteLatent) -> Tensor:
        """KL(q || uniform): `[B]`."""
        return CHOICES * math.log(VALUES) - posterior.entropy()

    def loss(self, x: Tensor, estimator: Estimator) -> Tensor:
        """-ELBO, averaged over the batch: its gradient in q(z|x) is the estimator's."""
        posterior = self.posterior(x)
        draws = estimator.sample(posterior)
        cost = estimator.surrogate(draws, self.reconstruction(draws.value, x))
        return (cost + self.divergence(posterior)).mean()


def train_autoencoder(
    estimator: Estimator, seed: int, updates: int = 2500, batch_size: int = 100, lr: float = 1e-3
) -> Autoencoder:
    """Trained with Adam."""
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
    """-ELBO of the test digits in nats, with so many draws for each."""
    _, test = load_digits()
    posterior = model.posterior(test)
    cost = model.reconstruction(posterior.sample((draws,)), test).mean(0)
    return float((cost + model.divergence(posterior)).mean())
