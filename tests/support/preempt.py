"""A callback that sends a signal to its own run."""

import os
import signal

from lightning import Callback


class Preempt(Callback):
    """Sends a signal to the process of a run that has not been resumed."""

    def __init__(self, name: str = "SIGUSR1") -> None:
        self.signal = signal.Signals[name]

    def on_train_start(self, trainer, algorithm):
        self.fresh = algorithm.env_steps == 0

    def on_train_batch_end(self, trainer, algorithm, *_):
        if self.fresh and algorithm.env_steps >= 96:
            os.kill(os.getpid(), self.signal)
            self.fresh = False

    def teardown(self, trainer, algorithm, stage):
        assert "lightning" not in str(signal.getsignal(signal.SIGUSR1))  # it would requeue the job itself
