"""Compare the runs of a reproduction with the stored curves and the published number, and store them."""

import platform
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from levin.core import files
from levin.core.errors import ConfigError, RunError
from levin.core.process import signals_handled
from levin.results import aggregates
from levin.results.curves import CURVES, TRAINING, Curve, Curves, read_curves, read_run, write_curves
from levin.results.result import (
    ANIMATION,
    CONFIG,
    PROVENANCE,
    Reference,
    file_fingerprints,
    judge_scores,
    read_provenance,
    score_seeds,
    score_source,
)
from levin.runs import code, provenance
from levin.runs import folder as run_folder
from levin.runs.load import export_policy, load_config

# Facts of provenance.json that, with the CPU vendor or model, must be equal for runs to give identical numbers.
# `versions` are those of the packages that compute; `lock_sha256` would also change with development tools.
COMPARED_FACTS = ("versions", "cpu_capability", "threads")
# Facts in which seeds added later must equal the stored ones: the machine may differ, the software may not.
SOFTWARE_FACTS = ("python", "versions")
# Facts that provenance.json stores once per result. `mixed` lists those that differ between seeds or between the
# training processes of a seed; these are stored for each seed.
SHARED_FACTS = (*SOFTWARE_FACTS, "processor", "cpu_capability", "cores", "threads", "gpus")


@dataclass(frozen=True)
class Outcome:
    """Outcome of a reproduction.

    `good`: the curves match the stored ones, and the mean score is not below the required one, unless the verdict is
    `matched`. Runs that are shorter than the result are judged by their curves alone.
    """

    verdict: str
    published: str  # comparison with the published number
    stored: str  # comparison with the stored curves
    good: bool


def judge_runs(folder: Path, reference: Reference, runs: dict[int, Path], kept: Sequence[int] = ()) -> Outcome:
    """Compare finished runs with the stored curves and the published number of a result.

    Args:
        folder: Folder of the result.
        reference: Published numbers and required score of the result.
        runs: Run folders by seed.
        kept: Stored seeds that count together with these runs for the published number.

    Raises:
        RunError: A run has no evaluation.
    """
    evaluations = {seed: read_run(run) for seed, run in runs.items()}
    training = {seed: read_run(run, TRAINING) for seed, run in runs.items()}
    for seed, curve in evaluations.items():
        if not len(curve.env_steps):
            raise RunError(f"{runs[seed]} has ended without an evaluation")
    matches, stored = _compare_curves(folder, reference, evaluations, training, runs)
    stored_evaluations, stored_training = read_curves(folder), read_curves(folder, TRAINING)
    reached = min(int(curve.env_steps[-1]) for curve in evaluations.values())
    if reached < reference.env_steps:
        published = f"a verdict needs {reference.env_steps:,} env steps, and these runs have {reached:,}"
        return Outcome("none yet", f"{published}; {_compare_early(evaluations, stored_evaluations)}", stored, matches)
    evaluations |= {seed: stored_evaluations[seed] for seed in kept}
    training |= {seed: stored_training[seed] for seed in kept}
    scores = score_seeds(evaluations, training, reference)
    source_scores = score_source(read_curves(folder, reference.source_file), reference)
    verdict, published = judge_scores(reference, scores, source_scores)
    missed = scores.mean() < reference.gate and verdict != "matched"
    return Outcome(verdict, published, stored, matches and not missed)


