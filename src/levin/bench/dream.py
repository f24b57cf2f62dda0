"""Steps of dreams (imagined episodes of World Models), batched over a population of controllers or one env at a time.

The batched version is the one that evolves the controllers.
"""

from time import perf_counter

import numpy as np
import torch

from levin.algorithms.world_models import WorldModels
from levin.bench.peers import fake_env_spec, print_table
from levin.core.spaces import EMPTY
from levin.model_based.dream_env import DreamEnv, policy_space

POPULATION, ROLLOUTS, LENGTH = 32, 4, 200
PEER = "one env at a time"
SPEC = fake_env_spec(
    {**EMPTY, "shape": [1, 16, 16], "dtype": "uint8"}, {**EMPTY, "type": "discrete", "dtype": "int64", "n": 3}
)


def dream_one_by_one(algorithm: WorldModels, weights: torch.Tensor, steps: int) -> float:
    """Return dream steps per second of the same envs stepped one at a time; controllers have weights `[P, n]`."""
    model, actions = algorithm.model, policy_space(SPEC["action"])
    envs = [
        DreamEnv(model, model.starts, actions, num_envs=1, temperature=1.0, time_limit=LENGTH)
        for _ in range(POPULATION * ROLLOUTS)
    ]
    features = [torch.from_numpy(env.reset(seed=[i])[0]) for i, env in enumerate(envs)]
    start = perf_counter()
    with torch.inference_mode():
        for _ in range(steps):
            for i, env in enumerate(envs):
                chosen = algorithm.controllers(weights[i // ROLLOUTS].unsqueeze(0), features[i].unsqueeze(0))
                features[i] = env.advance(chosen.flatten(0, 1))[0]
    return steps * len(envs) / (perf_counter() - start)


def dream(*, rounds: int, threads: int) -> None:
    """Print the steps per second of a population in one batch of dreams, and of the same dreams one env at a time.

    The model has an LSTM of 128 units and latents z of 24 numbers; there are 32 candidates with 4 dreams each.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    small = {"latent_size": 24, "memory_size": 128, "memory_batch_length": 50, "dream_length": LENGTH}
    algorithm = WorldModels(env=SPEC, **small, temperature=1.0, buffer_size=1000, buffer_storage="memory")  # type: ignore[arg-type]
    torch.nn.init.constant_(algorithm.model.memory.end_head.bias, -100.0)  # every dream runs to its time limit
    weights = torch.from_numpy(0.1 * np.random.default_rng(0).standard_normal((POPULATION, algorithm.controllers.size)))
    weights = weights.float()
    rates: dict[str, list[float]] = {"a population at once": [], PEER: []}
    algorithm.evaluate_in_dreams(weights, list(range(ROLLOUTS)))
    for _ in range(rounds):
        start = perf_counter()
        _, length = algorithm.evaluate_in_dreams(weights, list(range(ROLLOUTS)))
        rates["a population at once"].append(float(length.sum()) / (perf_counter() - start))
        rates[PEER].append(dream_one_by_one(algorithm, weights, steps=5))
    print(f"\nLSTM 128, z 24, {POPULATION} candidates x {ROLLOUTS} dreams of {LENGTH} steps", end="")
    print_table(rates, PEER, "dream steps/s")
