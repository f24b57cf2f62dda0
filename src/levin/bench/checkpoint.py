"""Measure a checkpoint: its pause compared with a plain write of the same bytes, and its share of the wall time."""

import os
import statistics
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import torch
from lightning import Callback, LightningModule, Trainer
from tensordict import TensorDict

from levin.algorithms.base import Algorithm
from levin.training.checkpointing import Checkpointing

EVERY = 10_000  # env steps between two checkpoints, as in train.yaml


class Probe(Callback):
    """Measure the speed of a run over one segment, then fill its buffer, save it repeatedly, and stop the run.

    Args:
        start: Number of env steps of warm-up.
        segment: Number of env steps over which the speed is measured.
        rounds: Number of checkpoints, each with `EVERY` new transitions.
    """

    def __init__(self, start: int, segment: int, rounds: int) -> None:
        self.start, self.end, self.rounds = start, start + segment, rounds
        self.begin: tuple[float, int] | None = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        algorithm = cast(Algorithm, pl_module)
        if self.begin is None and algorithm.env_steps >= self.start:
            self.begin = (perf_counter(), algorithm.env_steps)
        if self.begin is None or algorithm.env_steps < self.end:
            return
        seconds, steps = perf_counter() - self.begin[0], algorithm.env_steps - self.begin[1]
        print(f"{steps / seconds:,.0f} env steps/s without checkpoints")
        (checkpointing,) = trainer.checkpoint_callbacks
        self.measure(trainer, algorithm, cast(Checkpointing, checkpointing), every_seconds=EVERY * seconds / steps)
        trainer.should_stop = True

    def measure(
        self, trainer: Trainer, algorithm: Algorithm, checkpointing: Checkpointing, every_seconds: float
    ) -> None:
        """Print the pause for the full buffer, and for `EVERY` new transitions."""
        assert algorithm.buffer is not None
        for _ in range(algorithm.buffer.size // EVERY):
            algorithm.buffer.extend(_rollout(algorithm))
        pause, size, plain = _save(trainer, algorithm, checkpointing)
        print(f"all {len(algorithm.buffer):,} transitions: {pause:.2f} s for {size / 1e6:.0f} MB, ", end="")
        print(f"{pause / plain:.2f} x a plain write of these bytes")
        pauses, ratios = [], []
        for _ in range(self.rounds):
            algorithm.buffer.extend(_rollout(algorithm))
            pause, size, plain = _save(trainer, algorithm, checkpointing)
            pauses.append(pause)
            ratios.append(pause / plain)
        pause, ratio = statistics.median(pauses), statistics.median(ratios)
        print(f"{EVERY:,} new transitions: {pause * 1e3:.0f} ms for {size / 1e6:.1f} MB, ", end="")
        print(f"{ratio:.2f} x a plain write ({min(ratios):.2f} to {max(ratios):.2f})")
        print(f"a checkpoint every {EVERY:,} env steps costs {pause / every_seconds:.3%} of the wall time")


def _rollout(algorithm: Algorithm) -> TensorDict:
    """Return random transitions `[1, EVERY]`."""
    shape, actions = algorithm.env["observation"]["shape"], algorithm.env["action"]["shape"]
    after = {"observation": torch.randn(1, EVERY, *shape), "reward": torch.randn(1, EVERY, 1)}
    flags = torch.zeros(1, EVERY, 1, dtype=torch.bool)
    content = {"observation": torch.randn(1, EVERY, *shape), "action": torch.randn(1, EVERY, *actions)}
    return TensorDict({**content, "next": {**after, "terminated": flags}}, batch_size=(1, EVERY))


def _save(trainer: Trainer, algorithm: Algorithm, checkpointing: Checkpointing) -> tuple[float, int, float]:
    """Return seconds of a checkpoint, its new bytes, and seconds of a plain write of as many bytes."""
    algorithm.env_steps += EVERY
    start = perf_counter()
    checkpointing.save(trainer, algorithm)
    pause = perf_counter() - start
    folder = checkpointing.folder / str(algorithm.env_steps)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and file.stat().st_nlink == 1)
    data = os.urandom(size)
    return pause, size, _plain_write(checkpointing.folder / ".plain", data)


def _plain_write(path: Path, data: bytes) -> float:
    """Return the seconds of writing the bytes to one file, with fsync."""
    start = perf_counter()
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    seconds = perf_counter() - start
    path.unlink()
    return seconds
