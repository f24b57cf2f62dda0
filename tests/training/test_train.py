"""Training runs: counts of steps and updates, metrics, checkpoints, memory use."""

import csv
import ctypes
import gc
import os
import pickle
import resource
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from lightning import Callback

import levin
from checks import metrics, run_without_trainer, same, with_value
from levin import evaluate, resume
from levin.algorithms.sac import SAC
from levin.config.compose import compose
from levin.core.errors import ConfigError
from levin.training.session import build_run, train
from processes import run_python
from short_runs import SMALL


class Recorder(Callback):
    """Callback that records policy versions and progress counters of every iteration."""

    instances: ClassVar[list["Recorder"]] = []

    def __init__(self) -> None:
        self.versions, self.rows = [], []
        self.instances.append(self)

    def on_train_batch_start(self, trainer, algorithm, batch, batch_idx) -> None:
        self.versions.append((batch["policy_version"].unique().tolist(), algorithm.iterations))
        self.first = batch["observation"][0, 0].clone()

    def on_train_batch_end(self, trainer, algorithm, outputs, batch, batch_idx) -> None:
        self.algorithm = algorithm
        self.rows.append((algorithm.env_steps, algorithm.updates, trainer.global_step))


def run(folder: Path, *overrides: str, **kwargs):
    Recorder.instances.clear()
    all_overrides = [*SMALL, *overrides, "+callbacks.recorder={_target_:test_train.Recorder}"]
    train(compose(all_overrides), folder, **kwargs)
    return Recorder.instances[0]


@pytest.mark.parametrize("size", [1, 32])
def test_updates_are_env_steps_minus_learning_starts(size, tmp_path):
    recorder = run(tmp_path / "run", f"algo.steps_per_iteration={size}", "total_env_steps=160")
    env_steps, updates, _ = recorder.rows[-1]
    assert env_steps == 160
    assert updates == 160 - 40
    for env_steps, updates, _ in recorder.rows:
        assert updates == max(0, env_steps - 40)
    assert [env_steps for env_steps, _, _ in recorder.rows] == list(range(size, 161, size))


@pytest.mark.parametrize(("ratio", "envs", "expected"), [(0.3, 1, 36), (2.5, 2, 300), (0.0, 1, 0)])
def test_a_fractional_replay_ratio_carries_its_remainder(ratio, envs, expected, tmp_path):
    overrides = [
        f"algo.replay_ratio={ratio}",
        f"env.num_envs={envs}",
        "algo.steps_per_iteration=4",
        "total_env_steps=160",
    ]
    recorder = run(tmp_path / "run", *overrides)
    assert recorder.rows[-1][:2] == (160, expected)
    for env_steps, updates, _ in recorder.rows:
        assert updates == int(ratio * max(0, env_steps - 40))


def test_every_rollout_is_collected_by_the_newest_policy(tmp_path):
    recorder = run(tmp_path / "run", "total_env_steps=320")
    assert recorder.versions == [([i], i) for i in range(10)]


def test_a_run_that_is_evaluated_only_at_its_end_says_so(tmp_path, capsys):
    train(compose([*SMALL, "total_env_steps=64", "eval.every=65"]), tmp_path / "one")
    assert "eval.every=65 is more than total_env_steps: the run is evaluated once" in capsys.readouterr().out
    train(compose([*SMALL, "total_env_steps=64", "eval.every=64"]), tmp_path / "two")
    assert "eval.every" not in capsys.readouterr().out


def test_env_steps_do_not_depend_on_the_number_of_optimizers(tmp_path):
    recorder = run(tmp_path / "run", "total_env_steps=160")
    assert recorder.rows[-1][0] == 160
    assert {global_step for _, _, global_step in recorder.rows} == {0}  # Lightning's counter stays at 0


def test_metrics_are_indexed_by_env_steps(tmp_path):
    run(tmp_path / "run", "total_env_steps=640")
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert next(iter(rows[0])) == "env_steps"
    names = {"updates", "episode/return", "episode/length", "eval/return_mean", "eval/return_std", "train/critic_loss"}
    phases = {f"time/{name}" for name in ("collect", "sample", "update", "evaluate", "log")}
    assert names | phases | {"time/env_steps_per_second", "time/updates_per_second"} <= rows[0].keys()
    evaluated = [int(row["env_steps"]) for row in rows if row["eval/return_mean"]]
    assert evaluated == [224, 416, 608, 640]
    assert sorted(int(row["env_steps"]) for row in rows) == [int(row["env_steps"]) for row in rows]
    folders = sorted(int(each.name) for each in (tmp_path / "run" / "checkpoints").iterdir() if each.name.isdigit())
    assert folders[-2:] == [608, 640]
    assert os.readlink(tmp_path / "run" / "checkpoints" / "last") == "640"


