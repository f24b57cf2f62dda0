"""Compose a checked, resolved config from YAML files and overrides.

Hydra composes the files. `schema.py` checks each value against the type hints of the `__init__` that takes it.
`python -m levin.config` prints the file that sets each value.
"""

import re
import warnings
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
from levin.core import paths
from levin.core.errors import ConfigError, valid_names
from levin.core.omega import flat_keys, to_plain

SEARCH_PATH = "hydra.searchpath"
GROUPS = ("algo", "env", "debug", "launcher", "tuned")
ANY_ENV = ("gym", "torchrl", "atari")  # env configs for any id: their runs are named by the id
PATHS = ("run", "env.run", "note")  # keys whose values are taken as typed: paths and texts
NAMES = ("name", "wandb_project")  # the same, but for references to other keys, such as ${seed}
OPEN_SECTIONS = ("env.kwargs", "callbacks", "trainer")  # sections that take keys that no YAML file lists
NULL_DEFAULTS = ("debug=null", "launcher=null")  # valid defaults, which Hydra refuses as overrides


def compose(overrides: list[str], *, check_values: bool = True) -> DictConfig:
    """Return the config of `key=value` overrides: checked, resolved and read-only.

    Raises:
        ConfigError: An override is not valid.
    """
    return _compose(overrides, check_values=check_values)[0]


def chosen_algo_and_env(overrides: list[str]) -> tuple[str, str]:
    """Return the names of the algorithm's and the env's YAML files that these overrides choose.

    Raises:
        ConfigError: An override is not valid.
    """
    choices = _compose(overrides, check_values=False)[1]
    return str(choices["algo"]), str(choices["env"])


def _compose(overrides: list[str], *, check_values: bool) -> tuple[DictConfig, Mapping[str, str]]:
    """Return the config and, by group, the names of the files that it was composed of."""
    if not paths.CONFIGS.is_dir():
        raise ConfigError(
            f"there is no folder {paths.CONFIGS}: Levin was installed without its configs, and can only load policies; "
            "to train, clone the repository and use make, or pip install -e in the clone"
        )
    overrides, typed = take_paths(with_search_path(add_pluses(overrides)))
    _check_groups(parse_hydra_overrides(overrides))
    overrides = [each for each in overrides if each not in NULL_DEFAULTS]
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(paths.CONFIGS)):
            config = hydra_compose("train", overrides, return_hydra_config=True)
            choices = config.hydra.runtime.choices
            OmegaConf.set_struct(config, False)
            del config["hydra"]
            for key, path in typed.items():
                OmegaConf.update(config, key, path)
            return finalize(config, choices, check_values=check_values), choices
    except ConfigError:
        raise
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise _explain_error(error, overrides) from error


def compose_one_of_many(overrides: list[str]) -> DictConfig:
    """Compose the config of a run beside others: with one thread, so that results do not depend on `jobs` or cores."""
    config = compose(overrides)
    if config.trainer.threads is None:
        OmegaConf.set_readonly(config, False)
        config.trainer.threads = 1
        OmegaConf.set_readonly(config, True)
    return config


def finalize(config: DictConfig, choices: Mapping[str, str], *, check_values: bool = True) -> DictConfig:
    """Set the name of a config that Hydra has composed, resolve it, check it and make it read-only.

    Raises:
        ConfigError: A value is not valid.
    """
    OmegaConf.set_struct(config, False)
    _check_debug(str(choices.get("debug")), str(choices["algo"]))
    _warn_of_untuned_family(choices)
    OmegaConf.resolve(config)
    env = choices["env"]
    if env in ANY_ENV and not OmegaConf.is_missing(config.env, "id"):
        env = re.sub(r"[^\w.-]+", "_", str(config.env.id))
    config.name = _checked_name(config.get("name")) or f"{choices['algo']}_{env}"
    if check_values:
        schema.check(config)
        schema.add_defaults(config)
    OmegaConf.set_struct(config, True)
    OmegaConf.set_readonly(config, True)
    return config


