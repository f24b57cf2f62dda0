"""Hogwild training of A3C: workers update shared parameters asynchronously, and end together."""

import os
import signal
import subprocess

import numpy as np
import pytest
import torch

from checks import build_algorithm, metrics, saved_state
from levin import resume
from levin.algorithms.a3c import A3C
from levin.config.compose import compose
from levin.core.errors import RunError
from levin.training.session import train
from processes import children, has_exited, start_python, wait_until

OVERRIDES = [
    "algo=a3c",
    "env=cartpole",
    "logger=csv",
    "eval.every=1_000_000",
    "eval.episodes=2",
    "trainer.workers=2",
    "env.num_envs=1",
]
LONG = [*OVERRIDES, "total_env_steps=100_000_000", "checkpoint.every=200", "log_every=500"]


@pytest.fixture
def running(tmp_path):
    """Start a run with two workers in new processes; yield its process, its folder and the pid of the second worker."""
    run = tmp_path / "run"
    words = ("-m", "levin.train", *LONG, f"run={run}")
    process = start_python(*words, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        wait_until(lambda: process.poll() is not None or (run / "checkpoints" / "last").exists())
        assert process.poll() is None, process.communicate(timeout=300)[0]
        (worker,) = children(process.pid)
        yield process, run, worker
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=300)


def test_each_worker_compiles_for_itself(tmp_path, monkeypatch):
    torch_compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda loss, options, **how: torch_compile(loss, backend="aot_eager", **how))
    train(compose([*OVERRIDES, "total_env_steps=2000", "algo.compile=true"]), tmp_path / "run")
    pushes = saved_state(tmp_path / "run")["staleness"]
    assert sum(pushes) >= 400
    assert sum(pushes[1:]) > 0


def test_a_killed_worker_ends_the_run(running):
    process, run, worker = running
    os.kill(worker, signal.SIGKILL)
    output, _ = process.communicate(timeout=10)
    assert process.returncode == 1
    assert "worker 1 of 2 ended with exit code -9" in output
    assert f"make resume RUN={run}" in output
    assert "Traceback" not in output
    assert has_exited(worker)


def test_killing_a_run_ends_its_workers(running):
    process, _, worker = running
    process.kill()
    process.wait(300)
    wait_until(lambda: has_exited(worker), 10)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_saves_the_run_and_ends_the_workers(running, number):
    """Ctrl-C and SLURM send the signal to every process of a run."""
    process, run, worker = running
    os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 0, output
    assert "Traceback" not in output
    assert has_exited(worker)
    state = saved_state(run)
    assert state["levin"]["env_steps"] > 0


def test_an_error_in_a_worker_is_reported_by_the_run(tmp_path):
    """The env raises in step 100 of worker 1, but not in worker 0."""
    overrides = ["env=gym", "env.id=toy_envs:FailingRank-v0", "eval.episodes=1", "total_env_steps=100_000"]
    with pytest.raises(RunError, match=r"worker 1 of 2 .*the cart has left the track"):
        train(compose([*OVERRIDES, *overrides, "checkpoint.every=100_000"]), tmp_path / "run")


def test_workers_do_not_wait_for_each_other(tmp_path):
    """Some gradients are stale, and the counts of updates and env steps include those of all workers."""
    overrides = [*OVERRIDES, "total_env_steps=6000", "checkpoint.every=100_000", "log_every=100"]
    train(compose(overrides), tmp_path / "run")
    state = saved_state(tmp_path / "run")
    histogram = np.array(state["staleness"])
    assert histogram.sum() == state["levin"]["updates"]  # of both workers
    assert state["levin"]["env_steps"] == 5 * state["levin"]["updates"] >= 6000
    assert histogram[1:].sum() > 0.05 * histogram.sum(), histogram
    rows = metrics(tmp_path / "run")
    assert any(float(row["train/staleness"] or 0) > 0 for row in rows)


@pytest.fixture
def only_worker_1_pushes(monkeypatch):
    """Let worker 0, whose parameters are saved, wait for a push of worker 1 instead of pushing."""
    push = A3C.push

    def push_or_wait(self):
        if self.trainer.global_rank == 0:
            wait_until(lambda: self.pushes[1] > 0)
        else:
            push(self)

    monkeypatch.setattr(A3C, "push", push_or_wait)


@pytest.mark.usefixtures("only_worker_1_pushes")
def test_all_workers_share_one_network(tmp_path):
    overrides = [*OVERRIDES, "total_env_steps=1000", "checkpoint.every=100_000"]
    train(compose(overrides), tmp_path / "run")
    state = saved_state(tmp_path / "run")["state_dict"]
    assert not torch.equal(state["theta"], build_algorithm(*overrides).theta)
    local = torch.cat([value.flatten() for name, value in state.items() if name.split(".")[0] in ("actor", "critic")])
    assert torch.equal(local, state["theta"])  # the policy has the shared parameters
    assert bool((state["mean_square"] > 0).any())


def test_two_workers_resume(tmp_path, monkeypatch):
    monkeypatch.setattr("levin.algorithms.a3c.MAX_STALENESS", 200)  # so that no worker that stands still reaches it
    overrides = [*OVERRIDES, "total_env_steps=1000", "checkpoint.every=100_000"]
    train(compose(overrides), tmp_path / "run")
    before = saved_state(tmp_path / "run")
    resume.resume(run=str(tmp_path / "run"), total_env_steps=2000)
    after = saved_state(tmp_path / "run")
    assert after["levin"]["env_steps"] >= 2000
    assert 5 * after["levin"]["updates"] == after["levin"]["env_steps"]
    assert sum(after["staleness"]) == after["levin"]["updates"]
    assert after["staleness"][-1] == 0  # updates before the resume do not count as staleness
    moved = (after["state_dict"]["theta"] - before["state_dict"]["theta"]).abs().max()
    assert 0 < float(moved) < 0.3  # training continued from the saved parameters


@pytest.mark.usefixtures("only_worker_1_pushes")
def test_workers_share_the_moments_of_adam(tmp_path):
    overrides = [*OVERRIDES, "total_env_steps=1000", "checkpoint.every=100_000", "algo.optimizer=adam", "algo.lr=1e-4"]
    train(compose(overrides), tmp_path / "run")
    state = saved_state(tmp_path / "run")["state_dict"]
    assert not torch.equal(state["theta"], build_algorithm(*overrides).theta)
    assert bool((state["momentum"] != 0).any())
