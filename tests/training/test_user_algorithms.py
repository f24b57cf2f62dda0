"""Algorithms of users: what they change in the replay buffer or keep in attributes survives an exact resume."""

import io
import os
import pickle
import runpy
import subprocess

import pytest
import torch

import kept_states
import user_algorithms
from checks import metrics
from levin import resume
from levin.config.compose import compose
from levin.core import files
from levin.core.errors import RunError
from levin.runs import checkpoint, extra_state
from levin.runs.load import load_algorithm
from levin.training.session import build_run, train
from short_runs import INTERVALS, check_resumed_run_is_identical

DQN = (
    *("algo=dqn", "env=cartpole", "logger=csv", "eval.episodes=2", *INTERVALS, "algo.learning_starts=40"),
    *(
        "algo.steps_per_iteration=32",
        "algo.batch_size=16",
        "algo.hidden_sizes=[16]",
        "algo.replay_ratio=0.5",
        "algo.schedule_env_steps=640",
    ),
)
PPO = (
    *("algo=ppo", "env=cartpole", "env.num_envs=2", "logger=csv", "eval.episodes=2", *INTERVALS),
    *(
        "algo.steps_per_iteration=16",
        "algo.batch_size=16",
        "algo.epochs=2",
        "algo.hidden_sizes=[16]",
        "algo.schedule_env_steps=640",
    ),
)


def use(name: str) -> str:
    return f"algo._target_=user_algorithms.{name}"


@pytest.mark.parametrize("size", [10_000, 150])  # 150: old entries are overwritten between two checkpoints
@pytest.mark.parametrize("storage", ["memory", "memmap"])
def test_prioritized_replay_resumes_exactly(size, storage, tmp_path):
    words = (*DQN, use("PrioritizedDQN"), f"algo.buffer_size={size}", f"algo.buffer_storage={storage}")
    check_resumed_run_is_identical(tmp_path, words, 640)
    folder = tmp_path / "halves/checkpoints/last"
    rewritten = files.load(folder / "buffer/rewritten.ckpt")
    assert set(rewritten) == {"extra.priority"}  # all other keys are in the files that are written once
    checkpoint.verify(folder, buffer=True)


def test_a_replay_whose_entries_stay_is_written_once(tmp_path):
    train(compose([*DQN, "total_env_steps=320"]), tmp_path / "run")
    folders = checkpoint.list_checkpoints(tmp_path / "run/checkpoints")
    assert len(folders) >= 2
    assert not any((folder / "buffer/rewritten.ckpt").exists() for folder in folders)


def test_samplers_of_torchrl_resume_exactly(tmp_path):
    words = (*DQN, use("WithoutReplacement"), "algo.replay_ratio=0.0625", "algo.learning_starts=32")
    check_resumed_run_is_identical(tmp_path, words, 640)


def test_state_in_attributes_resumes_exactly(tmp_path):
    check_resumed_run_is_identical(tmp_path, (*PPO, use("Hoarder")), 640)
    totals = [row["train/total"] for row in metrics(tmp_path / "straight")]
    assert len(set(totals)) == len(totals) > 3
    extra = files.load(tmp_path / "straight/checkpoints/last/state.ckpt")["extra"]["saved"]
    saved = {".".join(filter(None, path)) for path in extra}
    assert {"history", "best", "window", "torch_generator", "head.calls", "head.mean", "late", "new_list"} <= saved
    assert not {"gamma", "lr", "batch_size", "actor", "env"} & saved


@pytest.mark.parametrize("what", ["iterator", "array", "function", "package"])
def test_state_that_can_not_be_saved_is_refused_at_the_first_checkpoint(what, tmp_path, monkeypatch):
    monkeypatch.setattr(user_algorithms.Lost, "what", what)
    with pytest.raises(RunError, match=r"Lost keeps something in the attribute kept .* not_saved = \(\"kept\",\)"):
        train(compose([*PPO, use("Lost"), "total_env_steps=320"]), tmp_path / "run")
    assert not checkpoint.list_checkpoints(tmp_path / "run/checkpoints")
    train(compose([*PPO, use("Forgiven"), "total_env_steps=320"]), tmp_path / "forgiven")
    resume.resume(run=str(tmp_path / "forgiven"), total_env_steps=352)


