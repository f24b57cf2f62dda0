"""Data parallelism: every process learns from envs of its own, and all apply the mean of their gradients.

Lightning's DistributedDataParallel wraps a module whose every forward is followed by one backward of all parameters. An
iteration here is many updates by several optimisers, so `Algorithm.step` averages the gradients itself, in one message.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
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
from levin.core.errors import RunError

GRACE = 20.0  # seconds in which rank 0 notices by itself that another has ended


class DataParallel(DDPStrategy):
    """Ranks that are equal but for the envs, the random streams and the replay buffer of each.

    Args:
        config: Of the whole run, for the ranks that are started here.
        run: The run folder.
        ckpt_path: The checkpoint that the run goes on from.
    """

    strategy_name = "ddp"

    def __init__(self, config: DictConfig, run: Path, ckpt_path: Path | None) -> None:
        # A rank that is gone is noticed otherwise, and an evaluation may take long.
        super().__init__(timeout=timedelta(days=1))
        self.config, self.run, self.ckpt_path = config, run, ckpt_path

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        if not self.cluster_environment.creates_processes_externally:
            self._launcher = RanksLauncher(self)

    def configure_ddp(self) -> None:
        """Nothing is wrapped. Parameters are drawn by every rank from the same seed; of other hardware, not quite."""
        assert self.model is not None
        for each in self.model.parameters():
            torch.distributed.broadcast(each.data, 0)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Every rank has something of its own to save."""
        self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options)


class RanksLauncher(_Launcher):
    """Starts the other ranks of this machine around what the Trainer runs, and leaves none behind."""

    def __init__(self, strategy: DataParallel) -> None:
        self.strategy = strategy
        self.processes: list[subprocess.Popen] = []

    @property
    def is_interactive_compatible(self) -> bool:
        return True

    def launch(self, function: Callable, *args: Any, trainer: Trainer, **kwargs: Any) -> Any:
        """`function` is the Trainer's own `fit`."""
        self.reports = Path(tempfile.mkdtemp(prefix="levin-ranks-"))
        over, before = Event(), dict(os.environ)
        try:
            for rank in range(1, self.strategy.num_processes):
                self.processes.append(self._start(rank))
            Thread(target=self._watch, args=(over,), daemon=True).start()
            result = function(*args, **kwargs)
            for process in self.processes:
                process.wait(GRACE)
            return result
        except distributed.RankLostError as error:
            raise self._failure() or error from error
        finally:
            over.set()
            self.kill()
            # The next run of this process, a sweep's, is another group at another address.
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
            for name in os.environ.keys() - before.keys():
                del os.environ[name]
            shutil.rmtree(self.reports, ignore_errors=True)

    def _start(self, rank: int) -> subprocess.Popen:
        """As torchrun would, with what it is to do on its stdin."""
        environment = self.strategy.cluster_environment
        assert environment is not None
        address = {"MASTER_ADDR": environment.main_address, "MASTER_PORT": str(environment.main_port)}
        paths = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}  # a user's modules are found here too
        process = subprocess.Popen(
            [sys.executable, "-m", "levin.training.distributed.rank"],
            env={**os.environ, **address, **paths, "LOCAL_RANK": str(rank), "NODE_RANK": "0"},
            stdin=subprocess.PIPE,
            text=True,
        )
        strategy = self.strategy
        ckpt_path = str(strategy.ckpt_path) if strategy.ckpt_path else ""
        orders = {"config": OmegaConf.to_yaml(strategy.config), "run": str(strategy.run), "ckpt_path": ckpt_path}
        orders["reports"] = str(self.reports)
        assert process.stdin is not None
        process.stdin.write(json.dumps(orders))
        process.stdin.close()
        return process

    def _failure(self) -> RunError | None:
        """What ended a rank, if one has ended by itself."""
        end = monotonic() + GRACE
        while not any(self.reports.glob("*")) and any(each.poll() is None for each in self.processes):
            if monotonic() > end:
                break
            sleep(0.05)
        for report in sorted(self.reports.glob("*")):
            said, trace = json.loads(report.read_text())
            error = RunError(f"rank {report.name} of {len(self.processes) + 1} {said}")
            error.__cause__ = RuntimeError(trace)
            return error
        for rank, process in enumerate(self.processes, start=1):
            if process.returncode and process.returncode < 0:
                return RunError(f"rank {rank} of {len(self.processes) + 1} ended by signal {-process.returncode}")
        return None

    def _watch(self, over: Event) -> None:
        """End this process where it waits for a rank that is gone: in an evaluation, or in a message on a GPU."""
        while not over.wait(1.0):
            if any(process.poll() for process in self.processes):
                if over.wait(GRACE):
                    return
                print(f"levin: {self._failure() or 'another rank of this run has ended'}", file=sys.stderr, flush=True)
                self.kill()
                os._exit(1)

    def kill(self, signum: Any = None) -> None:
        """End the other ranks at once."""
        for process in self.processes:
            process.kill()
            process.wait()
