"""Requeue a SLURM job on SIGUSR1, so that the run is saved and then continued when the job starts again.

    #SBATCH --requeue --signal=USR1@120
    srun python -m levin.train algo=sac env=pendulum

The jobs of a sweep (`launcher=slurm`) are requeued by submitit, which sets a signal handler of its own. A cluster that
preempts jobs sends SIGUSR1 first if its slurm.conf has `PreemptParameters=send_user_signal`, or, in older versions,
`SlurmctldParameters=preempt_send_user_signal`. Otherwise it sends SIGTERM: the run is saved, but not requeued, since
`scancel` sends SIGTERM as well.
"""

import os
import signal
import subprocess
import sys
from functools import partial
from types import FrameType

from levin.core.process import shield_resource_tracker

RANKS = ("SLURM_PROCID", "RANK", "LOCAL_RANK")  # environment variables that hold the rank of a process


def job_id() -> str | None:
    """Return the id of this SLURM job, `<array>_<task>` in a job array; None outside SLURM."""
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")


def was_requeued() -> bool:
    """Return whether this job was requeued, so that its run may have begun already."""
    return job_id() is not None and int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0


def is_later_rank() -> bool:
    """Return whether this process is a rank other than 0 that srun or torchrun has started."""
    return any(os.environ.get(rank, "0") != "0" for rank in RANKS)


def requeue_on_signal() -> None:
    """Set a SIGUSR1 handler that requeues this SLURM job. During training `Preemption` replaces it, to save first."""
    if job_id() is not None:
        shield_resource_tracker()
        signal.signal(signal.SIGUSR1, partial(_requeue, os.getpid()))


def _requeue(process: int, number: int, _: FrameType | None) -> None:
    """Requeue the job and exit. Do nothing on other ranks, or in a process that was forked from `process`."""
    if os.getpid() != process or is_later_rank():
        return
    # SLURM ends a job that it requeues by SIGTERM; this process ends by itself, and removes its semaphores first.
    for each in (number, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    command = ["scontrol", "requeue", str(job_id())]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        failure = " ".join(answer.stderr.split()) or f"exit code {answer.returncode}" if answer.returncode else None
    except OSError as error:
        failure = error.strerror
    message = f"{' '.join(command)} failed: {failure}" if failure else f"job {job_id()} is requeued"
    print(f"levin: {message}", file=sys.stderr, flush=True)
    raise SystemExit(0)
