"""Small DreamerV3 agents and batches for their tests."""

from typing import Any

import torch
from tensordict import TensorDict

from checks import build_algorithm
from levin.algorithms.dreamer_v3 import DreamerV3
from levin.data.sequences import LATENT
from levin.model_based.recurrent import State
from world_model_data import random_records

SMALL = (
    *("algo=dreamer_v3", "env=pendulum", "env.num_envs=1", "algo.size=micro", "algo.learning_starts=40"),
    *("algo.batch_size=4", "algo.batch_length=6", "algo.horizon=4", "algo.warm_up=0", "algo.lr=1e-3"),
)


def make_dreamer_v3(*overrides: str) -> DreamerV3:
    """Build a small DreamerV3 with its optimizers, without a Trainer."""
    return build_algorithm(*SMALL, *overrides)


def random_batch(algorithm: DreamerV3, **options: Any) -> TensorDict:
    """Return random records with random latents, as sampled from replay: `[3, 1 + 6]`."""
    size = algorithm.env["observation"]["shape"][0]
    data = random_records(observation=size, action=algorithm.model.actions, **options)
    generator = torch.Generator().manual_seed(1)
    deter = torch.randn(3, 7, algorithm.model.deter, generator=generator).tanh()
    classes = torch.rand(3, 7, *algorithm.model.choices, generator=generator).argmax(-1)
    latent = torch.cat([deter.bfloat16(), classes.bfloat16()], -1)
    row = torch.arange(7).expand(3, 7)
    data |= {LATENT: latent, "row": row, "env": torch.zeros_like(row)}
    return TensorDict(data, batch_size=(3, 7))


def count_parameters(module) -> int:
    """Return the number of parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


# --- the world model


def fix_noise(seed: int) -> None:
    """Seed the generator that latent states are sampled with."""
    torch.manual_seed(seed)


def observe(algorithm: DreamerV3, data: TensorDict) -> State:
    """Return the latent states of a batch, sampled with a fixed seed and without gradients."""
    fix_noise(0)
    with torch.no_grad():
        return algorithm.observe(data)[0]