def test_an_evaluation_at_the_start_adds_a_row_and_changes_nothing_else(tmp_path):
    words = [*SMALL, "total_env_steps=224", "eval.every=100"]
    train(compose(words), tmp_path / "without")
    train(compose([*words, "eval.at_start=true"]), tmp_path / "with")
    first, *rows = metrics(tmp_path / "with")
    assert (first["env_steps"], first["updates"]) == ("0", "0")
    assert float(first["eval/return_mean"]) < 0
    assert [
        {key: value for key, value in row.items() if key in rows[0]} for row in metrics(tmp_path / "without")
    ] == rows
    resume.resume(run=str(tmp_path / "with"), total_env_steps=256)
    assert [row["env_steps"] for row in metrics(tmp_path / "with")].count("0") == 1
    parameters = [
        torch.load(tmp_path / run / "checkpoints/224/state.ckpt", weights_only=True)["state_dict"]
        for run in ("with", "without")
    ]
    assert same(*parameters)


def test_evaluation_does_not_change_training(tmp_path):
    often = run(tmp_path / "often", "eval.every=32", "total_env_steps=224", "env.normalize_observation=true")
    never = run(tmp_path / "never", "eval.every=100_000", "total_env_steps=224", "env.normalize_observation=true")
    assert same(dict(often.algorithm.state_dict()), dict(never.algorithm.state_dict()))
    assert float(often.algorithm.observation_normalizer.moments.count) == 224


def test_running_statistics_are_saved_and_applied_by_the_policy(tmp_path):
    recorder = run(
        tmp_path / "run", "env.normalize_observation=true", "env.normalize_reward=true", "total_env_steps=96"
    )
    policy = levin.load(tmp_path / "run")
    observation = np.array([0.3, -0.2, 0.5], np.float32)
    normal = recorder.algorithm.observation_normalizer(torch.from_numpy(observation))
    expected = 2 * recorder.algorithm.actor(normal.unsqueeze(0)).mode[0]  # Pendulum's actions are in [-2, 2]
    np.testing.assert_allclose(policy(observation), expected.detach().numpy(), rtol=1e-6)
    assert policy(np.stack([observation] * 5)).shape == (5, 1)
    assert float(policy.algorithm.reward_normalizer.moments.count) == 96


def test_sampled_batches_are_normalized(tmp_path):
    recorder = run(
        tmp_path / "run", "env.normalize_observation=true", "env.normalize_reward=true", "total_env_steps=96"
    )
    algorithm = recorder.algorithm
    algorithm.updates = 0
    algorithm.learning_starts, algorithm.batch_size = 0, 4096
    batch = next(iter(algorithm.replay()))
    raw = algorithm.buffer.data
    torch.testing.assert_close(batch["observation"].mean(0), torch.zeros(3), atol=0.15, rtol=0)
    assert float(raw["observation"].std(0).max()) != pytest.approx(1, abs=0.1)
    assert float(batch["next", "reward"].std()) < float(raw["next", "reward"].std())


def test_loading_in_a_bare_interpreter_and_training_need_no_optional_package(tmp_path):
    run(tmp_path / "run", "total_env_steps=96")
    path = tmp_path / "run" / "checkpoints" / "last" / "state.ckpt"
    code = """
import sys
for name in ("mujoco", "Box2D", "ale_py", "dm_control", "shimmy", "rliable", "ray"):
    sys.modules[name] = None
from levin.algorithms.sac import SAC
loaded = SAC.load_from_checkpoint(sys.argv[2])
assert (loaded.env_steps, loaded.updates) == (96, 56), (loaded.env_steps, loaded.updates)
import levin, numpy
print(levin.load(sys.argv[1] + "/run")(numpy.zeros(3)))
from levin import train
sys.argv = ["train", "env=pendulum", "debug=smoke", "total_env_steps=128", "run=" + sys.argv[1] + "/new"]
train.main()
from levin.envs.config import EnvConfig
from levin.envs.factory import make_env
env = make_env(EnvConfig(id="CartPole-v1", num_envs=2), seed=0)
env.reset()
"""
    answer = run_python("-c", code, str(tmp_path), str(path), forked=False)  # new: nothing is imported yet
    assert answer.returncode == 0, answer.stderr
    torch.load(path, weights_only=True)


