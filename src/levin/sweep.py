"""Train many runs with one command: `python -m levin.train -m algo.tau=.005,.01 seeds="0 1" jobs=2`.

Each combination of the values and seeds is a run. Their folders are `runs/sweep_<time>/<values>/s<seed>/`, so
`make plot RUNS="runs/sweep_<time>/*"` draws one learning curve per combination. The scheduler trains `jobs` of them at
the same time, each with one thread by default, and the same command continues a sweep that has ended early.

With `launcher=slurm` each run is a SLURM job, even a single run, which Hydra's launcher submits. The command waits for
all of them and says how each has ended (`levin.scheduler.slurm_jobs`). Hydra's own sweepers
(`hydra.sweeper...`) work as documented by Hydra: one run after the other, each with the mean return of its last
evaluation as its result.
"""

import os
import re
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from levin.config import cli
from levin.config.compose import (
    NULL_DEFAULTS,
    SEARCH_PATH,
    add_pluses,
    compose,
    finalize,
    refuse_several_values,
    take_paths,
    with_search_path,
)
from levin.core.errors import ConfigError, RunError, exit_on_user_error
from levin.core.omega import flat_keys, to_plain
from levin.core.paths import CONFIGS
from levin.core.process import print_line, share_cores, shield_resource_tracker
from levin.runs import folder as run_folder
from levin.runs import trust

FLAGS = ("-m", "--multirun")
SWEEP_FOLDER = "hydra.sweep.dir"  # Hydra's name for the folder of a sweep; `run=` is the same here
# Values, such as env ids, may have a slash. Registered here, because jobs of a cluster import this module.
OmegaConf.register_new_resolver("folder_name", lambda text: text.replace("\\", "").replace("/", "_"), replace=True)


def needs_hydra(arguments: list[str]) -> bool:
    """Return whether Hydra's own launcher or sweeper is to start the runs."""
    keys = [each.lstrip("+~").partition("=")[0] for each in arguments if each not in NULL_DEFAULTS]
    return any(
        key == "launcher" or (key.startswith("hydra") and key not in (SWEEP_FOLDER, SEARCH_PATH)) for key in keys
    )


def is_sweep(arguments: list[str]) -> bool:
    """Return whether the arguments ask for all combinations of their values."""
    return any(each in FLAGS for each in arguments)