def _checked_name(name: object) -> str | None:
    """Return the name that the user gives to a run, which becomes a folder in `runs/`; None: there is none.

    Raises:
        ConfigError: It is not the name of a folder.
    """
    if name is None:
        return None
    if not re.fullmatch(r"\w[\w.-]*", str(name)):
        raise ConfigError(f"name={name} names a folder in runs/: it must hold only letters, digits and the signs _ - .")
    return str(name)


def add_pluses(overrides: list[str]) -> list[str]:
    """Put `++` before keys of sections that take any key, so that `env.kwargs.length=9` adds the key or changes it."""
    return [
        f"++{each}" if re.match(rf"({'|'.join(map(re.escape, OPEN_SECTIONS))})\.", each) else each for each in overrides
    ]


def take_paths(overrides: list[str]) -> tuple[list[str], dict[str, str]]:
    """Remove `run=path` and `env.run=path` from the overrides, so that Hydra's grammar does not change the paths.

    Returns:
        The other overrides, and the paths by key, exactly as typed.

    Raises:
        ConfigError: OmegaConf would read the path as a reference to another key or as a missing value.
    """
    others, typed = [], {}
    for override in overrides:
        key, _, path = override.partition("=")
        if path == "null" or not (key in PATHS or (key in NAMES and "${" not in path)):
            others.append(override)
            typed.pop(key, None)  # the last one counts
        elif "${" in path or path == "???":
            instead = "name another folder" if key in ("run", "env.run") else "write another text"
            raise ConfigError(
                f"{override} has a special meaning in a config (a reference or a missing value); {instead}"
            )
        else:
            typed[key] = path
    return others, typed


def with_search_path(overrides: list[str]) -> list[str]:
    """Add the folders of the forks that `algo=` names to Hydra's search path.

    `algo=my_idea` is `experiments/my_idea/algo/my_idea.yaml`. Other forks are not on the path, and a fork must not hold
    configs of other names, so no fork can change the values of another algorithm.

    Raises:
        ConfigError: A fork that is named holds another config, or its file is in another fork's folder.
    """
    if any(each.startswith(SEARCH_PATH) for each in overrides):
        return overrides
    algos = " ".join(each.removeprefix("algo=") for each in overrides if each.startswith("algo="))
    chosen = set(re.findall(r"\w+", algos))  # several in a sweep
    files = [
        file for file in paths.fork_files() if file.stem in chosen and not (paths.CONFIGS / "algo" / file.name).exists()
    ]
    for file in files:
        _check_fork(file)
    folders = [file.parents[1] for file in files]
    quoted = ",".join("'" + str(folder).replace("'", r"\'") + "'" for folder in folders)  # a path may hold any letter
    return [*overrides, f"{SEARCH_PATH}=[{quoted}]"] if folders else overrides


def _check_fork(file: Path) -> None:
    """Check that a fork has the name of its folder and holds no configs of other names."""
    folder, name = file.parents[1], file.stem
    if name != folder.name:
        raise ConfigError(f"algo={name} is {file}, but a fork must have the name of its folder: rename one of them")
    for other in sorted(folder.glob("*/**/*.yaml")):
        tuned = other.parent == folder / "tuned" and other.stem.startswith(f"{name}_")
        space = other.parent == folder / "tune" and f"{other.stem}_".startswith(f"{name}_")
        if other != file and not (tuned or space):
            raise ConfigError(
                f"{other} does not belong to the fork {name}, which may hold only algo/{name}.yaml, "
                f"tuned/{name}_<env>.yaml and tune/{name}.yaml: remove it"
            )


def _check_groups(overrides: list[Override]) -> None:
    folders = [paths.CONFIGS]
    for override in overrides:
        if override.key_or_group == SEARCH_PATH:
            folders += [Path(getattr(each, "text", each)) for each in override.value()]  # type: ignore[union-attr]
    refuse_several_values(overrides)
    for override in overrides:
        group, choice = override.key_or_group, override.value()
        if group in ("algo", "env") and choice is None:
            raise ConfigError(f"{group}=null leaves nothing to train; name one of configs/{group}/")
        if group in GROUPS and choice is not None:
            valid = [file.stem for folder in folders for file in (folder / group).glob("*.yaml")]
            if choice not in valid:
                forks = [file.stem for file in paths.fork_files() if file.stem == file.parents[1].name]
                names = {*valid, *(forks if group == "algo" else [])}
                raise ConfigError(f"{group}={choice} is unknown; {valid_names(str(choice), names)}")


