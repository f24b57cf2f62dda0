"""Evolution of C in World Models: CMA-ES over its weights, and the returns of candidates in dreams.

CMA-ES (Hansen 2016, arXiv:1604.00772) comes from the package `cma`; its step size is adapted by CSA, as published.
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

    The state of CMA-ES is not saved. It is rebuilt by replaying the generations so far: it samples from a random stream
    of its own, and the fitness of every generation of the round is saved.

    Args:
        population: Candidates per generation, P.
        initial_std: Initial std of CMA-ES.

    Attributes:
        round_info: `seed` and initial mean `mean` `[n]` of the round; once it is over, also `env_steps` at its end.
        fitness: Mean returns `[P]` of each generation of the round.
    """

    def __init__(self, population: int, initial_std: float) -> None:
        self.population, self.initial_std = population, initial_std
        self.round_info: dict[str, Any] = {}
        self.fitness: list[Tensor] = []
        self.strategy: cma.CMAEvolutionStrategy | None = None

    def begin(self, seed: int, mean: Tensor) -> None:
        """Begin a round with the initial mean `[n]`."""
        self.round_info, self.fitness = {"seed": seed, "mean": mean}, []
        self.restore()

    def restore(self) -> None:
        """Rebuild the round's CMA-ES by replaying its generations so far."""
        stream = np.random.default_rng(self.round_info["seed"])
        options: dict[str, Any] = {"popsize": self.population, "verbose": -9, "seed": np.nan}
        options["AdaptSigma"] = CMAAdaptSigmaCSA
        options["randn"] = lambda *shape: stream.standard_normal(shape)
        self.strategy = cma.CMAEvolutionStrategy(self.round_info["mean"].double().numpy(), self.initial_std, options)
        for fitness in self.fitness:
            self.strategy.tell(self.strategy.ask(), (-fitness).tolist())

    def ask(self) -> list[np.ndarray]:
        """Return the candidates of this generation, `[n]` each."""
        assert self.strategy is not None
        return self.strategy.ask()

    def tell(self, candidates: list[np.ndarray], fitness: Tensor) -> Tensor:
        """Report the mean returns `[P]` of the candidates; return the mean `[n]` of the new search distribution."""
        assert self.strategy is not None
        self.strategy.tell(candidates, (-fitness).tolist())
        self.fitness.append(fitness)
        return torch.from_numpy(self.strategy.result.xfavorite)

    def state_dict(self) -> dict[str, Any]:
        return {"begun": self.round_info, "fitness": self.fitness}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.round_info, self.fitness = state_dict["begun"], state_dict["fitness"]


def dream_returns(
    model: WorldModel,
    controllers: Controllers,
    weights: Tensor,
    seeds: list[int],
    actions: gym.Space,
    *,
    temperature: float,
    time_limit: int,
) -> tuple[Tensor, Tensor]:
    """Play every candidate in dreams of the same seeds; return the returns and lengths of the dreams, both `[P, R]`.

    Args:
        model: World model that the dreams are generated from.
        controllers: C, which turns weights and features into actions.
        weights: Weights of the candidates, `[P, n]`.
        seeds: Seeds of the R dreams of each candidate.
        actions: Action space of the policy.
        temperature: Sampling temperature of the dreams.
        time_limit: Steps after which a dream is truncated.
    """
    shape, num = (len(weights), len(seeds)), len(weights) * len(seeds)
    env = DreamEnv(model, model.starts, actions, num_envs=num, temperature=temperature, time_limit=time_limit)
    env.reset(seed=seeds * len(weights))
    feature, continues = env.latent.feature, np.ones(num, dtype=bool)
    total, length = np.zeros(num), np.zeros(num)
    with torch.inference_mode():
        while continues.any():
            action = controllers(weights, feature.unflatten(0, shape))
            feature, reward, terminated, truncated = env.advance(action.flatten(0, 1))
            total += reward * continues
            length += continues
            continues &= ~(terminated | truncated)
    return torch.from_numpy(total).unflatten(0, shape), torch.from_numpy(length).unflatten(0, shape)
