"""SLURM jobs without SLURM: submitit's local executor, and scripts that simulate SLURM's commands."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.config_store import ConfigStore

from levin.config.compose import compose
from levin.core.errors import ConfigError
from levin.runs import checkpoint
from levin.runs import folder as run_folder
from levin.train import main
from levin.training.session import train
from processes import run_python
from short_runs import TINY, assert_identical_runs, last_words

OVERRIDES = (*last_words(TINY), "trainer.threads=1", "trainer.accelerator=cpu", "total_env_steps=320")
PREEMPT = ("+callbacks.preempt._target_=preempt.Preempt",)
HARMLESS = (*PREEMPT, "+callbacks.preempt.name=SIGCONT")


class Slurm:
    """Simulated SLURM job: the environment variables of `srun`, and a `scontrol` that records its arguments."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.patch = folder, monkeypatch
        command(folder, "scontrol", f'echo "$@" >> {folder}/scontrol.txt')
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        for name in ("JOB_ID=77", "NTASKS=1", "PROCID=0", "LOCALID=0", "NODEID=0"):
            monkeypatch.setenv(*f"SLURM_{name}".split("="))

    def train(self, *overrides: str) -> int:
        """Run `python -m levin.train` in this process and return its exit code."""
        self.patch.setattr(sys, "argv", ["levin.train", *overrides])
        self.patch.setattr(sys, "orig_argv", ["python", "-m", "levin.train", *overrides])
        try:
            main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    def told(self) -> str:
        """Return the arguments of all calls of `scontrol`, one call per line."""
        file = self.folder / "scontrol.txt"
        return file.read_text() if file.exists() else ""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("levin.collectors.vector.SLOW", 1e9)  # also on a machine that stands still for a second
    before = signal.getsignal(signal.SIGUSR1)
    yield Slurm(tmp_path, monkeypatch)
    signal.signal(signal.SIGUSR1, before)


def command(folder: Path, name: str, script: str) -> None:
    """Write an executable shell script."""
    (folder / name).write_text(f"#!/bin/bash\n{script}\n")
    (folder / name).chmod(0o755)


def test_a_preempted_job_is_requeued_and_continues_its_run(slurm, tmp_path, capsys):
    train(compose([*OVERRIDES, *HARMLESS]), tmp_path / "straight")
    assert slurm.train(*OVERRIDES, *PREEMPT) == 0
    assert slurm.told() == "requeue 77\n"
    assert "levin: job 77 is requeued" in capsys.readouterr().err
    (run,) = (tmp_path / "runs" / "sac_pendulum").iterdir()
    assert [each.name for each in checkpoint.list_checkpoints(run / "checkpoints")][-1] == "128"
    slurm.patch.setenv("SLURM_RESTART_COUNT", "1")
    assert slurm.train(*OVERRIDES, *PREEMPT) == 0
    assert slurm.told() == "requeue 77\n"
    assert_identical_runs(tmp_path / "straight", run)
    assert slurm.train(*OVERRIDES, *PREEMPT) == 0  # requeued by hand: the run is already complete
    assert f"run={run.relative_to(tmp_path)} is complete" in capsys.readouterr().out
    assert list(run.parent.iterdir()) == [run]


def test_a_requeued_job_continues_only_its_own_run(slurm, tmp_path):
    """It continues no run of another job, nor of another command in the same batch script."""
    assert slurm.train(*OVERRIDES, *PREEMPT, "run=run") == 0
    slurm.patch.setenv("SLURM_RESTART_COUNT", "1")
    assert slurm.train(*OVERRIDES, "run=run") == 2
    slurm.patch.setenv("SLURM_JOB_ID", "78")
    assert slurm.train(*OVERRIDES, *PREEMPT, "run=run") == 2
    slurm.patch.setenv("SLURM_JOB_ID", "77")
    assert slurm.train(*OVERRIDES, *PREEMPT, "run=run") == 0
    assert run_folder.read_provenance(tmp_path / "run")["env_steps"] == 320


