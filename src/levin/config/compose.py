"""From YAML files and overrides to one checked, resolved config. `python -m levin.config` prints each value's file.

Hydra composes; what a value may be is said once, by the hints of the `__init__` that takes it.
"""

from collections.abc import Mapping
from pathlib import Path

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from levin.config import schema
from levin.config.cli import parse_hydra_overrides
from levin.core.errors import ConfigError, valid_names
from levin.core.omega import flat_keys, to_plain
from levin.core.paths import CONFIGS, EXPERIMENTS

SEARCH_PATH = "hydra.searchpath"
GROUPS = ("algo", "env", "debug", "launcher", "tuned")
NULL_DEFAULTS = ("debug=null", "launcher=null")  # the defaults, which Hydra does not take as words


def compose(overrides: list[str], *, check_values: bool = True) -> DictConfig:
    """The checked config of `key=value` overrides, resolved and read-only.

    Raises:
        ConfigError: Anything in them is not valid.
    """
    overrides, run = take_run(with_search_path(overrides))
    _check_groups(parse_hydra_overrides(overrides))
    overrides = [each for each in overrides if each not in NULL_DEFAULTS]
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
            config = hydra_compose("train", overrides, return_hydra_config=True)
            choices = config.hydra.runtime.choices
            OmegaConf.set_struct(config, False)
            del config["hydra"]
            config.run = config.run if run is None else run
            return finalize(config, choices, check_values=check_values)
    except ConfigError:
        raise
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise _explain_error(error, overrides) from error


def finalize(config: DictConfig, choices: Mapping[str, str], *, check_values: bool = True) -> DictConfig:
    """Name, resolve, check and freeze what Hydra has composed.

    Raises:
        ConfigError: A value is not valid.
    """
    OmegaConf.set_struct(config, False)
    config.name = f"{choices['algo']}_{choices['env']}"
    _check_debug(str(choices.get("debug")), str(choices["algo"]))
    OmegaConf.resolve(config)
    OmegaConf.set_struct(config, True)
    if check_values:
        schema.check(config)
    OmegaConf.set_readonly(config, True)
    return config


def take_run(overrides: list[str]) -> tuple[list[str], str | None]:
    """Take `run=path` out of the overrides: a path is what was typed, whatever Hydra's grammar would make of it.

    Returns:
        The other overrides, and the path; None without one.

    Raises:
        ConfigError: OmegaConf would take the path for a reference to another key.
    """
    others = [each for each in overrides if not each.startswith("run=")]
    typed = [each.removeprefix("run=") for each in overrides if each.startswith("run=")]
    if not typed or typed[-1] == "null":
        return others, None
    if "${" in typed[-1] or typed[-1] == "???":
        raise ConfigError(f"run={typed[-1]} is what a config takes for another key or none; name another folder")
    return others, typed[-1]


def with_search_path(overrides: list[str]) -> list[str]:
    """Add the forks, so that `algo=my_idea` finds `experiments/my_idea/algo/my_idea.yaml`."""
    if any(each.startswith(SEARCH_PATH) for each in overrides):
        return overrides
    folders = sorted({file.parents[1] for file in EXPERIMENTS.glob("*/algo/*.yaml")})
    return [*overrides, f"{SEARCH_PATH}=[{','.join(map(str, folders))}]"] if folders else overrides


def _check_groups(overrides: list[Override]) -> None:
    folders = [CONFIGS]
    for override in overrides:
        if override.key_or_group == SEARCH_PATH:
            folders += [Path(str(folder)) for folder in override.value()]  # type: ignore[union-attr]
    for override in overrides:
        group, choice = override.key_or_group, override.value()
        if group in ("algo", "env") and choice is None:
            raise ConfigError(f"{group}=null is nothing to train; name one of {group}")
        if group in GROUPS and choice is not None:
            valid = [file.stem for folder in folders for file in (folder / group).glob("*.yaml")]
            if choice not in valid:
                raise ConfigError(f"{group}={choice} is unknown; {valid_names(str(choice), valid)}")


def _check_debug(debug: str, algo: str) -> None:
    """Some presets are nothing but what they say of single algorithms."""
    told = sorted(file.stem.removeprefix(f"{debug}_") for file in (CONFIGS / "debug_algo").glob(f"{debug}_*.yaml"))
    if debug in ("lecture", "overfit") and algo not in told:
        raise ConfigError(f"debug={debug} is for {', '.join(told)}; of {algo} it says nothing")


def _explain_error(error: Exception, overrides: list[str]) -> ConfigError:
    """Hydra says that a key is not in the struct; find which, and what it could have been."""
    if isinstance(error, MissingConfigException) and str(error.missing_cfg_file).startswith("hydra/launcher/"):
        return ConfigError("launcher needs a package that is missing: pip install -e '.[scale]'")
    parsed = parse_hydra_overrides(overrides)
    groups = [str(each.input_line) for each in parsed if each.key_or_group in (*GROUPS, SEARCH_PATH)]
    if len(groups) < len(parsed):
        valid = [key for key in flat_keys(to_plain(compose(groups, check_values=False))) if key != "name"]
        for each in parsed:
            key = each.key_or_group
            if (
                key not in (*GROUPS, SEARCH_PATH)
                and not each.is_add()
                and not any(v == key or v.startswith(f"{key}.") for v in valid)
            ):
                open_ended = key.startswith(("env.kwargs.", "trainer.", "callbacks."))
                plus = f"; what is not listed is added with a plus: +{each.input_line}" if open_ended else ""
                return ConfigError(f"{key} is unknown; {valid_names(key, valid)}{plus}")
    return ConfigError(" ".join(str(error).split()))
