"""Two processes that share the envs and the batch are one process: the same mathematics, and one end for all."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.fabric.plugins.environments.lightning import find_free_network_port

import ranks_script
from checks import same
from levin import resume
from levin.config.compose import compose
from levin.core.errors import ConfigError, RunError
from levin.runs import checkpoint
from levin.training.distributed import sharding
from levin.training.session import build_run, train
from processes import children, gone, wait_until
from short_runs import SMALL, assert_same_run

RANKS_SCRIPT = Path(__file__).parents[1] / "support" / "ranks_script.py"


def at_once(*commands: list[str]) -> list[subprocess.Popen]:
    """As torchrun does: one process for each rank."""
    port = str(find_free_network_port())
    paths = os.pathsep.join(filter(None, sys.path))
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": paths}
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env={**common, "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, command in enumerate(commands)
    ]


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """The folder of what two ranks have done."""
    folder = tmp_path_factory.mktemp("two")
    command = [str(RANKS_SCRIPT), str(folder)]
    processes = at_once(command, command)
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    return folder


@pytest.mark.parametrize("row", ranks_script.PARALLEL, ids=lambda row: row.algo)
def test_ranks_differ_only_in_what_they_see(row, two):
    last = two / row.algo / "checkpoints" / "last"
    first, second = (torch.load(last / part / "state.ckpt", weights_only=True) for part in (".", "rank1"))
    own = ("running_return", "noise.state", "carry.deter", "carry.stoch", "carry.action")  # one for each env
    assert first["levin"]["iterations"] >= ranks_script.ITERATIONS
    for name, value in first["state_dict"].items():
        assert torch.equal(value, second["state_dict"][name]) != name.endswith(own), name
    assert same(first["optimizer_states"], second["optimizer_states"])
    for count in ("env_steps", "updates", "iterations"):
        assert first["levin"][count] == second["levin"][count]
    seen = [state["loops"]["fit_loop"]["state_dict"]["combined_loader"] for state in (first, second)]
    assert not same(*seen)


@pytest.mark.parametrize("algo", ranks_script.GRADIENTS)
def test_two_halves_of_a_batch_give_the_gradient_of_the_whole(algo, two):
    expected = ranks_script.gradients(algo, None)
    for rank in (0, 1):
        found = torch.load(two / f"{rank}.pt")["gradients"][algo]
        assert len(found) == len(expected) > 2
        for each, other in zip(found, expected, strict=True):
            assert each.dtype == torch.float64
            torch.testing.assert_close(each, other, atol=1e-10, rtol=0)


def test_statistics_are_those_of_all_samples(two):
    *moments, whole = ranks_script.statistics(None)
    found = [torch.load(two / f"{rank}.pt")["statistics"] for rank in (0, 1)]
    for each in found:
        torch.testing.assert_close(each[:-1], moments, atol=1e-10, rtol=1e-12)
    torch.testing.assert_close(torch.cat([each[-1] for each in found]), whole)


PAIR = [*SMALL, "env.num_envs=2", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.threads=1"]


@pytest.mark.parametrize("name", ranks_script.HALVES)
def test_two_halves_are_the_whole_on_two_ranks(name, two):
    straight, halves = two / f"{name}_straight", two / f"{name}_halves"
    assert_same_run(straight, halves)
    first, second = (
        torch.load(run / "checkpoints/320/rank1/state.ckpt", weights_only=True) for run in (straight, halves)
    )
    for key in ("state_dict", "optimizer_states", "rng", "levin"):
        assert same(first[key], second[key]), key
    buffers = [sorted((run / "checkpoints/320/rank1").glob("buffer/*")) for run in (straight, halves)]
    assert [file.read_bytes() for file in buffers[0]] == [file.read_bytes() for file in buffers[1]]
    assert bool(buffers[0]) == (name == "sac")


@pytest.fixture
def running(tmp_path):
    """A run of two ranks in processes of its own, that has begun; and the pid of the second."""
    run = tmp_path / "run"
    words = [*PAIR, "total_env_steps=1_000_000_000", "checkpoint.every=500", f"run={run}"]
    command = [sys.executable, "-m", "levin.train", *words]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        wait_until(lambda: process.poll() is not None or (run / "checkpoints" / "last").exists(), 120)
        assert process.poll() is None, process.communicate(timeout=60)[0]
        (other,) = [
            pid
            for pid in children(process.pid)
            if b"levin.training.distributed.rank" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        yield process, run, other
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=60)


def test_a_killed_rank_ends_the_run(running):
    process, run, other = running
    os.kill(other, signal.SIGKILL)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "rank 1 of 2 ended by signal 9" in said
    assert f"make resume RUN={run}" in said
    assert "Traceback" not in said
    assert gone(other)


@pytest.mark.slow
def test_a_killed_run_takes_its_ranks_with_it_and_goes_on(running):
    process, run, other = running
    process.kill()
    process.wait(60)
    wait_until(lambda: gone(other), 60)
    (*_, newest) = checkpoint.list_checkpoints(run / "checkpoints")
    resume.resume(run=str(run), total_env_steps=int(newest.name) + 64)
    checkpoint.verify(run / "checkpoints" / "last", buffer=True)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_leaves_nobody(number, running):
    process, run, other = running
    os.killpg(process.pid, number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert "Traceback" not in said
    assert said.count("the run is saved and ends") == 1
    assert gone(other)
    assert checkpoint.newest_checkpoint(run, buffer=True).is_file()


@pytest.mark.slow
def test_an_error_of_a_rank_is_that_of_the_run(tmp_path):
    words = [
        "env=gym",
        "env.id=toy_envs:FailingRank-v0",
        "env.action=none",
        "total_env_steps=100_000",
        "eval.episodes=1",
    ]
    with pytest.raises(RunError, match=r"rank 1 of 2 .*the cart has left the track"):
        train(compose([*PAIR, *words]), tmp_path / "run")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["env.num_envs=1"], "env.num_envs=1 is of all 2 ranks together and can't be divided: set env.num_envs=2"),
        (["algo.batch_size=15"], "set algo.batch_size=16"),
        (["algo=reinforce", "env=cartpole"], "set algo.episodes_per_update=2"),
        (
            ["algo=a3c", "env=cartpole", "trainer.strategy=ddp", "trainer.workers=1"],
            "trainer.strategy=hogwild trainer.workers=2",
        ),
        (["algo=a3c", "env=cartpole"], "not devices: trainer.devices=1"),
        (["trainer.devices=0"], "trainer.devices=0"),
    ],
)
def test_what_can_t_be_shared_is_refused(words, said):
    words = ["algo=sac", "env=pendulum", "trainer.devices=2", "env.num_envs=2", *words]
    with pytest.raises(ConfigError, match=said):
        compose(words)


def test_a_run_goes_on_with_as_many_ranks(tmp_path):
    train(compose([*SMALL, "env.num_envs=2", "total_env_steps=64"]), tmp_path / "run")
    with pytest.raises(
        ConfigError, match=r"trainer.devices=2 would change a run that was begun with trainer.devices=1"
    ):
        resume.resume(run=str(tmp_path / "run"), **{"trainer.devices": 2})


def test_a_checkpoint_of_other_ranks_is_refused(two, tmp_path):
    shutil.copytree(two / "sac_halves", tmp_path / "run")
    file = tmp_path / "run" / "config.yaml"
    file.write_text(file.read_text().replace("devices: 2", "devices: 1"))
    with pytest.raises(ConfigError, match=r"the checkpoint is of 2 ranks, and this run has 1: trainer.devices=2"):
        resume.resume(run=str(tmp_path / "run"), total_env_steps=400)


def test_as_many_processes_as_were_asked_for(monkeypatch):
    monkeypatch.setattr("torch.distributed.is_torchelastic_launched", lambda: True)
    for key, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(key, value)
    assert sharding.process_rank(compose(PAIR)) == 1
    with pytest.raises(ConfigError, match=r"2 processes were started for trainer.devices=4 times trainer.num_nodes=1"):
        sharding.process_rank(compose([*PAIR, "trainer.devices=4", "env.num_envs=4"]))
    with pytest.raises(ConfigError, match=r"2 processes were started for trainer.devices=1"):
        sharding.process_rank(compose(SMALL))


def test_each_rank_has_its_share(monkeypatch):
    words = [*PAIR, "env.num_envs=6", "algo.batch_size=10", "algo.buffer_size=100", "algo.random_env_steps=51"]
    monkeypatch.setenv("LOCAL_RANK", "1")
    algorithm, rollouts = build_run(compose(words))
    assert rollouts.env.num_envs == 3
    assert (algorithm.batch_size, algorithm.random_env_steps) == (5, 26)
    assert algorithm.buffer.size == 50
