"""Let a benchmark control a training run: the run waits for a line on stdin, trains one segment, reports its time."""

import sys
from time import perf_counter
from typing import Any, cast

from lightning import Callback, LightningModule, Trainer

from levin.algorithms.base import Algorithm

REPORT = "segment "


class Pace(Callback):
    """Wait for a line on stdin before every segment, and print the env steps and seconds of the last one.

    The run stops when stdin is closed.

    Args:
        start: Number of env steps of warm-up.
        segment: Number of env steps per segment.
    """

    def __init__(self, start: int, segment: int) -> None:
        self.next, self.segment = start, segment
        self.before: tuple[float, int] | None = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        env_steps = cast(Algorithm, pl_module).env_steps
        if env_steps < self.next:
            return
        if self.before is not None:
            seconds, start = self.before
            print(f"{REPORT}{env_steps - start} {perf_counter() - seconds}", flush=True)
        self.next = env_steps + self.segment
        trainer.should_stop = trainer.should_stop or not sys.stdin.readline()
        self.before = (perf_counter(), env_steps)