def test_target_networks_are_restored_from_the_checkpoint(tmp_path):
    recorder = run(tmp_path / "run", "total_env_steps=160")
    loaded = SAC.load_from_checkpoint(tmp_path / "run" / "checkpoints" / "last" / "state.ckpt")
    for saved_state, target, online in zip(
        recorder.algorithm.target_parameters, loaded.target_parameters, loaded.critic_parameters, strict=True
    ):
        assert torch.equal(saved_state, target)
        assert not torch.equal(target, online)


def test_resume_continues_metrics_and_total(tmp_path, capsys):
    run(tmp_path / "run", "total_env_steps=320")
    before = metrics(tmp_path / "run")
    assert before[-1]["env_steps"] == "320"
    resume.resume(run=str(tmp_path / "run"), total_env_steps=640)
    assert "320 -> 640" in capsys.readouterr().out
    after = metrics(tmp_path / "run")
    # The final evaluation of the first run is dropped on resume, because an uninterrupted run has none at this step.
    assert after[: len(before) - 1] == [{**dict.fromkeys(after[0], ""), **row} for row in before[:-1]]
    assert int(after[-1]["env_steps"]) == 640
    steps = [int(row["env_steps"]) for row in after]
    assert len(set(steps)) == len(steps)


def test_resuming_a_complete_run_changes_nothing(tmp_path, capsys):
    run(tmp_path / "run", "total_env_steps=96")
    before = (tmp_path / "run" / "config.yaml").read_text()
    assert resume.resume(run=str(tmp_path / "run")) is None
    assert "complete with 96 env steps" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="larger"):
        resume.resume(run=str(tmp_path / "run"), total_env_steps=64)
    assert (tmp_path / "run" / "config.yaml").read_text() == before


def test_a_run_stopped_by_lightning_is_saved_and_can_be_continued(tmp_path):
    overrides = ["+trainer.max_time=00:00:00:02", "total_env_steps=1_000_000", "checkpoint.every=1_000_000"]
    recorder = run(tmp_path / "run", *overrides)
    (folder,) = (each for each in (tmp_path / "run" / "checkpoints").iterdir() if each.name.isdigit())
    assert int(folder.name) == recorder.rows[-1][0] > 0
    state = torch.load(folder / "state.ckpt", weights_only=True)
    again = run(tmp_path / "run", "total_env_steps=" + str(int(folder.name) + 64), ckpt_path=folder / "state.ckpt")
    assert [row[0] for row in again.rows] == [int(folder.name) + 32, int(folder.name) + 64]
    assert state["levin"]["env_steps"] == int(folder.name)


def test_the_newest_and_the_best_checkpoints_are_kept(tmp_path, monkeypatch):
    results = iter([5.0, 9.0, 1.0, 2.0, 3.0, 4.0])
    monkeypatch.setattr("levin.training.evaluation.evaluate", lambda *_: ([next(results)], [1]))
    run(tmp_path / "run", "eval.every=32", "checkpoint.every=32", "checkpoint.keep=2", "total_env_steps=192")
    kept = {int(each.name) for each in (tmp_path / "run" / "checkpoints").iterdir() if each.name.isdigit()}
    assert kept == {64, 160, 192}


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 32])
def test_sac_solves_pendulum(size, tmp_path):
    overrides = ["algo=sac", "env=pendulum", "logger=csv", "eval.episodes=100", "eval.every=20_000"]
    result = train(compose([*overrides, f"algo.steps_per_iteration={size}"]), tmp_path / "run")
    assert result is not None
    assert result >= -180  # RL Baselines3 Zoo: -157


@pytest.mark.parametrize("collector", ["torchrl"])
def test_torchrl_collector_trains(collector, tmp_path):
    recorder = run(tmp_path / "run", f"collector={collector}", "total_env_steps=160")
    assert recorder.rows[-1][:2] == (160, 120)


def test_memmap_storage_and_bf16_train(tmp_path):
    recorder = run(
        tmp_path / "run", "algo.buffer_storage=memmap", "trainer.precision=bf16-mixed", "total_env_steps=160"
    )
    assert recorder.rows[-1][:2] == (160, 120)
    assert all(parameter.dtype == torch.float32 for parameter in recorder.algorithm.parameters())


def test_any_trainer_argument_can_be_set(tmp_path, caplog):
    caplog.set_level("INFO")
    run(tmp_path / "run", "+trainer.profiler=simple", "total_env_steps=64")
    assert "run_training_batch" in caplog.text


