"""Callbacks that stop a run early: on a signal, or on NaN or inf."""

import os
import signal
import threading
from contextlib import suppress
from types import FrameType
from typing import Any, cast

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.callbacks import Timer
from torch import nn

from levin.algorithms.base import Algorithm
from levin.collectors.loader import CollectorLoader
from levin.core import distributed
from levin.core.errors import ConfigError, NotFiniteError, RunError
from levin.core.process import SIGNALS, close_terminal, handle_signals, restore_signals
from levin.nn.parameters import FlatParameter
from levin.training.hooks import check_schedulers


class Preemption(Callback):
    """Saves and stops the run on a signal. A second Ctrl-C ends it at once.

    An evaluation and a slow rollout are abandoned, and a resumed run repeats them. Everything else goes on to the end
    of the iteration. Until all losses are compiled, signals wait for that end: the compiler, a child process, gets them
    too and would die of them, unless it is started while they are blocked.

    Args:
        alone: Whether this process trains alone. Rollouts of several ranks or workers are not abandoned, because the
            others might wait for this one.
    """

    def __init__(self, *, alone: bool) -> None:
        self.alone = alone
        self.received: signal.Signals | None = None
        self.anywhere = False  # whether some rank has received a signal
        self.preempted = False
        self._mask: set[int] | None = None  # of blocked signals, before an iteration that compiles
        self._original_handlers: dict[int, Any] = {}  # before those of the Trainer

    def setup(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment):
            environment.auto_requeue = False  # it may save mid-iteration; `runs.slurm` or submitit requeues
        if threading.current_thread() is threading.main_thread():
            self._original_handlers = {number: signal.getsignal(number) for number in SIGNALS}

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        self._loader = cast(CollectorLoader, trainer.train_dataloader)
        # Lightning has set its own handlers by now, which would end the run without saving.
        if threading.current_thread() is threading.main_thread():
            handle_signals(self._receive)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        self.received = signal.Signals(number)
        if number == signal.SIGHUP:
            close_terminal()
        self.preempted |= number == signal.SIGUSR1
        if self.alone:
            self._loader.interrupt()
        if distributed.rank():
            return
        again = "; press Ctrl-C again to end it at once without saving" if number == signal.SIGINT else ""
        line_break = "\n" if os.isatty(2) else ""  # ends the line of the progress bar
        message = f"{line_break}levin: {self.received.name}: the run will be saved and end{again}\n"
        # Not `print`, which is not reentrant: the signal may have interrupted another print.
        with suppress(OSError):  # stderr may be closed: the same Ctrl-C ends a `| tee`
            os.write(2, message.encode())

    def on_train_batch_start(self, _: Trainer, pl_module: LightningModule, *__: Any) -> None:
        algorithm = cast(Algorithm, pl_module)
        if algorithm.uncompiled:
            self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self._unblock()
        if self.received is not None:
            trainer.should_stop = True

    def on_train_end(self, *_: Any) -> None:
        self.anywhere = distributed.any_rank(self.received is not None)

    def _unblock(self) -> None:
        """Restore the mask of signals from before the iteration; pending ones are handled now."""
        if self._mask is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
            self._mask = None

    def restore(self) -> None:
        """Restore the handlers of the time before training. The caller of `Trainer.fit` does this when it has ended."""
        self._unblock()
        restore_signals(self._original_handlers)


def preemption_of(trainer: Trainer) -> Preemption:
    """Return the Preemption callback of a Trainer."""
    (preemption,) = (each for each in trainer.callbacks if isinstance(each, Preemption))  # type: ignore[attr-defined]
    return preemption


def is_interrupted(trainer: Trainer) -> bool:
    """Return whether a signal or `trainer.max_time` has stopped the run, so that it is to be continued."""
    timers = [each for each in trainer.callbacks if isinstance(each, Timer)]  # type: ignore[attr-defined]
    expired = any((left := timer.time_remaining()) is not None and left <= 0 for timer in timers)
    preemption = preemption_of(trainer)
    return preemption.received is not None or preemption.anywhere or expired


def forward_sigusr1(trainer: Trainer) -> None:
    """Raise SIGUSR1 again if it stopped the run, so that the previous handler (submitit, `slurm`) requeues the job."""
    preemption = preemption_of(trainer)
    if preemption.preempted and callable(signal.getsignal(signal.SIGUSR1)):
        signal.raise_signal(signal.SIGUSR1)


class FiniteGuard(Callback):
    """Stops the run with an error, before it saves, once a loss, a metric or a gradient is not finite.

    One check per iteration is enough: a non-finite gradient makes its parameters non-finite, and then every later loss.
    Rollouts are checked by their loader, which is asked first, as it can name the env.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_schedulers(trainer, cast(Algorithm, pl_module))
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        self.stepped = [parameter for group in groups for parameter in group["params"]]
        _check_flat_parameters(self.stepped)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        algorithm = cast(Algorithm, pl_module)
        if any(isinstance(each, FlatParameter) and each.grad is None for each in self.stepped):
            raise RunError(
                "optimizer.zero_grad() has removed the gradient vector of an optimiser that steps on one vector of all "
                "parameters, so nothing is trained: use self.step(optimizer, loss), or zero it with "
                "optimizer.zero_grad(set_to_none=False)"
            )
        gradients = [each.grad for each in self.stepped if each.grad is not None]
        values = {f"train/{name}": total for name, (total, _) in algorithm.recorded.items()}
        if not gradients and not values:
            return
        # One sum per tensor: a non-finite element makes its sum non-finite, and the sum is cheaper to check.
        sums = [each.sum() for each in (*values.values(), *gradients)]
        if not torch.stack([each.to(sums[0]) for each in sums]).isfinite().all():
            cast(CollectorLoader, trainer.train_dataloader).check_finite()
            bad = [name for name, value in values.items() if not value.isfinite()]
            named = [(name, each.grad) for name, each in algorithm.named_parameters() if each.grad is not None]
            modules = dict.fromkeys(name.split(".")[0] for name, gradient in named if not gradient.isfinite().all())
            bad += [f"the gradient of {module}" for module in modules]
            when = f"after {algorithm.env_steps} env steps and {algorithm.updates} updates"
            raise NotFiniteError(f"not finite {when}: {', '.join(bad)}")


def _check_flat_parameters(stepped: list[nn.Parameter]) -> None:
    """Raise a ConfigError if a vector of parameters shares some with another optimiser.

    Then these parameters are no views of the vector, or their gradients are none of its gradient after the other
    optimiser's step, and one of the two trains nothing.
    """
    places = [each.untyped_storage().data_ptr() for each in stepped]
    for parameter, place in zip(stepped, places, strict=True):
        if isinstance(parameter, FlatParameter) and (not parameter.is_whole or places.count(place) > 1):
            raise ConfigError(
                "two optimisers have the same parameters, so that one of them would train nothing: self.parameters() "
                "in configure_optimizers are all parameters, those of added networks, too"
            )