def list_runs(arguments: list[str], seeds: list[str]) -> tuple[dict[str, list[str]], Path | None]:
    """List every combination of values, with every seed. Names of keys are checked, values are not yet.

    Args:
        arguments: Arguments of the command line.
        seeds: Seeds; empty: those of the arguments.

    Returns:
        The overrides of each run by its name, `<values>/s<seed>`, and the folder for all runs, if they name one.

    Raises:
        ConfigError: A key is unknown, the arguments contradict one another, or a key other than the seed has several
            values without `-m`.
    """
    only_seeds = not is_sweep(arguments)
    arguments = [each for each in arguments if each not in (*FLAGS, *NULL_DEFAULTS)]
    named = [each.partition("=")[2] for each in arguments if each.startswith(("run=", f"{SWEEP_FOLDER}="))]
    folder = Path(named[-1]) if named and named[-1] != "null" else None
    arguments = [each for each in arguments if each.partition("=")[0] not in ("run", SWEEP_FOLDER)]
    texts = [each for each in arguments if _is_text(each)]
    arguments = [each for each in arguments if each not in texts]
    given = cli.parse_hydra_overrides(add_pluses(with_seeds(arguments, seeds)))
    parsed = list({str(override.key_or_group): override for override in given}.values())  # the last of each key counts
    if only_seeds:
        refuse_several_values([each for each in parsed if str(each.key_or_group) != "seed"])
    _check_each_value(parsed, texts, check_values=False)
    (combinations,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    swept = [each.is_sweep_override() and str(each.key_or_group) != "seed" for each in parsed]
    runs: dict[str, list[str]] = {}
    for values in combinations:
        # Without the signs that escape others in Hydra's grammar, and without folders.
        chosen = sorted(value.lstrip("+") for value, varies in zip(values, swept, strict=True) if varies)
        folders = [",".join(chosen).replace("\\", "").replace("/", "_")] if chosen else []
        named_seed = [value.partition("=")[2] for value in values if value.lstrip("+").startswith("seed=")]
        seed = named_seed[-1] if named_seed else "0"
        name = "/".join([*folders, f"s{seed}"])
        if name in runs:
            raise ConfigError(f"two runs of the sweep have the same name, {name}: leave out values that are equal")
        runs[name] = [*values, *texts]
    return runs, folder


def _is_text(argument: str) -> bool:
    """Return whether an argument is taken as typed, without Hydra's grammar. Several paths are a sweep."""
    key, _, value = argument.partition("=")
    return bool(take_paths([argument])[1]) and (key == "note" or "," not in value or os.path.exists(value))


def with_seeds(arguments: list[str], seeds: list[str]) -> list[str]:
    """Add the seeds to the arguments.

    Raises:
        ConfigError: The arguments name a seed already.
    """
    if seeds and any(each.startswith("seed=") for each in arguments):
        raise ConfigError("seed= and seeds= are both given (with make: SEED= or ARGS, and SEEDS=): leave one out")
    return [*arguments, f"seed={','.join(seeds)}"] if seeds else arguments


def _check_each_value(parsed: list[Override], texts: list[str], *, check_values: bool) -> None:
    """Compose a config with each single value: a wrong one is refused before torch and Lightning are imported."""
    choices = [_parse_values(override) for override in parsed]
    first = [values[0] for values in choices]
    compose([*first, *texts], check_values=check_values)
    for i, values in enumerate(choices):
        for value in values[1:]:
            # Another seed changes no key: checking one is enough.
            if check_values or not value.startswith("seed="):
                compose([*first[:i], value, *first[i + 1 :], *texts], check_values=check_values)


def submit(arguments: list[str], seeds: list[str]) -> None:
    """Run every combination of the comma-separated values by Hydra's launcher and sweeper.

    Args:
        arguments: Arguments of the command line.
        seeds: Seeds; empty: those of the arguments.

    Raises:
        ConfigError: A value is not valid. It is raised before the first run starts.
    """
    arguments = [f'{SWEEP_FOLDER}="{_escape(each)}"' if each.startswith("run=") else each for each in arguments]
    only_seeds = not is_sweep(arguments)
    texts = [each for each in arguments if _is_text(each)]
    arguments = add_pluses([each for each in arguments if each not in (*texts, *FLAGS, *NULL_DEFAULTS)])
    arguments = with_seeds(arguments, seeds)
    parsed = [
        override for override in cli.parse_hydra_overrides(arguments) if not override.key_or_group.startswith("hydra")
    ]
    if only_seeds:
        refuse_several_values([each for each in parsed if str(each.key_or_group) != "seed"])
    for check_values in (False, True):  # names first: checking a value imports the class that takes it, for seconds
        _check_each_value(parsed, texts, check_values=check_values)
    not_in_name = [each.partition("=")[0] for each in texts] + [
        str(each.key_or_group) for each in parsed if not each.is_sweep_override() or each.key_or_group == "seed"
    ]
    options = {
        SWEEP_FOLDER: f"runs/sweep_{run_folder.time_stamp()}",
        "hydra.sweep.subdir": "'./${folder_name:${hydra.job.override_dirname}}/s${seed}'",
        "hydra.job.config.override_dirname.exclude_keys": f"[{','.join(not_in_name)}]",
        "hydra.output_subdir": "null",  # the run folder has its own config.yaml
        "hydra/job_logging": "disabled",
        "hydra/hydra_logging": "disabled",
    }
    defaults = [f"{key}={value}" for key, value in options.items()]
    escaped = [f'{each.partition("=")[0]}="{_escape(each)}"' for each in texts]
    sys.argv[1:] = ["--multirun", *defaults, *with_search_path(arguments), *escaped]
    run_all = hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="train")(run_job)
    chosen = {str(override.key_or_group): str(override.value()) for override in cli.parse_hydra_overrides(arguments)}
    if "launcher" in chosen:
        if chosen["launcher"] == "slurm":
            _wait_for_slurm()
        _submit_jobs(run_all, chosen.get(SWEEP_FOLDER, options[SWEEP_FOLDER]))
    else:
        run_all()


