"""The evolution of C in World Models: CMA-ES over its weights, and the returns of candidates in dreams.

CMA-ES (Hansen 2016, arXiv:1604.00772) is that of the package `cma`; step sizes adapt by CSA, as published.
"""

from typing import Any

import cma
import gymnasium as gym
import numpy as np
import torch
from cma.sigma_adaptation import CMAAdaptSigmaCSA
from torch import Tensor

from levin.algorithms.world_models_networks import Controllers, WorldModel
from levin.model_based.dream_env import DreamEnv


class Evolution:
    """CMA-ES over the weights of C, one round at a time.

    CMA-ES itself is not saved but made again: it draws from a stream of its own, and the fitness of every generation
    of the round is known.

    Args:
        population: P, candidates of a generation.
        initial_std: Of the first generation.

    Attributes:
        begun: What the round began with: `seed` and `mean` `[n]`; once it is over, also `env_steps` at its end.
        fitness: Mean returns `[P]` of each generation of the round.
    """

    def __init__(self, population: int, initial_std: float) -> None:
        self.population, self.initial_std = population, initial_std
        self.begun: dict[str, Any] = {}
        self.fitness: list[Tensor] = []
        self.strategy: cma.CMAEvolutionStrategy | None = None

    def begin(self, seed: int, mean: Tensor) -> None:
        """Begin a round with the weights `[n]`."""
        self.begun, self.fitness = {"seed": seed, "mean": mean}, []
        self.restore()

    def restore(self) -> None:
        """Make the round's CMA-ES again, after the generations that have been."""
        stream = np.random.default_rng(self.begun["seed"])
        options: dict[str, Any] = {"popsize": self.population, "verbose": -9, "seed": np.nan}
        options["AdaptSigma"] = CMAAdaptSigmaCSA
        options["randn"] = lambda *shape: stream.standard_normal(shape)
        self.strategy = cma.CMAEvolutionStrategy(self.begun["mean"].double().numpy(), self.initial_std, options)
        for fitness in self.fitness:
            self.strategy.tell(self.strategy.ask(), (-fitness).tolist())

    def ask(self) -> list[np.ndarray]:
        """Return the candidates of this generation, `[n]` each."""
        assert self.strategy is not None
        return self.strategy.ask()

    def tell(self, candidates: list[np.ndarray], fitness: Tensor) -> Tensor:
        """Report the mean returns `[P]` of the candidates. Returns the mean `[n]` of their new distribution."""
        assert self.strategy is not None
        self.strategy.tell(candidates, (-fitness).tolist())
        self.fitness.append(fitness)
        return torch.from_numpy(self.strategy.result.xfavorite)

    def state_dict(self) -> dict[str, Any]:
        return {"begun": self.begun, "fitness": self.fitness}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.begun, self.fitness = state_dict["begun"], state_dict["fitness"]


def dream_returns(
    model: WorldModel, controllers: Controllers, weights: Tensor, seeds: list[int], actions: gym.Space, **dream: Any
) -> tuple[Tensor, Tensor]:
    """Play every candidate in the same dreams.

    Args:
        weights: Of the candidates, `[P, n]`.
        seeds: Of the R dreams of each.
        actions: The policy's action space.
        dream: `temperature` and `time_limit` of `DreamEnv`.

    Returns:
        Returns and lengths of the dreams: both `[P, R]`.
    """
    shape, num = (len(weights), len(seeds)), len(weights) * len(seeds)
    env = DreamEnv(model, model.starts, actions, num_envs=num, **dream)
    env.reset(seed=seeds * len(weights))
    feature, continues = env.latent.feature, np.ones(num, dtype=bool)
    total, length = np.zeros(num), np.zeros(num)
    with torch.inference_mode():
        while continues.any():
            action = controllers(weights, feature.unflatten(0, shape))
            feature, reward, ends, cuts = env.advance(action.flatten(0, 1))
            total += reward * continues
            length += continues
            continues &= ~(ends | cuts)
    return torch.from_numpy(total).unflatten(0, shape), torch.from_numpy(length).unflatten(0, shape)
