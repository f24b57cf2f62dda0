"""Set up a process of a run: signals, memory allocation, and log output."""

import ctypes
import logging
import os
import signal
import socket
import stat
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

# SLURM sends USR1 before the time limit; a terminal sends HUP when it is closed.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
# Settings of OpenMP that say how idle threads wait.
WAIT_SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
CLAIM = "levin-core"  # name of a claim, followed by user and core
CLAIMS: list[socket.socket] = []  # sockets that claim the cores of this process
PR_SET_PDEATHSIG = 1  # as in linux/prctl.h
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # as in glibc's malloc.h


def ignore_signals() -> None:
    """Ignore Ctrl-C and SLURM's signals, in a worker.

    The signals reach every process of a run. The main process then saves, and its workers must live until it has.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def handle_signals(handler: Callable[[int, FrameType | None], None]) -> dict[int, Any]:
    """Set the handler of all `SIGNALS`, and return the previous ones by signal. `nohup` keeps its effect."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    numbers = [number for number in SIGNALS if number != signal.SIGHUP or not ignored]
    return {number: signal.signal(number, handler) for number in numbers}


def restore_signals(handlers: dict[int, Any]) -> None:
    """Set the handlers that `handle_signals` returned."""
    for number, handler in handlers.items():
        signal.signal(number, handler)


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Block `SIGNALS` while the context lasts, also in processes that begin in it; here they are delivered after it."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def signal_at_parents_end(number: signal.Signals, parent: int | None) -> None:
    """Let this process receive a signal when its parent ends, however that ends (on Linux).

    Args:
        number: The signal.
        parent: Process id of the parent, which may have ended already.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:
            os.kill(os.getpid(), number)


def shield_resource_tracker() -> None:
    """Start the process in which multiprocessing counts semaphores, with all `SIGNALS` blocked.

    SLURM sends SIGUSR1 to every process of a job. The tracker would end, and a new one would print a traceback for each
    semaphore that it has not heard of.
    """
    from multiprocessing import resource_tracker

    with signals_blocked():
        resource_tracker.ensure_running()


@contextmanager
def signals_handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Set the handler of all `SIGNALS` while the context lasts."""
    previous_handlers = handle_signals(handler)
    try:
        yield
    finally:
        restore_signals(previous_handlers)


def print_line(text: str) -> None:
    """Print a line; once that fails, discard what else goes to stdout, so that a run goes on and is saved.

    Ctrl-C also ends the `tee` behind a pipe. A terminal may be closed, and the disk of a log file may be full.
    """
    with output_may_end():
        print(text, flush=True)


@contextmanager
def output_may_end() -> Iterator[None]:
    """Discard what else goes to stdout once it can't be written, and say so, unless it is a pipe that was closed."""
    try:
        yield
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            with suppress(OSError):  # and nothing left in a buffer, which Python could not write at its exit
                os.write(2, f"levin: no more output, since it can't be written: {error.strerror}\n".encode())
        discard_output(sys.stdout.fileno())


def close_terminal() -> None:
    """Discard what else goes to a terminal that was closed: writing to it would raise an error."""
    for descriptor in (1, 2):
        if stat.S_ISCHR(os.fstat(descriptor).st_mode):
            discard_output(descriptor)


def discard_output(descriptor: int) -> None:
    """Discard what this process writes to a file descriptor from now on."""
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), descriptor)


def keep_freed_memory() -> None:
    """Make glibc keep freed memory instead of returning it to the system.

    Every update allocates tensors of the same sizes. Returning their pages and faulting them in again costs a tenth of
    an update on the CPU.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        for option, value in ((M_MMAP_THRESHOLD, 32 << 20), (M_TRIM_THRESHOLD, 512 << 20), (M_TOP_PAD, 64 << 20)):
            libc.mallopt(option, value)


def share_cores() -> None:
    """Let the idle threads of this process sleep if another process of Levin already computes on its cores.

    An idle OpenMP thread spins by default. That is fastest for a process alone, but two processes that spin on the same
    cores starve each other, to a hundredth of their speed. One that spins beside others that sleep does not. So the
    first process claims its cores until it ends, and those that find too few unclaimed cores set
    `OMP_WAIT_POLICY=PASSIVE`. A setting of the user has priority. The results are the same either way.

    OpenMP reads the variable when torch is imported, so this must be called before. It does nothing outside Linux.
    """
    if sys.platform != "linux" or CLAIMS or any(name in os.environ for name in WAIT_SETTINGS):
        return
    cores = available_cores()
    threads = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    count = min(len(cores), int(threads) if threads.isdigit() else len(cores))
    if count > 1 and not _claim_cores(cores, count):
        sleep_when_idle()


def sleep_when_idle() -> None:
    """Let the idle threads of this process and its children sleep, unless the user has chosen how they wait."""
    if not any(name in os.environ for name in WAIT_SETTINGS):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def available_cores() -> list[int]:
    """Return the cores that this process may use."""
    return sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else list(range(os.cpu_count() or 1))


def _claim_cores(cores: list[int], count: int) -> bool:
    """Claim `count` of these cores until this process ends; return whether that was possible.

    A claim is a socket with a name but no file (Linux's abstract sockets), which only one process can bind.
    """
    others = 0  # cores that other processes have claimed
    for core in cores:
        claim = socket.socket(socket.AF_UNIX)
        try:
            claim.bind(f"\0{CLAIM}-{os.getuid()}-{core}")
            CLAIMS.append(claim)
        except OSError:
            claim.close()
            others += 1
        if len(CLAIMS) == count:
            return True
        if others > len(cores) - count:
            break
    release_cores(1)
    return False


def release_cores(threads: int) -> None:
    """Give up the claims that this number of threads does not need; a single thread never spins, so it needs none."""
    while len(CLAIMS) > (threads if threads > 1 else 0):
        CLAIMS.pop().close()


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    if Path(filename).is_relative_to(Path(__file__).parents[1]):
        return f"levin: {message}\n"
    return f"{filename}:{lineno}: {category.__name__}: {message}\n"


def silence_libraries() -> None:
    """Silence the library messages that no user can act on, and print Levin's own warnings as plain sentences."""
    warnings.formatwarning = _format_warning
    for name in (
        "torchrl",
        "lightning.fabric.utilities.distributed",
        "lightning.pytorch.trainer.connectors.checkpoint_connector",
    ):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Lightning's profilers write their reports to the same logger as its messages at the start.
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addFilter(lambda record: record.levelno >= logging.WARNING or "Report" in record.getMessage())
    # Levin reports an error of an env worker once; Gymnasium would add three warnings.
    for message in (
        ".*ERROR: (Traceback|Received|Raising).*",
        ".*is out of date.*",
        ".*isinstance.treespec, LeafSpec.*",
        ".*does not have many workers.*",
        ".*fit will run with no optimizer.*",  # A3C applies its gradients itself
    ):
        warnings.filterwarnings("ignore", message=message)
