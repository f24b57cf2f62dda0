"""A real SLURM, on this machine: runs that are preempted, killed or fail. Needs `slurm-wlm`, `munge` and submitit."""

import importlib.util
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from levin.config.compose import compose
from levin.runs import folder as run_folder
from levin.training.session import train
from processes import wait_until
from short_runs import TINY, assert_identical_runs, last_words
from slurm_cluster import SlurmCluster, missing_programs

MISSING = [*missing_programs(), *([] if importlib.util.find_spec("submitit") else ["submitit"])]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"needs SLURM, and submitit; missing: {', '.join(MISSING)}"),
]

OVERRIDES = (*last_words(TINY), "trainer.threads=1", "trainer.accelerator=cpu", "total_env_steps=320")
LONGER = (*OVERRIDES[:-1], "total_env_steps=2000")
SIGNAL = "+callbacks.signal._target_=preempt.SignalJob"
SWEEP = ("-m", *OVERRIDES, SIGNAL, "launcher=slurm", "hydra.launcher.cpus_per_task=1", "hydra.launcher.mem_gb=1")
NOISE = ("Traceback", "resource_tracker", "KeyError")


@pytest.fixture(scope="module")
def cluster():
    with (
        tempfile.TemporaryDirectory(prefix="slurm-") as folder,  # short: the name of a socket has at most 107 letters
        SlurmCluster(Path(folder)) as cluster,
    ):
        yield cluster


def levin_train(cluster: SlurmCluster, folder: Path, *words: str) -> subprocess.CompletedProcess:
    """Run `python -m levin.train` with the SLURM of the test, and print what it says."""
    command = [sys.executable, "-m", "levin.train", *words]
    answer = subprocess.run(
        command, cwd=folder, env=cluster.environment, capture_output=True, text=True, check=False, timeout=1500
    )
    print(f"$ {' '.join(['python', *command[1:]])}", answer.stdout, answer.stderr, sep="\n")
    print(f"exit code {answer.returncode}")
    return answer


def local_run(folder: Path, *words: str) -> Path:
    """Train a run in this process."""
    train(compose([*OVERRIDES, SIGNAL, "+callbacks.signal.name=nothing", *words]), folder)
    return folder


def read_logs(folder: Path) -> str:
    return "\n".join(file.read_text() for file in sorted(folder.glob(".submitit/*/*_log.*")))


def test_a_sweep_says_how_each_job_ended(cluster, tmp_path):
    answer = levin_train(cluster, tmp_path, *SWEEP, "run=mine", "+callbacks.signal.name=nothing,USR1,KILL,error")
    assert answer.returncode == 1
    runs = {name: f"mine/+callbacks.signal.name={name}/s0" for name in ("nothing", "USR1", "KILL", "error")}
    lines = answer.stdout.splitlines()
    for name in ("nothing", "USR1"):
        assert len([line for line in lines if line.startswith(f"{runs[name]} is complete: 320 env steps")]) == 1
    *errors, last = sorted(answer.stderr.splitlines(), key=lambda line: "runs failed" in line)
    killed, failed = sorted(errors, key=lambda line: runs["error"] in line)
    assert re.match(
        rf"levin: {re.escape(runs['KILL'])} failed: SLURM ended its job \d+_2, CANCELLED \(see mine/", killed
    )
    assert failed.startswith(f"levin: {runs['error']} failed: RuntimeError: an error after 160 env steps (see mine/")
    assert last.startswith("levin: 2 of 4 runs failed; the others have ended without an error: ")
    assert all(Path(tmp_path, line.rpartition("(see ")[2][:-1]).exists() for line in errors)
    straight = local_run(tmp_path / "straight")
    for name, resumed in (("nothing", 0), ("USR1", 1)):
        assert len(run_folder.read_provenance(tmp_path / runs[name])["resumed"]) == resumed
        assert_identical_runs(straight, tmp_path / runs[name])
        log = "\n".join(
            file.read_text()
            for file in (tmp_path / "mine" / ".submitit").glob("*/*_log.*")
            if f"name={name}/s0" in file.with_suffix(".out").read_text()
        )
        assert "sac_pendulum, seed 0" in log
        assert not [word for word in NOISE if word in log]
    again = levin_train(cluster, tmp_path, *SWEEP, "run=mine", "+callbacks.signal.name=nothing,USR1,KILL,error")
    assert again.returncode == 0, again.stderr
    for name in ("KILL", "error"):
        assert len(run_folder.read_provenance(tmp_path / runs[name])["resumed"]) == 1
        assert_identical_runs(straight, tmp_path / runs[name])


def test_a_preempted_run_of_two_ranks_continues(cluster, tmp_path):
    ranks = ("trainer.devices=2", "env.num_envs=2")
    answer = levin_train(cluster, tmp_path, *SWEEP, *ranks, "run=mine", "+callbacks.signal.name=USR1")
    assert answer.returncode == 0, answer.stderr
    run = tmp_path / "mine" / "s0"
    assert len(run_folder.read_provenance(run)["resumed"]) == 1
    assert_identical_runs(local_run(tmp_path / "straight", *ranks), run)
    assert not [word for word in NOISE if word in read_logs(tmp_path / "mine")]


def test_the_number_of_ranks_must_be_that_of_the_trainer(cluster, tmp_path):
    answer = levin_train(cluster, tmp_path, *SWEEP, "hydra.launcher.tasks_per_node=2", "+callbacks.signal.name=nothing")
    assert answer.returncode == 2
    assert answer.stderr.startswith("levin: a job would start 2 processes on each of 1 nodes, but trainer.devices=1 ")
    assert len(answer.stderr.splitlines()) == 1
    assert cluster.call("squeue", "--noheader") == ""


def test_a_preempted_batch_script_continues_its_run(cluster, tmp_path):
    """SLURM preempts the job for one in a partition of higher priority."""
    words = " ".join([sys.executable, "-m", "levin.train", *LONGER])
    script = f"#!/bin/bash\n#SBATCH --requeue --signal=USR1@30 --output=log.txt --open-mode=append\nsrun {words}\n"
    (tmp_path / "job.sh").write_text(script)
    job = cluster.call("sbatch", "--parsable", f"--chdir={tmp_path}", str(tmp_path / "job.sh")).strip()
    wait_until(lambda: list(tmp_path.glob("runs/sac_pendulum/*/checkpoints/*/manifest.json")), 400)
    cluster.call("sbatch", "--partition=urgent", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    wait_until(
        lambda: (
            cluster.call("squeue", "--noheader", f"--jobs={job}", "--states=all", "--format=%T")
            in ("COMPLETED\n", "FAILED\n")
        ),
        240,
    )
    log = (tmp_path / "log.txt").read_text()
    print(log)
    (run,) = (tmp_path / "runs" / "sac_pendulum").iterdir()
    provenance = run_folder.read_provenance(run)
    assert (provenance["env_steps"], provenance["slurm_job"], len(provenance["resumed"])) == (2016, job, 1)
    assert "levin: SIGUSR1: the run will be saved and end" in log
    assert f"levin: job {job} is requeued" in log
    assert not [word for word in NOISE if word in log]
    train(compose([*LONGER]), tmp_path / "straight")
    assert_identical_runs(tmp_path / "straight", run)
