"""Kill commands that train many runs at random moments, type them again, and compare with uninterrupted ones."""

import csv
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from checks import metrics, same, saved_state
from processes import children, has_exited

SMALL = (
    *("algo=sac", "env=gym", "env.id=toy_envs:Point-v0", "env.action=rescale", "logger=csv", "trainer.accelerator=cpu"),
    *("algo.learning_starts=16", "algo.batch_size=8", "algo.hidden_sizes=[8]", "log_every=16"),
    *("eval.every=64", "eval.episodes=2", "checkpoint.every=64"),
)
SWEEP = ("train", *SMALL, "total_env_steps=600", "-m", "algo.tau=.005,.02", "algo.gamma=.9,.99", "seeds=0 1", "jobs=2")
STUDY = ("tune", *SMALL, "total_env_steps=320", "trials=12", "seeds_per_trial=2", "retrain=2")


def start(words: tuple[str, ...], folder: Path) -> subprocess.Popen:
    """Start a levin command in a folder, with its output in a file there."""
    folder.mkdir(exist_ok=True)
    with (folder / "output.txt").open("a") as output:
        return subprocess.Popen(
            [sys.executable, "-m", f"levin.{words[0]}", *words[1:]], cwd=folder, stdout=output, stderr=output
        )


def finish(process: subprocess.Popen, folder: Path) -> None:
    """Wait for the end of a command and check that it succeeded."""
    assert process.wait() == 0, (folder / "output.txt").read_text()[-2000:]


def kill(process: subprocess.Popen, moment: random.Random, *, run: bool) -> None:
    """Kill a command, or one of its runs, and check that no process is left for long."""
    own = children(process.pid) if process.poll() is None else []
    if run:
        for pid in own[: 1 + moment.randrange(2)]:
            os.kill(pid, signal.SIGKILL)
        return
    process.kill()
    process.wait()
    end = time.monotonic() + 60
    while not all(map(has_exited, own)):
        assert time.monotonic() < end, "a run goes on after its command was killed"
        time.sleep(0.05)


def interrupt(words: tuple[str, ...], folder: Path, kills: int, seconds: float, moment: random.Random) -> None:
    """Run a command in a folder, kill it or its runs this often at random moments, and let it finish."""
    for _ in range(kills):
        process = start(words, folder)
        time.sleep(4 + moment.random() * seconds)  # after the imports
        kill(process, moment, run=moment.random() < 0.4)
        if process.poll() is None:  # its runs were killed: it ends by itself
            process.wait()
    process = start(words, folder)
    process.wait()
    if process.returncode:  # a run was killed
        finish(start(words, folder), folder)


def drill_sweep(folder: Path, kills: int, seed: int) -> str:
    """Interrupt a sweep of 2 x 2 values and 2 seeds; every run must end like that of an uninterrupted sweep."""
    straight, sweep = folder / "straight_sweep", folder / f"sweep{seed}"
    if not straight.exists():
        finish(start((*SWEEP, "run=sweep"), straight), straight)
    interrupt((*SWEEP, "run=sweep"), sweep, kills, 6, random.Random(seed))
    names = sorted(str(each.parent.relative_to(straight)) for each in straight.glob("sweep/*/*/config.yaml"))
    assert len(names) == 8, names
    assert names == sorted(str(each.parent.relative_to(sweep)) for each in sweep.glob("sweep/**/config.yaml"))
    for name in names:
        expected, got = saved_state(straight / name), saved_state(sweep / name)
        different = [key for key in {*expected, *got} if not same(expected.get(key), got.get(key))]
        assert not different, (name, different)
        assert metrics(straight / name) == metrics(sweep / name), name
    return f"sweep {seed}: 8 runs are identical after {kills} kills"


def drill_study(folder: Path, kills: int, seed: int, jobs: int) -> str:
    """Interrupt a study. With one job its trials and its winner must be the same, with more none is lost or doubled."""
    words = (*STUDY, f"jobs={jobs}", "run=study")
    straight, study = folder / f"straight_study{jobs}", folder / f"study{jobs}_{seed}"
    if not straight.exists():
        finish(start(words, straight), straight)
    interrupt(words, study, kills, 12, random.Random(seed))
    expected, got = (list(csv.DictReader((each / "study" / "trials.csv").open())) for each in (straight, study))
    assert [row["number"] for row in got] == [str(number) for number in range(12)], got
    assert {row["state"] for row in got} <= {"COMPLETE", "PRUNED"}, got
    assert len(list(study.glob("study/trials/*/s*/config.yaml"))) == 24
    if jobs == 1:
        assert got == expected
        lines = [(each / "study" / "winner.yaml").read_text().splitlines() for each in (straight, study)]
        assert [line for line in lines[0] if "Commit" not in line] == [
            line for line in lines[1] if "Commit" not in line
        ]
    pruned = sum(row["state"] == "PRUNED" for row in got)
    return f"study {seed}, jobs={jobs}: 12 trials, {pruned} pruned, after {kills} kills"
