"""Open the folder of a search, which Optuna calls a study; each trial is runs of one config with several seeds.

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

import os
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

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
from levin.core.errors import ConfigError, LockedError
from levin.core.process import print_line
from levin.core.validate import read_json
from levin.runs import folder as run_folder
from levin.runs.code import checksum_of
from levin.runs.load import load_config
from levin.runs.provenance import command_line, run_git
from levin.tuning.sampler import TrialSampler
from levin.tuning.space import as_word
from levin.tuning.winner import tuned_path

PLAN, JOURNAL = run_folder.SEARCH_PLAN, "study.log"
BASE, TUNED = "base", "tuned.yaml"


class Plan(pydantic.BaseModel):
    """Contents of study.json."""

    command: str
    git_sha: str
    words: list[str]  # overrides of the command, in alphabetical order
    space: dict[str, str]
    seeds_per_trial: pydantic.PositiveInt
    code: str  # checksum of the code that trains the trials


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
    with lock_until(folder / ".study.lock"):
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
        self.held.enter_context(lock_until(self.path))
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
    if existing.code != plan.code:
        print_line(
            f"{folder}: the code has changed since the search began, so its trials do not compare with later ones"
        )
    if differ:
        raise ConfigError(
            f"run={folder} holds a search with another {' and '.join(differ)}; it was started by: {existing.command}; "
            "name another folder with run= (with make: RUN=)"
        )


@contextmanager
def lock_until(path: Path) -> Iterator[None]:
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


def best_trials(study: optuna.Study, number: int) -> list[FrozenTrial]:
    """Return the trials with the best values, the best first, the earlier first of equal ones."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return sorted(complete, key=lambda trial: (-(trial.value or 0.0), trial.number))[:number]
