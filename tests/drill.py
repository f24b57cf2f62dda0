"""Interrupt runs at random moments, resume them, and compare each with an uninterrupted run: `make drill`.

Arguments, with their defaults: kills=50 terms=20 many=5 seed=0 jobs=(number of CPUs).
"""

import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.append(str(Path(__file__).parent / "support"))  # pytest gets this path from pyproject.toml
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[-1:])  # for the toy envs

from checks import metrics, same, saved_state
from drill_many import drill_study, drill_sweep
from levin.config import cli
from levin.runs import checkpoint

EVERY, STEPS_PER_ITERATION = 150, 32
OVERRIDES = (
    *("algo=sac", "env=pendulum", "logger=csv", "trainer.threads=1", "total_env_steps=3200", "log_every=50"),
    *("eval.episodes=2", "eval.every=470", f"checkpoint.every={EVERY}", "algo.learning_starts=40"),
    *("algo.batch_size=16", "algo.hidden_sizes=[16,16]", "algo.buffer_size=2000"),
)


def start(command: str, *overrides: str, **kwargs) -> subprocess.Popen:
    """Start a levin command in a new process."""
    return subprocess.Popen(
        [sys.executable, "-m", f"levin.{command}", *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **kwargs,
    )


def finish(process: subprocess.Popen) -> str:
    """Wait for a process to end, check that it succeeded, and return its output."""
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return output


def last_step(run: Path) -> int:
    """Return the last env step in metrics.csv, or 0."""
    file = run / "metrics.csv"
    lines = file.read_text().splitlines()[1:] if file.exists() else []
    return int(lines[-1].split(",")[0]) if lines else 0


def compare(straight: Path, run: Path) -> None:
    """Check that the last checkpoints and the metrics of two runs are identical."""
    expected, got = saved_state(straight), saved_state(run)
    different = [key for key in {*expected, *got} if not same(expected.get(key), got.get(key))]
    assert not different, different
    assert metrics(straight) == metrics(run)


def kill(trial: int, folder: Path, straight: Path, seconds: float) -> str:
    """Kill a run with SIGKILL, resume it, and compare it with the uninterrupted run.

    Even trials are killed at a random time, odd trials while a checkpoint is being written.
    """
    moment, run = random.Random(trial), folder / f"kill{trial}"
    process = start("train", *OVERRIDES, f"run={run}")
    if trial % 2:
        number = moment.randrange(1, 3200 // EVERY)  # the checkpoint to interrupt
        seen: set[str] = set()
        while process.poll() is None and len(seen) < number:
            seen |= {path.name for path in (run / "checkpoints").glob(".[0-9]*.partial")}
        time.sleep(moment.random() * 0.01)
    else:
        time.sleep(moment.random() * seconds)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    partial = bool(list((run / "checkpoints").glob(".*.partial")))
    logged, complete = last_step(run), checkpoint.list_checkpoints(run / "checkpoints")
    for each in complete:
        checkpoint.verify(each, buffer=True)
    at = int(complete[-1].name) if complete else 0
    assert logged - at <= EVERY + STEPS_PER_ITERATION, (logged, at)
    output = finish(start("resume", f"run={run}")) if (run / "config.yaml").exists() else ""
    if not output:  # killed before the run folder was complete
        finish(start("train", *OVERRIDES, f"run={run}"))
    assert "trying the checkpoint before it" not in output, output
    compare(straight, run)
    return f"logged to {logged:>4}, resumed from {at:>4}{', beside an unfinished checkpoint' if partial else ''}"


def terminate(trial: int, folder: Path, straight: Path, seconds: float) -> str:
    """Stop a run with SIGTERM, check that it saves and exits with 0, resume it, and compare."""
    moment, run = random.Random(1000 + trial), folder / f"term{trial}"
    process = start("train", *OVERRIDES, f"run={run}")
    while process.poll() is None and not (run / "metrics.csv").exists():
        time.sleep(0.01)
    time.sleep(moment.random() * seconds / 2)
    process.send_signal(signal.SIGTERM)
    finish(process)
    at = int(checkpoint.list_checkpoints(run / "checkpoints")[-1].name)
    finish(start("resume", f"run={run}"))
    compare(straight, run)
    return f"saved at {at:>4}"


def fill(folder: Path, straight: Path) -> str:
    """Fill the disk during a run, resume the run with free space, and compare.

    The run must end with a one-line error and exit code 1, and its earlier checkpoints must be complete.
    """
    run, disk = folder / "full", folder / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", disk], capture_output=True, check=False
    ).returncode
    if mounted == 0:
        run, limit_description = disk / "run", "a tmpfs of 200 KiB"
        process = start("train", *OVERRIDES, f"run={run}")
    else:
        limit_description = "a limit on the size of files"  # not allowed to mount
        limit = (40_000, 40_000)  # bytes
        process = start(
            "train", *OVERRIDES, f"run={run}", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        )
    try:
        output, _ = process.communicate()
        lines = [line for line in output.splitlines() if line.startswith("levin: ")]
        assert process.returncode == 1, output
        assert "Traceback" not in output, output
        assert len(lines) == 1, output
        for each in checkpoint.list_checkpoints(run / "checkpoints"):
            checkpoint.verify(each, buffer=True)
        if mounted == 0:
            subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        finish(start("resume", f"run={run}"))
        compare(straight, run)
    finally:
        if mounted == 0:
            subprocess.run(["umount", disk], check=True)
    return f"full disk ({limit_description}): {lines[0]}"


def main(*, kills: int = 50, terms: int = 20, many: int = 5, seed: int = 0, jobs: int = os.cpu_count() or 1) -> None:
    """Run all trials and exit with 1 if one of them failed.

    Args:
        kills: Number of runs to kill with SIGKILL.
        terms: Number of runs to stop with SIGTERM.
        many: Number of sweeps, of studies with one run at a time, and of studies with two, to kill four times each.
        seed: Seed of the moments of interruption.
        jobs: Number of trials at a time.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        begin = time.monotonic()
        finish(start("train", *OVERRIDES, f"run={folder / 'straight'}"))
        seconds = time.monotonic() - begin
        print(f"the uninterrupted run took {seconds:.1f} s", flush=True)
        print(fill(folder, folder / "straight"), flush=True)
        failed = 0
        with ThreadPoolExecutor(jobs) as pool:
            for what, drill, count in (("kill -9", kill, kills), ("SIGTERM", terminate, terms)):
                trials = range(seed * 10_000, seed * 10_000 + count)
                waiting = [pool.submit(drill, trial, folder, folder / "straight", seconds) for trial in trials]
                good = 0
                for trial, each in zip(trials, waiting, strict=True):
                    error = each.exception()
                    good += error is None
                    print(f"{what} {trial}: {each.result() if error is None else f'FAILED {error!r}'}", flush=True)
                print(f"{what}: {good} of {count} identical", flush=True)
                failed += count - good
        for number in range(seed * 10_000, seed * 10_000 + many):
            for drill, options in ((drill_sweep, {}), (drill_study, {"jobs": 1}), (drill_study, {"jobs": 2})):
                try:
                    print(drill(folder, kills=4, seed=number, **options), flush=True)
                except AssertionError as error:
                    print(f"{drill.__name__} {number}: FAILED {error}", flush=True)
                    failed += 1
    sys.exit(failed > 0)


if __name__ == "__main__":
    main(**cli.parse_overrides(sys.argv[1:], as_typed=[]))