def _escape(argument: str) -> str:
    """Return the text in an argument, such as `note=<text>`, with Hydra's special signs escaped."""
    text = re.sub(r"\\+(?=\"|$)", lambda match: 2 * match[0], argument.partition("=")[2])
    return text.replace('"', '\\"').replace("${", "\\${")


def _submit_jobs(run_all: Callable[[], None], folder: str) -> None:
    """Submit the runs as jobs, and wait for them.

    Args:
        run_all: Hydra's main function.
        folder: Folder of the sweep.

    Raises:
        ConfigError: The options of the launcher are not valid.
        RunError: The jobs can't be submitted, or a job failed; the other jobs continue.
    """
    os.environ["SUBMITIT_PREEMPT_SIGNAL"] = "USR1"  # with submitit's default USR2, jobs are requeued without saving
    os.environ["HYDRA_FULL_ERROR"] = "1"  # otherwise Hydra prints a traceback instead of raising the error
    print_line(f"jobs of {folder}: their output is in {folder}/.submitit")
    try:
        run_all()
    except HydraException as error:
        raise ConfigError(" ".join(str(error).split())) from error
    except RuntimeError as error:  # submitit's errors; the last line of the message is the last line of the job's log
        raise RunError(str(error).strip().splitlines()[-1].removeprefix("levin: ")) from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None  # the SLURM jobs continue


def _wait_for_slurm() -> None:
    """Let Hydra's launcher wait for SLURM's jobs as `levin.scheduler.slurm_jobs` does.

    The launcher calls `map_array` of submitit's executor to submit the jobs, then `results` of one job after the other.
    submitit would ask `sacct` for their states, and stop at the first job that failed.
    """
    import submitit  # type: ignore[import-not-found]

    class Executor(submitit.AutoExecutor):  # type: ignore[misc]
        def map_array(self, launcher: Any, overrides: list[list[str]], *others: Any) -> list[_Finished]:
            loader = launcher.hydra_context.config_loader
            configs = [loader.load_sweep_config(launcher.config, list(each)) for each in overrides]
            for config in configs:
                check_ranks(config)
            return _wait_for_jobs(super().map_array(launcher, overrides, *others), configs)

    submitit.AutoExecutor = Executor
    os.environ["SLURM_KILL_BAD_EXIT"] = "1"  # if a rank fails, srun ends the others


def check_ranks(config: DictConfig) -> None:
    """Check that srun will start as many processes for a job as its run has ranks. `config` holds `hydra` as well.

    Raises:
        ConfigError: It would start more or fewer.
    """
    options, devices, nodes = config.hydra.launcher, config.trainer.devices, config.trainer.get("num_nodes", 1)
    if (options.nodes, options.tasks_per_node) != (nodes, devices):
        raise ConfigError(
            f"a job would start {options.tasks_per_node} processes on each of {options.nodes} nodes, but "
            f"trainer.devices={devices} and trainer.num_nodes={nodes} need {devices} on each of {nodes}: leave out "
            "hydra.launcher.nodes and hydra.launcher.tasks_per_node, which follow the trainer, and give a sweep one "
            "value of trainer.devices"
        )


