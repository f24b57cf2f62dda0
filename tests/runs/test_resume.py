"""An interrupted run is the uninterrupted one, to the last bit; and what is damaged is never loaded."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest

from checks import metrics, same, saved
from levin import resume
from levin.config.compose import compose
from levin.core.errors import ConfigError
from levin.runs import checkpoint
from levin.training.guards import Preemption
from levin.training.session import train
from short_runs import CLOCKS, SMALL, TINY, Killed, assert_same_run, in_two_halves, kill, loader_state

VARIANTS = {
    "one step per iteration": ("algo.steps_per_iteration=1",),
    "a fractional replay ratio": ("algo.replay_ratio=0.3", "algo.steps_per_iteration=7"),
    "several envs, normalisers": (
        "env.num_envs=3",
        "env.normalize_observation=true",
        "env.normalize_reward=true",
        "algo.steps_per_iteration=10",
    ),
    "async envs": ("env.num_envs=2", "env.vectorization=async"),
    "a buffer that wraps": ("algo.buffer_size=77",),
    "a memmap buffer": ("algo.buffer_storage=memmap",),
    "bf16": ("trainer.precision=bf16-mixed",),
    "action repeat": ("env.action_repeat=3",),
}


@pytest.mark.parametrize("words", VARIANTS.values(), ids=VARIANTS.keys())
def test_two_halves_are_the_whole(words, tmp_path):
    in_two_halves(tmp_path, (*TINY, *words), 448)


def test_two_halves_are_the_whole_of_twin_episodes(tmp_path):
    words = ("algo=reinforce", "env=cartpole", "algo.advantage=self_critical", "algo.transitions_per_update=30")
    words += ("algo.schedule_env_steps=448",)
    in_two_halves(tmp_path, (*words, "algo.hidden_sizes=[8]", "eval.episodes=1", *CLOCKS), 448)


def test_two_halves_are_the_whole_with_actions_that_critics_read(tmp_path):
    """What a sampled estimator of the actor draws, goes on as well."""
    words = ("algo=sac_discrete", "env=gym", "env.id=toy_envs:Buttons-v0", "algo.critic=state_action")
    words += ("algo.actor_estimator=loo", "algo.learning_starts=40", "algo.batch_size=16", "algo.hidden_sizes=[8]")
    in_two_halves(tmp_path, (*words, "eval.episodes=1", *CLOCKS), 448)


def test_two_halves_are_the_whole_on_any_gymnasium_id(tmp_path):
    in_two_halves(tmp_path, (*TINY, "env=gym", "env.id=toy_envs:Point-v0", "env.action=rescale"), 448)


def test_torchrl_s_collector_begins_new_episodes(tmp_path):
    train(compose([*TINY, "collector=torchrl", "total_env_steps=224"]), tmp_path / "run")
    before = saved(tmp_path / "run")
    resume.resume(run=str(tmp_path / "run"), total_env_steps=225)
    after = saved(tmp_path / "run")
    loader, earlier = loader_state(after), loader_state(before)
    assert loader["episodes"] == [earlier["episodes"][0] + 1]
    assert loader["open_length"] == [32]
    assert loader["open_return"] == pytest.approx([float(after["buffer"]["data"]["next.reward"][224:256].sum())])
    old, new = (each["buffer"]["data"] for each in (before, after))
    assert same({key: value[:224] for key, value in new.items()}, old)
    assert after["levin"]["updates"] == before["levin"]["updates"] + 32


MUJOCO = ("halfcheetah", "ant", "humanoid")


@pytest.mark.parametrize("env", MUJOCO)
def test_two_halves_are_the_whole_on_mujoco(env, tmp_path):
    in_two_halves(tmp_path, (*TINY, f"env={env}", "eval.every=300", "eval.episodes=1"), 448)


@pytest.mark.slow
@pytest.mark.parametrize("env", ["pendulum", *MUJOCO])
def test_longer_halves_are_the_whole(env, tmp_path):
    words = (f"env={env}", "algo.hidden_sizes=[256,256]", "algo.batch_size=256", "eval.every=2000", "log_every=500")
    in_two_halves(tmp_path, (*SMALL, *words, "checkpoint.every=900", "algo.learning_starts=1000"), 6016)


def start(command: str, *words: str, start_new_session: bool = False) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", f"levin.{command}", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=start_new_session,
    )


def until(condition, process: subprocess.Popen, seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate(timeout=300)
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("env", ["pendulum", pytest.param("halfcheetah", marks=pytest.mark.slow)])
def test_a_new_process_continues_a_killed_one(env, tmp_path):
    words = (*TINY, f"env={env}", "trainer.threads=1", "total_env_steps=2560", "checkpoint.every=150", "eval.every=700")
    train(compose([*words]), tmp_path / "straight")
    process = start("train", *words, f"run={tmp_path / 'killed'}")
    until(lambda: checkpoint.list_checkpoints(tmp_path / "killed" / "checkpoints"), process)
    time.sleep(random.Random(env).random())
    process.kill()
    process.communicate(timeout=300)
    again = start("resume", f"run={tmp_path / 'killed'}")
    _, said = again.communicate(timeout=300)
    assert again.returncode == 0, said
    assert_same_run(tmp_path / "straight", tmp_path / "killed")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_saves_and_the_run_goes_on_where_it_was(name, tmp_path, capfd):
    words = (*TINY, "trainer.threads=1", "total_env_steps=1280", "checkpoint.every=100_000")
    train(compose([*words]), tmp_path / "straight")

    def send() -> None:
        while not (tmp_path / "stopped" / "metrics.csv").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), getattr(signal, name))

    sender = threading.Thread(target=send)
    sender.start()
    train(compose([*words, "total_env_steps=1_000_000_000"]), tmp_path / "stopped")
    sender.join()
    assert not isinstance(getattr(signal.getsignal(getattr(signal, name)), "__self__", None), Preemption)
    said = capfd.readouterr()
    assert f"levin: {name}" in said.err
    assert "to go on: make resume" in said.out
    (only,) = checkpoint.list_checkpoints(tmp_path / "stopped" / "checkpoints")
    total = max(1280, int(only.name) + 64)
    if total > 1280:  # a fast machine: compare with as long a run
        shutil.rmtree(tmp_path / "straight")
        train(compose([*words, f"total_env_steps={total}"]), tmp_path / "straight")
    resume.resume(run=str(tmp_path / "stopped"), total_env_steps=total)
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")


LATER = [pytest.param(name, marks=pytest.mark.slow) for name in ("SIGTERM", "SIGUSR1")]


@pytest.mark.parametrize("name", ["SIGINT", *LATER])
def test_a_signal_to_every_process_of_an_async_run_saves_and_exits_with_0(name, tmp_path):
    """As a terminal and SLURM send it: to the workers too."""
    words = (*TINY, "env.num_envs=2", "env.vectorization=async", "total_env_steps=1_000_000_000")
    process = start("train", *words, "checkpoint.every=100_000", f"run={tmp_path / 'run'}", start_new_session=True)
    until((tmp_path / "run" / "metrics.csv").exists, process)
    os.killpg(process.pid, getattr(signal, name))
    said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert "to go on: make resume" in said[0]
    assert checkpoint.newest_checkpoint(tmp_path / "run", buffer=True).is_file()


def test_ctrl_c_that_also_ends_the_pipe_saves(tmp_path):
    """As in `python -m levin.train ... | tee log`."""
    words = (*TINY, "trainer.threads=1", "total_env_steps=1_000_000_000", "checkpoint.every=100_000")
    process = start("train", *words, f"run={tmp_path / 'run'}")
    until((tmp_path / "run" / "metrics.csv").exists, process)
    assert process.stdout is not None
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(300) == 0
    assert checkpoint.newest_checkpoint(tmp_path / "run", buffer=True).is_file()


def test_no_second_process_trains_in_the_same_folder(tmp_path):
    words = (*TINY, "trainer.threads=1", "total_env_steps=1_000_000_000", "checkpoint.every=64")
    process = start("train", *words, f"run={tmp_path / 'run'}")
    until(lambda: checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints"), process)
    second = start("resume", f"run={tmp_path / 'run'}")
    _, said = second.communicate(timeout=300)
    assert second.returncode == 2
    assert "is being trained by another process" in said
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=300)
    assert process.returncode == 0


def test_a_signal_in_the_last_evaluation_exits_with_0(tmp_path):
    words = (*TINY, "env=gym", "env.id=signal_env:Slow-v0", "env.action=rescale", "total_env_steps=64", "log_every=64")
    process = start("train", *words, f"run={tmp_path / 'run'}", "eval.every=1_000_000", "checkpoint.every=64")
    until(lambda: checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints"), process)
    time.sleep(0.3)
    process.send_signal(signal.SIGUSR1)
    said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert "eval/return_mean" in said[0]


def test_a_second_ctrl_c_leaves_at_once(tmp_path):
    module = "signal_env:Slow-v0"
    process = start(
        *("train", *TINY, "env=gym", f"env.id={module}", "env.action=rescale", "checkpoint.every=40"),
        *("total_env_steps=1_000_000", f"run={tmp_path / 'run'}"),
    )
    until(lambda: checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints"), process)
    before = [each.name for each in checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")]
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=300)
    assert process.returncode == -signal.SIGINT  # and not 0, as after the three seconds of this iteration
    assert [each.name for each in checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")] == before
    assert checkpoint.newest_checkpoint(tmp_path / "run", buffer=True).is_file()


def test_max_time_saves_and_every_session_has_its_own(tmp_path):
    words = [*TINY, "+trainer.max_time=00:00:00:01", "total_env_steps=1_000_000", "checkpoint.every=1_000_000"]
    train(compose(words), tmp_path / "run")
    first = int(checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")[-1].name)
    resume.resume(run=str(tmp_path / "run"))
    second = int(checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")[-1].name)
    assert second - first > 32  # had the time of the first been used up for both, one iteration would have ended it
    train(compose([*TINY, f"total_env_steps={second}"]), tmp_path / "straight")
    rows = metrics(tmp_path / "run")
    assert rows == metrics(tmp_path / "straight")[: len(rows)]


def test_a_run_killed_in_its_last_evaluation_is_evaluated_when_resumed(tmp_path, monkeypatch):
    words = [*TINY, "total_env_steps=256"]
    train(compose(words), tmp_path / "straight")
    with monkeypatch.context() as patch:
        patch.setattr("levin.training.callbacks.Metrics.on_train_end", kill)
        with pytest.raises(Killed):
            train(compose(words), tmp_path / "killed")
    assert len(metrics(tmp_path / "killed")) < len(metrics(tmp_path / "straight"))
    resume.resume(run=str(tmp_path / "killed"))
    assert_same_run(tmp_path / "straight", tmp_path / "killed")


def test_a_run_without_a_checkpoint_begins_anew(tmp_path, monkeypatch, capsys):
    words = [*TINY, "total_env_steps=256", "checkpoint.every=100_000"]
    train(compose(words), tmp_path / "straight")
    with monkeypatch.context() as patch:
        patch.setattr("levin.training.checkpointing.Checkpointing.save", kill)
        with pytest.raises(Killed):
            train(compose(words), tmp_path / "killed")
    assert metrics(tmp_path / "killed")
    resume.resume(run=str(tmp_path / "killed"))
    assert "begins anew" in capsys.readouterr().out
    assert_same_run(tmp_path / "straight", tmp_path / "killed")


def test_another_commit_or_version_is_a_warning(finished, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run, symlinks=True)
    facts = json.loads((run / "provenance.json").read_text())
    (run / "provenance.json").write_text(
        json.dumps({**facts, "git_sha": "0123abc", "versions": {**facts["versions"], "torch": "1.0"}})
    )
    resume.resume(run=str(run), total_env_steps=352)
    said = capsys.readouterr().err
    assert "git_sha was 0123abc" in said
    assert "torch was 1.0" in said
    assert saved(run)["levin"]["env_steps"] == 352


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"algo.gamma": 0.5}, "algo.gamma=0.5 would change a run that was begun with algo.gamma=0.99"),
        ({"seed": 1}, "seed=1 would change a run"),
        ({"env.num_envs": 2}, "env.num_envs=2 would change"),
        ({"algo.gama": 0.5}, "algo.gama is unknown"),
        ({"loger": "csv"}, "loger is unknown; valid: logger"),
        ({"total_env_steps": 64}, "has 320 env steps already"),
        ({"total_env_steps": -1}, "greater than 0"),
        ({"logger": "wndb"}, "'csv', 'tensorboard' or 'wandb'"),
        ({"trainer.devices": 2}, "trainer.devices=2 would change a run"),
        ({"checkpoint.every": 0}, "greater than 0"),
    ],
)
def test_what_may_not_change_is_refused_and_nothing_is_touched(changes, sentence, finished, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError) as error:
        resume.resume(run=str(finished), **changes)
    assert sentence in str(error.value)
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}


def test_what_may_change_is_printed_and_changes_no_number(finished, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run, symlinks=True)
    changes = {"total_env_steps": 640, "logger": "tensorboard", "checkpoint.every": 64, "checkpoint.keep": 5}
    resume.resume(run=str(run), **changes)
    said = capsys.readouterr().out
    for line in ("total_env_steps: 320 -> 640", "logger: csv -> tensorboard", "checkpoint.keep: 2 -> 5"):
        assert line in said
    train(compose([*TINY, "total_env_steps=640"]), tmp_path / "straight")
    for key in ("state_dict", "optimizer_states", "rng", "buffer", "loops"):
        assert same(saved(run)[key], saved(tmp_path / "straight")[key]), key
    assert metrics(run) == metrics(tmp_path / "straight")
    assert len(checkpoint.list_checkpoints(run / "checkpoints")) >= 5


def test_rows_that_were_logged_after_the_checkpoint_are_written_once(tmp_path):
    words = [*TINY, "checkpoint.every=200", "total_env_steps=640"]
    train(compose(words), tmp_path / "straight")
    shutil.copytree(tmp_path / "straight", tmp_path / "killed", symlinks=True)
    checkpoint.discard(checkpoint.list_checkpoints(tmp_path / "killed" / "checkpoints")[-1])
    facts = json.loads((tmp_path / "killed" / "provenance.json").read_text())
    (tmp_path / "killed" / "provenance.json").write_text(json.dumps({**facts, "env_steps": None}))
    with (tmp_path / "killed" / "metrics.csv").open("a") as file:
        file.write("641,7")  # the kill came in the middle of a line
    resume.resume(run=str(tmp_path / "killed"))
    assert_same_run(tmp_path / "straight", tmp_path / "killed")


def test_an_env_that_does_not_replay_is_truncated_and_says_so_once(tmp_path):
    words = [*TINY, "env=gym", "env.id=toy_envs:Drifting-v0", "env.action=rescale", "env.normalize_reward=true"]
    train(compose([*words, "env.time_limit=100", "total_env_steps=352"]), tmp_path / "run")
    episodes = loader_state(saved(tmp_path / "run"))["episodes"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resume.resume(run=str(tmp_path / "run"), total_env_steps=384)
    (said,) = [str(each.message) for each in caught if "does not replay" in str(each.message)]
    assert "is truncated" in said
    state = saved(tmp_path / "run")
    loader, rewards = loader_state(state), state["buffer"]["data"]["next.reward"][352:384, 0]
    assert loader["episodes"] == [episodes[0] + 1]  # a new episode began at 352, and it alone is counted
    assert loader["open_length"] == [32]
    assert loader["open_return"] == pytest.approx([float(rewards.sum())])
    discounted = sum(float(reward) * 0.99**k for k, reward in enumerate(reversed(rewards)))
    assert state["state_dict"]["reward_normalizer.running_return"].tolist() == pytest.approx([discounted], rel=1e-5)


def test_a_killed_start_leaves_a_folder_that_can_be_continued(tmp_path, monkeypatch):
    """Whichever file of a new run was the last to be written."""
    replace = Path.replace
    for count in (1, 2):
        left = [count]

        def dying(self, target, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return replace(self, target)

        run = tmp_path / f"run{count}"
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", dying)
            with pytest.raises(Killed):
                train(compose([*TINY, "total_env_steps=64"]), run)
        resume.resume(run=str(run))
        assert saved(run)["levin"]["env_steps"] == 64
