"""Start a new result: `python -m levin.pin exp=sac_hopper algo=sac env=hopper total_env_steps=1_000_000`.

Writes `experiments/<exp>/config.yaml`, the composed config with one CPU thread by default, and a `reference.yaml` in
which you fill in the published numbers and their sources. The config is pinned: it stays as it is when defaults change.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.resolvers import oc

from levin.config import cli
from levin.config.compose import compose
from levin.core import files
from levin.core.errors import ConfigError, exit_on_user_error
from levin.core.omega import to_plain
from levin.envs.config import EnvConfig
from levin.results.result import CONFIG, REFERENCE, result_path
from levin.runs import trust
from levin.runs.trust import trusted

DEFAULTS = ("trainer.accelerator=cpu", "trainer.threads=1", "logger=csv")


def pin(exp: str, overrides: list[str]) -> Path:
    """Write the folder of a new result, and return its path.

    Args:
        exp: Name of the result.
        overrides: Overrides of the config, `key=value`.

    Raises:
        ConfigError: The result exists already, or an override is not valid or reads an environment variable.
    """
    folder = result_path(exp)
    if (folder / CONFIG).exists():
        raise ConfigError(f"exp={exp} exists already: {folder / CONFIG}; choose another name")
    with _refuse_environment_variables():
        chosen = {word.partition("=")[0] for word in overrides}
        cfg = compose([*(word for word in DEFAULTS if word.partition("=")[0] not in chosen), *overrides])
    trust.record(cfg)
    if not (folder / REFERENCE).exists():
        from levin.collectors.uniform import random_return  # late: torch takes seconds to import

        published = dict.fromkeys(("family", "env", "mean", "std", "seeds", "metric", "source"))
        reference = {"env_steps": cfg.total_env_steps, "metric": "evaluations", "last": 1, "gate": None}
        reference |= {
            "gate_from": None,
            "random_return": random_return(EnvConfig(**to_plain(cfg.env)), cfg.eval.seed),  # 100 episodes, may fail
            "published": [published],
        }
        folder.mkdir(exist_ok=True)
        files.write_text(folder, REFERENCE, yaml.safe_dump(reference, sort_keys=False))
    files.write_text(folder, CONFIG, OmegaConf.to_yaml(cfg))  # last: with it, the result exists
    return folder


@contextmanager
def _refuse_environment_variables() -> Iterator[None]:
    """Make `${oc.env:NAME}` in a config an error: a pinned config goes into git, and such a value may be a secret."""

    def refuse(name: str, *_: Any) -> None:
        raise ConfigError(f"a pinned config must not read the environment variable {name}: write its value instead")

    OmegaConf.register_new_resolver("oc.env", refuse, replace=True)
    try:
        yield
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)


def main() -> None:
    """Write the result's folder and print what to do next."""
    with exit_on_user_error():
        cli.check_arguments(sys.argv[1:])
        overrides, given = cli.pop_flag(sys.argv[1:], "trust")
        names = [word for word in overrides if word.startswith("exp=")]
        if len(names) != 1 or not (exp := names[0].removeprefix("exp=")):
            raise ConfigError("exp must be given once: exp=<name of the result>, such as exp=sac_hopper")
        with trusted(given):
            folder = pin(exp, [word for word in overrides if word not in names])
    print(f"{folder}: fill in {REFERENCE}, commit, then run make reproduce EXP={exp} STORE=1")


if __name__ == "__main__":
    main()
