"""Data-parallel runs: two ranks compute what one process computes, and end together."""

import io
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning.pytorch.strategies import DDPStrategy

import ranks_script
from checks import same
from levin import resume
from levin.config.compose import compose
from levin.core import distributed
from levin.core.errors import ConfigError, RunError
from levin.runs import checkpoint
from levin.runs import folder as run_folder
from levin.training.distributed import data_parallel, sharding
from levin.training.distributed import rank as rank_script
from levin.training.distributed.data_parallel import DataParallel
from levin.training.session import build_run, train
from processes import children, has_exited, start_python, wait_until
from short_runs import SMALL, assert_identical_runs

RANKS_SCRIPT = Path(__file__).parents[1] / "support" / "ranks_script.py"


def at_once(*commands: list[str]) -> list[subprocess.Popen]:
    """Start one process per rank, as torchrun does."""
    port = str(find_free_network_port())
    paths = os.pathsep.join(filter(None, sys.path))
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": paths}
    return [
        start_python(*command, env={**common, "LOCAL_RANK": str(rank)}, stderr=subprocess.STDOUT)
        for rank, command in enumerate(commands)
    ]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> Path:
    """Run ranks_script.py on two ranks and return its output folder."""
    folder = tmp_path_factory.mktemp("two_ranks")
    command = [str(RANKS_SCRIPT), str(folder)]
    processes = at_once(command, command)
    output = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], output
    return folder


@pytest.mark.parametrize("row", ranks_script.PARALLEL, ids=lambda row: row.algo)
def test_ranks_share_parameters_and_differ_in_their_data(row, two_ranks):
    last = two_ranks / row.algo / "checkpoints" / "last"
    first, second = (torch.load(last / part / "state.ckpt", weights_only=True) for part in (".", "rank1"))
    # State of each env.
    own = ("running_return", "noise.state", "carry.deter", "carry.stoch", "carry.action", "carry.state")
    assert first["levin"]["iterations"] >= ranks_script.ITERATIONS
    assert first["levin"]["updates"] > 0
    for name, value in first["state_dict"].items():
        assert torch.equal(value, second["state_dict"][name]) != name.endswith(own), name
    assert same(first["optimizer_states"], second["optimizer_states"])
    for count in ("env_steps", "updates", "iterations"):
        assert first["levin"][count] == second["levin"][count]
    seen = [state["loops"]["fit_loop"]["state_dict"]["combined_loader"] for state in (first, second)]
    assert not same(*seen)


@pytest.mark.parametrize("algo", ranks_script.GRADIENTS)
def test_gradients_of_two_half_batches_average_to_that_of_the_full_batch(algo, two_ranks):
    expected = ranks_script.gradients(algo, None)
    for rank in (0, 1):
        actual = torch.load(two_ranks / f"{rank}.pt")["gradients"][algo]
        assert len(actual) == len(expected) > 2
        for each, other in zip(actual, expected, strict=True):
            assert each.dtype == torch.float64
            torch.testing.assert_close(each, other, atol=1e-10, rtol=0)


def test_running_statistics_cover_the_samples_of_all_ranks(two_ranks):
    *moments, standardized = ranks_script.statistics(None)
    actual = [torch.load(two_ranks / f"{rank}.pt")["statistics"] for rank in (0, 1)]
    for each in actual:
        torch.testing.assert_close(each[:-1], moments, atol=1e-10, rtol=1e-12)
    torch.testing.assert_close(torch.cat([each[-1] for each in actual]), standardized)


