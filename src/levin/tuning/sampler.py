"""Optuna's TPE sampler, with random numbers that a continued search draws again."""

import zlib
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial

RANDOM_TRIALS = 10  # trials with random values at the beginning


class TrialSampler(BaseSampler):
    """Tree-structured Parzen estimator (TPE; Bergstra et al. 2011), multivariate, after random trials.

    The random numbers of a trial depend only on the seed of the search and the number of the trial. So if a search is
    killed and continued, its next trials are those of an uninterrupted search, given the same finished trials.

    Args:
        seed: Seed of the search.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def _sampler(self, trial: FrozenTrial, name: str = "") -> TPESampler:
        entropy = [self.seed, trial.number, zlib.crc32(name.encode())]
        seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
        return TPESampler(seed=seed, n_startup_trials=RANDOM_TRIALS, multivariate=True)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._sampler(trial).infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._sampler(trial).sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._sampler(trial, param_name).sample_independent(study, trial, param_name, param_distribution)
