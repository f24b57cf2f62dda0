"""Parts that the studies in this folder share: runs in several processes, their evaluations, and tables.

A study is a folder with a `run.py` that measures and reports: `make study NAME=worlds`. Runs that are complete are not
made again, and one that was interrupted continues from its checkpoint.
"""

import csv
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from levin import resume
from levin.config.compose import compose
from levin.core.omega import to_plain
from levin.core.process import silence_libraries
from levin.runs import checkpoint
from levin.runs import folder as run_folder
from levin.runs.load import load_config
from levin.training.session import train


def in_processes(function: Callable[..., Any], jobs: Iterable[tuple[Any, ...]]) -> list[Any]:
    """Call a function with each tuple of arguments, in as many processes as there are cores. Returns in their order."""
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn"), initializer=silence_libraries) as pool:
        return list(pool.map(_call, repeat(function), jobs))  # the first error ends those that wait


def _call(function: Callable[..., Any], job: tuple[Any, ...]) -> Any:
    return function(*job)


def is_complete(run: Path) -> bool:
    """Return whether a run is there and has come to its end."""
    return run_folder.read_provenance(run).get("env_steps") is not None


def train_once(words: list[str], run: Path) -> None:
    """Train a run with these overrides, unless it is complete. One that was begun with others begins anew."""
    cfg = compose(words)
    begun = run_folder.has_begun(run)
    if begun and not _is_of(run, cfg):
        shutil.rmtree(run)
    elif begun and is_complete(run):
        return
    if checkpoint.list_checkpoints(run / "checkpoints"):
        resume.resume(run=str(run))
    else:
        train(cfg, run)


def _is_of(run: Path, cfg: DictConfig) -> bool:
    """Return whether a run was begun with this config; how many threads it took is not the config's to say."""
    saved, wanted = to_plain(load_config(run)), to_plain(cfg)
    for each in (saved, wanted):
        each["trainer"].pop("threads")
    return saved == wanted


def evaluations(run: Path) -> list[dict[str, str]]:
    """Return the rows of a run's metrics.csv that hold an evaluation."""
    with (run / "metrics.csv").open() as file:
        return [row for row in csv.DictReader(file) if row.get("eval/return_mean")]


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a CSV file."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
