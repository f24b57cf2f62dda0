"""Run the trials of a search, which Optuna calls a study; each is runs of one config with several seeds.

The folder of a search:

    study.json                     what is searched; another command is refused
    study.log                      Optuna's journal: trials, their values and evaluations
    base/                          config that the search changes, and the tuned config it came from
    trials.csv                     one row per trial, for other programs
    trials/<number>/s<seed>/       ordinary runs
    retrained/<name>/s<seed>/      best trials, and the values that the search started from, with fresh seeds
    winner.yaml                    values of the best of them

Several commands, also of several machines that share a file system, may work on one search. A trial belongs to the
command that holds the lock in its folder; one whose command was killed is continued by the next command. Everything
that decides about a trial depends on numbers of finished trials and of its own evaluations, in a fixed order, and not
on time. So a search with one run at a time ends with the same trials if it is killed and continued.
"""

import csv
import io
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pydantic
from omegaconf import DictConfig, OmegaConf
from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._file import BaseJournalFileLock
from optuna.trial import FrozenTrial, TrialState

from levin.config import cli, schema
from levin.config.compose import chosen_algo_and_env, compose_one_of_many
from levin.core import files
from levin.core.errors import ConfigError, LockedError, RunError
from levin.core.process import print_line
from levin.core.validate import read_json
from levin.results.aggregates import iqm
from levin.results.curves import METRICS, Curve, read_run
from levin.runs import folder as run_folder
from levin.runs.code import checksum_of
from levin.runs.load import load_config
from levin.runs.provenance import command_line, run_git
from levin.scheduler.scheduler import NOT_FINITE, NOT_VALID, SECONDS, Ended, Scheduler
from levin.scheduler.table import State, Table
from levin.tuning.sampler import TrialSampler
from levin.tuning.space import as_word, suggest
from levin.tuning.winner import tuned_path

PLAN, JOURNAL, TRIALS, TABLE = run_folder.SEARCH_PLAN, "study.log", "trials", "trials.csv"
BASE, TUNED = "base", "tuned.yaml"
RESTARTS = 3  # times that one command restarts killed runs of a trial
FAILED_BEFORE = "failed_before"  # attribute of a trial with a run that has failed; a second failure ends the trial


class Plan(pydantic.BaseModel):
    """Contents of study.json."""

    command: str
    git_sha: str
    words: list[str]  # overrides of the command, in alphabetical order
    space: dict[str, str]
    seeds_per_trial: pydantic.PositiveInt
    code: str | None = None  # checksum of the code that trains the trials; older searches have none


def open_study(
    folder: Path, overrides: list[str], space: Mapping[str, BaseDistribution], seeds_per_trial: int
) -> tuple[optuna.Study, DictConfig]:
    """Create the search in a folder, or open the one that an equal command has created.

    Args:
        folder: Folder of the search.
        overrides: Overrides of the config that the search changes.
        space: Search space.
        seeds_per_trial: Number of runs of each trial.

    Returns:
        Optuna's study, and the config that the search changes: as it was when the search began. Since then, the winner
        may have changed the tuned config.

    Raises:
        ConfigError: The folder holds another search, or something else.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    base = compose_one_of_many(overrides)
    plan = Plan(
        command=command_line(),
        git_sha=run_git("rev-parse", "HEAD"),
        words=sorted(overrides),
        space={key: distribution_to_json(each) for key, each in space.items()},
        seeds_per_trial=seeds_per_trial,
        code=checksum_of({str(base.algo._target_)}),
    )
    if base.trainer.get("max_time") is not None:
        raise ConfigError(
            f"trainer.max_time={base.trainer.max_time} stops runs before their end, so no trial would be complete: "
            "leave it out"
        )
    with _lock_until(folder / ".study.lock"):
        if (folder / PLAN).exists():
            _refuse_other(folder, plan)
        elif not run_folder.is_empty(folder):
            raise ConfigError(f"run={folder} exists already, and is not a search: name another folder")
        else:
            files.save_json(plan.model_dump(), folder, PLAN)
        if not run_folder.has_begun(folder / BASE):
            if (tuned := tuned_path(*chosen_algo_and_env(overrides))) is not None and tuned.is_file():
                (folder / BASE).mkdir(exist_ok=True)
                files.write_text(folder / BASE, TUNED, tuned.read_text(encoding="utf-8"))
            run_folder.begin(folder / BASE, base)
        config = load_config(folder / BASE)
        study = optuna.create_study(
            storage=_open_journal(folder / JOURNAL),
            study_name="levin",
            sampler=TrialSampler(config.seed),
            pruner=optuna.pruners.MedianPruner(n_startup_trials=5),
            direction="maximize",
            load_if_exists=True,
        )
        return study, config


def with_values(base: DictConfig, values: Mapping[str, Any], seed: int) -> DictConfig:
    """Return a copy of a config with the values of a trial and this seed.

    Raises:
        ConfigError: The values are not valid together.
    """
    config = base.copy()
    OmegaConf.set_readonly(config, False)
    for override in cli.parse_hydra_overrides([f"{key}={as_word(value)}" for key, value in values.items()]):
        OmegaConf.update(config, str(override.key_or_group), override.value())
    config.seed = seed
    schema.check(config)
    return config


def load_study(folder: Path) -> optuna.Study:
    """Open the study of an existing search to read it.

    Raises:
        ConfigError: There is none in the folder.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if not (folder / PLAN).is_file() or not (folder / JOURNAL).is_file():
        raise ConfigError(f"run={folder} holds no search")
    return optuna.load_study(study_name="levin", storage=_open_journal(folder / JOURNAL))


