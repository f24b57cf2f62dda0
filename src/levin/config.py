"""From YAML files and overrides to one checked, resolved config. `python -m levin.config` prints each value's file.

Hydra composes; what a value may be is said once, by the hints of the `__init__` that takes it.
"""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from levin import schema
from levin.envs import EnvConfig
from levin.errors import ConfigError, one_sentence, valid_names
from levin.paths import CONFIGS, EXPERIMENTS, ROOT

SEARCH_PATH = "hydra.searchpath"
GROUPS = ("algo", "env", "debug", "launcher", "tuned")
UNSAID = ("debug=null", "launcher=null")  # the defaults, which Hydra does not take as words


def compose(overrides: list[str], *, check_values: bool = True) -> DictConfig:
    """The checked config of `key=value` overrides, resolved and read-only.

    Raises:
        ConfigError: Anything in them is not valid.
    """
    overrides = with_search_path(overrides)
    _check_groups(parse(overrides))
    overrides = [each for each in overrides if each not in UNSAID]
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
            config = hydra_compose("train", overrides, return_hydra_config=True)
            choices = config.hydra.runtime.choices
            OmegaConf.set_struct(config, False)
            del config["hydra"]
            return complete(config, choices, check_values=check_values)
    except ConfigError:
        raise
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise _explain(error, overrides) from error


def complete(config: DictConfig, choices: Mapping[str, str], *, check_values: bool = True) -> DictConfig:
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


def arguments(command: Callable[..., Any]) -> dict[str, Any]:
    """The `key=value` words of the command line, held against the signature of the command.

    Raises:
        ConfigError: Unknown or missing key, wrong type, out of range.
    """
    hints = get_type_hints(command)
    values = words(sys.argv[1:], as_typed=[key for key, hint in hints.items() if hint is str])
    schema.bind(command, "", values)
    return values


def words(words: list[str], *, as_typed: list[str]) -> dict[str, Any]:
    """`["a=1", "b.c=x"] -> {"a": 1, "b.c": "x"}`.

    Args:
        words: Of the command line.
        as_typed: Keys, such as those of paths, whose values stay what was typed, whatever a parser would make of them.

    Raises:
        ConfigError: One is not of the form key=value.
    """
    values: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise ConfigError(f"{word} is not of the form key=value")
        if key in as_typed:
            values[key] = value
        else:
            (override,) = parse([word])
            values[override.key_or_group] = override.value()
    return values


def load(run: Path) -> DictConfig:
    """The config that a run was made from.

    Raises:
        ConfigError: The folder has none, or it is damaged.
    """
    path = run / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"run={run} is no run folder: it has no config.yaml")
    try:
        config = OmegaConf.load(path)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is damaged: {' '.join(str(error).split())}") from error
    if not config or not isinstance(config, DictConfig):
        raise ConfigError(f"{path} is damaged: it holds no keys")
    return config


def load_env(run: Path) -> EnvConfig:
    """The env that a run was made in."""
    return EnvConfig(**schema.plain(load(run).env))


def parse(overrides: list[str]) -> list[Override]:
    """The words of a command line. Raises ConfigError when they are not of the form key=value."""
    try:
        return OverridesParser.create().parse_overrides(overrides)
    except HydraException as error:
        raise ConfigError(f"{' '.join(overrides)} is not of the form key=value") from error


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


def _explain(error: Exception, overrides: list[str]) -> ConfigError:
    """Hydra says that a key is not in the struct; find which, and what it could have been."""
    if isinstance(error, MissingConfigException) and str(error.missing_cfg_file).startswith("hydra/launcher/"):
        return ConfigError("launcher needs a package that is missing: pip install -e '.[scale]'")
    parsed = parse(overrides)
    groups = [str(each.input_line) for each in parsed if each.key_or_group in (*GROUPS, SEARCH_PATH)]
    if len(groups) < len(parsed):
        valid = [key for key in schema.flatten(schema.plain(compose(groups, check_values=False))) if key != "name"]
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


def origins(overrides: list[str]) -> dict[str, str]:
    """Every key, and the file that set its value."""
    overrides = with_search_path(overrides)
    parsed = parse(overrides)
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
        from hydra.core.global_hydra import GlobalHydra

        loader = GlobalHydra.instance().config_loader()
        assert isinstance(loader, ConfigLoaderImpl)
        files = loader.compute_defaults_list("train", overrides, RunMode.RUN).defaults
    origin = {"name": "configs/algo, configs/env"}
    for file in files:
        found = [folder / f"{file.config_path}.yaml" for folder in (CONFIGS, *EXPERIMENTS.glob("*"))]
        for path in filter(Path.exists, found):
            values = yaml.safe_load(path.read_text()) or {}
            values.pop("defaults", None)
            prefix = f"{file.package}." if file.package and file.package != "_global_" else ""
            origin |= dict.fromkeys(schema.flatten(values, prefix), str(path.relative_to(ROOT)))
    for each in parsed:
        if each.key_or_group not in (*GROUPS, SEARCH_PATH):
            origin = {key: of for key, of in origin.items() if not key.startswith(f"{each.key_or_group}.")}
            origin[each.key_or_group] = "command line"
    return origin


def main() -> None:
    """Print `key: value  # file` for every value of the composed config."""
    with one_sentence():
        overrides = sys.argv[1:]
        config, origin = compose(overrides), origins(overrides)
        rows = [(key, OmegaConf.select(config, key)) for key in schema.flatten(schema.plain(config))]
        lines = [(f"{key}: {'null' if value is None else value}", origin.get(key, "")) for key, value in rows]
        width = max(len(line) for line, _ in lines)
        for line, of in lines:
            print(f"{line:<{width}}  # {of}")


if __name__ == "__main__":
    main()