PAIR = [*SMALL, "env.num_envs=2", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.threads=1"]


@pytest.mark.parametrize("name", ranks_script.HALVES)
def test_a_resumed_run_on_two_ranks_is_identical(name, two_ranks):
    straight, halves = two_ranks / f"{name}_straight", two_ranks / f"{name}_halves"
    assert_identical_runs(straight, halves)
    first, second = (
        torch.load(run / "checkpoints/320/rank1/state.ckpt", weights_only=True) for run in (straight, halves)
    )
    for key in ("state_dict", "optimizer_states", "rng", "levin"):
        assert same(first[key], second[key]), key
    buffers = [sorted((run / "checkpoints/320/rank1").glob("buffer/*")) for run in (straight, halves)]
    assert [file.read_bytes() for file in buffers[0]] == [file.read_bytes() for file in buffers[1]]
    assert bool(buffers[0]) == (name == "sac")


def test_a_metric_that_one_rank_records_is_averaged_under_its_name(monkeypatch):
    algorithm, _ = build_run(compose(SMALL))
    algorithm.recorded = {"loss": (torch.tensor(2.0), 2), "mine": (torch.tensor(5.0), 1)}
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "gather_objects", lambda own: [own, {"train/other": 7.0, "train/loss": 2.0}])
    metrics = algorithm.pop_metrics()
    assert metrics == {"train/loss": 1.5, "train/mine": 5.0, "train/other": 7.0, "time/sample": 0.0}


def test_a_rank_does_not_outlive_rank_0(monkeypatch):
    calls = []
    monkeypatch.setattr(rank_script, "signal_at_parents_end", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(rank_script, "train_rank", lambda *_: calls.append("train"))
    started = SimpleNamespace(stdin=io.StringIO())
    monkeypatch.setattr(started.stdin, "close", lambda: None)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: started)
    launcher = data_parallel.RanksLauncher(DataParallel(compose(PAIR), Path("run"), None))
    launcher.strategy.cluster_environment = SimpleNamespace(main_address="127.0.0.1", main_port=1)
    launcher.reports = Path("reports")
    launcher._start(1)
    monkeypatch.setattr("sys.stdin", io.StringIO(started.stdin.getvalue()))
    rank_script.main()
    assert calls == [(signal.SIGKILL, os.getpid()), "train"]


def test_a_rank_that_does_not_end_after_the_run_is_killed(monkeypatch):
    monkeypatch.setattr(data_parallel, "GRACE", 0.1)
    launcher = data_parallel.RanksLauncher(SimpleNamespace(num_processes=2))
    monkeypatch.setattr(launcher, "_start", lambda _: subprocess.Popen(["sleep", "60"]))
    assert launcher.launch(lambda: "result", trainer=None) == "result"
    assert launcher.processes[0].returncode == -signal.SIGKILL


@pytest.fixture
def running(tmp_path):
    """Start a run with two ranks in new processes; yield its process, its folder and the pid of the second rank."""
    run = tmp_path / "run"
    overrides = [*PAIR, "total_env_steps=1_000_000_000", "checkpoint.every=500", f"run={run}"]
    process = start_python("-m", "levin.train", *overrides, stderr=subprocess.STDOUT, start_new_session=True)
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
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "rank 1 of 2 ended by signal 9" in output
    assert f"make resume RUN={run}" in output
    assert "Traceback" not in output
    assert has_exited(other)


@pytest.mark.parametrize("name", ["barrier", "broadcast", "reduce"])
def test_a_rank_that_is_lost_in_a_call_of_lightning_is_recognised(name, monkeypatch, tmp_path):
    def fail(*_):
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(DDPStrategy, name, fail)
    strategy = DataParallel(compose(PAIR), tmp_path, None)
    with pytest.raises(distributed.RankLostError):
        getattr(strategy, name)(torch.zeros(1))


@pytest.mark.slow
def test_killing_a_run_ends_its_ranks_and_it_can_be_resumed(running):
    process, run, other = running
    process.kill()
    process.wait(60)
    wait_until(lambda: has_exited(other), 60)
    (*_, newest) = checkpoint.list_checkpoints(run / "checkpoints")
    resume.resume(run=str(run), total_env_steps=int(newest.name) + 64)
    checkpoint.verify(run / "checkpoints" / "last", buffer=True)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_run_and_ends_all_ranks(number, running):
    process, run, other = running
    os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert "Traceback" not in output
    assert output.count("the run will be saved and end") == 1
    assert has_exited(other)
    assert checkpoint.newest_checkpoint(run, buffer=True).is_file()


