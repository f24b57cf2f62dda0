"""Compare the runs of a reproduction with the stored curves and the published number, and store them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from levin.core.errors import ConfigError
from levin.results import aggregates
from levin.results.curves import CURVES, TRAINING, Curve, Curves, read_curves, read_run, write_curves
from levin.results.result import (
    CONFIG,
    PROVENANCE,
    Reference,
    file_fingerprints,
    judge_scores,
    read_provenance,
    score_seeds,
)
from levin.runs import folder as run_folder
from levin.runs import provenance
from levin.runs.load import POLICY, export_policy, load_config

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


def judge_runs(cell: Path, reference: Reference, folders: dict[int, Path], kept: Sequence[int] = ()) -> Outcome:
    """Hold finished runs, seed -> folder, against a result's curves and, with the kept seeds, its published number."""
    evaluations = {seed: read_run(run) for seed, run in folders.items()}
    training = {seed: read_run(run, TRAINING) for seed, run in folders.items()}
    same, stored = _compare_curves(cell, reference, evaluations, training, folders)
    if min(curve.env_steps[-1] for curve in evaluations.values()) < reference.env_steps:
        return Outcome("not run", f"the published number is at {reference.env_steps:,} env steps", stored, same)
    known, known_training = read_curves(cell), read_curves(cell, TRAINING)
    evaluations |= {seed: known[seed] for seed in kept}
    training |= {seed: known_training[seed] for seed in kept}
    found = score_seeds(evaluations, training, reference)
    verdict, published = judge_scores(reference, found)
    missed = found.mean() < reference.gate
    return Outcome(verdict, published, stored, same and not missed)


def _compare_curves(
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
    others = [
        key for run in folders.values() for key in _provenance_differences(before, run_folder.read_provenance(run))
    ]
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


def _provenance_differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    vendors = (before["processor"].split(" ")[0], now["processor"].split(" ")[0])
    found = ["CPU vendor"] if len(set(vendors)) > 1 else []
    if before["gpus"] or now["gpus"]:
        found.append("GPU")  # whose sums come in no fixed order
    return found + [key for key in SAME if before[key] != now[key]]


def kept_seeds(cell: Path, seeds: list[int]) -> list[int]:
    """The stored seeds that stay when these are added.

    Raises:
        ConfigError: They come from another config or machine.
    """
    before = read_provenance(cell)
    kept = [int(seed) for seed in before.get("seeds", {}) if int(seed) not in seeds]
    if kept:
        here = provenance.collect_provenance()
        others = [key for key in ONE_MACHINE if before[key] != here[key]]
        if before["files"][CONFIG] != file_fingerprints(cell)[CONFIG]:
            others.append(CONFIG)
        if others:
            every = " ".join(map(str, sorted([*kept, *seeds])))
            raise ConfigError(
                f"store=true: the stored seeds {' '.join(map(str, kept))} are of another {', '.join(others)}; "
                f'run them, too: seeds="{every}"'
            )
    return kept


def store_runs(cell: Path, folders: dict[int, Path], kept: Sequence[int] = ()) -> None:
    """Make these runs the result, with the stored seeds that are kept; what follows from it is for `levin.report`.

    Raises:
        ConfigError: They are not of one commit.
    """
    facts = {seed: run_folder.read_provenance(run) for seed, run in folders.items()}
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
        "files": file_fingerprints(cell),
    }
    (cell / PROVENANCE).write_text(json.dumps(origin, indent=2) + "\n")
