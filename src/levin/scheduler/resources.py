"""Decide how many runs train at the same time, with how many threads and on which GPUs."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from omegaconf import DictConfig

from levin.core.errors import RunError
from levin.core.process import available_cores, share_cores, sleep_when_idle


@dataclass(frozen=True)
class Resources:
    """Number of runs at the same time, torch threads of each, and the GPUs of each (None: as every process sees them).

    Runs at the same time share no GPU, unless there are more of them than GPUs.
    """

    at_once: int
    threads: int
    gpus: list[str] | None = None

    @classmethod
    def of(cls, configs: Sequence[DictConfig], jobs: int | None) -> Self:
        """Return the resources of runs with these configs; `jobs` is their number at the same time, None: all that fit.

        The GPUs or, for runs on the CPU, the cores are divided among the runs.
        """
        threads = max(config.trainer.threads or len(available_cores()) for config in configs)
        devices = max(config.trainer.devices for config in configs)
        on_cpu = all(each.trainer.accelerator == "cpu" or each.trainer.strategy == "hogwild" for each in configs)
        count = 0 if on_cpu else _count_gpus()
        if not count:
            processes = max(config.trainer.devices * config.trainer.get("workers", 1) for config in configs)
            return cls(jobs or max(1, len(available_cores()) // (threads * processes)), threads)
        at_once = jobs or max(1, count // devices)
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
        shares = [[visible[(place * devices + i) % count] for i in range(devices)] for place in range(at_once)]
        return cls(at_once, threads, [",".join(dict.fromkeys(share)) for share in shares])


def prepare_cores(threads: int | None, jobs: int | None) -> None:
    """Choose how the idle threads of all runs wait; before torch is imported, since OpenMP reads the setting then.

    Args:
        threads: Torch threads of each run; None: one per core.
        jobs: Number of runs at the same time; None: as many as the cores can run.
    """
    count = threads or len(available_cores())
    if (jobs or len(available_cores()) // count) > 1:
        sleep_when_idle()
    else:
        share_cores()


def _count_gpus() -> int:
    """Return the number of GPUs, counted in another process: one that has used a GPU can't be copied.

    Without NVML, and with a slice of a GPU (MIG), torch counts them by using them.
    """
    import torch

    count = 0
    if not (pid := os.fork()):
        try:
            count = min(torch.cuda.device_count(), 255)
        finally:
            os._exit(count)
    count = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if count < 0:
        raise RunError(f"the GPUs can't be counted: torch.cuda.device_count() was ended by signal {-count}")
    return count
