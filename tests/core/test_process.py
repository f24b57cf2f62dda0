"""Output that is discarded, and processes on the same cores: only one of them lets idle threads spin."""

import errno
import os
import stat
import subprocess
import sys
from types import SimpleNamespace
from uuid import uuid4

import pytest

from levin.core import files, paths
from levin.core import process as levin_process
from levin.core.process import WAIT_SETTINGS, discard_output
from processes import has_exited, wait_until

CLAIM = """
import os, sys
from levin.core import process
process.CLAIM = sys.argv[1]
process.share_cores()
print(os.environ.get("OMP_WAIT_POLICY"), flush=True)
for threads in sys.stdin:
    process.release_cores(int(threads))
    print("released", flush=True)
"""
# Ends the process when torch is imported.
COMMAND = """
import os, runpy, sys
class End:
    def find_spec(self, name, *_):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"), flush=True)
            os._exit(0)
sys.meta_path.insert(0, End())
from levin.core import process
process.CLAIM = sys.argv[1]
sys.argv = ["levin", *sys.argv[2:]]
runpy.run_module("levin." + {module!r}, run_name="__main__")
"""


ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in (*WAIT_SETTINGS, "OMP_NUM_THREADS")}


@pytest.fixture
def name() -> str:
    """Return the name of the claims of one test: other tests start processes that claim cores at the same time."""
    return f"levin-test-{uuid4()}"


@pytest.fixture
def claim(name):
    """Start a process that claims its cores and lives until its stdin is closed; return it and its setting."""
    if sys.platform != "linux" or len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs Linux and two cores")
    processes = []

    def start(**changes: str) -> tuple[subprocess.Popen, str]:
        process = subprocess.Popen(
            [sys.executable, "-c", CLAIM, name],
            env=ENVIRONMENT | changes,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process, process.stdout.readline().strip()

    yield start
    for process in processes:
        process.kill()
        process.wait()


def test_only_the_first_process_on_the_same_cores_spins(claim):
    first, setting = claim()
    assert setting == "None"
    second, setting = claim()
    assert setting == "PASSIVE"
    second.communicate(timeout=30)
    first.kill()
    first.wait()
    assert claim()[1] == "None"  # however the first has ended


def test_a_setting_of_the_user_and_a_single_thread_stay_as_they_are(claim):
    assert claim(OMP_NUM_THREADS="1")[1] == "None"
    assert claim()[1] == "None"  # the single thread has claimed no core
    assert claim(OMP_WAIT_POLICY="ACTIVE")[1] == "ACTIVE"
    assert claim(GOMP_SPINCOUNT="100")[1] == "None"
    assert claim(OMP_NUM_THREADS="1")[1] == "None"


def test_a_process_that_computes_with_one_thread_gives_up_its_cores(claim):
    first, setting = claim()
    assert setting == "None"
    first.stdin.write("1\n")
    first.stdin.flush()
    assert first.stdout.readline().strip() == "released"
    assert claim()[1] == "None"
    assert claim()[1] == "PASSIVE"


def test_a_job_of_a_sweep_shares_the_cores_before_it_imports_torch(claim, name):
    assert claim()[1] == "None"
    code = COMMAND.partition("sys.argv =")[0] + "from levin.sweep import run_job\nrun_job(None)"
    job = [sys.executable, "-c", code, name]
    environment = ENVIRONMENT | {"SUBMITIT_EXECUTOR": "local"}
    assert subprocess.run(job, env=environment, capture_output=True, text=True, check=True).stdout == "PASSIVE\n"


@pytest.mark.parametrize("module", ["train", "resume", "evaluate", "play"])
def test_a_command_shares_the_cores_before_it_imports_torch(module, claim, name, tmp_path):
    assert claim()[1] == "None"
    run = tmp_path / "run"
    run.mkdir()
    result = paths.EXPERIMENTS / "ppo_cartpole"
    for file in ("config.yaml", "policy.ckpt", "provenance.json"):
        if (result / file).exists():
            (run / file).symlink_to(result / file)
    words = {"train": ["algo=ppo"], "resume": [f"run={run}"]}.get(module, [f"run={result}"])
    answer = subprocess.run(
        [sys.executable, "-c", COMMAND.format(module=module), name, *words],
        env=ENVIRONMENT,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.stdout.strip() == "PASSIVE", answer.stderr


def test_discarding_output_leaves_no_file_open():
    reader, writer = os.pipe()
    before = os.listdir("/dev/fd")
    discard_output(writer)
    assert os.listdir("/dev/fd") == before
    os.write(writer, b"lost")
    os.close(writer)
    with open(reader, "rb") as pipe:
        assert pipe.read() == b""


PARENT = """
import os, signal, sys
from levin.core.process import signal_at_parents_end
parent = os.getpid()
if not (child := os.fork()):
    signal_at_parents_end(signal.SIGKILL, parent if sys.argv[1] == "lives" else 0)
    os.write(1, f"{os.getpid()}".encode())
    signal.pause()
if sys.argv[1] != "lives":
    os.write(1, f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}".encode())
signal.pause()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
@pytest.mark.parametrize("state", ["lives", "has ended before"])
def test_a_process_ends_with_its_parent(state):
    with subprocess.Popen([sys.executable, "-c", PARENT, state], stdout=subprocess.PIPE) as parent:
        output = os.read(parent.stdout.fileno(), 100).decode()
        parent.kill()
    if state == "lives":
        wait_until(lambda: has_exited(int(output)))
    else:
        assert output == "-9"


@pytest.mark.parametrize("number", [errno.EPIPE, errno.ENOSPC, errno.EIO])
def test_a_line_that_cannot_be_printed_ends_nothing(number, monkeypatch):
    """The disk of a log file is full, or the terminal is closed."""

    def write(*_, **__):
        raise OSError(number, "no")

    discarded = []
    monkeypatch.setattr(levin_process, "print", write, raising=False)
    monkeypatch.setattr(levin_process, "discard_output", discarded.append)
    monkeypatch.setattr(levin_process.sys, "stdout", SimpleNamespace(fileno=lambda: 1))
    levin_process.print_line("a line")
    assert discarded == [1]


def test_a_terminal_without_a_letter_shows_another():
    script = "from levin.core.errors import exit_on_user_error\nwith exit_on_user_error():\n    print('5 \\u00b7 6')"
    environment = {**ENVIRONMENT, "PYTHONIOENCODING": "ascii"}
    answer = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert answer.stdout == "5 ? 6\n"


def test_a_folder_that_cannot_be_forced_onto_the_disk_is_no_obstacle(tmp_path, monkeypatch):
    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", fsync)
    before = os.listdir("/dev/fd")
    files.write_text(tmp_path, "a.txt", "text")
    assert (tmp_path / "a.txt").read_text() == "text"
    assert os.listdir("/dev/fd") == before
