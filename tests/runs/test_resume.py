"""Resumed runs: bitwise identical to uninterrupted ones after stops, signals and kills; refused changes."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import threading
import time
import warnings
from pathlib import Path

import pytest

from checks import metrics, same, saved_state
from levin import resume
from levin.config.compose import compose
from levin.core.errors import ConfigError
from levin.core.process import handle_signals, restore_signals
from levin.runs import checkpoint, provenance
from levin.runs import folder as run_folder
from levin.training.guards import Preemption
from levin.training.session import train
from processes import run_python, start_python
from short_runs import (
    INTERVALS,
    SMALL,
    TINY,
    Killed,
    assert_identical_runs,
    check_resumed_run_is_identical,
    kill,
    loader_state,
)

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


@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS.keys())
def test_a_resumed_run_is_identical(overrides, tmp_path):
    check_resumed_run_is_identical(tmp_path, (*TINY, *overrides), 448)


def test_a_resumed_run_with_paired_episodes_is_identical(tmp_path):
    overrides = ("algo=reinforce", "env=cartpole", "algo.advantage=self_critical", "algo.transitions_per_update=30")
    overrides += ("algo.schedule_env_steps=448",)
    check_resumed_run_is_identical(tmp_path, (*overrides, "algo.hidden_sizes=[8]", "eval.episodes=1", *INTERVALS), 448)


def test_a_resumed_run_with_a_sampled_actor_estimator_is_identical(tmp_path):
    """The random stream of a sampled actor estimator continues as well."""
    overrides = ("algo=sac_discrete", "env=gym", "env.id=toy_envs:Buttons-v0", "algo.critic=state_action")
    overrides += ("algo.actor_estimator=loo", "algo.learning_starts=40", "algo.batch_size=16", "algo.hidden_sizes=[8]")
    check_resumed_run_is_identical(tmp_path, (*overrides, "eval.episodes=1", *INTERVALS), 448)


def test_a_resumed_run_on_any_gymnasium_id_is_identical(tmp_path):
    check_resumed_run_is_identical(tmp_path, (*TINY, "env=gym", "env.id=toy_envs:Point-v0", "env.action=rescale"), 448)


def test_the_torchrl_collector_resumes_with_new_episodes(tmp_path):
    train(compose([*TINY, "collector=torchrl", "total_env_steps=224"]), tmp_path / "run")
    before = saved_state(tmp_path / "run")
    resume.resume(run=str(tmp_path / "run"), total_env_steps=225)
    after = saved_state(tmp_path / "run")
    loader, earlier = loader_state(after), loader_state(before)
    assert loader["episodes"] == [earlier["episodes"][0] + 1]
    assert loader["open_length"] == [32]
    assert loader["open_return"] == pytest.approx([float(after["buffer"]["data"]["next.reward"][224:256].sum())])
    old, new = (each["buffer"]["data"] for each in (before, after))
    assert same({key: value[:224] for key, value in new.items()}, old)
    assert after["levin"]["updates"] == before["levin"]["updates"] + 8


MUJOCO = ("halfcheetah", "ant", "humanoid")


@pytest.mark.parametrize("env", MUJOCO)
def test_a_resumed_run_on_mujoco_is_identical(env, tmp_path):
    check_resumed_run_is_identical(tmp_path, (*TINY, f"env={env}", "eval.every=300", "eval.episodes=1"), 448)


@pytest.mark.slow
@pytest.mark.parametrize("env", ["pendulum", *MUJOCO])
def test_a_longer_resumed_run_is_identical(env, tmp_path):
    overrides = (f"env={env}", "algo.hidden_sizes=[256,256]", "algo.batch_size=256", "eval.every=2000", "log_every=500")
    check_resumed_run_is_identical(
        tmp_path, (*SMALL, *overrides, "checkpoint.every=900", "algo.learning_starts=1000"), 6016
    )


def start(command: str, *overrides: str, start_new_session: bool = False, forked: bool = True) -> subprocess.Popen:
    """Start a levin command in a new process."""
    return start_python("-m", f"levin.{command}", *overrides, start_new_session=start_new_session, forked=forked)


def until(condition, process: subprocess.Popen, seconds: float = 180) -> None:
    """Wait until `condition()` holds while a process runs."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate(timeout=300)
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("env", ["pendulum", pytest.param("halfcheetah", marks=pytest.mark.slow)])
def test_a_killed_run_resumed_in_a_new_process_is_identical(env, tmp_path):
    overrides = (
        *TINY,
        f"env={env}",
        "trainer.threads=1",
        "total_env_steps=2560",
        "checkpoint.every=150",
        "eval.every=700",
    )
    train(compose([*overrides]), tmp_path / "straight")
    # New interpreters, whose sets of strings have another order.
    process = start("train", *overrides, f"run={tmp_path / 'killed'}", forked=False)
    until(lambda: checkpoint.list_checkpoints(tmp_path / "killed" / "checkpoints"), process)
    time.sleep(random.Random(env).random())
    process.kill()
    process.communicate(timeout=300)
    again = start("resume", f"run={tmp_path / 'killed'}", forked=False)
    _, output = again.communicate(timeout=300)
    assert again.returncode == 0, output
    assert_identical_runs(tmp_path / "straight", tmp_path / "killed")


