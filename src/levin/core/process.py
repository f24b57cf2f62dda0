"""What a process of a run sets up for itself: signals, memory, and what it prints."""

import ctypes
import logging
import os
import signal
import sys
import warnings

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # USR1: SLURM's warning before the time is over
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h


def ignore_signals() -> None:
    """Ctrl-C and SLURM signal every process of a run: the run's own is to save, and its workers live until it has."""
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)


def print_line(text: str) -> None:
    """Print a line, for whoever still listens: Ctrl-C also ends the `tee` behind a pipe, and the run must be saved."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def keep_freed_memory() -> None:
    """Let glibc keep what is freed. The tensors of one update are those of the next: giving their pages back to the
    system and faulting them in again costs a tenth of an update on the CPU."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        for option, value in ((M_MMAP_THRESHOLD, 32 << 20), (M_TRIM_THRESHOLD, 512 << 20), (M_TOP_PAD, 64 << 20)):
            libc.mallopt(option, value)


def silence_libraries() -> None:
    """Silence what the libraries say at every start and no user can act on."""
    for name in (
        "torchrl",
        "lightning.fabric.utilities.distributed",
        "lightning.pytorch.trainer.connectors.checkpoint_connector",
    ):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Lightning's profilers report through the same logger as its greetings.
    spoken = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    spoken.addFilter(lambda record: record.levelno >= logging.WARNING or "Report" in record.getMessage())
    # What a worker raises is said once, and not by Gymnasium in three warnings.
    for message in (
        ".*ERROR: (Traceback|Received|Raising).*",
        ".*is out of date.*",
        ".*isinstance.treespec, LeafSpec.*",
        ".*does not have many workers.*",
        ".*fit will run with no optimizer.*",  # A3C applies its gradients itself
    ):
        warnings.filterwarnings("ignore", message=message)