def _compare_curves(
    folder: Path,
    reference: Reference,
    evaluations: Curves,
    training: Curves,
    runs: dict[int, Path],
) -> tuple[bool, str]:
    """Compare the curves of new runs with the stored ones; return whether they match, and a message.

    Runs of stored seeds in an equal environment must give identical curves. Otherwise the mean score of the new runs
    must lie in the 95% prediction interval of the stored seeds. Runs that are too short for that, and results whose
    stored seeds give no interval, because there are fewer than two or all have the same score, count as a match.
    """
    before = read_provenance(folder)
    if not before:
        return True, "there are no stored curves yet"
    stored_evaluations, stored_training = read_curves(folder), read_curves(folder, TRAINING)
    common = sorted(set(stored_evaluations) & set(evaluations))
    facts = [run_folder.read_provenance(run) for run in runs.values()]
    config = load_config(folder, code_sections=())
    gpu, bf16 = config.trainer.accelerator != "cpu", config.trainer.precision == "bf16-mixed"
    sessions = _all_sessions(facts)
    differences = [key for each in sessions for key in _provenance_differences(before, each, gpu=gpu, bf16=bf16)]
    if config.trainer.get("workers", 1) > 1:
        differences.append("order of the workers' updates")  # not deterministic
    if common and not differences:
        totals = {seed: load_config(runs[seed], code_sections=()).total_env_steps for seed in common}
        identical = [
            seed
            for seed in common
            if is_identical(evaluations[seed], stored_evaluations[seed], totals[seed], config.total_env_steps)
            and is_identical(training[seed], stored_training[seed], totals[seed], config.total_env_steps)
        ]
        message = f"{len(identical)} of {len(common)} curves are identical to the stored ones"
        return len(identical) == len(common), message
    why = f"different {', '.join(dict.fromkeys(differences))}" if differences else "other seeds"
    if min(curve.env_steps[-1] for curve in evaluations.values()) < reference.env_steps or len(stored_evaluations) < 2:
        return True, f"can't be compared with the stored curves ({why})"
    scores = score_seeds(evaluations, training, reference)
    stored_scores = score_seeds(stored_evaluations, stored_training, reference)
    if len(set(stored_scores.tolist())) == 1:  # such as the maximal return
        return True, f"mean {scores.mean():.1f}, and all stored seeds have {stored_scores[0]:.1f} ({why})"
    low, high = aggregates.prediction_interval(stored_scores, len(scores))
    inside = bool(low <= scores.mean() <= high)
    where = f"{'in' if inside else 'out'}side the 95% prediction interval [{low:.1f}, {high:.1f}] of the stored seeds"
    return inside, f"mean {scores.mean():.1f} is {where} ({why})"


def _compare_early(evaluations: Curves, stored: Curves) -> str:
    """Return the mean return of runs that are too short for a verdict beside that of the stored seeds, in words."""

    def describe(curves: Curves, step: int) -> str:
        returns = [float(each.return_mean[each.env_steps <= step][-1]) for each in curves.values()]
        seeds = f"{len(returns)} seeds, {min(returns):.1f} to {max(returns):.1f}" if len(returns) > 1 else "one seed"
        return f"{np.mean(returns):.1f} ({seeds})"

    first = max(int(each.env_steps[0]) for each in evaluations.values())
    reached = min(int(each.env_steps[-1]) for each in evaluations.values())
    shared = [step for each in stored.values() for step in each.env_steps.tolist() if first <= step <= reached]
    if not shared:
        return f"return at {reached:,}: {describe(evaluations, reached)}; no stored seed was evaluated by then"
    step = int(max(shared))
    later = {seed: each for seed, each in stored.items() if each.env_steps[0] <= step}
    return f"return at {step:,}: {describe(evaluations, step)}, stored {describe(later, step)}"


def is_identical(curve: Curve, stored: Curve, total_env_steps: int, stored_total: int) -> bool:
    """Return whether the curves of two runs with these `total_env_steps` are identical, as far as the shorter run goes.

    The last row of the shorter run may be left out: its final evaluation and row are not in a longer run.
    """
    if total_env_steps == stored_total:
        return curve.equals(stored)
    shorter, longer = (curve, stored) if total_env_steps < stored_total else (stored, curve)
    rows = len(shorter.env_steps)
    if shorter.equals(longer.first_rows(rows)):
        return True
    next_step = longer.env_steps[rows - 1 : rows]
    same = shorter.first_rows(rows - 1).equals(longer.first_rows(rows - 1))
    return same and bool((next_step > shorter.env_steps[-1]).all())


