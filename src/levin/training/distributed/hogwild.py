"""How a run is spread over processes, where Lightning has no strategy for it."""

import multiprocessing
import multiprocessing.process
import os
import signal
import traceback
from collections.abc import Callable
from time import sleep
from typing import Any, cast

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.strategies.launchers.launcher import _Launcher
from tensordict import TensorDictBase

from levin.algorithms.base import Algorithm
from levin.collectors.loader import CollectorLoader
from levin.core.errors import RunError
from levin.core.process import ignore_signals
from levin.training.guards import FiniteGuard


class Hogwild(SingleDeviceStrategy):
    """Processes on one machine's CPU train one set of parameters in shared memory, without a lock.

    Source: Niu et al. 2011 (arXiv:1106.5730); asynchronous agents: Mnih et al. 2016 (arXiv:1602.01783).

    This process is worker 0: it evaluates, logs and saves. The others are forked from it when training begins, each
    with envs and random streams of its own. What an algorithm does not want to share it copies in `on_train_start`.

    Args:
        workers: Processes, this one included.
        rollouts: Makes the rollouts of another worker, in its process: rank, env steps of the run so far -> loader.
    """

    strategy_name = "hogwild"

    def __init__(self, workers: int, rollouts: Callable[[int, int], CollectorLoader]) -> None:
        super().__init__(device="cpu")
        self.workers, self.rollouts = workers, rollouts
        self.env_steps = torch.zeros(workers, dtype=torch.int64).share_memory_()  # each writes its own: no lock
        self.stopping = torch.zeros(1, dtype=torch.bool).share_memory_()
        self.restored = torch.zeros(1, dtype=torch.bool).share_memory_()
        self.processes: list[multiprocessing.process.BaseProcess] = []
        self.errors = multiprocessing.get_context("fork").SimpleQueue()

    @property
    def is_global_zero(self) -> bool:
        return self.global_rank == 0

    def _configure_launcher(self) -> None:
        self._launcher = HogwildLauncher(self)

    def check(self) -> None:
        """Raise the error of a worker that has died."""
        for rank, process in enumerate(self.processes, start=1):
            if process.exitcode:
                said = self.errors.get() if not self.errors.empty() else f"ended with exit code {process.exitcode}"
                raise RunError(f"worker {rank} of {self.workers} {said}")

    def join(self) -> None:
        """Let the other workers finish their iterations and end."""
        self.stopping.fill_(True)
        while any(process.is_alive() for process in self.processes):
            self.check()
            sleep(0.005)
        self.check()


class HogwildLauncher(_Launcher):
    """Forks the other workers around what the Trainer runs, and leaves none behind."""

    def __init__(self, strategy: Hogwild) -> None:
        self.strategy = strategy

    @property
    def is_interactive_compatible(self) -> bool:
        return True

    def launch(self, function: Callable, *args: Any, trainer: Trainer, **kwargs: Any) -> Any:
        """`function` is the Trainer's own `fit`, its first arguments the module and worker 0's rollouts."""
        strategy, algorithm = self.strategy, cast(Algorithm, args[0])
        algorithm.share_memory()
        context = multiprocessing.get_context("fork")
        try:
            for rank in range(1, strategy.workers):
                process = context.Process(target=self._work, args=(rank, function, algorithm, trainer))
                process.start()
                strategy.processes.append(process)
            return function(*args, **kwargs)
        finally:
            self.kill(signal.SIGKILL)

    def kill(self, signum: signal.Signals) -> None:
        """End the other workers at once."""
        for process in self.strategy.processes:
            process.kill()
            process.join()

    def _work(self, rank: int, function: Callable, algorithm: Algorithm, trainer: Trainer) -> None:
        ignore_signals()
        try:
            self.strategy.global_rank = rank
            trainer.callbacks = [Workers(self.strategy), FiniteGuard()]  # type: ignore[attr-defined]
            trainer.loggers = []
            while not self.strategy.restored:  # worker 0 reads the checkpoint into the memory that all share
                exit_if_orphaned()
                sleep(0.005)
            if not self.strategy.stopping:
                rollouts = self.strategy.rollouts(rank, int(self.strategy.env_steps[0]))
                function(algorithm, rollouts)
                rollouts.collector.shutdown()
        except BaseException as error:
            said = str(error) if isinstance(error, RunError) else f"raised {traceback.format_exc()}"
            self.strategy.errors.put(said)
            os._exit(1)
        os._exit(0)  # nothing of worker 0, whose copy this is, is to be closed


def exit_if_orphaned() -> None:
    """End this worker if worker 0 is gone."""
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:
        os._exit(1)


class Workers(Callback):
    """Keeps the clock of all workers, and ends each when another has."""

    def __init__(self, strategy: Hogwild) -> None:
        self.strategy = strategy

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self.strategy.env_steps[0] = cast(Algorithm, pl_module).env_steps
            self.strategy.stopping.fill_(trainer.should_stop)  # a run that has nothing left to do but to evaluate
            self.strategy.restored.fill_(True)
        else:
            ignore_signals()  # again: the Trainer has handlers of its own

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: TensorDictBase, batch_idx: int
    ) -> None:
        # The algorithm adds the steps of this batch itself.
        cast(Algorithm, pl_module).env_steps = int(self.strategy.env_steps.sum())
        self.strategy.env_steps[self.strategy.global_rank] += batch.numel()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if not trainer.is_global_zero:
            exit_if_orphaned()
            trainer.should_stop = bool(self.strategy.stopping)
        elif trainer.should_stop:  # before the last evaluation and the last checkpoint
            self.strategy.join()
            cast(Algorithm, pl_module).env_steps = int(self.strategy.env_steps.sum())
            cast(Algorithm, pl_module).pull()
        else:
            self.strategy.check()
