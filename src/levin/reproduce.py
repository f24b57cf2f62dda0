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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf

from levin import report
from levin.config import cli, schema
from levin.core import paths
from levin.core.errors import ConfigError, RunError, one_sentence
from levin.core.types import PositiveInt
from levin.results import aggregates
from levin.results.curves import CURVES, TRAINING, Curve, Curves, read_curves, read_run, write_curves
from levin.results.result import (
    CONFIG,
    PROVENANCE,
    Reference,
    fingerprints,
    judge_scores,
    read_provenance,
    read_reference,
    result_folder,
    score_seeds,
)
from levin.runs import folder as run_folder
from levin.runs import provenance
from levin.runs.load import POLICY, export_policy, load_config

RUNS = Path("runs/reproduce")
DONE = "verdict.json"
# With the CPU's vendor, what equal numbers rest on. The packages that compute, not the lock: it holds tools too.
SAME = ("versions", "cpu_capability", "threads")
# What seeds of one result share, whose provenance says it once
ONE_MACHINE = ("python", "versions", "processor", "cpu_capability", "cores", "gpus")


@dataclass(frozen=True)
class Outcome:
    """What came of it: the verdict on the published number, and what the stored curves say."""

    verdict: str
    published: str
    stored: str
    good: bool


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
    chosen = _seeds(seeds) or sorted(read_curves(cell)) or [0, 1, 2]
    if store and total_env_steps not in (None, cfg.total_env_steps):
        raise ConfigError("store=true keeps whole runs only: leave total_env_steps alone")
    kept = _kept(cell, chosen) if store else []
    cfg.total_env_steps = total_env_steps or cfg.total_env_steps
    schema.check(cfg)
    folders = _prepare(exp, cfg, chosen)
    batch = next(iter(folders.values())).parent
    cores = os.cpu_count() or 1
    _run(folders, cfg, jobs or max(1, cores // ((cfg.trainer.threads or cores) * cfg.trainer.get("workers", 1))))
    outcome = judge(cell, reference, folders, kept)
    if store:
        _store(cell, folders, kept)
    said = {"exp": exp, "seeds": chosen, "env_steps": cfg.total_env_steps, **outcome.__dict__}
    (batch / DONE).write_text(json.dumps(said, indent=2) + "\n")
    return outcome


def judge(cell: Path, reference: Reference, folders: dict[int, Path], kept: Sequence[int] = ()) -> Outcome:
    """Hold finished runs, seed -> folder, against a result's curves and, with the kept seeds, its published number."""
    evaluations = {seed: read_run(run) for seed, run in folders.items()}
    training = {seed: read_run(run, TRAINING) for seed, run in folders.items()}
    same, stored = _compare(cell, reference, evaluations, training, folders)
    if min(curve.env_steps[-1] for curve in evaluations.values()) < reference.env_steps:
        return Outcome("not run", f"the published number is at {reference.env_steps:,} env steps", stored, same)
    known, known_training = read_curves(cell), read_curves(cell, TRAINING)
    evaluations |= {seed: known[seed] for seed in kept}
    training |= {seed: known_training[seed] for seed in kept}
    found = score_seeds(evaluations, training, reference)
    verdict, published = judge_scores(reference, found)
    missed = found.mean() < reference.gate
    return Outcome(verdict, published, stored, same and not missed)


def _compare(
    cell: Path,
    reference: Reference,
    evaluations: Curves,
    training: Curves,
    folders: dict[int, Path],
) -> tuple[bool, str]:
    """Whether the curves are the stored ones as far as they can be, and one sentence."""
    before = read_provenance(cell)
    if not before:
        return True, "there are no stored curves yet"
    known, known_training = read_curves(cell), read_curves(cell, TRAINING)
    common = sorted(set(known) & set(evaluations))
    others = [key for run in folders.values() for key in _differences(before, run_folder.sessions(run))]
    if load_config(cell).trainer.get("workers", 1) > 1:
        others.append("order in which the workers came")
    if common and not others:
        identical = [
            seed
            for seed in common
            if _is_prefix(evaluations[seed], known[seed]) and _is_prefix(training[seed], known_training[seed])
        ]
        said = f"{len(identical)} of {len(common)} curves are identical to the stored ones"
        return len(identical) == len(common), said
    why = f"another {', '.join(dict.fromkeys(others))}" if others else "other seeds"
    if min(curve.env_steps[-1] for curve in evaluations.values()) < reference.env_steps or len(known) < 2:
        return True, f"nothing to compare with the stored curves ({why})"
    ours = score_seeds(evaluations, training, reference)
    low, high = aggregates.prediction_interval(score_seeds(known, known_training, reference), len(ours))
    inside = bool(low <= ours.mean() <= high)
    where = f"{'in' if inside else 'out'}side [{low:.1f}, {high:.1f}], where 95% of such means lie"
    return inside, f"mean {ours.mean():.1f} is {where} ({why})"


def _is_prefix(ours: Curve, stored: Curve) -> bool:
    """Whether the curve is how the stored one begins. A shorter run ends with an evaluation and a row of its own."""
    shared = np.isin(ours.env_steps, stored.env_steps)
    if len(ours.env_steps) < len(stored.env_steps):
        shared[-1:] &= ours.equals(stored.until(int(ours.env_steps[-1])))
    ours = Curve(ours.env_steps[shared], ours.return_mean[shared], ours.second[shared])
    return len(ours.env_steps) > 0 and ours.equals(stored.until(int(ours.env_steps[-1])))


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    vendors = (before["processor"].split(" ")[0], now["processor"].split(" ")[0])
    found = ["CPU vendor"] if len(set(vendors)) > 1 else []
    if before["gpus"] or now["gpus"]:
        found.append("GPU")  # whose sums come in no fixed order
    return found + [key for key in SAME if before[key] != now[key]]


def _seeds(words: str) -> list[int]:
    if not all(word.isdigit() for word in words.split()):
        raise ConfigError(f"seeds={words}: whole numbers, separated by spaces")
    return sorted(map(int, words.split()))


def _prepare(exp: str, cfg: DictConfig, seeds: list[int]) -> dict[int, Path]:
    """The run folders of the seeds: of the newest batch interrupted at this commit and config, else new."""
    commit = provenance.git("rev-parse", "HEAD")
    for batch in sorted(RUNS.glob(f"*/{exp}"), reverse=True):
        folders = {seed: batch / f"s{seed}" for seed in seeds}
        begun = sorted(each.name for each in batch.glob("s*"))
        if not (batch / DONE).exists() and begun == sorted(each.name for each in folders.values()):
            commits = {run_folder.sessions(run).get("git_sha", commit) for run in folders.values()}
            if commits == {commit} and all(load_config(each[1]) == _of_seed(cfg, *each) for each in folders.items()):
                print(f"{batch}: goes on", flush=True)
                return folders
    batch = RUNS / f"{datetime.now():%Y%m%d-%H%M%S}" / exp
    folders = {seed: batch / f"s{seed}" for seed in seeds}
    for seed, run in folders.items():
        run.mkdir(parents=True)
        (run / CONFIG).write_text(OmegaConf.to_yaml(_of_seed(cfg, seed, run)))
    print(f"{batch}: begins", flush=True)
    return folders


def _of_seed(cfg: DictConfig, seed: int, run: Path) -> DictConfig:
    cfg = cfg.copy()
    cfg.seed, cfg.run = seed, str(run)
    return cfg


def _run(folders: dict[int, Path], cfg: DictConfig, jobs: int) -> None:
    """Train what is not complete yet, each seed in a process of its own; say how far they are twice a minute."""
    waiting = dict(folders)
    running: dict[int, subprocess.Popen[bytes]] = {}
    last_said = time.monotonic()
    with _stopping(running):
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
def _stopping(running: dict[int, subprocess.Popen[bytes]]) -> Iterator[None]:
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


def _kept(cell: Path, seeds: list[int]) -> list[int]:
    """The stored seeds that stay when these are added.

    Raises:
        ConfigError: They come from another config or machine.
    """
    before = read_provenance(cell)
    kept = [int(seed) for seed in before.get("seeds", {}) if int(seed) not in seeds]
    if kept:
        here = provenance.collect()
        others = [key for key in ONE_MACHINE if before[key] != here[key]]
        if before["files"][CONFIG] != fingerprints(cell)[CONFIG]:
            others.append(CONFIG)
        if others:
            every = " ".join(map(str, sorted([*kept, *seeds])))
            raise ConfigError(
                f"store=true: the stored seeds {' '.join(map(str, kept))} are of another {', '.join(others)}; "
                f'run them, too: seeds="{every}"'
            )
    return kept


def _store(cell: Path, folders: dict[int, Path], kept: Sequence[int] = ()) -> None:
    """Make these runs the result, with the stored seeds that are kept.

    Raises:
        ConfigError: They are not of one commit.
    """
    facts = {seed: run_folder.sessions(run) for seed, run in folders.items()}
    sessions = [session for each in facts.values() for session in (each, *each["resumed"])]
    first = next(iter(facts.values()))
    if any(session["git_dirty"] for session in sessions) or len({session["git_sha"] for session in sessions}) > 1:
        raise ConfigError(
            "store=true keeps what one commit gives, and these runs are of changed files or of several commits; "
            f"commit, remove {next(iter(folders.values())).parent} and run again"
        )
    before = read_provenance(cell)
    for kind in (CURVES, TRAINING):
        known = read_curves(cell, kind)
        write_curves(
            cell,
            {seed: known[seed] for seed in kept} | {seed: read_run(run, kind) for seed, run in folders.items()},
            kind,
        )
    seeds = {seed: {"git_sha": before["git_sha"], **before["seeds"][str(seed)]} for seed in kept}
    seeds |= {seed: {key: each[key] for key in ("git_sha", "date", "wall_seconds")} for seed, each in facts.items()}
    if min(seeds) in folders:
        export_policy(folders[min(seeds)], cell / POLICY)
    dropped = ("date", "resumed", "env_steps", "wall_seconds", "command", "git_dirty")
    origin = {
        "command": f'make reproduce EXP={cell.name} SEEDS="{" ".join(map(str, sorted(seeds)))}" STORE=1',
        **{key: value for key, value in first.items() if key not in dropped},
        "seeds": {str(seed): seeds[seed] for seed in sorted(seeds)},
        "files": fingerprints(cell),
    }
    (cell / PROVENANCE).write_text(json.dumps(origin, indent=2) + "\n")
    report.report()


def main() -> None:
    """Print the verdict; exit 1 on a miss."""
    with one_sentence():
        os.chdir(paths.ROOT)
        outcome = reproduce(**cli.arguments(reproduce))
    print(f"stored: {outcome.stored}")
    print(f"published: {outcome.published}")
    print(f"verdict: {outcome.verdict}{'' if outcome.good else ', and a miss'}")
    raise SystemExit(0 if outcome.good else 1)


if __name__ == "__main__":
    main()
