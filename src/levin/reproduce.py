"""Run a pinned config anew and hold it against its stored curves and the published number.

`python -m levin.reproduce exp=sac_halfcheetah`. Every seed is a process of its own, as many at once as there are cores.
What was interrupted goes on; exits 1 when the curves are not the stored ones or the gate is missed.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from levin.config import cli, schema
from levin.core import paths
from levin.core.errors import ConfigError, RunError, exit_on_user_error
from levin.core.types import PositiveInt
from levin.report import report
from levin.results.curves import read_curves
from levin.results.reproduction import Outcome, judge_runs, kept_seeds, store_runs
from levin.results.result import (
    CONFIG,
    read_reference,
    result_folder,
)
from levin.runs import folder as run_folder
from levin.runs import provenance
from levin.runs.load import load_config

RUNS = Path("runs/reproduce")
DONE = "verdict.json"


def reproduce(
    *,
    exp: str,
    seeds: str = "",
    total_env_steps: PositiveInt | None = None,
    store: bool = False,
    jobs: PositiveInt | None = None,
) -> Outcome:
    """Train every seed of a result, compare, and say what came of it.

    Args:
        exp: The result's folder in experiments/.
        seeds: Such as "0 1 2"; without a word, those of the stored curves, else 0, 1 and 2.
        total_env_steps: Fewer than are pinned, for a look; the published number is then not judged.
        store: Make these runs the result: write curves, policy, provenance, and all that follows from them. Stored
            seeds that are not among these stay.
        jobs: Processes at once; without a word, as many as there are cores for their threads.

    Raises:
        ConfigError: There is no such result, or what is run can't be stored.
        RunError: It was stopped, or a run failed. The same command goes on.
    """
    cell = result_folder(exp)
    cfg, reference = load_config(cell), read_reference(cell)
    chosen = _parse_seeds(seeds) or sorted(read_curves(cell)) or [0, 1, 2]
    if store and total_env_steps not in (None, cfg.total_env_steps):
        raise ConfigError("store=true keeps whole runs only: leave total_env_steps alone")
    kept = kept_seeds(cell, chosen) if store else []
    cfg.total_env_steps = total_env_steps or cfg.total_env_steps
    schema.check(cfg)
    folders = _prepare(exp, cfg, chosen)
    batch = next(iter(folders.values())).parent
    cores = os.cpu_count() or 1
    _train_seeds(
        folders, cfg, jobs or max(1, cores // ((cfg.trainer.threads or cores) * cfg.trainer.get("workers", 1)))
    )
    outcome = judge_runs(cell, reference, folders, kept)
    if store:
        store_runs(cell, folders, kept)
        report()
    said = {"exp": exp, "seeds": chosen, "env_steps": cfg.total_env_steps, **outcome.__dict__}
    (batch / DONE).write_text(json.dumps(said, indent=2) + "\n")
    return outcome


def _parse_seeds(words: str) -> list[int]:
    if not all(word.isdigit() for word in words.split()):
        raise ConfigError(f"seeds={words}: whole numbers, separated by spaces")
    return sorted(map(int, words.split()))


def _prepare(exp: str, cfg: DictConfig, seeds: list[int]) -> dict[int, Path]:
    """The run folders of the seeds: of the newest batch interrupted at this commit and config, else new."""
    commit = provenance.run_git("rev-parse", "HEAD")
    for batch in sorted(RUNS.glob(f"*/{exp}"), reverse=True):
        folders = {seed: batch / f"s{seed}" for seed in seeds}
        begun = sorted(each.name for each in batch.glob("s*"))
        if not (batch / DONE).exists() and begun == sorted(each.name for each in folders.values()):
            commits = {run_folder.read_provenance(run).get("git_sha", commit) for run in folders.values()}
            if commits == {commit} and all(
                load_config(each[1]) == _config_of_seed(cfg, *each) for each in folders.items()
            ):
                print(f"{batch}: goes on", flush=True)
                return folders
    batch = RUNS / f"{datetime.now():%Y%m%d-%H%M%S}" / exp
    folders = {seed: batch / f"s{seed}" for seed in seeds}
    for seed, run in folders.items():
        run.mkdir(parents=True)
        (run / CONFIG).write_text(OmegaConf.to_yaml(_config_of_seed(cfg, seed, run)))
    print(f"{batch}: begins", flush=True)
    return folders


def _config_of_seed(cfg: DictConfig, seed: int, run: Path) -> DictConfig:
    cfg = cfg.copy()
    cfg.seed, cfg.run = seed, str(run)
    return cfg


def _train_seeds(folders: dict[int, Path], cfg: DictConfig, jobs: int) -> None:
    """Train what is not complete yet, each seed in a process of its own; say how far they are twice a minute."""
    waiting = dict(folders)
    running: dict[int, subprocess.Popen[bytes]] = {}
    last_said = time.monotonic()
    with _stop_on_exit(running):
        while waiting or running:
            while waiting and len(running) < jobs:
                seed, run = next(iter(waiting.items()))
                del waiting[seed]
                with (run / "output.txt").open("ab") as output:
                    running[seed] = subprocess.Popen(
                        [sys.executable, "-m", "levin.resume", f"run={run}"],
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on once
                    )
            time.sleep(0.2)
            for seed, process in list(running.items()):
                if process.poll() is not None:
                    del running[seed]
                    lines = (folders[seed] / "output.txt").read_text().strip().splitlines()
                    if process.returncode:
                        raise RunError(f"seed {seed} failed: {lines[-1]} (see {folders[seed]}/output.txt)")
                    print(f"seed {seed}: {lines[-1]}", flush=True)
            if running and time.monotonic() > last_said + 30:
                last_said = time.monotonic()
                at = (f"seed {seed} {_env_steps(folders[seed]):,}" for seed in running)
                print(f"{' · '.join(at)} of {cfg.total_env_steps:,} env steps", flush=True)


def _env_steps(run: Path) -> int:
    metrics = run / "metrics.csv"
    last = metrics.read_text().splitlines()[-1].split(",")[0] if metrics.is_file() else ""
    return int(last) if last.isdigit() else 0


@contextmanager
def _stop_on_exit(running: dict[int, subprocess.Popen[bytes]]) -> Iterator[None]:
    """Let no run outlive this process: whatever ends it, they are asked to save, and waited for."""

    def stop(*_: Any) -> None:
        raise RunError("stopped; the runs are saved, and the same command goes on")

    before = {each: signal.signal(each, stop) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()


def main() -> None:
    """Print the verdict; exit 1 on a miss."""
    with exit_on_user_error():
        os.chdir(paths.ROOT)
        outcome = reproduce(**cli.command_arguments(reproduce))
    print(f"stored: {outcome.stored}")
    print(f"published: {outcome.published}")
    print(f"verdict: {outcome.verdict}{'' if outcome.good else ', and a miss'}")
    raise SystemExit(0 if outcome.good else 1)


if __name__ == "__main__":
    main()
