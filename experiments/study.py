"""Helpers of the studies in this folder: train runs in several processes, read their evaluations, write tables.

A study is a folder with a `run.py` that trains, measures and writes a report: `make study NAME=worlds`. A complete run
is kept as it is, and an interrupted one continues from its last checkpoint. No run is ever deleted: one with another
config is renamed, and trained again.
"""

import csv
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import count, repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from levin.config.compose import GROUPS, compose
from levin.core.errors import ConfigError, LockedError, RunError, exit_on_user_error
from levin.core.omega import flat_keys, to_plain
from levin.core.process import silence_libraries
from levin.resume import STOPPED, resume_side_by_side
from levin.runs import folder as run_folder
from levin.runs.load import load_config


def read_words(*valid: str) -> list[str]:
    """Return the words after the study's name (`make study ARGS=`); end the program if one of them is not valid."""
    with exit_on_user_error():
        if unknown := set(sys.argv[1:]) - set(valid):
            allowed = f"only these words: {', '.join(valid)}" if valid else "no words"
            raise ConfigError(f"{', '.join(sorted(unknown))}: this study takes {allowed}")
    return sys.argv[1:]


def run_in_processes(function: Callable[..., Any], jobs: Iterable[tuple[Any, ...]]) -> list[Any]:
    """Call a function with each tuple of arguments, in one process per core. Return the results in the same order."""
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn"), initializer=silence_libraries) as pool:
        return list(pool.map(_call, repeat(function), jobs))  # the first error cancels the jobs that have not started


def _call(function: Callable[..., Any], job: tuple[Any, ...]) -> Any:
    return function(*job)


def train_runs(runs: Mapping[Path, list[str]]) -> None:
    """Train runs with these overrides, some at the same time. One with another config is set aside and begun again.

    Raises:
        LockedError: Another process trains a run with another config.
    """
    configs = {run: compose(words) for run, words in runs.items()}
    for run, config in configs.items():
        if run_folder.has_begun(run) and not _has_config(run, config, runs[run]):
            set_aside(run)
        if not run_folder.has_begun(run):
            run_folder.begin(run, config)
    continue_runs(configs)


def continue_runs(configs: Mapping[Path, DictConfig]) -> None:
    """Train runs, whose folders hold these configs, to their ends. Exit if one fails or a signal stops them."""
    with exit_on_user_error():
        if not resume_side_by_side(configs, jobs=None):
            raise RunError(STOPPED)


def set_aside(run: Path) -> None:
    """Rename a run to `<run>.old`, `<run>.old2` and so on.

    Raises:
        LockedError: Another process trains the run.
    """
    if run_folder.is_locked(run):
        raise LockedError(f"run={run} is out of date, and another process trains it: stop that process first")
    names = (run.with_name(f"{run.name}.old{number if number > 1 else ''}") for number in count(1))
    old = next(name for name in names if not name.exists())
    run.rename(old)
    print(f"levin: {run} is out of date: renamed to {old}")


def _has_config(run: Path, config: DictConfig, words: list[str]) -> bool:
    """Return whether a run was started with the config of these overrides.

    A key that did not exist at that time had its default value. Threads are ignored: a run saves how many it used.
    """
    saved, expected = _flat_values(load_config(run, code_sections=())), _flat_values(config)
    new = expected.keys() - saved.keys()
    if new:
        others = [word for word in words if _chooses_file(word) or not any(_sets(word, key) for key in new)]
        saved = {key: value for key, value in _flat_values(compose(others)).items() if key in new} | saved
    return saved == expected


def _flat_values(config: DictConfig) -> dict[str, Any]:
    """Return the values of a config by dotted key, without the number of threads."""
    return {key: OmegaConf.select(config, key) for key in flat_keys(to_plain(config)) if key != "trainer.threads"}


def _chooses_file(word: str) -> bool:
    """Return whether an override chooses a YAML file, as `algo=sac` does."""
    return word.partition("=")[0] in GROUPS


def _sets(word: str, key: str) -> bool:
    """Return whether an override sets a key, or the section that holds it."""
    return f"{key}.".startswith(f"{word.partition('=')[0].lstrip('+')}.")


def read_evaluations(run: Path) -> list[dict[str, str]]:
    """Return the rows of a run's metrics.csv that contain an evaluation."""
    with (run / "metrics.csv").open() as file:
        return [row for row in csv.DictReader(file) if row.get("eval/return_mean")]


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a CSV file."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
