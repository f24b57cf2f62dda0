"""Data parallelism: each rank collects in its own envs, and all ranks apply the mean of their gradients.

PyTorch's DistributedDataParallel expects one backward pass through all parameters after each forward pass. An iteration
here is many updates by several optimisers, so `Algorithm.step` averages the gradients itself, in one all-reduce.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from threading import Event, Thread
from time import monotonic, sleep
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers.launcher import _Launcher
from omegaconf import DictConfig, OmegaConf

from levin.core import distributed
from levin.core.errors import ConfigError, RunError

GRACE = 20.0  # seconds that rank 0 gets to notice by itself that another rank has ended


class DataParallel(DDPStrategy):
    """Strategy of data-parallel ranks. Each has its own envs, random streams and replay buffer.

    Args:
        config: Config of the whole run, passed to the ranks that this process starts.
        run: Run folder.
        ckpt_path: Checkpoint to continue from; None starts a new run.
    """

    def __init__(self, config: DictConfig, run: Path, ckpt_path: Path | None) -> None:
        # Long, because the other ranks wait during an evaluation. `RanksLauncher` notices ranks that have ended.
        super().__init__(timeout=timedelta(days=1))
        self.config, self.run, self.ckpt_path = config, run, ckpt_path

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        if not self.cluster_environment.creates_processes_externally:
            if self.num_nodes > 1:
                raise ConfigError(
                    f"trainer.num_nodes={self.num_nodes} needs torchrun or srun, which starts the ranks of each machine"
                )
            self._launcher = RanksLauncher(self)

    def configure_ddp(self) -> None:
        """Broadcast the parameters of rank 0; the module is not wrapped in DistributedDataParallel.

        All ranks initialise from the same seed, but on different hardware the numbers may differ slightly.
        """
        assert self.model is not None
        for parameter in self.model.parameters():
            distributed.call_collective(lambda data=parameter.data: torch.distributed.broadcast(data, 0))

    # Lightning calls these three, for example after saving a checkpoint. A rank may be lost there as well.
    def barrier(self, *args: Any, **kwargs: Any) -> None:
        distributed.call_collective(lambda: DDPStrategy.barrier(self, *args, **kwargs))

    def broadcast(self, *args: Any, **kwargs: Any) -> Any:
        return distributed.call_collective(lambda: DDPStrategy.broadcast(self, *args, **kwargs))

    def reduce(self, *args: Any, **kwargs: Any) -> Any:
        return distributed.call_collective(lambda: DDPStrategy.reduce(self, *args, **kwargs))

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Save on every rank, not only on rank 0: each has its own part of the state."""
        self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options)


class RanksLauncher(_Launcher):
    """Starts the other ranks of this machine before `Trainer.fit`, and ends them after it."""

    def __init__(self, strategy: DataParallel) -> None:
        self.strategy = strategy
        self.processes: list[subprocess.Popen] = []

    @property
    def is_interactive_compatible(self) -> bool:
        return True

    def launch(self, function: Callable, *args: Any, trainer: Trainer, **kwargs: Any) -> Any:
        """Start the other ranks, run `function` (the Trainer's `fit`) as rank 0, and return its result.

        Raises:
            RunError: Another rank failed; the message says why.
        """
        self.reports = Path(tempfile.mkdtemp(prefix="levin-ranks-"))
        finished, environ_before = Event(), dict(os.environ)
        try:
            for rank in range(1, self.strategy.num_processes):
                self.processes.append(self._start(rank))
            Thread(target=self._watch, args=(finished,), daemon=True).start()
            result = function(*args, **kwargs)
            for process in self.processes:
                with suppress(subprocess.TimeoutExpired):  # it is killed below
                    process.wait(GRACE)
            return result
        except distributed.RankLostError as error:
            raise self._find_failure() or error from error
        finally:
            finished.set()
            self.kill()
            # A sweep's next run in this process needs a new process group at another address.
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
            for name in os.environ.keys() - environ_before.keys():
                del os.environ[name]
            shutil.rmtree(self.reports, ignore_errors=True)

    def _start(self, rank: int) -> subprocess.Popen:
        """Start a rank with the environment variables that Lightning reads, and write its arguments to its stdin."""
        environment = self.strategy.cluster_environment
        assert environment is not None
        address = {"MASTER_ADDR": environment.main_address, "MASTER_PORT": str(environment.main_port)}
        paths = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}  # so that user modules can be imported
        process = subprocess.Popen(
            [sys.executable, "-m", "levin.training.distributed.rank"],
            env={**os.environ, **address, **paths, "LOCAL_RANK": str(rank), "NODE_RANK": "0"},
            stdin=subprocess.PIPE,
            text=True,
        )
        strategy = self.strategy
        ckpt_path = str(strategy.ckpt_path) if strategy.ckpt_path else ""
        arguments = {"config": OmegaConf.to_yaml(strategy.config), "run": str(strategy.run), "ckpt_path": ckpt_path}
        arguments |= {"reports": str(self.reports), "rank_0": str(os.getpid())}
        assert process.stdin is not None
        process.stdin.write(json.dumps(arguments))
        process.stdin.close()
        return process

    def _find_failure(self) -> RunError | None:
        """Wait up to `GRACE` seconds for the report of a failed rank; return its error, or None without a failure."""
        deadline = monotonic() + GRACE
        while not any(self.reports.glob("*")) and any(process.poll() is None for process in self.processes):
            if monotonic() > deadline:
                break
            sleep(0.05)
        for report in sorted(self.reports.glob("*")):
            message, trace = json.loads(report.read_text(encoding="utf-8"))
            error = RunError(f"rank {report.name} of {len(self.processes) + 1} {message}")
            error.__cause__ = RuntimeError(trace)
            return error
        for rank, process in enumerate(self.processes, start=1):
            if process.returncode and process.returncode < 0:
                return RunError(f"rank {rank} of {len(self.processes) + 1} ended by signal {-process.returncode}")
        return None

    def _watch(self, finished: Event) -> None:
        """End this process if another rank has failed and rank 0 does not notice it within `GRACE` seconds.

        This happens during an evaluation, or in a collective call on a GPU.
        """
        while not finished.wait(1.0):
            if any(process.poll() for process in self.processes):
                if finished.wait(GRACE):
                    return
                print(
                    f"levin: {self._find_failure() or 'another rank of this run has ended'}",
                    file=sys.stderr,
                    flush=True,
                )
                self.kill()
                os._exit(1)

    def kill(self, signum: Any = None) -> None:
        """End the other ranks at once."""
        for process in self.processes:
            process.kill()
            process.wait()
