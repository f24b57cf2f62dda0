"""Hogwild: lock-free workers on shared CPU parameters."""

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
    """Strategy of workers that train one set of parameters in the shared memory of a CPU, without a lock.

    Source: Niu et al. 2011 (arXiv:1106.5730); asynchronous agents: Mnih et al. 2016 (arXiv:1602.01783).

    This process is worker 0: it evaluates, logs and saves. The other workers are forked from it when training begins,
    each with its own envs and random streams. An algorithm copies in `on_train_start` what it does not want to share.

    Args:
        workers: Number of workers, including this process.
        make_rollouts: Builds the rollout loader of another worker, in its process: (rank, env steps of the run so far)
            -> loader.
    """

    def __init__(self, workers: int, make_rollouts: Callable[[int, int], CollectorLoader]) -> None:
        super().__init__(device="cpu")
        self.workers, self.make_rollouts = workers, make_rollouts
        self.env_steps = torch.zeros(workers, dtype=torch.int64).share_memory_()  # each worker writes its own element
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
                reason = self.errors.get() if not self.errors.empty() else f"ended with exit code {process.exitcode}"
                raise RunError(f"worker {rank} of {self.workers} {reason}")

    def join(self) -> None:
        """Ask the other workers to end after their current iteration, and wait for them."""
        self.stopping.fill_(True)
        while any(process.is_alive() for process in self.processes):
            self.check()
            sleep(0.005)
        self.check()


class HogwildLauncher(_Launcher):
    """Forks the other workers before `Trainer.fit`, and ends them after it."""

    def __init__(self, strategy: Hogwild) -> None:
        self.strategy = strategy

    @property
    def is_interactive_compatible(self) -> bool:
        return True

    def launch(self, function: Callable, *args: Any, trainer: Trainer, **kwargs: Any) -> Any:
        """Fork the other workers, run `function` as worker 0, and return its result.

        `function` is the Trainer's `fit`; its first two arguments are the algorithm and worker 0's rollout loader.
        """
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
        # Worker 0 may have initialised CUDA, which a fork can't use: Lightning and torch.compile must not ask for it.
        torch.cuda.is_available = lambda: False
        try:
            self.strategy.global_rank = rank
            trainer.callbacks = [Workers(self.strategy), FiniteGuard()]  # type: ignore[attr-defined]
            trainer.loggers = []
            while not self.strategy.restored:  # worker 0 is still loading the checkpoint into shared memory
                exit_if_orphaned()
                sleep(0.005)
            if not self.strategy.stopping:
                rollouts = self.strategy.make_rollouts(rank, int(self.strategy.env_steps[0]))
                function(algorithm, rollouts)
                rollouts.collector.shutdown()
        except BaseException as error:
            message = str(error) if isinstance(error, RunError) else f"raised {traceback.format_exc()}"
            self.strategy.errors.put(message)
            os._exit(1)
        os._exit(0)  # skips exit handlers: this process is a copy of worker 0 and must not close its files


def exit_if_orphaned() -> None:
    """End this worker if worker 0 is gone."""
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:
        os._exit(1)


class Workers(Callback):
    """Adds up the env steps of all workers, ends the other workers with worker 0, and raises their errors in it."""

    def __init__(self, strategy: Hogwild) -> None:
        self.strategy = strategy

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self.strategy.env_steps[0] = cast(Algorithm, pl_module).env_steps
            self.strategy.stopping.fill_(trainer.should_stop)  # already complete: only evaluate
            self.strategy.restored.fill_(True)
        else:
            ignore_signals()  # again: the Trainer has set its own handlers

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: TensorDictBase, batch_idx: int
    ) -> None:
        # Without this batch, whose steps the algorithm adds itself.
        cast(Algorithm, pl_module).env_steps = int(self.strategy.env_steps.sum())
        self.strategy.env_steps[self.strategy.global_rank] += batch.numel()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if not trainer.is_global_zero:
            exit_if_orphaned()
            trainer.should_stop = bool(self.strategy.stopping)
            cast(CollectorLoader, trainer.train_dataloader).pop_metrics()  # which nobody logs here, and would pile up
        elif trainer.should_stop:  # all workers must have ended before the last evaluation and the last checkpoint
            self.strategy.join()
            cast(Algorithm, pl_module).env_steps = int(self.strategy.env_steps.sum())
            cast(Algorithm, pl_module).pull()
        else:
            self.strategy.check()