def _wait_for_jobs(submitted: list[Any], configs: list[DictConfig]) -> list["_Finished"]:
    """Wait until submitit's jobs have ended.

    Raises:
        RunError: A job has failed.
    """
    from levin.scheduler.progress import read_progress
    from levin.scheduler.slurm_jobs import Job, count_runs, wait_for_jobs

    runs = [Path(config.hydra.sweep.dir, config.hydra.sweep.subdir) for config in configs]
    jobs = [
        Job(job.job_id, run, config.total_env_steps, Path(os.path.relpath(job.paths.folder)))
        for job, run, config in zip(submitted, runs, configs, strict=True)
    ]
    number = jobs[0].id.partition("_")[0]
    print_line(f"SLURM job {number} is submitted; this command waits for its end")
    try:
        failures = wait_for_jobs(jobs)
    except KeyboardInterrupt:
        print_line(f"SLURM job {number} goes on; to end it: scancel {number}")
        raise
    if failures:
        more = "; the others have ended without an error" if len(jobs) > len(failures) else ""
        raise RunError(f"{len(failures)} of {count_runs(len(jobs))} failed{more}: {failures[0]}")
    print_line(f"{count_runs(len(jobs))} ended; to see them: make compare RUNS=..., make plot RUNS=...")
    return [_Finished(read_progress(run).evaluation) for run in runs]


@dataclass(frozen=True)
class _Finished:
    """Job that has ended, as Hydra's launcher expects it. `value`: mean return of the last evaluation."""

    value: float | None

    def results(self) -> list[JobReturn]:
        return [JobReturn(status=JobStatus.COMPLETED, _return_value=self.value)]


def run_job(cfg: DictConfig) -> float | None:
    """Train one run of the sweep, or resume it: submitit calls this again for a job that was preempted."""
    if "SUBMITIT_EXECUTOR" in os.environ:  # without jobs, `levin.train` has done it
        share_cores()
        shield_resource_tracker()
    from levin import resume  # late: a sweep that is mistyped is refused before torch and Lightning are imported
    from levin.training.distributed import sharding
    from levin.training.session import train, train_rank

    hydra = HydraConfig.get()
    run = Path(hydra.runtime.output_dir)
    try:
        with exit_on_user_error():
            cfg = finalize(cfg, hydra.runtime.choices)
            chosen = _chosen_values(cfg, list(hydra.overrides.task))
            later_rank = sharding.process_rank(cfg) > 0
            if run_folder.has_ended(run, cfg.total_env_steps):  # by a callback, such as EarlyStopping
                result = None
            elif run_folder.has_begun(run):
                trust.record(cfg)
                result = resume.resume(run=str(run), **chosen)
            else:
                result = train_rank(cfg, run) if later_rank else train(cfg, run)
    except Exception:
        if "SUBMITIT_EXECUTOR" not in os.environ:
            raise
        traceback.print_exc()  # Hydra would send the error to the waiting process without its traceback
        raise SystemExit(1) from None
    if later_rank:
        return None
    if not run_folder.has_ended(run, cfg.total_env_steps) and "max_time" not in cfg.trainer:
        raise SystemExit(0)  # stopped by a signal, which ends the whole sweep
    return result


def _chosen_values(cfg: DictConfig, overrides: list[str]) -> dict[str, Any]:
    """Return the config values set by the command line, which must equal those of a run that is resumed."""
    keys = [str(each.key_or_group) for each in cli.parse_hydra_overrides(overrides)]
    leaves = flat_keys(to_plain(cfg))
    chosen = {leaf: OmegaConf.select(cfg, leaf) for leaf in leaves if any(f"{leaf}.".startswith(f"{k}.") for k in keys)}
    return {"name": cfg.name, **{key: value for key, value in chosen.items() if value is not None}}


def _parse_values(override: Override) -> list[str]:
    """Return an override with each of its values."""
    if not override.is_sweep_override():
        return [str(override.input_line)]
    if not (override.is_choice_sweep() or override.is_range_sweep()):
        raise ConfigError(f"{override.input_line}: only lists, such as {override.key_or_group}=1,2, and range() work")
    return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