def test_a_requeued_job_needs_no_record_of_its_own_env(slurm, tmp_path):
    """The home folder of the node may be new."""
    words = (*OVERRIDES, "env=gym", "env.id=toy_envs:Failing-v0", "+env.kwargs.how=never", *PREEMPT, "run=run")
    assert slurm.train(*words) == 0
    slurm.patch.setenv("SLURM_RESTART_COUNT", "1")
    slurm.patch.setenv("XDG_STATE_HOME", str(tmp_path / "new"))
    assert slurm.train(*words) == 0


def test_a_requeued_job_continues_its_run_that_has_only_a_config(slurm):
    """Its first start was killed before provenance.json was written."""
    config = compose([*OVERRIDES, "run=run"])
    slurm.patch.setenv("SLURM_RESTART_COUNT", "1")
    assert run_folder.find_requeued_run(config) is None
    run_folder.begin(Path("run"), config)
    assert run_folder.find_requeued_run(config) == Path("run")
    slurm.patch.setenv("SLURM_RESTART_COUNT", "0")
    assert run_folder.find_requeued_run(config) is None


@pytest.mark.parametrize(
    ("name", "environment", "told"),
    [
        ("SIGUSR1", "SLURM_ARRAY_JOB_ID=70 SLURM_ARRAY_TASK_ID=3", "requeue 70_3\n"),
        ("SIGUSR1", "SLURM_PROCID=1", ""),
        ("SIGUSR1", "SLURM_JOB_ID=", ""),
        ("SIGTERM", "", ""),
        ("SIGINT", "", ""),
    ],
)
def test_only_sigusr1_to_rank_0_of_a_job_requeues(slurm, name, environment, told):
    slurm.patch.delenv("SLURM_NTASKS")  # with it, Lightning would leave saving to rank 0
    for key, value in (each.split("=") for each in environment.split()):
        slurm.patch.setenv(key, value) if value else slurm.patch.delenv(key)
    assert slurm.train(*OVERRIDES, *PREEMPT, f"+callbacks.preempt.name={name}", "run=run") == 0
    assert slurm.told() == told
    assert checkpoint.newest_checkpoint(Path("run"), buffer=True).parent.name == "128"


def test_a_signal_before_the_training_requeues_at_once(slurm):
    slurm.patch.setattr("levin.train.run_folder.new_run_path", lambda _: os.kill(os.getpid(), signal.SIGUSR1))
    assert slurm.train(*OVERRIDES) == 0
    assert slurm.told() == "requeue 77\n"
    assert not Path("runs").exists()


@pytest.mark.parametrize("reason", ["not allowed", "No such file or directory"])
def test_a_failed_requeue_is_a_one_line_error(slurm, reason, capsys):
    command(slurm.folder, "scontrol", "echo not allowed >&2; exit 1")
    if reason != "not allowed":
        (slurm.folder / "scontrol").unlink()
        (slurm.folder / "git").symlink_to(str(shutil.which("git")))
        slurm.patch.setenv("PATH", str(slurm.folder))  # hides a real scontrol
    assert slurm.train(*OVERRIDES, *PREEMPT, "run=run") == 0
    assert capsys.readouterr().err.splitlines()[-1] == f"levin: scontrol requeue 77 failed: {reason}"
    assert checkpoint.newest_checkpoint(Path("run"), buffer=True).is_file()


def sweep(folder: Path, *overrides: str) -> subprocess.CompletedProcess:
    """Run a sweep of two jobs; one of them is preempted."""
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "FAKE": str(folder)}
    both = (*PREEMPT, "+callbacks.preempt.name=SIGCONT,SIGUSR1")
    words = ("-m", "levin.train", "-m", *OVERRIDES, *both, *overrides)
    return run_python(*words, cwd=folder, env={**os.environ, **environment})


