"""A small DreamerV3 and its records."""

from typing import Any

import torch
from tensordict import TensorDict

from dreams import records
from levin.algorithms.dreamer_v3 import DreamerV3
from levin.config.compose import compose
from levin.data.sequences import LATENT
from levin.model_based.recurrent import State
from levin.training.session import build_run

SMALL = (
    *("algo=dreamer_v3", "env=pendulum", "env.num_envs=1", "algo.size=micro", "algo.learning_starts=40"),
    *("algo.batch_size=4", "algo.batch_length=6", "algo.horizon=4", "algo.warm_up=0", "algo.lr=1e-3"),
)


def make(*words: str) -> DreamerV3:
    algorithm, _ = build_run(compose([*SMALL, *words]))
    algorithm.configure_optimizers()
    algorithm.manual_backward = lambda loss: loss.backward()
    return algorithm


def drawn(algorithm: DreamerV3, **how: Any) -> TensorDict:
    """Random records with states that a policy had: `[3, 1 + 6]`."""
    size = algorithm.env["observation"]["shape"][0]
    data = records(observation=size, action=algorithm.model.actions, **how)
    generator = torch.Generator().manual_seed(1)
    deter = torch.randn(3, 7, algorithm.model.deter, generator=generator).tanh()
    classes = torch.rand(3, 7, *algorithm.model.choices, generator=generator).argmax(-1)
    latent = torch.cat([deter.bfloat16(), classes.bfloat16()], -1)
    row = torch.arange(7).expand(3, 7)
    data |= {LATENT: latent, "row": row, "env": torch.zeros_like(row)}
    return TensorDict(data, batch_size=(3, 7))


def count(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# --- the world model


def with_noise(seed: int) -> None:
    torch.manual_seed(seed)


def observed(algorithm: DreamerV3, data: TensorDict) -> State:
    with_noise(0)
    with torch.no_grad():
        return algorithm.observe(data)[0]
