"""Waiting for SLURM's jobs, with a `squeue` that gives one answer after the other."""

import json
import os
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from levin.core.errors import ConfigError
from levin.scheduler import slurm_jobs
from levin.scheduler.slurm_jobs import Job, last_line, wait_for_jobs
from levin.sweep import check_ranks
from processes import run_python

ONE_BY_ONE = """#!/bin/bash
first=$(ls answer_* | head -1)
(. ./$first); code=$?
[ $first = answer_9 ] || rm $first
exit $code
"""
UNKNOWN = "echo slurm_load_jobs error: Invalid job id specified >&2; exit 1"


@pytest.fixture
def squeue(tmp_path, monkeypatch):
    """Return a function that sets the answers of squeue: shell scripts, or states of the tasks of job 70."""
    monkeypatch.setattr(slurm_jobs, "SECONDS", (0.0, 0.0))
    monkeypatch.setattr(slurm_jobs, "LAG", 0.2)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    program = tmp_path / "squeue"
    program.write_text(ONE_BY_ONE)
    program.chmod(0o755)

    def answer(*answers: str) -> None:
        for i, text in enumerate(answers):
            tasks = "".join(f"echo 70_{task} {state};" for task, state in enumerate(text.split()))
            name = "answer_9" if i == len(answers) - 1 else f"answer_{i}"
            Path(name).write_text(tasks if text.isupper() else text)

    return answer


def end_run(run: Path, env_steps: int | None = 320) -> None:
    """Write what a run leaves: `env_steps` is None if it was stopped."""
    run.mkdir()
    (run / "config.yaml").write_text("name: test\n")
    facts = {"git_sha": "", "git_dirty": False, "versions": {}, "wall_seconds": 1.0, "resumed": []}
    (run / "provenance.json").write_text(json.dumps({**facts, "env_steps": env_steps, "ended_at": env_steps}))
    (run / "metrics.csv").write_text("env_steps,eval/return_mean\n320,-1.5\n")


def jobs(count: int) -> list[Job]:
    return [Job(f"70_{i}", Path(f"run_{i}"), 320, Path(f"logs_{i}")) for i in range(count)]


def test_each_job_is_waited_for_and_described(squeue, capsys):
    squeue(
        "PENDING CONFIGURING RUNNING RUNNING",
        "COMPLETED REQUEUE_HOLD RUNNING FAILED",
        "echo slurm_load_jobs error: Unable to contact slurm controller >&2; exit 1",
        "COMPLETED RUNNING COMPLETING FAILED",
        "echo 70_1 RUNNING; echo 70_2 TIMEOUT",
        "echo 70_1 COMPLETED; echo 70_2 TIMEOUT",
    )
    end_run(Path("run_0")), end_run(Path("run_1"))
    Path("logs_3").mkdir()
    Path("logs_3/70_3_0_log.err").write_text("levin: NaN\nsrun: error: node: task 0: Exited with exit code 1\n")
    failures = wait_for_jobs(jobs(4))
    said = capsys.readouterr()
    assert failures == [
        "run_3 failed: NaN (see logs_3/70_3_0_log.err)",
        "run_2 failed: SLURM ended its job 70_2, TIMEOUT (see logs_2)",
    ]
    assert said.err.splitlines() == [f"levin: {failure}" for failure in failures]
    assert said.out.splitlines() == [
        "4 runs: 0 ended, 1 configuring, 1 pending, 2 running",
        "run_0 is complete: 320 env steps, eval/return_mean -1.5",
        "4 runs: 2 ended, 1 requeue_hold, 1 running",
        "4 runs: 2 ended, 1 completing, 1 running",
        "4 runs: 3 ended, 1 running",
        "run_1 is complete: 320 env steps, eval/return_mean -1.5",
    ]


def test_the_run_folder_tells_how_a_job_ended_that_squeue_has_forgotten(squeue, capsys):
    squeue("RUNNING RUNNING", UNKNOWN)
    end_run(Path("run_0"))
    assert wait_for_jobs(jobs(2)) == [
        "run_1 is not complete, and SLURM does not know its job 70_1 any more (see logs_1)"
    ]
    assert "run_0 is complete" in capsys.readouterr().out


def test_files_of_another_machine_may_be_seen_late(squeue, capsys):
    squeue("COMPLETED", "echo 70_0 COMPLETED; mv late/* run_0")
    end_run(Path("run_0"), env_steps=None), end_run(Path("late"))
    assert not wait_for_jobs(jobs(1))
    assert capsys.readouterr().out.splitlines()[-1].startswith("run_0 is complete")


def test_a_run_that_was_stopped_is_no_failure(squeue, capsys):
    squeue("RUNNING", "COMPLETED")
    end_run(Path("run_0"), env_steps=None)
    assert not wait_for_jobs(jobs(1))
    assert capsys.readouterr().out.splitlines()[-1] == (
        "run_0 was stopped before its end, and saved; to continue: make resume RUN=run_0"
    )


def test_a_job_that_trained_nothing_has_failed(squeue):
    squeue("RUNNING", "COMPLETED")
    assert wait_for_jobs(jobs(1)) == ["run_0 failed: its job 70_0 ended before the run began (see logs_0)"]


def test_the_rank_that_reports_an_error_is_quoted(tmp_path):
    assert last_line(tmp_path) == ("it has written nothing", tmp_path)
    texts = {
        "70_0_log.err": "a warning\nsrun: error: node: task 1: Exited with exit code 1\nsrun: Terminating it\n",
        "70_1_log.err": "levin: the env failed\n",
    }
    for i, (name, text) in enumerate(texts.items()):
        (tmp_path / name).write_text(text)
        os.utime(tmp_path / name, (i, i))
    assert last_line(tmp_path) == ("the env failed", tmp_path / "70_1_log.err")


@pytest.mark.parametrize(("nodes", "tasks"), [(1, 1), (2, 2), (2, 1)])
def test_a_job_must_start_one_process_for_each_rank(nodes, tasks):
    launcher = {"nodes": nodes, "tasks_per_node": tasks}
    config = OmegaConf.create({"trainer": {"devices": 2}, "hydra": {"launcher": launcher}})
    with pytest.raises(ConfigError, match=rf"start {tasks} processes on each of {nodes} nodes, but trainer.dev"):
        check_ranks(config)
    config.hydra.launcher = {"nodes": 1, "tasks_per_node": 2}
    check_ranks(config)


SIGNAL_TO_ALL = """
import os, signal, time
from multiprocessing import Lock, resource_tracker
from levin.runs import slurm

os.setpgid(0, 0)
slurm.requeue_on_signal()
signal.signal(signal.SIGUSR1, signal.SIG_IGN)
lock = Lock()
os.killpg(0, signal.SIGUSR1)
time.sleep(0.5)
os.kill(resource_tracker._resource_tracker._pid, 0)
del lock
"""


def test_a_signal_to_all_processes_of_a_job_leaves_no_traceback():
    answer = run_python("-c", SIGNAL_TO_ALL, env={**os.environ, "SLURM_JOB_ID": "77"}, forked=False)
    assert (answer.returncode, answer.stderr) == (0, "")
