"""Train the runs of trials, prune trials, and tell their values to Optuna's study."""

import csv
import io
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from omegaconf import DictConfig
from optuna.distributions import BaseDistribution
from optuna.trial import TrialState

from levin.core import files
from levin.core.errors import ConfigError, LockedError, RunError
from levin.results.aggregates import iqm
from levin.results.curves import METRICS, Curve, read_run
from levin.results.tables import short_number
from levin.runs import folder as run_folder
from levin.scheduler.scheduler import NOT_FINITE, NOT_VALID, SECONDS, Ended, Scheduler
from levin.scheduler.table import State, Table
from levin.tuning.space import suggest
from levin.tuning.study import lock_until

TRIALS, TABLE = "trials", "trials.csv"
RESTARTS = 3  # times that one command restarts killed runs of a trial
FAILED_BEFORE = "failed_before"  # attribute of a trial with a run that has failed; a second failure ends the trial


@dataclass
class OpenTrial:
    """A trial whose runs this process trains."""

    trial: optuna.Trial
    configs: dict[Path, DictConfig]  # by run folder, in the order of the seeds
    lock: ExitStack
    waiting: list[Path]  # runs that are not started yet
    last_step: int = -1  # of the values reported
    judged_step: int = -1  # of the value after which the pruner was asked
    told: bool = False  # whether its state is final; its processes may still be saving
    restarts: int = 0
    ended: set[Path] = field(default_factory=set)


