"""The signals that end a run, and the processes that are deaf to them."""

import signal

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # USR1: SLURM's warning before the time is over


def ignore() -> None:
    """Ctrl-C and SLURM signal every process of a run: the run's own is to save, and its workers live until it has."""
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
