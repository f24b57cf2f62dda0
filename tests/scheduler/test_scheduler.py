"""The scheduler: processes side by side, failures, signals, and the end of its own process."""

import hashlib
import importlib
import os
import shutil
import signal
import time

import pytest

from levin.config.compose import compose
from levin.core.errors import ConfigError, FolderError, LockedError, NotFiniteError, RunError
from levin.runs import folder as run_folder
from levin.runs import provenance
from levin.scheduler.progress import read_progress
from levin.scheduler.resources import Resources
from levin.scheduler.scheduler import LOCKED, NOT_FINITE, Scheduler, train_all
from processes import children, has_exited, run_python, start_python, wait_until

TWO = Resources(at_once=2, threads=1)
RUN = (
    *("env=gym", "env.id=toy_envs:Point-v0", "algo.learning_starts=16", "algo.batch_size=4", "algo.hidden_sizes=[4]"),
    *("eval.episodes=1", "trainer.accelerator=cpu", "logger=csv"),
)
LOCK = """
import sys, time
from pathlib import Path
from levin.runs import folder
run = Path(sys.argv[1])
with folder.lock(run):
    (run / "locked").touch()
    while not (run.parent / "s3" / "begin").exists():
        time.sleep(0.05)
"""


@pytest.fixture
def folders(tmp_path):
    """Four empty run folders."""
    runs = [tmp_path / f"s{seed}" for seed in range(4)]
    for run in runs:
        run.mkdir()
    return runs


def end(run):
    """Write what a complete run of 10 env steps leaves behind."""
    (run / "provenance.json").write_text('{"git_sha": "", "git_dirty": false, "versions": {}, "env_steps": 10, '
                                         '"wall_seconds": 1.0, "resumed": []}')  # fmt: skip


def train(runs, function, resources=TWO):
    return train_all(dict.fromkeys(runs, 10), function, resources)


def test_as_many_runs_as_allowed_train_at_the_same_time(folders, tmp_path):
    def note(run):
        (run / "begin").write_text(str(time.monotonic()))
        print("my last line")
        time.sleep(0.5)
        (run / "end").write_text(str(time.monotonic()))
        end(run)

    assert train(folders, note)
    times = [(float((run / "begin").read_text()), float((run / "end").read_text())) for run in folders]
    together = [sum(begin <= other < stop for begin, stop in times) for other, _ in times]
    assert max(together) == 2
    assert (folders[0] / "output.txt").read_text() == "my last line\n"
    assert train(folders, None)  # complete runs are not started again


def test_runs_record_the_code_and_the_commit_that_they_run(folders, tmp_path, monkeypatch):
    """Files and commit may change while other runs train, and each process runs the modules of the first one."""
    (tmp_path / "code_early.py").write_text("VALUE = 'before'\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("code_early")
    config, facts = compose(list(RUN)), provenance.collect_code_facts()

    def record(run):
        importlib.import_module("code_late")
        run_folder.create(run, config, provenance.collect_provenance(), resumed=False)

    with Scheduler(record, TWO) as scheduler:
        for name in ("early", "late"):
            (tmp_path / f"code_{name}.py").write_text("VALUE = 'after'\n")
        monkeypatch.setattr(provenance, "run_git", lambda *_: "0" * 40)
        scheduler.start(folders[0])
        wait_until(scheduler.poll)
    recorded = run_folder.read_provenance(folders[0])
    assert {key: recorded[key] for key in facts} == facts
    copies = {name: (folders[0] / f"code/code_{name}.py").read_text() for name in ("early", "late")}
    assert copies == {"early": "VALUE = 'before'\n", "late": "VALUE = 'after'\n"}
    for name, text in copies.items():
        assert recorded["code"][f"code_{name}.py"] == hashlib.sha256(text.encode()).hexdigest()


def test_a_run_that_fails_is_named_and_the_others_are_trained(folders, capsys):
    def fail_once(run):
        if run.name == "s1":
            raise RunError("the env fell over")
        end(run)

    with pytest.raises(RunError, match=r"1 of 4 runs failed; the others are complete: .*s1 failed: the env fell over"):
        train(folders, fail_once)
    assert all(run_folder.has_ended(run, 10) for run in folders if run.name != "s1")
    assert "s1 failed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("x"), 2),
        (RunError("x"), 1),
        (NotFiniteError("x"), NOT_FINITE),
        (FolderError("x"), 1),
        (LockedError("x"), LOCKED),
        (KeyError("x"), 1),
        (SystemExit(5), 5),
    ],
)
def test_exit_codes_say_why_a_run_failed(error, code, folders):
    def fail(_):
        raise error

    ended = []
    with Scheduler(fail, TWO) as scheduler:
        scheduler.start(folders[0])
        wait_until(lambda: ended.extend(scheduler.poll()) or ended)
    assert [each.code for each in ended] == [code]