@pytest.mark.slow
def test_a_run_whose_second_rank_gets_a_signal_has_not_ended(running):
    process, run, other = running
    os.kill(other, signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert "to continue: make resume" in output
    assert not run_folder.has_ended(run, 1_000_000_000)


def test_ranks_on_several_machines_need_a_launcher(tmp_path):
    with pytest.raises(ConfigError, match=r"trainer.num_nodes=2 needs torchrun or srun"):
        train(compose([*PAIR, "trainer.devices=1", "trainer.num_nodes=2"]), tmp_path / "run")


@pytest.mark.slow
def test_an_error_in_a_rank_is_reported_by_the_run(tmp_path):
    overrides = [
        "env=gym",
        "env.id=toy_envs:FailingRank-v0",
        "env.action=none",
        "total_env_steps=100_000",
        "eval.episodes=1",
    ]
    with pytest.raises(RunError, match=r"rank 1 of 2 .*the cart has left the track"):
        train(compose([*PAIR, *overrides]), tmp_path / "run")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["env.num_envs=1"], "env.num_envs=1 can't be divided equally among 2 ranks: set env.num_envs=2"),
        (["algo.batch_size=15"], "set algo.batch_size=16"),
        (["algo=reinforce", "env=cartpole"], "set algo.episodes_per_update=2"),
        (
            ["algo=a3c", "env=cartpole", "trainer.strategy=ddp", "trainer.workers=1"],
            "trainer.strategy=hogwild trainer.workers=2",
        ),
        (["algo=a3c", "env=cartpole"], "not trainer.devices=2: set trainer.devices=1"),
        (["algo=a3c", "env=cartpole", "trainer.devices=1", "trainer.num_nodes=2"], "not trainer.num_nodes=2"),
        (["trainer.devices=0"], "trainer.devices=0"),
    ],
)
def test_settings_that_cannot_be_divided_among_ranks_are_refused(overrides, message):
    overrides = ["algo=sac", "env=pendulum", "trainer.devices=2", "env.num_envs=2", *overrides]
    with pytest.raises(ConfigError, match=message):
        compose(overrides)


def test_the_number_of_ranks_cannot_change_on_resume(tmp_path):
    train(compose([*SMALL, "env.num_envs=2", "total_env_steps=64"]), tmp_path / "run")
    with pytest.raises(
        ConfigError, match=r"trainer.devices=2 would change a run that was started with trainer.devices=1"
    ):
        resume.resume(run=str(tmp_path / "run"), **{"trainer.devices": 2})


def test_a_checkpoint_of_another_world_size_is_refused(two_ranks, tmp_path):
    shutil.copytree(two_ranks / "sac_halves", tmp_path / "run")
    file = tmp_path / "run" / "config.yaml"
    file.write_text(file.read_text().replace("devices: 2", "devices: 1"))
    with pytest.raises(
        ConfigError, match=r"the checkpoint was saved by 2 ranks, but this run has 1: set trainer.devices=2"
    ):
        resume.resume(run=str(tmp_path / "run"), total_env_steps=400)


def test_the_number_of_processes_must_match_the_config(monkeypatch):
    monkeypatch.setattr("torch.distributed.is_torchelastic_launched", lambda: True)
    for key, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(key, value)
    assert sharding.process_rank(compose(PAIR)) == 1
    with pytest.raises(
        ConfigError, match=r"2 processes were started, but trainer.devices=4 and trainer.num_nodes=1 need 4"
    ):
        sharding.process_rank(compose([*PAIR, "trainer.devices=4", "env.num_envs=4"]))
    with pytest.raises(ConfigError, match=r"2 processes were started, but trainer.devices=1"):
        sharding.process_rank(compose(SMALL))


def test_envs_batch_and_buffer_are_divided_among_ranks(monkeypatch):
    overrides = [*PAIR, "env.num_envs=6", "algo.batch_size=10", "algo.buffer_size=100", "algo.random_env_steps=51"]
    monkeypatch.setenv("LOCAL_RANK", "1")
    algorithm, rollouts = build_run(compose(overrides))
    assert rollouts.env.num_envs == 3
    assert (algorithm.batch_size, algorithm.random_env_steps) == (5, 26)
    assert algorithm.buffer.size == 50


def test_the_cores_of_a_node_are_divided_among_its_own_ranks(monkeypatch):
    threads = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    overrides = ["trainer.devices=4", "trainer.num_nodes=2", "trainer.threads=null", "env.num_envs=8"]
    build_run(compose([*SMALL, "trainer.accelerator=cpu", *overrides]))
    assert threads == [16]