def test_nohup_keeps_its_effect(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        previous = handle_signals(lambda *_: None)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        restore_signals(previous)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_resume_holds_the_lock_while_it_moves_checkpoints(tmp_path, monkeypatch):
    train(compose([*TINY, "total_env_steps=96"]), tmp_path / "run")
    code = f"import pathlib, levin.runs.folder as f\nwith f.lock(pathlib.Path({str(tmp_path / 'run')!r})): pass"
    answers = []

    def locked(*_):
        answers.append(run_python("-c", code))

    monkeypatch.setattr(checkpoint, "set_aside_newer", locked)
    resume.resume(run=str(tmp_path / "run"), total_env_steps=128)
    assert "is being trained by another process" in answers[0].stderr


def test_a_lock_that_may_not_be_opened_is_not_held(tmp_path, monkeypatch):
    """It is the lock of another user, whose run this user can only read."""
    with run_folder.lock(tmp_path):
        assert run_folder.is_locked(tmp_path) is False  # this process holds it

    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("levin.core.files.no_link", refuse)
    assert run_folder.is_locked(tmp_path) is False


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_locks_is_no_obstacle(number, tmp_path, monkeypatch, capsys):
    def lockf(*_):
        raise OSError(number, "No locks available")

    monkeypatch.setattr("fcntl.lockf", lockf)
    train(compose([*TINY, "total_env_steps=96"]), tmp_path / "run")
    resume.resume(run=str(tmp_path / "run"), total_env_steps=128)
    assert "has no locks (No locks available): do not train this run in two processes" in capsys.readouterr().err


def test_a_machine_without_git_is_no_obstacle(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    train(compose([*TINY, "total_env_steps=96"]), tmp_path / "run")
    facts = json.loads((tmp_path / "run" / "provenance.json").read_text())
    assert (facts["git_sha"], facts["git_dirty"]) == ("", False)
    resume.resume(run=str(tmp_path / "run"), total_env_steps=128)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP"])
def test_a_run_stopped_by_a_signal_and_resumed_is_identical(name, tmp_path, capfd):
    overrides = (*TINY, "trainer.threads=1", "total_env_steps=320", "checkpoint.every=100_000")
    train(compose([*overrides]), tmp_path / "straight")

    def send() -> None:
        while not (tmp_path / "stopped" / "metrics.csv").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), getattr(signal, name))

    sender = threading.Thread(target=send)
    sender.start()
    train(compose([*overrides, "total_env_steps=1_000_000_000"]), tmp_path / "stopped")
    sender.join()
    assert not isinstance(getattr(signal.getsignal(getattr(signal, name)), "__self__", None), Preemption)
    output = capfd.readouterr()
    assert f"levin: {name}" in output.err
    assert "to continue: make resume" in output.out
    (only,) = checkpoint.list_checkpoints(tmp_path / "stopped" / "checkpoints")
    total = max(320, int(only.name) + 64)
    if total > 320:  # on a fast machine: compare with a longer run
        shutil.rmtree(tmp_path / "straight")
        train(compose([*overrides, f"total_env_steps={total}"]), tmp_path / "straight")
    resume.resume(run=str(tmp_path / "stopped"), total_env_steps=total)
    assert_identical_runs(tmp_path / "straight", tmp_path / "stopped")


