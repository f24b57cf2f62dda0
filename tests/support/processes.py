"""Helpers for processes started by tests."""

import ctypes
import functools
import inspect
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36  # as in linux/prctl.h


@functools.cache
def _fork_server(pid: int, preloaded: tuple[str, ...] = (), path: str | None = None) -> socket.socket:
    """Start a fork_server.py of the process `pid`, this one, and return a connection to it.

    Args:
        pid: This process.
        preloaded: Modules that the server imports besides its own.
        path: PYTHONPATH of the server; None: that of this process.
    """
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1):  # its copies become children of this process
        raise OSError(ctypes.get_errno(), f"prctl failed in process {pid}")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    script = Path(__file__).with_name("fork_server.py")
    with theirs:
        subprocess.Popen(
            [sys.executable, str(script), str(theirs.fileno()), *preloaded],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE", **({} if path is None else {"PYTHONPATH": path})},
        )
    return ours


class _ForkedPython(subprocess.Popen):
    """Popen of a Python program whose process is a copy made by fork_server.py."""

    def __init__(self, *arguments, preloaded: tuple[str, ...], **options):
        self.preloaded = preloaded
        super().__init__(*arguments, **options)

    def _execute_child(self, *values):
        given = dict(zip(list(inspect.signature(subprocess.Popen._execute_child).parameters)[1:], values, strict=True))
        request = {
            "words": given["args"][1:],
            "cwd": str(given["cwd"] or os.getcwd()),
            "env": dict(os.environ if given["env"] is None else given["env"]),
            "new_session": given["start_new_session"],
        }
        ends = [given[name] for name in ("p2cread", "c2pwrite", "errwrite")]
        descriptors = [own if end == -1 else end for own, end in enumerate(ends)]
        path = request["env"].get("PYTHONPATH", "") if self.preloaded else None
        server = _fork_server(os.getpid(), self.preloaded, path)
        socket.send_fds(server, [json.dumps(request).encode()], descriptors)
        self.pid, parent = map(int, server.recv(64).split())
        assert parent == os.getpid(), "the copy of the fork server is not a child of this process"
        self._child_created = True
        pipes = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(given[name] for name in pipes))


def start_python(
    *words: str,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    start_new_session: bool = False,
    stdin: int | None = None,
    stdout: int | None = subprocess.PIPE,
    stderr: int | None = subprocess.PIPE,
    forked: bool = True,
    preloaded: tuple[str, ...] = (),
) -> subprocess.Popen:
    """Start `python <words>`, on Linux as a copy of a process that has imported torch, Lightning and `preloaded`.

    With `forked=False` it is a new interpreter: where the order of imports or the seed of Python's hashes matter.
    """
    fork = functools.partial(_ForkedPython, preloaded=preloaded)
    program = fork if forked and sys.platform == "linux" else subprocess.Popen
    return program(
        [sys.executable, *words],
        cwd=cwd,
        env=env,
        start_new_session=start_new_session,
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        text=True,
    )


def run_python(
    *words: str,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    forked: bool = True,
    preloaded: tuple[str, ...] = (),
) -> subprocess.CompletedProcess:
    """Run `python <words>` as `start_python` does, to its end."""
    with start_python(*words, cwd=cwd, env=env, forked=forked, preloaded=preloaded) as process:
        output, errors = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def children(pid: int) -> list[int]:
    """Return the pids of the children of a process."""
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def has_exited(pid: int) -> bool:
    """Return whether a process has ended; a zombie counts as ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_until(condition, seconds: float = 60.0) -> None:
    """Wait until `condition()` holds; fail after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"the condition did not hold within {seconds} s"
        time.sleep(0.05)
