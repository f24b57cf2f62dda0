"""Many runs from one command, by Hydra's multirun: `python -m levin.train -m algo.tau=.005,.01 seed=0,1`.

Run folders are `runs/sweep_<time>/<what differs>/s<seed>/`: `make plot RUNS="runs/sweep_<time>/*"` draws a curve for
each value. Hydra's launchers and sweepers work as its pages say: a job returns the mean of its last evaluation.
"""

import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override, QuotedString
from omegaconf import DictConfig

from levin import config, runs, train
from levin.errors import one_sentence
from levin.paths import CONFIGS

FLAGS = ("-m", "--multirun")


def sweep(words: list[str]) -> None:
    """Run every combination of the comma-separated values.

    Args:
        words: Of the command line, `-m` among them.

    Raises:
        ConfigError: One of the values is not valid; nothing was run.
    """
    words = [word for word in words if word not in (*FLAGS, "debug=null")]
    parsed = [each for each in config.parse(words) if not each.key_or_group.startswith("hydra")]
    choices = {str(each.key_or_group): _values(each) for each in parsed}
    first = [values[0] for values in choices.values()]
    for i, values in enumerate(choices.values()):
        for value in values:
            config.compose([*first[:i], value, *first[i + 1 :]])
    same = [key for key, values in choices.items() if len(values) == 1 or key == "seed"]
    options = {
        "hydra.sweep.dir": "'runs/sweep_${now:%Y%m%d-%H%M%S}'",
        "hydra.sweep.subdir": "'${hydra.job.override_dirname}/s${seed}'",
        "hydra.job.config.override_dirname.exclude_keys": f"[{','.join(same)}]",
        "hydra.output_subdir": "null",  # config.yaml says it all
        "hydra/job_logging": "disabled",
        "hydra/hydra_logging": "disabled",
    }
    ours = [f"{key}={value}" for key, value in options.items()]
    sys.argv[1:] = ["--multirun", *ours, *config.with_search_path(words)]
    hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="train")(job)()


def job(cfg: DictConfig) -> float | None:
    """One run of the sweep."""
    runtime = HydraConfig.get().runtime
    run = Path(runtime.output_dir)
    with one_sentence():
        cfg = config.complete(cfg, runtime.choices)
        result = train.train(cfg, run)
    if runs.sessions(run)["env_steps"] is None and "max_time" not in cfg.trainer:
        raise SystemExit(0)  # a signal: it ends the sweep, not this run alone
    return result


def _values(override: Override) -> list[str]:
    if not override.is_sweep_override():
        return [str(override.input_line)]
    value: Any = override.value()
    if not hasattr(value, "list"):  # a range or a glob: Hydra's to expand
        return [str(override.input_line)]
    key = str(override.input_line).partition("=")[0]
    return [f"{key}={each.with_quotes() if isinstance(each, QuotedString) else each}" for each in value.list]