LATER = [pytest.param(name, marks=pytest.mark.slow) for name in ("SIGTERM", "SIGUSR1")]


@pytest.mark.parametrize("name", ["SIGINT", *LATER])
def test_a_signal_to_every_process_of_an_async_run_saves_and_exits_with_0(name, tmp_path):
    """A terminal and SLURM send the signal to the env processes as well."""
    overrides = (*TINY, "env.num_envs=2", "env.vectorization=async", "total_env_steps=1_000_000_000")
    process = start("train", *overrides, "checkpoint.every=100_000", f"run={tmp_path / 'run'}", start_new_session=True)
    until((tmp_path / "run" / "metrics.csv").exists, process)
    os.killpg(process.pid, getattr(signal, name))
    output = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "to continue: make resume" in output[0]
    assert checkpoint.newest_checkpoint(tmp_path / "run", buffer=True).is_file()


def test_ctrl_c_saves_when_stdout_is_closed(tmp_path):
    """Ctrl-C in `python -m levin.train ... | tee log` ends `tee` as well."""
    overrides = (*TINY, "trainer.threads=1", "total_env_steps=1_000_000_000", "checkpoint.every=100_000")
    process = start("train", *overrides, f"run={tmp_path / 'run'}")
    until((tmp_path / "run" / "metrics.csv").exists, process)
    assert process.stdout is not None
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(300) == 0
    assert checkpoint.newest_checkpoint(tmp_path / "run", buffer=True).is_file()


def test_no_second_process_trains_in_the_same_folder(tmp_path):
    overrides = (*TINY, "trainer.threads=1", "total_env_steps=1_000_000_000", "checkpoint.every=64")
    process = start("train", *overrides, f"run={tmp_path / 'run'}")
    until(lambda: checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints"), process)
    second = start("resume", f"run={tmp_path / 'run'}")
    _, output = second.communicate(timeout=300)
    assert second.returncode == 2
    assert "is being trained by another process" in output
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=300)
    assert process.returncode == 0


