"""Seed, save and restore all random generators of a process."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
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
        **({"mps": torch.mps.get_rng_state()} if torch.backends.mps.is_available() else {}),
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore the generators to a state that `rng_state` returned; of the GPUs as many as there are now."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    for device, gpu_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(gpu_state, device)
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])


def torch_states() -> list[torch.Tensor]:
    """Return the states of PyTorch's generators: that of the CPU, then those of the GPUs in use.

    Unlike `Generators` it is fast enough for every step of an env.
    """
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])]


def set_torch_states(states: list[torch.Tensor]) -> None:
    """Restore the states that `torch_states` returned."""
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state_all(states[1:])


class Generators:
    """State of the global generators of Python, NumPy and PyTorch at the time when this object is made.

    It is made and compared faster than `rng_state`, which is for checkpoints.
    """

    def __init__(self) -> None:
        self.python = random.getstate()
        self.numpy: tuple = np.random.get_state()  # type: ignore[assignment]
        self.pytorch = torch_states()

    def restore(self) -> None:
        """Set the generators to this state."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        set_torch_states(self.pytorch)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Generators)
            and self.python == other.python
            and self.numpy[2:] == other.numpy[2:]
            and np.array_equal(self.numpy[1], other.numpy[1])
            and all(torch.equal(one, two) for one, two in zip(self.pytorch, other.pytorch, strict=False))
        )

    __hash__ = None  # type: ignore[assignment]


@contextmanager
def preserved_state() -> Iterator[None]:
    """Restore the global generators when the context ends."""
    before = Generators()
    try:
        yield
    finally:
        before.restore()