def check_sweep(folder: Path) -> None:
    """Check that one of the two runs was resumed after a preemption, and that both are identical."""
    straight, preempted = sorted(folder.glob("runs/sweep_*/*/s0"))
    assert [len(run_folder.read_provenance(run)["resumed"]) for run in (straight, preempted)] == [0, 1]
    assert_identical_runs(straight, preempted)


def test_a_preempted_job_of_a_sweep_continues_its_run(tmp_path):
    pytest.importorskip("submitit")
    answer = sweep(tmp_path, "launcher=local")
    assert answer.returncode == 0, answer.stderr
    check_sweep(tmp_path)


@pytest.mark.slow
def test_a_failing_job_gives_a_one_line_error(tmp_path):
    pytest.importorskip("submitit")
    answer = sweep(tmp_path, "launcher=local", "env=gym", "env.id=toy_envs:Nope-v0")
    assert answer.returncode == 1
    of_env, message = answer.stderr.splitlines()
    assert of_env.startswith("levin: env is given twice")
    assert message.startswith("levin: env.id=toy_envs:Nope-v0 can't be made")


def test_a_wrong_launcher_key_gives_a_one_line_error(tmp_path):
    pytest.importorskip("submitit")
    answer = sweep(tmp_path, "launcher=slurm", "hydra.launcher.partitio=gpu")
    assert (answer.returncode, len(answer.stderr.splitlines())) == (2, 1)
    assert "partitio" in answer.stderr


def test_a_missing_launcher_names_its_extra(monkeypatch):
    compose([])  # Hydra looks for its plugins once
    monkeypatch.delitem(ConfigStore.instance().repo["hydra"]["launcher"], "submitit_slurm.yaml", raising=False)
    with pytest.raises(ConfigError, match=r"a package that is missing: type make \.venv/\.scale"):
        compose(["launcher=slurm"])


# Job array of two jobs; each is started again after it requeues itself.
SBATCH = r"""
cp "$1" "$FAKE/batch.sh"
begin() {
    export SLURM_JOB_ID=$((70 + $1)) SLURM_ARRAY_JOB_ID=70 SLURM_ARRAY_TASK_ID=$1 SLURM_RESTART_COUNT=0
    export SLURM_NTASKS=1 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0
    bash "$FAKE/batch.sh" && state=COMPLETED || state=FAILED
    while rm "$FAKE/requeue_70_$1"; do
        export SLURM_RESTART_COUNT=$((SLURM_RESTART_COUNT + 1))
        bash "$FAKE/batch.sh" && state=COMPLETED || state=FAILED
    done
}
for task in 0 1; do
    echo RUNNING > "$FAKE/state_$task"
    (begin $task; echo $state > "$FAKE/state_$task") > "$FAKE/task_$task.txt" 2>&1 &
done
echo Submitted batch job 70
"""
SRUN = r"""
while [[ $1 == --* ]]; do [[ $1 == --unbuffered ]] && shift || shift 2; done
exec "$@"
"""


@pytest.mark.slow
def test_a_sweep_on_slurm(tmp_path):
    pytest.importorskip("submitit")
    command(tmp_path, "sbatch", SBATCH)
    command(tmp_path, "srun", SRUN)
    command(tmp_path, "scontrol", 'touch "$FAKE/$1_$2"')
    command(tmp_path, "squeue", 'for task in 0 1; do echo "70_$task $(cat $FAKE/state_$task)"; done')
    answer = sweep(tmp_path, "launcher=slurm", "hydra.launcher.partition=gpu")
    assert answer.returncode == 0, answer.stderr
    batch = (tmp_path / "batch.sh").read_text()
    for line in ("--signal=USR1@120", "--requeue", "--partition=gpu", "--time=1440", "--array=0-1%2"):
        assert f"#SBATCH {line}\n" in batch
    check_sweep(tmp_path)