def test_a_signal_in_the_last_evaluation_exits_with_0_and_a_resume_repeats_it(tmp_path):
    overrides = (
        *TINY,
        "env=gym",
        "env.id=signal_env:Slow-v0",
        "env.action=rescale",
        "total_env_steps=64",
        "log_every=64",
    )
    process = start("train", *overrides, f"run={tmp_path / 'run'}", "eval.every=1_000_000", "checkpoint.every=64")
    until(lambda: checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints"), process)
    time.sleep(0.3)
    process.send_signal(signal.SIGUSR1)
    output = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "eval/return_mean" not in output[0]
    output = start("resume", f"run={tmp_path / 'run'}").communicate(timeout=300)
    assert "eval/return_mean" in output[0]


def test_a_second_ctrl_c_exits_at_once(tmp_path):
    module = "signal_env:Slow-v0"
    process = start(
        *("train", *TINY, "env=gym", f"env.id={module}", "env.action=rescale", "checkpoint.every=40"),
        *("total_env_steps=1_000_000", f"run={tmp_path / 'run'}"),
    )
    until(lambda: checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints"), process)
    before = [each.name for each in checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")]
    process.send_signal(signal.SIGINT)
    assert any("SIGINT" in line for line in process.stderr)  # two signals at once would be one
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=300)
    assert process.returncode == -signal.SIGINT  # 0 would mean that the iteration was finished first
    assert [each.name for each in checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")] == before
    assert checkpoint.newest_checkpoint(tmp_path / "run", buffer=True).is_file()


def test_max_time_saves_the_run_and_counts_anew_after_a_resume(tmp_path):
    overrides = [*TINY, "+trainer.max_time=00:00:00:01", "total_env_steps=1_000_000", "checkpoint.every=1_000_000"]
    train(compose(overrides), tmp_path / "run")
    first = int(checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")[-1].name)
    resume.resume(run=str(tmp_path / "run"))
    second = int(checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")[-1].name)
    assert second - first > 32  # more than one iteration: max_time is counted anew
    train(compose([*TINY, f"total_env_steps={second}"]), tmp_path / "straight")
    rows = metrics(tmp_path / "run")
    assert rows == metrics(tmp_path / "straight")[: len(rows)]


def test_a_run_killed_in_its_last_evaluation_is_evaluated_when_resumed(tmp_path, monkeypatch):
    overrides = [*TINY, "total_env_steps=256"]
    train(compose(overrides), tmp_path / "straight")
    with monkeypatch.context() as patch:
        patch.setattr("levin.training.callbacks.Metrics.on_train_end", kill)
        with pytest.raises(Killed):
            train(compose(overrides), tmp_path / "killed")
    assert len(metrics(tmp_path / "killed")) < len(metrics(tmp_path / "straight"))
    resume.resume(run=str(tmp_path / "killed"))
    assert_identical_runs(tmp_path / "straight", tmp_path / "killed")


def test_a_run_without_a_checkpoint_is_restarted(tmp_path, monkeypatch, capsys):
    overrides = [*TINY, "total_env_steps=256", "checkpoint.every=100_000"]
    train(compose(overrides), tmp_path / "straight")
    with monkeypatch.context() as patch:
        patch.setattr("levin.training.checkpointing.Checkpointing.save", kill)
        with pytest.raises(Killed):
            train(compose(overrides), tmp_path / "killed")
    assert metrics(tmp_path / "killed")
    resume.resume(run=str(tmp_path / "killed"))
    assert "starting from the beginning" in capsys.readouterr().out
    assert_identical_runs(tmp_path / "straight", tmp_path / "killed")


def test_another_commit_or_version_is_a_warning(finished, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run, symlinks=True)
    facts = json.loads((run / "provenance.json").read_text())
    (run / "provenance.json").write_text(
        json.dumps({**facts, "git_sha": "0123abc", "versions": {**facts["versions"], "torch": "1.0", "mujoco": None}})
    )
    resume.resume(run=str(run), total_env_steps=352)
    output = capsys.readouterr().err
    assert "git_sha was 0123abc" in output
    assert "torch was 1.0" in output
    assert "mujoco" not in output
    assert saved_state(run)["levin"]["env_steps"] == 352


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"algo.gamma": 0.5}, "algo.gamma=0.5 would change a run that was started with algo.gamma=0.99"),
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
def test_forbidden_changes_on_resume_are_refused_and_leave_the_run_unchanged(changes, sentence, finished, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError) as error:
        resume.resume(run=str(finished), **changes)
    assert sentence in str(error.value)
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}


def test_allowed_changes_on_resume_are_printed_and_do_not_change_training(finished, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run, symlinks=True)
    changes = {"total_env_steps": 640, "logger": "tensorboard", "checkpoint.every": 64, "checkpoint.keep": 5}
    resume.resume(run=str(run), **changes)
    output = capsys.readouterr().out
    for line in ("total_env_steps: 320 -> 640", "logger: csv -> tensorboard", "checkpoint.keep: 2 -> 5"):
        assert line in output
    train(compose([*TINY, "total_env_steps=640"]), tmp_path / "straight")
    for key in ("state_dict", "optimizer_states", "rng", "buffer", "loops"):
        assert same(saved_state(run)[key], saved_state(tmp_path / "straight")[key]), key
    assert metrics(run) == metrics(tmp_path / "straight")
    assert len(checkpoint.list_checkpoints(run / "checkpoints")) >= 5


def test_metrics_logged_after_the_checkpoint_are_written_once(tmp_path):
    overrides = [*TINY, "checkpoint.every=200", "total_env_steps=640"]
    train(compose(overrides), tmp_path / "straight")
    shutil.copytree(tmp_path / "straight", tmp_path / "killed", symlinks=True)
    checkpoint.discard(checkpoint.list_checkpoints(tmp_path / "killed" / "checkpoints")[-1])
    facts = json.loads((tmp_path / "killed" / "provenance.json").read_text())
    (tmp_path / "killed" / "provenance.json").write_text(json.dumps({**facts, "env_steps": None}))
    with (tmp_path / "killed" / "metrics.csv").open("a") as file:
        file.write("641,7")  # killed in the middle of a line
    resume.resume(run=str(tmp_path / "killed"))
    assert_identical_runs(tmp_path / "straight", tmp_path / "killed")


def test_an_env_that_does_not_replay_is_truncated_with_one_warning(tmp_path):
    overrides = [*TINY, "env=gym", "env.id=toy_envs:Drifting-v0", "env.action=rescale", "env.normalize_reward=true"]
    train(compose([*overrides, "env.time_limit=100", "total_env_steps=352"]), tmp_path / "run")
    episodes = loader_state(saved_state(tmp_path / "run"))["episodes"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resume.resume(run=str(tmp_path / "run"), total_env_steps=384)
    (message,) = [str(each.message) for each in caught if "does not replay" in str(each.message)]
    assert "is truncated" in message
    state = saved_state(tmp_path / "run")
    loader, rewards = loader_state(state), state["buffer"]["data"]["next.reward"][352:384, 0]
    assert loader["episodes"] == [episodes[0] + 1]  # only the episode that started at 352 is counted
    assert loader["open_length"] == [32]
    assert loader["open_return"] == pytest.approx([float(rewards.sum())])
    discounted = sum(float(reward) * 0.99**k for k, reward in enumerate(reversed(rewards)))
    assert state["state_dict"]["reward_normalizer.running_return"].tolist() == pytest.approx([discounted], rel=1e-5)


def test_a_run_killed_at_its_start_can_be_resumed(tmp_path, monkeypatch):
    """Kill a new run before its second and before its third file is in place."""
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
        assert saved_state(run)["levin"]["env_steps"] == 64


@pytest.mark.parametrize("total", [-1, 0, "abc", None])
def test_wrong_values_for_many_runs_are_refused_before_the_first_starts(total, tmp_path):
    run_folder.begin(tmp_path / "run", compose([*TINY]))
    with pytest.raises(ConfigError, match=f"total_env_steps={total}: input should be"):
        resume.resume_all(runs=str(tmp_path / "run"), total_env_steps=total)
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["config.yaml"]


def test_a_run_that_a_callback_has_ended_is_to_be_continued_once_it_is_resumed(tmp_path):
    config, facts = compose([*TINY, "total_env_steps=320"]), provenance.collect_provenance()
    run_folder.create(tmp_path, config, facts, resumed=False)
    run_folder.record_end(tmp_path, 1.0, None, 320)
    assert run_folder.has_ended(tmp_path, 320)
    run_folder.create(tmp_path, config, facts, resumed=True)  # and then it is killed
    assert not run_folder.has_ended(tmp_path, 320)


@pytest.mark.parametrize("runs", ["experiments/toy", "experiments", "experiments/*"])
def test_a_stored_result_is_not_trained(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_folder.begin(Path("experiments/toy"), compose([*TINY]))
    Path("experiments/toy/reference.yaml").touch()
    for function, words in ((resume.resume, {"run": "experiments/toy"}), (resume.resume_all, {"runs": runs})):
        with pytest.raises(ConfigError, match="toy is a result: make reproduce EXP=toy trains it"):
            function(**words)
    assert len(list(Path("experiments/toy").iterdir())) == 2
