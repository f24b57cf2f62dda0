"""Every random generator of a run: seeded, saved, restored."""

import random
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int, rank: int, env_steps: int = 0) -> None:
    """Seed python, numpy and torch. The third stream beside training and evaluation episodes."""
    key = (2, rank, env_steps) if env_steps else (2, rank)
    python, numpy, pytorch = np.random.SeedSequence(seed, spawn_key=key).generate_state(3).tolist()
    random.seed(python)
    np.random.seed(numpy)
    torch.manual_seed(pytorch)


def rng_state() -> dict[str, Any]:
    """The state of python's, numpy's and torch's generators, in tensors and plain values."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, torch.tensor(words, dtype=torch.int64), gauss],  # a list of 625 words is slow to save
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), int(position), int(has_gauss), cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Undo everything that has been drawn since `rng_state`."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