def test_lists_that_are_one_list_stay_one(tmp_path):
    words = (*PPO, use("Hoarder"))
    train(compose([*words, "total_env_steps=160"]), tmp_path / "run")
    seen = []
    original = user_algorithms.Hoarder.training_step

    def step(self, *arguments):
        original(self, *arguments)
        seen.append(self.same_list is self.history)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(user_algorithms.Hoarder, "training_step", step)
        resume.resume(run=str(tmp_path / "run"), total_env_steps=192)
    assert seen
    assert all(seen)


def test_a_parameter_in_a_list_is_saved_once(tmp_path):
    train(compose([*DQN, "total_env_steps=320"]), tmp_path / "run")  # it keeps lists of its parameters
    state = torch.load(tmp_path / "run/checkpoints/last/state.ckpt", weights_only=True)
    assert "extra" not in state


def test_states_of_every_kind_survive_two_resumes(tmp_path):
    words = (*PPO, "algo._target_=kept_states.Keeper", "eval.every=1000", "eval.episodes=1", "log_every=32")
    train(compose([*words, "total_env_steps=192"]), tmp_path / "straight")
    train(compose([*words, "total_env_steps=64"]), tmp_path / "parts")
    resume.resume(run=str(tmp_path / "parts"), total_env_steps=128)
    resume.resume(run=str(tmp_path / "parts"), total_env_steps=192)
    straight, parts = metrics(tmp_path / "straight"), metrics(tmp_path / "parts")
    assert len(straight) >= 6
    for number, state in enumerate(kept_states.STATES):
        column = f"train/shown_{number}"
        assert [row[column] for row in straight] == [row[column] for row in parts], state
    assert straight == parts


def test_a_checkpoint_makes_no_object_of_a_class_that_is_not_the_users(tmp_path, capsys):
    words = (*PPO, "algo._target_=kept_states.Keeper", "total_env_steps=64")
    train(compose([*words]), tmp_path / "run")
    state = tmp_path / "run/checkpoints/last/state.ckpt"
    extra = files.load(state)["extra"]
    for attack in (subprocess.Popen, os.system, getattr, runpy.run_path):
        content = pickle.dumps((("", "kept"), attack), protocol=4)
        loader = extra_state.Loader(None, {}, io.BytesIO(content))
        with pytest.raises((ValueError, AttributeError, pickle.UnpicklingError)):
            loader.load()
    algorithm = load_algorithm(tmp_path / "run")
    assert "a policy must not depend on them" in capsys.readouterr().err  # some begin only in a training run
    algorithm.configure_optimizers()
    extra_state.ExtraState(algorithm).restore(extra)
    kept = algorithm.holders[list(kept_states.STATES).index("new objects")].kept
    assert [type(each) for each in kept] == [kept_states.Episode] * 2


def test_values_on_a_gpu_are_restored_on_the_device_of_the_resumed_run():
    algorithm, _ = build_run(compose(list(PPO)))
    state = extra_state.ExtraState(algorithm)
    algorithm.late = [torch.arange(3.0), torch.Generator().manual_seed(5), torch.device("cpu")]
    saved = state.save()
    data = saved["data"].numpy().tobytes()
    assert data.count(b"\x03cpu") == 4  # also that of the state of the generator
    # As if saved on a device that this machine does not have.
    saved["data"] = torch.frombuffer(bytearray(data.replace(b"\x03cpu", b"\x03xpu")), dtype=torch.uint8)
    resumed, _ = build_run(compose(list(PPO)))
    extra_state.ExtraState(resumed).restore(saved)
    tensor, generator, device = resumed.late
    assert tensor.tolist() == [0, 1, 2]
    assert torch.equal(generator.get_state(), algorithm.late[1].get_state())
    assert {tensor.device, generator.device, device} == {torch.device("cpu")}
    extra_state._set_generator_state(generator, torch.zeros(16, dtype=torch.uint8))  # the size on a GPU