@pytest.mark.usefixtures("some_trees")
def test_every_sac_hyper_parameter_has_an_effect(tmp_path):
    uniform = compose([*SMALL, "total_env_steps=96"])
    prioritized = with_value(uniform, "algo.replay", "prioritized")
    of_uniform, of_prioritized = run_without_trainer(uniform), run_without_trainer(prioritized)
    assert same(dict(run(tmp_path / "run", "total_env_steps=96").algorithm.state_dict()), of_uniform)
    changes = {
        "gamma": 0.5,
        "tau": 0.5,
        "actor_lr": 1e-2,
        "critic_lr": 1e-2,
        "alpha_lr": 1e-2,
        "initial_alpha": 0.1,
        "target_entropy": 3.0,
        "batch_size": 8,
        "replay_ratio": 0.5,
        "learning_starts": 20,
        "random_env_steps": 80,
        "buffer_size": 50,
        "n_step": 3,
        "replay": "prioritized",
        "priority_alpha": 0.9,
        "priority_beta": 0.9,
        "schedule_env_steps": 80,
        "steps_per_iteration": 8,
        "hidden_sizes": "[16,8]",
        "activation": "tanh",
        "network": "layer_norm",
    }
    # The storage of the buffer and compiling do not change results.
    assert changes.keys() == set(uniform.algo) - {"_target_", "buffer_storage", "compile"}
    for name, value in changes.items():
        base, expected = uniform, of_uniform
        if name.startswith(("priority", "schedule")):
            base, expected = prioritized, of_prioritized
        assert not same(expected, run_without_trainer(with_value(base, f"algo.{name}", value))), name


def test_evaluate_writes_its_file(tmp_path):
    run(tmp_path / "run", "total_env_steps=64")
    first = evaluate.evaluate_run(run=str(tmp_path / "run"), episodes=3)
    assert first == evaluate.evaluate_run(run=str(tmp_path / "run"), episodes=3)
    assert first["return_mean"] != evaluate.evaluate_run(run=str(tmp_path / "run"), episodes=3, seed=2)["return_mean"]
    assert first.keys() >= {"return_mean", "return_std", "episodes", "env_steps"}
    assert (tmp_path / "run" / "evaluation.json").exists()


def test_a_replay_buffer_uses_no_more_memory_than_its_tensors():
    code = """
import resource, torch
from tensordict import TensorDict
from levin.config.compose import compose
from levin.training.session import build_run
algorithm, loader = build_run(compose(["env=halfcheetah"]))
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
def chunk(n):
    flags = torch.zeros(n, 1, 1)
    after = {"observation": torch.zeros(n, 1, 17), "reward": flags, "terminated": flags.bool()}
    return TensorDict({"observation": torch.zeros(n, 1, 17), "action": torch.zeros(n, 1, 6), "next": after}, (n, 1))
warm = resident()
for _ in range(1000):
    algorithm.buffer.extend(chunk(1000))
assert len(algorithm.buffer) == 1_000_000
tensors = 1_000_000 * (17 * 4 + 17 * 4 + 6 * 4 + 4 + 1)
print((resident() - warm) / tensors)
"""
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert float(answer.stdout.split()[-1]) <= 1.05


def test_memory_does_not_grow(tmp_path):
    resident = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, algorithm, *_):
            if algorithm.iterations % 500 == 0:
                gc.collect()
                ctypes.CDLL("libc.so.6").malloc_trim(0)  # freed memory does not count
                pages = int(Path("/proc/self/statm").read_text().split()[1])
                resident.append(pages * resource.getpagesize() / 2**20)

    overrides = ["algo.steps_per_iteration=1", "algo.buffer_size=100", "eval.every=100_000", "checkpoint.every=100_000"]
    Watch_instances.append(Watch())
    run(tmp_path / "run", *overrides, "total_env_steps=3000", "+callbacks.watch={_target_:test_train.make_watch}")
    assert len(resident) == 6
    assert resident[-1] - resident[1] < 8, resident  # MiB over 2000 iterations


Watch_instances: list[Callback] = []


def make_watch() -> Callback:
    return Watch_instances.pop()


def test_checkpoints_hold_only_tensors_and_plain_values(tmp_path):
    run(tmp_path / "run", "total_env_steps=64")
    for file in (tmp_path / "run" / "checkpoints" / "64").rglob("*"):
        if file.is_file() and file.name != "manifest.json":
            torch.load(file, weights_only=True)
    torch.save({"env": build_run}, tmp_path / "evil.ckpt")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "evil.ckpt", weights_only=True)
