"""Retrain a reported result and compare it: `python -m levin.reproduce exp=sac_halfcheetah`.

Trains the pinned config (the frozen config of the result) with every seed, and compares the runs with the stored curves
and the published number. The same command continues an interrupted reproduction. Exits with 1 if the curves differ from
the stored ones, or if the mean score is below the required one and the verdict is not `matched`. Runs that are shorter
than the result are judged by their curves alone.
"""

import os
import sys
from pathlib import Path

from omegaconf import DictConfig

from levin.config import cli, schema
from levin.core import files, paths
from levin.core.errors import ConfigError, RunError, exit_on_user_error
from levin.core.types import PositiveInt
from levin.report import report
from levin.results.curves import read_curves
from levin.results.reproduction import Outcome, judge_runs, kept_seeds, refuse_uncommitted, store_runs
from levin.results.result import read_reference, result_folder
from levin.resume import STOPPED, resume_side_by_side
from levin.runs import code, provenance
from levin.runs import folder as run_folder
from levin.runs.load import load_config
from levin.runs.trust import SECTIONS, foreign_code, origin, trusted
from levin.scheduler.resources import prepare_cores

RUNS = Path("runs/reproduce")
CODE, DONE = "code_checksum.txt", "verdict.json"  # files in the folder of a reproduction, beside its runs


def reproduce(
    *,
    exp: str,
    seeds: str = "",
    total_env_steps: PositiveInt | None = None,
    store: bool = False,
    jobs: PositiveInt | None = None,
    trust: bool = False,
) -> Outcome:
    """Train the seeds of a result, and compare them with its stored curves and its published number.

    Args:
        exp: Name of the result: its folder in experiments/.
        seeds: Seeds separated by spaces, such as "0 1 2". Default: those of the stored curves, or else 0, 1 and 2.
        total_env_steps: Env steps for a shorter trial; the required score is judged only if they reach its env steps.
        store: Store these runs as the result: write curves, policy, provenance and all generated files. Stored seeds
            other than these are kept.
        jobs: Number of processes at the same time. Default: as many as the cores can run with their threads.
        trust: Whether to run code from outside this checkout that the pinned config names (`levin.runs.trust`).

    Raises:
        ConfigError: There is no such result, or these runs can't be stored.
        RunError: The command was stopped, or a run failed. The same command continues the runs.
    """
    with trusted(trust):
        return _reproduce(exp, seeds, total_env_steps, store, jobs)


def _reproduce(exp: str, seeds: str, total_env_steps: int | None, store: bool, jobs: int | None) -> Outcome:
    folder = result_folder(exp)
    cfg, reference = load_config(folder), read_reference(folder)
    prepare_cores(cfg.trainer.threads, jobs)
    chosen = sorted(cli.parse_seeds(seeds) if seeds else read_curves(folder)) or [0, 1, 2]
    if store and total_env_steps not in (None, cfg.total_env_steps):
        raise ConfigError("store=true stores complete runs only: leave out total_env_steps")
    kept = kept_seeds(folder, chosen) if store else []
    if store:
        code_facts = provenance.collect_code_facts()
        if not code_facts["git_sha"]:
            raise ConfigError(f"store=true stores the commit of the runs, but git does not answer in {paths.ROOT}")
        if code_facts["git_dirty"]:
            raise ConfigError(
                "store=true needs runs of committed files, but files of src, configs or experiments have changed or "
                "are not in git: commit them first"
            )
    cfg.total_env_steps = total_env_steps or cfg.total_env_steps
    schema.check(cfg)
    if store:  # hours before `store_runs` would refuse them
        sources = [Path(origin(each.module) or "") for each in foreign_code(cfg, SECTIONS)]
        refuse_uncommitted({str(path) for path in sources if path.is_file() and not code.is_in_a_commit(path)})
    if cfg.total_env_steps < reference.env_steps:
        print(
            f"a trial of {cfg.total_env_steps:,} of {reference.env_steps:,} env steps: it is compared with the stored "
            "curves, but a verdict needs all of them (leave out STEPS=)",
            flush=True,
        )
    folders = _find_or_create_runs(exp, cfg, chosen)
    parent = next(iter(folders.values())).parent
    with trusted(True):  # `load_config` has accepted the code that the pinned config names
        if not resume_side_by_side(dict.fromkeys(folders.values(), cfg), jobs):
            raise RunError(STOPPED)
    outcome = judge_runs(folder, reference, folders, kept)
    if store:
        store_runs(folder, folders, kept)
    verdict = {"exp": exp, "seeds": chosen, "env_steps": cfg.total_env_steps, **outcome.__dict__}
    files.save_json(verdict, parent, DONE)
    if store:
        try:
            report()
        except ConfigError as error:  # of another result: it must not cost this one its verdict
            print(f"levin: {exp} is stored, but not in the tables: {error}; then type make report", file=sys.stderr)
    return outcome


def _find_or_create_runs(exp: str, cfg: DictConfig, seeds: list[int]) -> dict[int, Path]:
    """Return the run folder of each seed: of an interrupted reproduction of this config and code, or of a new one."""
    commit, checksum = provenance.run_git("rev-parse", "HEAD"), code.checksum_of({str(cfg.algo._target_)})
    for folder in sorted(RUNS.glob(f"*/{exp}"), reverse=True):
        folders = {seed: folder / f"s{seed}" for seed in seeds}
        existing = sorted(run.name for run in folder.glob("s*"))
        if not (folder / DONE).exists() and existing == sorted(run.name for run in folders.values()):
            same_code = _has_code(folder, list(folders.values()), commit, checksum)
            if same_code and all(_is_run_of(cfg, seed, run) for seed, run in folders.items()):
                print(f"{folder}: continuing", flush=True)
                return folders
    folder = RUNS / run_folder.time_stamp() / exp
    folders = {seed: folder / f"s{seed}" for seed in seeds}
    folder.mkdir(parents=True, exist_ok=True)
    files.write_text(folder, CODE, checksum)
    for seed, run in folders.items():
        run_folder.begin(run, _config_of_seed(cfg, seed, run))
    print(f"{folder}: starting", flush=True)
    return folders


def _has_code(folder: Path, runs: list[Path], commit: str, checksum: str) -> bool:
    """Return whether a reproduction's folder was begun with this commit and code checksum."""
    file = folder / CODE
    if not file.exists() or file.read_text(encoding="utf-8") != checksum:
        return False
    return {run_folder.read_provenance(run).get("git_sha", commit) for run in runs} == {commit}


def _is_run_of(cfg: DictConfig, seed: int, run: Path) -> bool:
    """Return whether a folder holds the run of a config and seed. Without `trainer.threads`, any number is right."""
    saved, expected = load_config(run, code_sections=()), _config_of_seed(cfg, seed, run)
    if expected.trainer.threads is None:  # a run that has begun has saved the number that it uses
        expected.trainer.threads = saved.trainer.threads
    return saved == expected


def _config_of_seed(cfg: DictConfig, seed: int, run: Path) -> DictConfig:
    cfg = cfg.copy()
    cfg.seed, cfg.run = seed, str(run)
    return cfg


def main() -> None:
    """Reproduce a result and print the verdict. Exit with 1 if the comparison fails."""
    with exit_on_user_error():
        os.chdir(paths.ROOT)
        outcome = reproduce(**cli.command_arguments(reproduce))
    print(f"stored: {outcome.stored}")
    print(f"published: {outcome.published}")
    print(f"verdict: {outcome.verdict}{'' if outcome.good else ' (the comparison failed)'}")
    raise SystemExit(0 if outcome.good else 1)


if __name__ == "__main__":
    main()
