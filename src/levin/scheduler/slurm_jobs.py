"""Wait for the SLURM jobs of a sweep, and say how each of them has ended.

`squeue` tells the states of the jobs: `sacct` knows nothing on a cluster without accounting. It forgets a job some
minutes after its end (MinJobAge, 5 minutes by default). The run folder tells whether the run is complete.
"""

import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from levin.core.process import print_line
from levin.runs import folder as run_folder
from levin.scheduler.progress import read_progress

# States of jobs that SLURM will not start again. All others, such as CONFIGURING and REQUEUE_HOLD, are waited for.
ENDED = (
    *("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "DEADLINE", "OUT_OF_MEMORY", "PREEMPTED", "NODE_FAIL"),
    *("BOOT_FAIL", "REVOKED"),
)
FORGOTTEN = "FORGOTTEN"  # a job that squeue does not know any more
SECONDS = (1.0, 30.0)  # between two calls of squeue, at first and at most
LAG = 20.0  # seconds after which files written by a job on another machine are seen here
EXIT_CODE = re.compile(r"srun: .*(Exited with exit code|Terminating|Force Terminated|Job step aborted)")


@dataclass(frozen=True)
class Job:
    """SLURM job of one run.

    Args:
        id: `<job>`, or `<array>_<task>` in a job array.
        run: Run folder.
        total_env_steps: Env steps of the complete run.
        logs: Folder of its logs, `*.err`, one for each rank.
    """

    id: str
    run: Path
    total_env_steps: int
    logs: Path


def wait_for_jobs(jobs: Sequence[Job]) -> list[str]:
    """Wait until all jobs have ended, however often they are requeued; print one sentence about each.

    Returns:
        The sentences about the jobs that failed.
    """
    failures: list[str] = []
    waiting, seen_ended = list(jobs), dict[str, float]()
    begin = time.monotonic()
    while waiting:
        time.sleep(min(SECONDS[1], max(SECONDS[0], (time.monotonic() - begin) / 20)))
        if (states := read_states([job.id for job in waiting])) is None:
            continue
        for job in list(waiting):
            state = states.get(job.id, FORGOTTEN)
            if state not in (*ENDED, FORGOTTEN):
                seen_ended.pop(job.id, None)
                continue
            complete = run_folder.has_ended(job.run, job.total_env_steps)
            fresh = time.monotonic() - seen_ended.setdefault(job.id, time.monotonic()) < LAG
            if state in ("COMPLETED", FORGOTTEN) and not complete and fresh:
                continue
            waiting.remove(job)
            if complete or state == "COMPLETED":
                print_line(_describe(job, complete=complete))
            else:
                failures.append(_explain(job, state))
                print(f"levin: {failures[-1]}", file=sys.stderr, flush=True)
    return failures


def read_states(jobs: Sequence[str]) -> Mapping[str, str] | None:
    """Return the state of each job that squeue knows; None if SLURM does not answer at the moment."""
    arrays = ",".join(sorted({job.partition("_")[0] for job in jobs}))
    command = ["squeue", "--noheader", "--array", "--states=all", "--format=%i %T", f"--jobs={arrays}"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode and "Invalid job id" not in answer.stderr:
        return None
    pairs = (line.split() for line in answer.stdout.splitlines())
    return {pair[0]: pair[1] for pair in pairs if len(pair) == 2}


def _describe(job: Job, *, complete: bool) -> str:
    """Return a sentence about a job that has ended without an error."""
    progress = read_progress(job.run)
    score = "" if progress.evaluation is None else f", eval/return_mean {progress.evaluation}"
    if complete:
        return f"{job.run} is complete: {progress.env_steps} env steps{score}"
    return f"{job.run} was stopped before its end, and is saved; to continue: make resume RUN={job.run}"


def _explain(job: Job, state: str) -> str:
    """Return a sentence about a job that has failed."""
    if state == "FAILED":
        return f"{job.run} failed: {last_line(job.logs)} (see {job.logs})"
    if state == FORGOTTEN:
        return f"{job.run} is not complete, and SLURM does not know its job {job.id} any more (see {job.logs})"
    return f"{job.run} failed: SLURM ended its job {job.id}: {state} (see {job.logs})"


def last_line(logs: Path) -> str:
    """Return the last line that a failed job has written: of several ranks, that of the first which failed."""
    files = sorted(logs.glob("*.err"), key=lambda file: file.stat().st_mtime)
    texts = [file.read_text(errors="replace").strip().splitlines() for file in files]
    lines = [[line for line in text if not EXIT_CODE.match(line)] for text in texts]
    last = [each[-1] for each in lines if each]
    said = [line.removeprefix("levin: ") for line in last if line.startswith("levin: ")]
    return (said or last or ["no output"])[0]
