"""What ends a run before its time: a signal, or a number that is not finite."""

import os
import signal
import threading
from contextlib import suppress
from types import FrameType
from typing import Any, cast

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.plugins.environments import SLURMEnvironment

from levin.algorithms.base import Algorithm
from levin.core import distributed
from levin.core.errors import RunError
from levin.core.process import SIGNALS


class Preemption(Callback):
    """Ends the run at the end of the iteration when a signal asks for it. The second Ctrl-C ends it at once."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.preempted = False
        self._before: dict[signal.Signals, Any] = {}

    def setup(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment):
            environment.auto_requeue = False  # from a checkpoint that Lightning writes wherever it is called

    def on_train_start(self, *_: Any) -> None:
        # Lightning has set handlers of its own by now, which would leave without saving.
        if threading.current_thread() is threading.main_thread():
            self._before = {each: signal.signal(each, self._receive) for each in SIGNALS}

    def _receive(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        self.received = signal.Signals(number)
        self.preempted |= number == signal.SIGUSR1
        if distributed.rank():
            return
        again = ", Ctrl-C again ends it at once" if number == signal.SIGINT else ""
        # Not `print`, which can't be entered twice.
        said = f"levin: {self.received.name}, the run is saved and ends with this iteration{again}\n"
        with suppress(OSError):  # nobody may listen any more: the same Ctrl-C ends a `| tee`
            os.write(2, said.encode())

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if self.received is not None:
            trainer.should_stop = True

    def teardown(self, *_: Any, **__: Any) -> None:  # after the last evaluation, which is made in `on_train_end`
        self._restore()

    def on_exception(self, *_: Any) -> None:
        self._restore()

    def _restore(self) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)


def forward_sigusr1(trainer: Trainer) -> None:
    """Let SIGUSR1, if it ended the run, reach whoever waited for it before: submitit or `slurm` requeues the job."""
    (preemption,) = (each for each in trainer.callbacks if isinstance(each, Preemption))  # type: ignore[attr-defined]
    if preemption.preempted and callable(signal.getsignal(signal.SIGUSR1)):
        signal.raise_signal(signal.SIGUSR1)


class FiniteGuard(Callback):
    """Refuses to go on, and so to save, once a loss, a metric or a gradient is not finite.

    One look per iteration: a gradient that is not finite makes its parameters so, and then every later loss. Rollouts
    are looked at where they are collected.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        self.stepped = [each for group in groups for each in group["params"]]  # few, where they are one vector

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        algorithm = cast(Algorithm, pl_module)
        gradients = [each.grad for each in self.stepped if each.grad is not None]
        values = {f"train/{name}": total for name, (total, _) in algorithm.recorded.items()}
        if not gradients and not values:
            return
        # A sum is finite only if every term is, and far cheaper than looking at each.
        sums = [each.sum() for each in (*values.values(), *gradients)]
        if not torch.stack([each.to(sums[0]) for each in sums]).isfinite().all():
            bad = [name for name, value in values.items() if not value.isfinite()]
            named = [(name, each.grad) for name, each in algorithm.named_parameters() if each.grad is not None]
            of = dict.fromkeys(name.split(".")[0] for name, gradient in named if not gradient.isfinite().all())
            bad += [f"the gradient of {module}" for module in of]
            when = f"after {algorithm.env_steps} env steps and {algorithm.updates} updates"
            raise RunError(f"not finite {when}: {', '.join(bad)}")