def test_a_run_that_another_process_trains_is_waited_for(folders):
    other = start_python("-c", LOCK, str(folders[0]))
    wait_until((folders[0] / "locked").exists)

    def note(run):
        (run / "begin").write_text(str(time.monotonic()))
        with run_folder.lock(run):
            end(run)

    assert train(folders, note)
    assert other.wait() == 0
    begun = {run.name: float((run / "begin").read_text()) for run in folders}
    assert max(begun, key=begun.__getitem__) == "s0"


def test_a_run_that_another_process_starts_at_the_same_moment_is_waited_for(folders, capsys):
    def start_second(run):
        if run.name == "s0" and not (run / "tried").exists():
            (run / "tried").touch()
            raise LockedError("run=s0 is being trained by another process")
        end(run)

    assert train(folders, start_second)
    assert "failed" not in capsys.readouterr().out


def test_a_signal_stops_all_runs_and_starts_no_other(folders):
    parent = os.getpid()

    def wait_for_signal(run):
        def save(*_):
            (run / "saved").touch()
            raise SystemExit(0)

        signal.signal(signal.SIGTERM, save)
        (run / "begin").touch()
        if all((each / "begin").exists() for each in folders[:2]):
            os.kill(parent, signal.SIGTERM)
        time.sleep(60)

    before = signal.getsignal(signal.SIGTERM)
    assert not train(folders, wait_for_signal)
    assert [(run / "saved").exists() for run in folders] == [True, True, False, False]
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_run_that_is_stopped_from_outside_is_not_complete(folders):
    def stop(run):
        if run.name != "s2":
            end(run)

    assert not train(folders, stop)
    assert train(folders, end)


def test_failures_can_be_tolerated(folders):
    def fail(run):
        if run.name == "s2":
            raise NotFiniteError
        end(run)

    assert train_all(dict.fromkeys(folders, 10), fail, TWO, tolerated=(NOT_FINITE,))
    with pytest.raises(RunError, match="1 of 4 runs failed"):
        train(folders, fail)


def test_a_folder_that_is_removed_costs_no_other_run(folders, capsys):
    def lose(run):
        if run == folders[0]:
            shutil.rmtree(folders[0])
            shutil.rmtree(folders[3])  # which waits
            raise ConfigError("no such folder")
        wait_until(lambda: not folders[3].exists())
        end(run)

    with pytest.raises(RunError, match="2 of 4 runs failed; the others are complete"):
        train(folders, lose)
    said = capsys.readouterr().out
    assert f"{folders[0]} failed: its output can't be read: No such file" in said
    assert f"{folders[3]} can't be written: No such file" in said
    assert all(run_folder.has_ended(run, 10) for run in folders[1:3])


def test_a_run_that_gets_ctrl_c_itself_is_saved_and_a_second_ctrl_c_ends_it(folders):
    """SLURM sends a signal to the command and to its runs."""
    parent = os.getpid()

    def wait(run):
        received = []

        def save_or_end(number, _):
            received.append(number)
            if received.count(signal.SIGINT) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            (run / "signal").touch()

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, save_or_end)
        if run == folders[0]:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(parent, signal.SIGINT)
            wait_until(lambda: signal.SIGTERM in received)
            (run / "saved").touch()
            os.kill(parent, signal.SIGINT)
        time.sleep(60)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    begun = time.monotonic()
    try:
        assert not train(folders, wait)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (folders[0] / "saved").exists()
    assert time.monotonic() - begun < 50  # both were killed


