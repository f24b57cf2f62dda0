"""Wait for the SLURM jobs of a sweep, and say how each of them has ended.

`squeue` tells the states of the jobs: `sacct` knows nothing on a cluster without accounting. It forgets a job some
minutes after its end (MinJobAge, 5 minutes by default). The run folder tells whether the run is complete.
"""

import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
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
SECONDS = (1.0, 30.0)  # between two calls of squeue: at first, and after ten minutes
LAG = 20.0  # seconds after which a file that was written on another machine is surely seen here
# Lines that srun adds after those of a process that has failed.
AFTERWARDS = re.compile(r"srun: .*(Exited with exit code|Terminating|Terminated StepId|Job step aborted)")


@dataclass(frozen=True)
class Job:
    """SLURM job of one run.

    Args:
        id: `<job>`, or `<array>_<task>` in a job array.
        run: Run folder.
        total_env_steps: Env steps of the complete run.
        logs: Folder of its logs, which holds a file `*.err` for each rank.
    """

    id: str
    run: Path
    total_env_steps: int
    logs: Path


def wait_for_jobs(jobs: Sequence[Job]) -> list[str]:
    """Wait until all jobs have ended, however often they are requeued, and print one sentence about each.

    Returns:
        The sentences about the jobs that failed.
    """
    failures: list[str] = []
    waiting = dict.fromkeys(jobs, 0.0)  # time at which a job was first seen to have ended; 0: it has not
    begin, last_counts = time.monotonic(), ""
    number = count_runs(len(jobs))
    while waiting:
        time.sleep(min(SECONDS[1], max(SECONDS[0], (time.monotonic() - begin) / 20)))
        if (states := read_states([job.id for job in waiting])) is None:
            continue
        now = time.monotonic()
        for job in list(waiting):
            state = states.get(job.id, FORGOTTEN)
            waiting[job] = (waiting[job] or now) if state in (*ENDED, FORGOTTEN) else 0.0
            complete = run_folder.has_ended(job.run, job.total_env_steps)
            may_be_complete = state in ("COMPLETED", FORGOTTEN) and now - waiting[job] < LAG
            if not waiting[job] or (may_be_complete and not complete):
                continue
            del waiting[job]
            if complete or (state == "COMPLETED" and run_folder.has_begun(job.run)):
                print_line(_describe(job, complete=complete))
            else:
                failures.append(_explain(job, state))
                print(f"levin: {failures[-1]}", file=sys.stderr, flush=True)
        counts = Counter(states.get(job.id, FORGOTTEN).lower() for job in waiting)
        words = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
        if words != last_counts and counts:
            print_line(f"{number}: {len(jobs) - len(waiting)} ended, {words}")
        last_counts = words
    return failures


def count_runs(count: int) -> str:
    """Return the number of runs in words."""
    return "1 run" if count == 1 else f"{count} runs"


def read_states(jobs: Sequence[str]) -> dict[str, str] | None:
    """Return the state of each job that squeue knows; None if SLURM does not answer at the moment."""
    numbers = ",".join(sorted({job.partition("_")[0] for job in jobs}))
    command = ["squeue", "--noheader", "--array", "--states=all", "--format=%i %T", f"--jobs={numbers}"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode and "Invalid job id" not in answer.stderr:
        return None
    return dict(line.split() for line in answer.stdout.splitlines())


def _describe(job: Job, *, complete: bool) -> str:
    """Return a sentence about a job that has ended without an error."""
    if not complete:
        return f"{job.run} was stopped before its end, and saved; to continue: make resume RUN={job.run}"
    progress = read_progress(job.run)
    score = "" if progress.evaluation is None else f", eval/return_mean {progress.evaluation}"
    return f"{job.run} is complete: {progress.env_steps} env steps{score}"


def _explain(job: Job, state: str) -> str:
    """Return a sentence about a job that has failed."""
    if state == "FAILED":
        line, file = last_line(job.logs)
        return f"{job.run} failed: {line} (see {file})"
    if state == "COMPLETED":
        return f"{job.run} failed: its job {job.id} ended before the run began (see {job.logs})"
    if state == FORGOTTEN:
        return f"{job.run} is not complete, and SLURM does not know its job {job.id} any more (see {job.logs})"
    return f"{job.run} failed: SLURM ended its job {job.id}, {state} (see {job.logs})"


def last_line(logs: Path) -> tuple[str, Path]:
    """Return the last line of a failed job, and its file: of several ranks, that of the first to report an error."""
    found = []
    for file in sorted(logs.glob("*.err"), key=lambda file: file.stat().st_mtime):
        lines = [
            line
            for line in file.read_text(encoding="utf-8", errors="replace").splitlines()
            if not AFTERWARDS.match(line)
        ]
        found += [(line, file) for line in lines if line.strip()][-1:]
    reported = [(line.removeprefix("levin: "), file) for line, file in found if line.startswith("levin: ")]
    return (reported or found or [("it has written nothing", logs)])[0]
