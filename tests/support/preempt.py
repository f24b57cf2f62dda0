"""Callback that sends a signal to its own run."""

import os
import signal
import subprocess
import time

from lightning import Callback


class Preempt(Callback):
    """Sends a signal to its own process after 96 env steps, except in a resumed run."""

    def __init__(self, name: str = "SIGUSR1") -> None:
        self.name = name

    def on_train_start(self, trainer, algorithm):
        self.fresh = algorithm.env_steps == 0

    def on_train_batch_end(self, trainer, algorithm, *_):
        if self.fresh and algorithm.env_steps >= 96:
            os.kill(os.getpid(), signal.Signals[self.name])
            self.fresh = False

    def teardown(self, trainer, algorithm, stage):
        # Lightning's handler would requeue the job as well.
        assert "lightning" not in str(signal.getsignal(signal.SIGUSR1))


class SignalJob(Preempt):
    """Sends a signal to every process of its SLURM job, as SLURM does, or raises an `error`, or does `nothing`."""

    def on_train_batch_end(self, trainer, algorithm, *_):
        if self.fresh and algorithm.env_steps >= 160 and self.name != "nothing":
            self.fresh = False
            if self.name == "error":
                raise RuntimeError("an error after 160 env steps")
            if trainer.global_rank == 0:
                subprocess.run(["scancel", f"--signal={self.name}", os.environ["SLURM_JOB_ID"]], check=False)
                time.sleep(3)  # until it has arrived, also at scancel itself, which belongs to the job