def _open_journal(path: Path) -> JournalStorage:
    """Open Optuna's journal. An incomplete last line, which a full disk leaves behind, is removed."""
    lock = JournalLock(path)
    if path.exists():
        lock.acquire()
        try:
            text = path.read_bytes()
            if not text.endswith(b"\n"):
                os.truncate(path, text.rfind(b"\n") + 1)
        finally:
            lock.release()
    try:
        return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))
    except ValueError as error:
        raise ConfigError(f"{path} is damaged: {error}") from error


class JournalLock(BaseJournalFileLock):
    """Lock of Optuna's journal that ends with its process.

    Optuna's own is a link, which a killed process leaves behind.
    """

    def __init__(self, journal: Path) -> None:
        self.path = journal.with_name(f".{journal.name}.lock")
        self.held = ExitStack()

    def acquire(self) -> bool:
        """Wait for the lock."""
        self.held.enter_context(_lock_until(self.path))
        return True

    def release(self) -> None:
        """Release the lock."""
        self.held.close()


def _refuse_other(folder: Path, plan: Plan) -> None:
    """Raise a ConfigError if the search in the folder is not this one."""
    try:
        existing = Plan(**read_json(folder / PLAN, Plan))
    except ValueError as error:
        raise ConfigError(f"{folder / PLAN} is damaged: {error}") from error
    differ = [
        text
        for text, here, there in (
            ("search space", plan.space, existing.space),
            ("config", plan.words, existing.words),
            ("number of seeds per trial", plan.seeds_per_trial, existing.seeds_per_trial),
        )
        if here != there
    ]
    if existing.code not in (None, plan.code):
        print_line(
            f"{folder}: the code has changed since the search began, so its trials do not compare with later ones"
        )
    if differ:
        raise ConfigError(
            f"run={folder} holds a search with another {' and '.join(differ)}; it was started by: {existing.command}; "
            "name another folder with run= (with make: RUN=)"
        )


@contextmanager
def _lock_until(path: Path) -> Iterator[None]:
    """Lock a file, and wait for another process that holds the lock: for moments only."""
    with ExitStack() as held:
        for attempt in range(1200):
            try:
                held.enter_context(run_folder.lock_file(path, f"{path} is locked"))
                break
            except LockedError:
                if attempt == 1199:
                    raise
                time.sleep(0.05)
        yield


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
        with _lock_until(self.folder / ".trials.lock"):  # no other process takes the same trial
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
        if not trial.told:
            for step, value in self._evaluations(trial):
                if step > trial.last_step:
                    trial.trial.report(value, step)
                    trial.last_step = step
                    self.trains = True
                if step == trial.last_step > trial.judged_step:  # also the last step before the trial was reopened
                    trial.judged_step = step
                    if trial.trial.should_prune():
                        self._finish(trial, None, TrialState.PRUNED, f"pruned, {value:.1f} so far")
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
        value_text = "" if value is None else f", IQM {value:.1f}"
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


def best_trials(study: optuna.Study, number: int) -> list[FrozenTrial]:
    """Return the trials with the best values, the best first, the earlier first of equal ones."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return sorted(complete, key=lambda trial: (-(trial.value or 0.0), trial.number))[:number]


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
