"""A run as a SLURM job: what SIGUSR1 ends is saved, goes back into the queue, and is then found and continued.

    #SBATCH --requeue --signal=USR1@120
    srun python -m levin.train algo=sac env=pendulum

The jobs of a sweep (`launcher=slurm`) are submitit's: it sets a handler of its own, which requeues them. A cluster that
preempts jobs before their time sends SIGUSR1 if its PreemptParameters has send_user_signal.
"""

import os
import signal
import subprocess
import sys
from functools import partial
from types import FrameType


def job_id() -> str | None:
    """The id of this SLURM job, of an array `<array>_<task>`; None outside of SLURM."""
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")


def was_requeued() -> bool:
    """Whether this job was requeued: its run may have begun."""
    return job_id() is not None and int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0


def requeue_on_signal() -> None:
    """Let SIGUSR1 requeue this SLURM job. While a run trains, `Preemption` takes the signal, to save first."""
    if job_id() is not None:
        signal.signal(signal.SIGUSR1, partial(_requeue, os.getpid()))


def _requeue(process: int, number: int, _: FrameType | None) -> None:
    """Put the job back into the queue and leave; only in the first process of rank 0, not in one forked from it."""
    if os.getpid() != process or any(os.environ.get(rank, "0") != "0" for rank in ("SLURM_PROCID", "LOCAL_RANK")):
        return
    signal.signal(number, signal.SIG_IGN)
    command = ["scontrol", "requeue", str(job_id())]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        failed = " ".join(answer.stderr.split()) or f"exit code {answer.returncode}" if answer.returncode else None
    except OSError as error:
        failed = error.strerror
    said = f"{' '.join(command)} failed: {failed}" if failed else f"job {job_id()} is requeued"
    print(f"levin: {said}", file=sys.stderr, flush=True)
    raise SystemExit(0)