def refuse_several_values(overrides: list[Override]) -> None:
    """Raise a ConfigError if an override has several values, as in a sweep."""
    for override in overrides:
        if override.is_sweep_override():
            raise ConfigError(
                f'{override.input_line} has several values: to train all of them, add -m (with make: ARGS="-m ..."); '
                "a number has no commas: 30_000"
            )


def _check_debug(debug: str, algo: str) -> None:
    """Check that a preset which exists only for some algorithms is used with one of them."""
    supported = sorted(
        file.stem.removeprefix(f"{debug}_") for file in (paths.CONFIGS / "debug_algo").glob(f"{debug}_*.yaml")
    )
    if debug in ("lecture", "overfit") and algo not in supported:
        raise ConfigError(f"debug={debug} is not for {algo}; valid algorithms: {', '.join(supported)}")


def _warn_of_untuned_family(choices: Mapping[str, str]) -> None:
    """Warn if the env's family has values of its own for some algorithms, but not for the one chosen."""
    algo, family = choices["algo"], choices.get("family@_global_")
    if not family:
        return
    folders = [paths.CONFIGS, *(file.parents[1] for file in paths.fork_files() if file.stem == algo)]
    names = [f"{algo}_{each}.yaml" for each in (family, choices["env"])]
    if not any((folder / "tuned" / name).is_file() for folder in folders for name in names):
        files = sorted((paths.CONFIGS / "tuned").glob(f"*_{family}.yaml"))
        tuned = ", ".join(file.stem.removesuffix(f"_{family}") for file in files)
        warnings.warn(
            f"algo={algo} has no tuned values for {family}: its defaults, chosen for another env, are used; "
            f"tuned for {family}: {tuned}",
            stacklevel=2,
        )


def _explain_new_keys(key: str, overrides: list[str]) -> str:
    """Return how to add a hyper-parameter, if a fork is chosen and the key is of its algorithm."""
    forks = {file.stem: file for file in paths.fork_files()}
    chosen = [forks[name] for each in overrides if (name := each.removeprefix("algo=")) != each and name in forks]
    if not key.startswith("algo.") or not chosen:
        return ""
    file = chosen[0].relative_to(paths.ROOT)
    return f"; to add a hyper-parameter, write a keyword argument of __init__ and a line in {file}"


def _explain_error(error: Exception, overrides: list[str]) -> ConfigError:
    """Return a plain error for one of Hydra's: name the unknown key and the valid ones."""
    cause: BaseException | None = error
    while cause is not None:  # an error of Levin's own, raised while OmegaConf resolved a value
        if isinstance(cause, ConfigError):
            return cause
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, MissingConfigException) and str(error.missing_cfg_file).startswith("hydra/launcher/"):
        return ConfigError("launcher=... needs a package that is missing: type make .venv/.scale")
    parsed = parse_hydra_overrides(overrides)
    groups = [str(each.input_line) for each in parsed if each.key_or_group in (*GROUPS, SEARCH_PATH)]
    for override in parsed:
        if override.key_or_group in OPEN_SECTIONS and f"'{override.key_or_group}'" in str(error):
            return ConfigError(f"{override.input_line} adds keys: put a plus before it, +{override.input_line}")
    if len(groups) < len(parsed):
        valid = list(flat_keys(to_plain(compose(groups, check_values=False))))
        for override in parsed:
            key = override.key_or_group
            if (
                key not in (*GROUPS, SEARCH_PATH)
                and not override.is_add()
                and not any(v == key or v.startswith(f"{key}.") for v in valid)
            ):
                return ConfigError(f"{key} is unknown; {valid_names(key, valid)}{_explain_new_keys(key, overrides)}")
    return ConfigError(" ".join(str(error).split()))
