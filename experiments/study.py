"""Helpers of the studies in this folder: train runs in several processes, read their evaluations, write tables.

A study is a folder with a `run.py` that trains, measures and writes a report: `make study NAME=worlds`. A complete run
is kept as it is, and an interrupted one continues from its last checkpoint.
"""

import csv
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from levin.config.compose import compose
from levin.core.errors import RunError, exit_on_user_error
from levin.core.omega import to_plain
from levin.core.process import silence_libraries
from levin.resume import STOPPED, resume_side_by_side
from levin.runs import folder as run_folder
from levin.runs.load import load_config


def run_in_processes(function: Callable[..., Any], jobs: Iterable[tuple[Any, ...]]) -> list[Any]:
    """Call a function with each tuple of arguments, in one process per core. Return the results in the same order."""
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn"), initializer=silence_libraries) as pool:
        return list(pool.map(_call, repeat(function), jobs))  # the first error cancels the jobs that have not started


def _call(function: Callable[..., Any], job: tuple[Any, ...]) -> Any:
    return function(*job)


def train_runs(runs: Mapping[Path, list[str]]) -> None:
    """Train runs with these overrides, some at the same time. One with another config is deleted and begun again."""
    configs = {run: compose(words) for run, words in runs.items()}
    for run, config in configs.items():
        if run_folder.has_begun(run) and not _has_config(run, config):
            shutil.rmtree(run)
        if not run_folder.has_begun(run):
            run_folder.begin(run, config)
    continue_runs(configs)


def continue_runs(configs: Mapping[Path, DictConfig]) -> None:
    """Train runs, whose folders hold these configs, to their ends. Exit if one fails or a signal stops them."""
    with exit_on_user_error():
        if not resume_side_by_side(configs, jobs=None):
            raise RunError(STOPPED)


def _has_config(run: Path, cfg: DictConfig) -> bool:
    """Return whether a run was started with this config. Threads are ignored: a run saves how many it really used."""
    saved, expected = to_plain(load_config(run, runs=())), to_plain(cfg)
    for config in (saved, expected):
        config["trainer"].pop("threads")
    return saved == expected


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