def test_ctrl_c_before_a_run_trains_is_no_failure(folders):
    parent = os.getpid()

    def wait(run):
        (run / "begin").touch()
        if all((each / "begin").exists() for each in folders[:2]):
            os.kill(parent, signal.SIGINT)
        time.sleep(60)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a worker of pytest-xdist ignores the signal
    try:
        assert not train(folders, wait)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_no_run_outlives_its_command(number, tmp_path):
    words = (
        "-m",
        "levin.train",
        *RUN,
        "total_env_steps=10_000_000",
        "log_every=32",
        "seeds=0 1 2",
        "jobs=2",
        "run=sweep",
    )
    process = start_python(*words, cwd=tmp_path)
    wait_until(lambda: len(list(tmp_path.glob("sweep/*/metrics.csv"))) == 2)
    own = children(process.pid)
    assert len(own) == 2
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == (-9 if number == signal.SIGKILL else 0), errors
    wait_until(lambda: all(map(has_exited, own)))
    for run in ("s0", "s1"):
        assert "stopped and saved at" in (tmp_path / "sweep" / run / "output.txt").read_text()
    assert [each.name for each in tmp_path.glob("sweep/*/metrics.csv")] == ["metrics.csv"] * 2
    assert number == signal.SIGKILL or "the same command continues them" in output


def test_threads_and_gpus_are_divided(monkeypatch):
    from levin.scheduler import resources

    cpu = [compose(["env=pendulum", "trainer.accelerator=cpu", f"trainer.threads={threads}"]) for threads in (1, 2)]
    monkeypatch.setattr(resources, "available_cores", lambda: list(range(8)))
    assert Resources.of(cpu[:1], None) == Resources(at_once=8, threads=1)
    assert Resources.of(cpu, None) == Resources(at_once=4, threads=2)
    assert Resources.of(cpu, 3) == Resources(at_once=3, threads=2)
    monkeypatch.setattr(resources, "_count_gpus", lambda: 4)
    assert Resources.of(cpu, None).gpus is None
    a3c = compose(["algo=a3c", "env=cartpole", "trainer.threads=1", "trainer.workers=2"])
    assert Resources.of([a3c], None) == Resources(at_once=4, threads=1)  # its workers are on the CPU
    gpu = compose(["env=pendulum", "trainer.threads=1"])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert Resources.of([gpu], None).gpus == ["0", "1", "2", "3"]
    assert Resources.of([gpu], 6).gpus == ["0", "1", "2", "3", "0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    pairs = compose(["env=pendulum", "trainer.threads=1", "trainer.devices=2", "env.num_envs=2"])
    assert Resources.of([pairs], None) == Resources(at_once=2, threads=1, gpus=["4,5", "6,7"])


def test_progress_is_read_from_the_end_of_a_file_and_complete_lines_only(tmp_path):
    assert read_progress(tmp_path).env_steps == 0
    rows = [f"{step},{step / 2},{'' if step % 10 else step}" for step in range(1, 20001)]
    header = "env_steps,time/env_steps_per_second,eval/return_mean"
    (tmp_path / "metrics.csv").write_text("\n".join([header, *rows, "20001,1"]))
    progress = read_progress(tmp_path)
    assert (progress.env_steps, progress.steps_per_second, progress.evaluation) == (20000, 10000.0, 20000.0)


def test_an_early_stop_by_a_callback_ends_a_run(tmp_path):
    stopping = "_target_:lightning.pytorch.callbacks.EarlyStopping,monitor:eval/return_mean,mode:max"
    early = f"+callbacks.early={{{stopping},patience:1,min_delta:1e9}}"
    words = ("-m", "levin.train", *RUN, "total_env_steps=640", "eval.every=64", early, "seeds=0 1", "run=sweep")
    assert run_python(*words, cwd=tmp_path).returncode == 0
    assert all(run_folder.has_ended(tmp_path / "sweep" / run, 640) for run in ("s0", "s1"))
    before = (tmp_path / "sweep/s0/metrics.csv").read_text()
    answer = run_python(*words, cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert (tmp_path / "sweep/s0/metrics.csv").read_text() == before