def _all_sessions(facts: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the provenance of every training process of these runs, also of those that continued a run."""
    return [session for own in facts for session in (own, *own["resumed"])]


def _provenance_differences(before: dict[str, Any], now: dict[str, Any], *, gpu: bool, bf16: bool) -> list[str]:
    """Return why runs may have other numbers than the stored ones.

    Args:
        before: Provenance of the stored seeds.
        now: Provenance of the runs.
        gpu: Whether the config may run on a GPU.
        bf16: Whether it computes in bfloat16, whose sums differ between models of one vendor with the same capability.
    """
    if bf16:
        differences = _different_facts(before, now, ("processor",))
    else:
        vendors = (before["processor"].split(" ")[0], now["processor"].split(" ")[0])
        differences = ["CPU vendor"] if len(set(vendors)) > 1 else []
    if gpu and (before["gpus"] or now["gpus"]):
        differences.append("GPU")  # even the same GPU: its sums have no fixed order
    relevant = {*COMPARED_FACTS, "processor", *(["gpus"] if gpu else [])}
    differences += [f"{key} of the stored sessions" for key in before.get("mixed", ()) if key in relevant]
    return differences + _different_facts(before, now, COMPARED_FACTS)


def _different_facts(before: dict[str, Any], now: dict[str, Any], keys: Collection[str]) -> list[str]:
    """Return which of these facts of provenance.json differ; versions with the packages, such as `versions (torch)`.

    Levin's own version is not compared, as its code has a commit, nor are packages that only one side has installed.
    """
    differences = [key for key in keys if key != "versions" and before[key] != now[key]]
    packages = provenance.changed_packages(before["versions"], now["versions"]) if "versions" in keys else []
    names = ", ".join(name for name in packages if name != "levin")
    return differences + ([f"versions ({names})"] if names else [])


def kept_seeds(folder: Path, seeds: list[int]) -> list[int]:
    """Return the stored seeds that stay in the result when these seeds are stored.

    Raises:
        ConfigError: The stored seeds come from a different config, Python or package.
    """
    before = read_provenance(folder)
    kept = [int(seed) for seed in before.get("seeds", {}) if int(seed) not in seeds]
    if kept:
        here = {"python": platform.python_version(), **provenance.collect_code_facts()}
        differences = _different_facts(before, here, SOFTWARE_FACTS)
        if before["files"][CONFIG] != file_fingerprints(folder)[CONFIG]:
            differences.append(CONFIG)
        if differences:
            all_seeds = " ".join(map(str, sorted([*kept, *seeds])))
            raise ConfigError(
                f"store=true: the stored seeds {' '.join(map(str, kept))} differ in {', '.join(differences)}; "
                f'run them again, too: seeds="{all_seeds}"'
            )
    return kept


def refuse_uncommitted(names: Collection[str]) -> None:
    """Raise a ConfigError if runs that are to be stored have imported files that are in no commit of this repository.

    The script that has begun the runs may be in no commit.
    """
    if names := {name for name in names if not name.startswith(code.SCRIPT)}:
        raise ConfigError(
            f"store=true needs runs of committed code, but {', '.join(sorted(names))} is in no commit of this "
            "repository: commit it, or install its package without -e, and run again"
        )


def store_runs(folder: Path, runs: dict[int, Path], kept: Sequence[int] = ()) -> None:
    """Store runs as the result: write its curves, policy and provenance. `levin.report` writes the rest.

    Args:
        folder: Folder of the result.
        runs: Run folders by seed.
        kept: Stored seeds that stay in the result.

    Raises:
        ConfigError: The runs are not all of one commit, are of uncommitted files, imported code that is in no commit of
            this repository, or are of a checkout without git.
    """
    facts = {seed: run_folder.read_provenance(run) for seed, run in runs.items()}
    sessions = _all_sessions(facts.values())
    commits = {session["git_sha"] for session in sessions}
    if any(session["git_dirty"] for session in sessions) or len(commits) > 1 or not all(commits):
        raise ConfigError(
            "store=true needs runs of one commit, but these are of uncommitted files, of several commits or without "
            f"git; commit, remove {next(iter(runs.values())).parent} and run again"
        )
    refuse_uncommitted({name for session in sessions for name in session.get("code", ())})
    with signals_handled(lambda *_: None):  # the files of a result belong together
        _write_result(folder, runs, kept, facts)


def _write_result(folder: Path, runs: dict[int, Path], kept: Sequence[int], facts: dict[int, dict[str, Any]]) -> None:
    """Write the files of a result; `facts` is the provenance of each run."""
    before = read_provenance(folder)
    for kind in (CURVES, TRAINING):
        stored = read_curves(folder, kind)
        write_curves(
            folder,
            {seed: stored[seed] for seed in kept} | {seed: read_run(run, kind) for seed, run in runs.items()},
            kind,
        )
    if (lowest := min([*kept, *runs])) in runs:
        export_policy(runs[lowest], folder)
        (folder / ANIMATION).unlink(missing_ok=True)  # shows the policy of before; scripts/agents.py draws it
    dropped = ("date", "resumed", "env_steps", "wall_seconds", "command", "git_dirty", "code")
    first, sessions = next(iter(facts.values())), [*([before] if kept else []), *_all_sessions(facts.values())]
    mixed = {key for key in SHARED_FACTS if any(_different_facts(session, first, [key]) for session in sessions)}
    mixed |= set(before.get("mixed", ()) if kept else ())
    own_facts = ("git_sha", *sorted(mixed))
    seeds = {seed: {key: before[key] for key in own_facts} | before["seeds"][str(seed)] for seed in kept}
    seeds |= {seed: {key: own[key] for key in (*own_facts, "date", "wall_seconds")} for seed, own in facts.items()}
    origin = {
        "command": f'make reproduce EXP={folder.name} SEEDS="{" ".join(map(str, sorted(seeds)))}" STORE=1',
        **{key: value for key, value in first.items() if key not in dropped},
        "mixed": sorted(mixed),
        "seeds": {str(seed): seeds[seed] for seed in sorted(seeds)},
        "files": file_fingerprints(folder),
    }
    files.save_json(origin, folder, PROVENANCE)
