"""Train many runs, some at the same time: `train_all` for a fixed list, `Scheduler` for runs decided on the way.

Every run is a process, a copy (`os.fork`) of this one, which has imported everything once. Its output goes to
`output.txt` in its run folder. Before a run starts, its folder holds its `config.yaml`, so a run is trained, continued
or left alone by the same call: `levin.resume.resume`.
"""

import atexit
import multiprocessing.util
import os
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Self

from levin.core.errors import CheckpointError, FolderError, LockedError, NotFiniteError, RunError, exit_on_user_error
from levin.core.process import (
    SIGNALS,
    close_terminal,
    handle_signals,
    release_cores,
    restore_signals,
    signal_at_parents_end,
)
from levin.runs import folder as run_folder
from levin.runs.code import inherit, take_snapshot
from levin.scheduler.resources import Resources
from levin.scheduler.table import State, Table

OUTPUT = "output.txt"
SECONDS = 0.1  # between two looks at the processes
# Exit codes of the process of a run: its values are not valid, a number was not finite, another process trains it,
# Ctrl-C before it trained.
NOT_VALID, NOT_FINITE, LOCKED, INTERRUPTED = 2, 3, 4, 130


@dataclass(frozen=True)
class Ended:
    """A process that has ended: `code` is its exit code, negative if a signal killed it."""

    run: Path
    code: int

    @property
    def last_line(self) -> str:
        """Last line of the run's output."""
        try:
            lines = (self.run / OUTPUT).read_text(encoding="utf-8", errors="replace").strip().splitlines()
        except OSError as error:  # such as that of a folder which the user has removed
            return f"its output can't be read: {error.strerror}"
        return lines[-1].removeprefix("levin: ") if lines else "no output"

    @property
    def failure(self) -> str:
        """One sentence about a run that has failed."""
        if self.code < 0:
            return f"{self.run} was killed by {signal.Signals(-self.code).name}"
        return f"{self.run} failed: {self.last_line} (see {self.run / OUTPUT})"