class Trials:
    """Trials of a search that this process works on.

    Args:
        study: Optuna's study.
        folder: Its folder.
        space: Its search space.
        make_configs: Function that returns the config of each seed, given the values of a trial.
        number: Number of trials of the search, those of all processes together.
        scheduler: Scheduler that trains the runs.
        table: Table that shows them.
    """

    def __init__(
        self,
        *,
        study: optuna.Study,
        folder: Path,
        space: Mapping[str, BaseDistribution],
        make_configs: Callable[[dict[str, Any]], list[DictConfig]],
        number: int,
        scheduler: Scheduler,
        table: Table,
    ) -> None:
        self.study, self.folder, self.space, self.make_configs = study, folder, space, make_configs
        self.number, self.scheduler, self.table = number, scheduler, table
        self.open: list[OpenTrial] = []
        self.states: dict[Path, State] = {}
        self.finished = 0  # trials of all processes, when trials.csv was last written
        self.trains = False  # whether a run has been evaluated here, so that this machine can train the search
        self.refusal = ""  # last line of the run whose values were last refused
        self._curves: dict[Path, tuple[int, Curve]] = {}  # by run: size of its metrics.csv when it was read, and curve

    def run(self) -> bool:
        """Work until no trial is left to be done here; return False if a signal has stopped the work.

        Raises:
            RunError: A run has failed for another reason than the values of its trial.
        """
        self.write_table()
        while True:
            while self.scheduler.has_room and self._start_next():
                pass
            for ended in self.scheduler.poll():
                self._end_run(ended)
            for each in list(self.open):
                self._follow(each)
            if not self.open and (self.scheduler.received or not self._is_work_left()):
                return self.scheduler.received is None
            self.table.show(self.states, f"{self.finished} of {self.number} trials have ended")
            time.sleep(SECONDS)

    def _start_next(self) -> bool:
        """Start a run of an open trial, or of another trial; return False if there is nothing to start now."""
        for each in self.open:
            for run in list(each.waiting):
                if run_folder.is_locked(run):  # it is saving, after the end of the command that trained it
                    continue
                each.waiting.remove(run)
                if run_folder.has_ended(run, each.configs[run].total_env_steps):
                    self._set_state(each, run, "complete")
                    each.ended.add(run)
                    continue
                self.scheduler.start(run)
                self._set_state(each, run, "running")
                return True
        # A trial whose runs have all ended, before a command was killed, is told before another one is asked for.
        running = set(self.scheduler.running)
        if any(each.waiting or not (each.told or running & set(each.configs)) for each in self.open):
            return False
        with lock_until(self.folder / ".trials.lock"):  # no other process takes the same trial
            opened = self._continue_trial() or self._ask()
        if opened is None:
            return False
        self.open.append(opened)
        return True

    def _continue_trial(self) -> OpenTrial | None:
        """Return a trial whose command was killed or stopped."""
        own = [each.trial.number for each in self.open]
        for each in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if each.number in own or run_folder.is_locked(trial_folder(self.folder, each.number)):
                continue
            if (lock := self._lock(each.number)) is not None:
                frozen = self.study.get_trials(deepcopy=False)[each.number]
                if frozen.state != TrialState.RUNNING:  # finished just now by the process that had the lock
                    lock.close()
                    continue
                steps = frozen.intermediate_values
                return self._open(optuna.Trial(self.study, frozen._trial_id), lock, max(steps, default=-1))
        return None

    def _ask(self) -> OpenTrial | None:
        """Return a new trial; None if there are enough."""
        if len(self.study.get_trials(deepcopy=False)) >= self.number:
            return None
        trial = self.study.ask()
        lock = self._lock(trial.number)
        assert lock is not None
        return self._open(trial, lock, -1)

    def _lock(self, number: int) -> ExitStack | None:
        """Lock a trial; return None if another process works on it."""
        held = ExitStack()
        folder = trial_folder(self.folder, number)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            held.enter_context(run_folder.lock_file(folder / run_folder.LOCK, f"{folder} is locked"))
        except LockedError:
            return None
        return held

    def _open(self, trial: optuna.Trial, lock: ExitStack, last_step: int) -> OpenTrial:
        """Create the run folders of a trial."""
        values = {key: suggest(trial, key, distribution) for key, distribution in self.space.items()}
        folder = trial_folder(self.folder, trial.number)
        opened = OpenTrial(trial, {}, lock, [], last_step)
        try:
            configs = self.make_configs(values)
        except ConfigError as error:  # the values are valid one by one, but not together
            self._finish(opened, None, TrialState.FAIL, str(error))
            return opened
        opened.configs = {folder / f"s{config.seed}": config for config in configs}
        for run, config in opened.configs.items():
            if not run_folder.has_begun(run):
                run_folder.begin(run, config)
            self._set_state(opened, run, "waiting")
        opened.waiting = list(opened.configs)
        self.write_table()
        return opened

    def _set_state(self, trial: OpenTrial, run: Path, state: State) -> None:
        self.states[run] = state
        self.table.total[run] = trial.configs[run].total_env_steps

    def _end_run(self, ended: Ended) -> None:
        """Note that a run's process has ended: complete, stopped by us, failed or killed.

        Raises:
            RunError: It has failed for another reason than the values of its trial.
        """
        (trial,) = (each for each in self.open if ended.run in each.configs)
        if trial.told or self.scheduler.received:
            self._set_state(trial, ended.run, "stopped")
        elif ended.code == 0 and run_folder.has_ended(ended.run, trial.configs[ended.run].total_env_steps):
            trial.ended.add(ended.run)
            self._set_state(trial, ended.run, "complete")
        elif ended.code == NOT_VALID and not self.trains and ended.last_line == self.refusal:
            # Other values, the same message: perhaps this machine has no GPU or lacks a package.
            raise RunError(f"trial {trial.trial.number}: {ended.failure}; the same command continues the search")
        elif ended.code in (NOT_VALID, NOT_FINITE):
            self.refusal = ended.last_line
            self._set_state(trial, ended.run, "failed")
            self._finish(trial, None, TrialState.FAIL, ended.last_line)
        elif ended.code <= 0 and trial.restarts < RESTARTS:
            trial.restarts += 1
            trial.waiting.append(ended.run)
            self._set_state(trial, ended.run, "waiting")
        elif FAILED_BEFORE in trial.trial.user_attrs:
            self._set_state(trial, ended.run, "failed")
            self._finish(trial, None, TrialState.FAIL, f"failed twice: {ended.last_line}")
        else:  # perhaps a full disk, and the trial is continued; a failure of its values comes again
            trial.trial.set_user_attr(FAILED_BEFORE, True)
            raise RunError(f"trial {trial.trial.number}: {ended.failure}; the same command continues the search")

    def _follow(self, trial: OpenTrial) -> None:
        """Report new evaluations of a trial, prune it or finish it, and close it when its processes have ended."""
        if not trial.told and not all(len(self._read_evaluations(run).return_mean) for run in trial.ended):
            self._finish(trial, None, TrialState.FAIL, "a run has ended without an evaluation")
        if not trial.told:
            for step, value in self._evaluations(trial):
                if step > trial.last_step:
                    trial.trial.report(value, step)
                    trial.last_step = step
                    self.trains = True
                if step == trial.last_step > trial.judged_step:  # also the last step before the trial was reopened
                    trial.judged_step = step
                    if trial.trial.should_prune():
                        self._finish(trial, None, TrialState.PRUNED, f"pruned, {short_number(value)} so far")
                        break
            if not trial.told and len(trial.ended) == len(trial.configs):
                last = np.array([last_return(run) for run in trial.configs])
                self._finish(trial, float(iqm(last[:, None, None])[0]), TrialState.COMPLETE, "complete")
        if not set(trial.configs) & set(self.scheduler.running) and (trial.told or self.scheduler.received):
            trial.lock.close()
            self.open.remove(trial)
            for run in trial.configs:
                del self.states[run]

    def _evaluations(self, trial: OpenTrial) -> Iterator[tuple[int, float]]:
        """Yield the steps and values to report to Optuna, seed by seed.

        A seed is reported after all seeds before it have ended. The value at an evaluation is the mean of its return
        and the last returns of the seeds before, so trials are compared at equal steps.
        """
        before: list[float] = []
        for place, (run, config) in enumerate(trial.configs.items()):
            per_run = config.total_env_steps // config.eval.every + 2
            for index, value in _numbered(self._read_evaluations(run), config.eval.every):
                yield place * per_run + index, float(np.mean([*before, value]))
            if run not in trial.ended:
                return
            before.append(last_return(run))

    def _read_evaluations(self, run: Path) -> Curve:
        """Return the evaluations of a run so far; none before its first row of metrics."""
        file = run / METRICS
        size = file.stat().st_size if file.is_file() else 0
        before, curve = self._curves.get(run, (0, Curve(*(np.empty(0) for _ in range(3)))))
        if size != before and file.read_bytes().endswith(b"\n"):  # else a row is being written
            self._curves[run] = size, read_run(run)
            return self._curves[run][1]
        return curve

    def _finish(self, trial: OpenTrial, value: float | None, state: TrialState, text: str) -> None:
        """Record the end of a trial, and stop its runs."""
        self.study.tell(trial.trial, value, state=state)
        trial.told = True
        trial.waiting.clear()
        for run in trial.configs:
            if run in self.scheduler.running:
                self.scheduler.stop(run)
        self.write_table()
        value_text = "" if value is None else f", IQM {short_number(value)}"
        self.table.print(f"trial {trial.trial.number}: {text}{value_text} ({describe(trial.trial.params)})")

    def _is_work_left(self) -> bool:
        """Return whether trials are missing, or are running: in other processes, since this one has none."""
        states = [trial.state for trial in self.study.get_trials(deepcopy=False)]
        return len(states) < self.number or TrialState.RUNNING in states

    def write_table(self) -> None:
        """Write trials.csv."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["number", "state", "value", *self.space])
        trials = self.study.get_trials(deepcopy=False)
        self.finished = sum(trial.state.is_finished() for trial in trials)
        for trial in trials:
            value = "" if trial.value is None else trial.value
            writer.writerow([trial.number, trial.state.name, value, *(trial.params.get(key, "") for key in self.space)])
        files.write_text(self.folder, TABLE, text.getvalue())


def trial_folder(folder: Path, number: int) -> Path:
    """Return the folder of a trial."""
    return folder / TRIALS / f"{number:04d}"


def describe(values: Mapping[str, Any]) -> str:
    """Return the values of a trial as text."""
    return ", ".join(
        f"{key.rpartition('.')[2]}={value:.4g}" if isinstance(value, float) else f"{key.rpartition('.')[2]}={value}"
        for key, value in values.items()
    )


def last_return(run: Path) -> float:
    """Return the mean return of a run's last evaluation.

    Raises:
        RunError: It has none.
    """
    returns = read_run(run).return_mean
    if not len(returns):
        raise RunError(f"{run} has no evaluation")
    return float(returns[-1])


def _numbered(curve: Curve, every: int) -> Iterator[tuple[int, float]]:
    """Yield the number of each evaluation, its env steps in units of `eval.every`, and its return."""
    last = -1
    for env_steps, value in zip(curve.env_steps, curve.return_mean, strict=True):
        if (index := int(env_steps) // every) > last:
            last = index
            yield index, float(value)
