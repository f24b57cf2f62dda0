"""Seed, save and restore all random generators of a process."""

import random
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int, rank: int, env_steps: int = 0) -> None:
    """Seed Python, NumPy and PyTorch, with a random stream apart from those of training and evaluation episodes.

    Args:
        seed: Seed of the run.
        rank: Number of the process; each has a stream of its own.
        env_steps: Env steps at which the run resumes, for a stream that was not used before; else 0.
    """
    key = (2, rank, env_steps) if env_steps else (2, rank)
    python, numpy, pytorch = np.random.SeedSequence(seed, spawn_key=key).generate_state(3).tolist()
    random.seed(python)
    np.random.seed(numpy)
    torch.manual_seed(pytorch)


def rng_state() -> dict[str, Any]:
    """Return the state of the generators of Python, NumPy and PyTorch, in tensors and plain values."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        # A tensor, because a list of 625 numbers is slow to save.
        "python": [version, torch.tensor(words, dtype=torch.int64), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), int(position), int(has_gauss), cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore the generators to a state that `rng_state` returned; those of GPUs only if there are as many as then."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
