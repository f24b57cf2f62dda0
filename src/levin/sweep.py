"""Many runs from one command, by Hydra's multirun: `python -m levin.train -m algo.tau=.005,.01 seed=0,1`.

Run folders are `runs/sweep_<time>/<what differs>/s<seed>/`: `make plot RUNS="runs/sweep_<time>/*"` draws a curve for
each value. Hydra's launchers and sweepers work as its pages say: a job returns the mean of its last evaluation. With
`launcher=slurm` each run is a SLURM job, also a single one.
"""

import os
import sys
import traceback
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from levin import resume
from levin.config import cli
from levin.config.compose import NULL_DEFAULTS, compose, finalize, with_search_path
from levin.core.errors import ConfigError, RunError, exit_on_user_error
from levin.core.omega import flat_keys, to_plain
from levin.core.paths import CONFIGS
from levin.core.process import print_line
from levin.runs import folder as run_folder
from levin.training.session import train

FLAGS = ("-m", "--multirun")


def sweep(words: list[str]) -> None:
    """Run every combination of the comma-separated values.

    Args:
        words: Of the command line, `-m` or `launcher` among them.

    Raises:
        ConfigError: One of the values is not valid; nothing was run.
    """
    words = [word for word in words if word not in (*FLAGS, *NULL_DEFAULTS)]
    parsed = [each for each in cli.parse_hydra_overrides(words) if not each.key_or_group.startswith("hydra")]
    choices = {str(each.key_or_group): _parse_values(each) for each in parsed}
    first = [values[0] for values in choices.values()]
    for i, values in enumerate(choices.values()):
        for value in values:
            compose([*first[:i], value, *first[i + 1 :]])
    same = [key for key, values in choices.items() if len(values) == 1 or key == "seed"]
    options = {
        "hydra.sweep.dir": f"runs/sweep_{datetime.now():%Y%m%d-%H%M%S}",
        "hydra.sweep.subdir": "'./${hydra.job.override_dirname}/s${seed}'",
        "hydra.job.config.override_dirname.exclude_keys": f"[{','.join(same)}]",
        "hydra.output_subdir": "null",  # config.yaml says it all
        "hydra/job_logging": "disabled",
        "hydra/hydra_logging": "disabled",
    }
    ours = [f"{key}={value}" for key, value in options.items()]
    sys.argv[1:] = ["--multirun", *ours, *with_search_path(words)]
    run_all = hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="train")(run_job)
    if "launcher" in choices:
        said = {str(each.key_or_group): str(each.value()) for each in cli.parse_hydra_overrides(words)}
        _wait_for_jobs(run_all, said.get("hydra.sweep.dir", options["hydra.sweep.dir"]))
    else:
        run_all()


def _wait_for_jobs(run_all: Callable[[], None], folder: str) -> None:
    """Submit the runs as jobs, whose folder this is, and wait for them.

    Raises:
        ConfigError: The launcher can't be made of what was said.
        RunError: It can't submit, or a job failed. The others go on.
    """
    os.environ["SUBMITIT_PREEMPT_SIGNAL"] = "USR1"  # for the jobs: on USR2 they would be requeued without saving
    os.environ["HYDRA_FULL_ERROR"] = "1"  # else Hydra prints a traceback, and raises nothing
    print_line(f"jobs of {folder}: what they print is in {folder}/.submitit")
    try:
        run_all()
    except HydraException as error:
        raise ConfigError(" ".join(str(error).split())) from error
    except RuntimeError as error:  # as submitit's all are; the last line of a job's log is the last of its message
        raise RunError(str(error).strip().splitlines()[-1].removeprefix("levin: ")) from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None  # what SLURM runs goes on


def run_job(cfg: DictConfig) -> float | None:
    """One run of the sweep, or what is left of it: submitit calls it again for a job that was preempted."""
    hydra = HydraConfig.get()
    run = Path(hydra.runtime.output_dir)
    try:
        with exit_on_user_error():
            cfg = finalize(cfg, hydra.runtime.choices)
            said = _chosen_values(cfg, list(hydra.overrides.task))
            result = resume.resume(run=str(run), **said) if run_folder.has_begun(run) else train(cfg, run)
    except Exception:
        if "SUBMITIT_EXECUTOR" not in os.environ:
            raise
        traceback.print_exc()  # Hydra would send the error to the process that waits, without where it was raised
        raise SystemExit(1) from None
    if run_folder.read_provenance(run)["env_steps"] is None and "max_time" not in cfg.trainer:
        raise SystemExit(0)  # a signal: it ends the sweep, not this run alone
    return result


def _chosen_values(cfg: DictConfig, words: list[str]) -> dict[str, Any]:
    """The values that the command line chose: those of a run that has begun must be the same."""
    keys = [str(each.key_or_group) for each in cli.parse_hydra_overrides(words)]
    leaves = flat_keys(to_plain(cfg))
    said = {leaf: OmegaConf.select(cfg, leaf) for leaf in leaves if any(f"{leaf}.".startswith(f"{k}.") for k in keys)}
    return {"name": cfg.name, **{key: value for key, value in said.items() if value is not None}}


def _parse_values(override: Override) -> list[str]:
    if not override.is_sweep_override():
        return [str(override.input_line)]
    value: Any = override.value()
    if not hasattr(value, "list"):  # a range or a glob: Hydra's to expand
        return [str(override.input_line)]
    key = str(override.input_line).partition("=")[0]
    return [f"{key}={each.with_quotes() if isinstance(each, QuotedString) else each}" for each in value.list]