class Scheduler:
    """Processes that train runs, at most `at_once` at the same time. Use it in a `with` statement.

    A signal to this process is passed on to all runs, which save and end; `received` is then set, and nothing new may
    start. When the `with` statement ends, for any reason, the remaining runs save and end. If this process is killed,
    they do so too (on Linux).

    Args:
        train: Function that trains the run in a folder; it is called in the process of the run.
        resources: Number of processes at the same time, and what each may use.
    """

    def __init__(self, train: Callable[[Path], Any], resources: Resources) -> None:
        self.train, self.resources = train, resources
        self.received: signal.Signals | None = None
        self._pids: dict[Path, int] = {}
        self._places: dict[Path, int] = {}
        self._owner = os.getpid()

    def __enter__(self) -> Self:
        release_cores(self.resources.threads)
        import levin.training.session  # noqa: F401  # once, for all processes

        self._code = take_snapshot()  # of what all processes run, whatever happens to the files and the commit
        self._handlers = handle_signals(self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for run in self._pids:
            self.stop(run)
        while self._pids:
            self.poll()
            time.sleep(SECONDS)
        restore_signals(self._handlers)
        if self.received == signal.SIGUSR1 and callable(signal.getsignal(signal.SIGUSR1)):
            signal.raise_signal(signal.SIGUSR1)  # of a SLURM job, which is requeued

    @property
    def running(self) -> list[Path]:
        """Folders of the runs that are being trained by a process of this one."""
        return list(self._pids)

    @property
    def has_room(self) -> bool:
        """Whether another run may start."""
        return self.received is None and len(self._pids) < self.resources.at_once

    def start(self, run: Path) -> None:
        """Start the process of a run, whose folder exists."""
        output = os.open(run / OUTPUT, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666)
        place = min(set(range(self.resources.at_once)) - set(self._places.values()))
        sys.stdout.flush()
        sys.stderr.flush()
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # a signal waits until the process is known and can be told
        pid = -1
        try:
            pid = os.fork()
            if pid:
                self._pids[run], self._places[run] = pid, place
        finally:
            if pid:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
                os.close(output)
        if not pid:
            self._train_and_exit(run, place, output)

    def _train_and_exit(self, run: Path, place: int, output: int) -> None:
        """Train a run in a process that `start` has forked, and end the process."""
        code: Any = 1
        atexit._clear()  # what the first process does at its end is not for this one to do
        try:
            os.setsid()  # so that Ctrl-C in a terminal reaches only the first process, which passes it on
            _redirect_output(output)
            if self.resources.gpus is not None:
                os.environ["CUDA_VISIBLE_DEVICES"] = self.resources.gpus[place]
            signal_at_parents_end(signal.SIGTERM, self._owner)
            restore_signals(self._handlers)
            signal.signal(signal.SIGUSR1, signal.SIG_DFL)  # that of a SLURM job is for the first process alone
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            inherit(self._code)
            with exit_on_user_error():
                self.train(run)
            code = 0
        except SystemExit as ending:
            code = _exit_code(ending)
        except BaseException:
            traceback.print_exc()
        finally:  # as the interpreter ends, but without returning into the code of the first process
            try:
                threading._shutdown()  # type: ignore[attr-defined]
                atexit._run_exitfuncs()
                multiprocessing.util._exit_function()  # type: ignore[attr-defined]
                sys.stdout.flush()
            finally:
                os._exit(code if isinstance(code, int) else 0 if code is None else 1)

    def poll(self) -> list[Ended]:
        """Return the processes that have ended since the last call."""
        ended = []
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # no signal is passed on to a process that has just ended
        for run, pid in list(self._pids.items()):
            if (status := os.waitpid(pid, os.WNOHANG))[0]:
                del self._pids[run], self._places[run]
                ended.append(Ended(run, os.waitstatus_to_exitcode(status[1])))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return ended

    def stop(self, run: Path) -> None:
        """Let the process of a run save and end."""
        os.kill(self._pids[run], signal.SIGTERM)

    def _receive(self, number: int, _: FrameType | None) -> None:
        # The runs of a SLURM job have received the signal, too, and would take another SIGINT for a second Ctrl-C.
        sent = number if number != signal.SIGINT else signal.SIGTERM if self.received != number else signal.SIGKILL
        self.received = signal.Signals(number)
        if number == signal.SIGHUP:
            close_terminal()
        for pid in self._pids.values():
            os.kill(pid, sent)
        again = "; press Ctrl-C again to end them without saving" if number == signal.SIGINT else ""
        with suppress(OSError):  # stderr may be closed: the same Ctrl-C ends a `| tee`
            os.write(2, f"levin: {self.received.name}: the runs will be saved and end{again}\n".encode())


def _exit_code(ending: SystemExit) -> Any:
    """Return the exit code that tells the scheduler why a run failed; the user's commands have fewer codes."""
    reason = ending.__context__
    if isinstance(reason, NotFiniteError):
        return NOT_FINITE
    if isinstance(reason, LockedError):
        return LOCKED
    return 1 if isinstance(reason, FolderError | CheckpointError) else ending.code


def _redirect_output(descriptor: int) -> None:
    """Write all output of this process to an open file, and read nothing."""
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    # New streams: those of the first process may have been replaced, as pytest and notebooks do.
    sys.stdout, sys.stderr = (open(each, "w", encoding="utf-8", buffering=1, closefd=False) for each in (1, 2))  # noqa: SIM115


def train_all(
    runs: Mapping[Path, int], train: Callable[[Path], Any], resources: Resources, *, tolerated: tuple[int, ...] = ()
) -> bool:
    """Train runs to their ends, except those that are complete, and show their progress.

    A run that another process trains is waited for. A run that fails is named, and the others continue.

    Args:
        runs: Env steps of each complete run, by its folder, which holds its config.yaml.
        train: Function that trains the run in a folder.
        resources: Number of processes at the same time, and what each may use.
        tolerated: Exit codes of failed runs that are printed, but raise no RunError.

    Returns:
        Whether all runs have come to their end; False if one was stopped before, by a signal or `trainer.max_time`.

    Raises:
        RunError: Runs have failed.
    """
    states: dict[Path, State] = dict.fromkeys(runs, "waiting")
    failures: list[str] = []
    with Table(runs, shared_folder(runs)) as table, Scheduler(train, resources) as scheduler:
        while scheduler.running or (scheduler.received is None and unfinished(states)):
            for run in unfinished(states):
                if not scheduler.has_room:
                    break
                try:
                    states[run] = _start_if_needed(run, runs[run], scheduler)
                except OSError as error:  # such as of a folder that is gone, or of another user's
                    if error.filename is None:  # no process could be started
                        raise
                    states[run] = "failed"
                    failures.append(f"{run} can't be written: {error.strerror}")
                    table.print(f"levin: {failures[-1]}")
            for ended in scheduler.poll():
                # A run that has not begun to train when a signal arrives ends at once.
                stopped = scheduler.received is not None and (ended.code < 0 or ended.code == INTERRUPTED)
                if ended.code == LOCKED:  # another process has started it at the same moment
                    states[ended.run] = "elsewhere"
                elif ended.code and not stopped:
                    states[ended.run] = "failed"
                    if ended.code not in tolerated:
                        failures.append(ended.failure)
                    table.print(f"levin: {ended.failure}")
                else:
                    states[ended.run] = "complete" if run_folder.has_ended(ended.run, runs[ended.run]) else "stopped"
                    line = ended.last_line
                    table.print(line if str(ended.run) in line else f"{ended.run}: {line}")
            table.show(states, count_states(states))
            time.sleep(SECONDS)
        table.show(states, count_states(states), now=True)
    if failures:
        others = "saved" if scheduler.received else "complete"
        more = f"; the others are {others}" if len(runs) > len(failures) else ""
        raise RunError(f"{len(failures)} of {len(runs)} runs failed{more}: {failures[0]}")
    return all(state in ("complete", "failed") for state in states.values())


def _start_if_needed(run: Path, total_env_steps: int, scheduler: Scheduler) -> State:
    """Start a run that is not complete and that no other process trains; return its state."""
    if run_folder.is_locked(run):  # another process trains it, or saves it after the end of its command
        return "elsewhere"
    if run_folder.has_ended(run, total_env_steps):
        return "complete"
    scheduler.start(run)
    return "running"


def count_states(states: Mapping[Path, State]) -> str:
    """Return how many runs are in each state, in words."""
    counts = Counter(states.values())
    return f"{len(states)} runs: {', '.join(f'{count} {state}' for state, count in counts.items())}"


def shared_folder(runs: Iterable[Path]) -> Path:
    """Return the folder that runs share, relative to the current one."""
    return Path(os.path.relpath(os.path.commonpath([run.parent.absolute() for run in runs])))


def unfinished(states: Mapping[Path, State]) -> list[Path]:
    """Return the runs that still have to be started here."""
    return [run for run, state in states.items() if state in ("waiting", "elsewhere")]
