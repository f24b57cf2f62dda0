"""Train many runs with one command, by Hydra's multirun: `python -m levin.train -m algo.tau=.005,.01 seed=0,1`.

Run folders are `runs/sweep_<time>/<swept values>/s<seed>/`, so `make plot RUNS="runs/sweep_<time>/*"` draws one
learning curve per combination of values. Hydra's launchers and sweepers work as documented by Hydra; a job
returns the mean return of its last evaluation. With `launcher=slurm` each run is a SLURM job, even a single run.
"""

import os
import re
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

from levin.config import cli
from levin.config.compose import NULL_DEFAULTS, add_pluses, compose, finalize, with_search_path
from levin.core.errors import ConfigError, RunError, exit_on_user_error
from levin.core.omega import flat_keys, to_plain
from levin.core.paths import CONFIGS
from levin.core.process import print_line, share_cores
from levin.runs import folder as run_folder

FLAGS = ("-m", "--multirun")
# Values, such as env ids, may have a slash. Registered here, because jobs of a cluster import this module.
OmegaConf.register_new_resolver("folder_name", lambda text: text.replace("\\", "").replace("/", "_"), replace=True)


def sweep(words: list[str]) -> None:
    """Run every combination of the comma-separated values.

    Args:
        words: Arguments of the command line, including `-m` or `launcher=...`.

    Raises:
        ConfigError: A value is not valid. It is raised before the first run starts.
    """
    words = [f'note="{_escape(word)}"' if word.startswith("note=") else word for word in words]
    words = add_pluses([word for word in words if word not in (*FLAGS, *NULL_DEFAULTS)])
    parsed = [
        override for override in cli.parse_hydra_overrides(words) if not override.key_or_group.startswith("hydra")
    ]
    choices = {str(override.key_or_group): _parse_values(override) for override in parsed}
    if "run" in choices:
        raise ConfigError(
            "run= names the folder of one run, but -m and launcher= train in runs/sweep_<time>/<values>/s<seed>: leave "
            "it out, or set hydra.sweep.dir=<folder of the sweep>"
        )
    first = [values[0] for values in choices.values()]
    for check_values in (False, True):  # names first: checking a value imports the class that takes it, for seconds
        for i, values in enumerate(choices.values()):
            for value in values:
                compose([*first[:i], value, *first[i + 1 :]], check_values=check_values)
    not_in_name = [key for key, values in choices.items() if len(values) == 1 or key == "seed"]
    options = {
        "hydra.sweep.dir": f"runs/sweep_{datetime.now():%Y%m%d-%H%M%S-%f}",
        "hydra.sweep.subdir": "'./${folder_name:${hydra.job.override_dirname}}/s${seed}'",
        "hydra.job.config.override_dirname.exclude_keys": f"[{','.join(not_in_name)}]",
        "hydra.output_subdir": "null",  # the run folder has its own config.yaml
        "hydra/job_logging": "disabled",
        "hydra/hydra_logging": "disabled",
    }
    defaults = [f"{key}={value}" for key, value in options.items()]
    sys.argv[1:] = ["--multirun", *defaults, *with_search_path(words)]
    run_all = hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="train")(run_job)
    if "launcher" in choices:
        chosen = {str(override.key_or_group): str(override.value()) for override in cli.parse_hydra_overrides(words)}
        _submit_jobs(run_all, chosen.get("hydra.sweep.dir", options["hydra.sweep.dir"]))
    else:
        run_all()


def _escape(word: str) -> str:
    """Return the text in `note=<text>` with Hydra's special signs escaped."""
    text = re.sub(r"\\+(?=\"|$)", lambda match: 2 * match[0], word.removeprefix("note="))
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


def run_job(cfg: DictConfig) -> float | None:
    """Train one run of the sweep, or resume it: submitit calls this again for a job that was preempted."""
    if "SUBMITIT_EXECUTOR" in os.environ:  # without jobs, `levin.train` has done it
        share_cores()
    from levin import resume  # late: a sweep that is mistyped is refused before torch and Lightning are imported
    from levin.training.session import train

    hydra = HydraConfig.get()
    run = Path(hydra.runtime.output_dir)
    try:
        with exit_on_user_error():
            cfg = finalize(cfg, hydra.runtime.choices)
            chosen = _chosen_values(cfg, list(hydra.overrides.task))
            result = resume.resume(run=str(run), **chosen) if run_folder.has_begun(run) else train(cfg, run)
    except Exception:
        if "SUBMITIT_EXECUTOR" not in os.environ:
            raise
        traceback.print_exc()  # Hydra would send the error to the waiting process without its traceback
        raise SystemExit(1) from None
    if run_folder.read_provenance(run)["env_steps"] is None and "max_time" not in cfg.trainer:
        raise SystemExit(0)  # stopped by a signal, which ends the whole sweep
    return result


def _chosen_values(cfg: DictConfig, words: list[str]) -> dict[str, Any]:
    """Return the config values set by the command line, which must equal those of a run that is resumed."""
    keys = [str(each.key_or_group) for each in cli.parse_hydra_overrides(words)]
    leaves = flat_keys(to_plain(cfg))
    chosen = {leaf: OmegaConf.select(cfg, leaf) for leaf in leaves if any(f"{leaf}.".startswith(f"{k}.") for k in keys)}
    return {"name": cfg.name, **{key: value for key, value in chosen.items() if value is not None}}


def _parse_values(override: Override) -> list[str]:
    if not override.is_sweep_override():
        return [str(override.input_line)]
    value: Any = override.value()
    if not hasattr(value, "list"):  # a range or a glob, which Hydra expands
        return [str(override.input_line)]
    key = str(override.input_line).partition("=")[0]
    return [f"{key}={each.with_quotes() if isinstance(each, QuotedString) else each}" for each in value.list]
