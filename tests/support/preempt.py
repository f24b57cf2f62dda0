"""Callback that sends a signal to its own run."""

import os
import signal

from lightning import Callback


class Preempt(Callback):
    """Sends a signal to its own process after 96 env steps, except in a resumed run."""

    def __init__(self, name: str = "SIGUSR1") -> None:
        self.signal = signal.Signals[name]

    def on_train_start(self, trainer, algorithm):
        self.fresh = algorithm.env_steps == 0

    def on_train_batch_end(self, trainer, algorithm, *_):
        if self.fresh and algorithm.env_steps >= 96:
            os.kill(os.getpid(), self.signal)
            self.fresh = False

    def teardown(self, trainer, algorithm, stage):
        # Lightning's handler would requeue the job as well.
        assert "lightning" not in str(signal.getsignal(signal.SIGUSR1))
