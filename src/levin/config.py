"""From YAML files and overrides to one checked, resolved config. `python -m levin.config` prints each value's file.

Hydra composes; what a value may be is said once, by the hints of the `__init__` that takes it.
"""

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

import pydantic
import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from levin.errors import ConfigError, one_sentence, valid_names
from levin.hints import NonNegativeInt, PositiveInt

if TYPE_CHECKING:
    from levin.envs import EnvConfig

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
SEARCH_PATH = "hydra.searchpath"
GROUPS = ("algo", "env", "debug", "tuned")
# Lightning's arguments that would act on the wrong clock, or not at all under manual optimisation.
OURS = {
    "max_epochs": "total_env_steps",
    "min_epochs": "total_env_steps",
    "max_steps": "total_env_steps",
    "min_steps": "total_env_steps",
    "limit_train_batches": "total_env_steps",
    "callbacks": "callbacks",
    "logger": "logger",
    "log_every_n_steps": "log_every",
    "enable_checkpointing": "checkpoint.every",
    "val_check_interval": "eval.every",
    "check_val_every_n_epoch": "eval.every",
    "accumulate_grad_batches": "algo.batch_size",
    "gradient_clip_val": "the algorithm's own max_grad_norm",
    "gradient_clip_algorithm": "the algorithm's own max_grad_norm",
    "default_root_dir": "run",
    "fast_dev_run": "debug=smoke",
    "barebones": "debug=profile",
}


def compose(overrides: list[str], *, check_values: bool = True) -> DictConfig:
    """The checked config of `key=value` overrides, resolved and read-only.

    Raises:
        ConfigError: Anything in them is not valid.
    """
    overrides = _with_search_path(overrides)
    _check_groups(_parse(overrides))
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
            config = hydra_compose("train", overrides, return_hydra_config=True)
            choices = config.hydra.runtime.choices
            config = _without_hydra(config)
            config.name = f"{choices.algo}_{choices.env}"
    except (HydraException, OmegaConfBaseException) as error:
        raise _explain(error, overrides) from error
    if check_values:
        check(config)
    OmegaConf.set_readonly(config, True)
    return config


def check(config: DictConfig) -> None:
    """Hold every value against the hints of the code that takes it; a whole float where an int belongs becomes one.

    Raises:
        ConfigError: Unknown or missing key, wrong type, out of range.
    """
    from levin.callbacks import Checkpointing, Evaluation  # these import torch
    from levin.envs import EnvConfig

    for key in sorted(OmegaConf.missing_keys(config)):
        raise ConfigError(f"{key} has no value: give one by {key}=...")
    _bind(top_level, "", config, skip=("env", "algo", "eval", "checkpoint", "trainer", "callbacks"))
    _bind(EnvConfig, "env.", config.env)
    _bind(get_class(config.algo._target_), "algo.", config.algo, skip=("_target_",), given=("env",))
    _bind(Evaluation, "eval.", config.eval, given=("env", "metrics"))
    _bind(Checkpointing, "checkpoint.", config.checkpoint, given=("run", "evaluation"))
    for name, ours in OURS.items():
        if name in config.trainer:
            raise ConfigError(f"trainer.{name} does not act here; say {ours} instead")
    _bind(trainer_options, "trainer.", config.trainer, ignore_unknown=True)
    _check_trainer_keys(config.trainer)


def top_level(
    *,
    name: str,
    seed: NonNegativeInt,
    total_env_steps: PositiveInt,
    run: str | None,
    collector: Literal["vector", "torchrl"],
    logger: Literal["csv", "tensorboard", "wandb"] | None,
    log_every: PositiveInt,
    wandb_project: str,
    upload: bool,
) -> None:
    """What the plain keys of train.yaml may hold."""


def trainer_options(
    *,
    accelerator: str,
    devices: PositiveInt,
    strategy: str,
    # Half "true" precisions cast the batch and lose its shape; 16-mixed needs a gradient scaler per optimiser.
    precision: Literal["32-true", "bf16-mixed"],
    threads: PositiveInt | None,
) -> None:
    """What the `trainer` keys that we read ourselves may hold."""


def _check_trainer_keys(trainer: DictConfig) -> None:
    from lightning import Trainer

    valid = {"threads", *inspect.signature(Trainer.__init__).parameters} - {"self", *OURS}
    for key in map(str, trainer):
        if key not in valid:
            raise ConfigError(f"trainer.{key} is unknown; {valid_names(key, valid)}")


def _bind(
    target: Callable[..., Any],
    prefix: str,
    section: DictConfig,
    *,
    skip: tuple[str, ...] = (),
    given: tuple[str, ...] = (),
    ignore_unknown: bool = False,
) -> None:
    """Check a section against the signature that will take it. `given` arguments are not the config's to say."""
    hints = get_type_hints(target.__init__ if inspect.isclass(target) else target, include_extras=True)
    parameters = inspect.signature(target).parameters
    values = {str(key): value for key, value in plain(section).items() if key not in skip}
    valid = [name for name in parameters if name not in given]
    for name, value in values.items():
        if name in valid:
            whole = _validate(f"{prefix}{name}", hints[name], value)
            if whole is not value:
                section[name] = whole
        elif not ignore_unknown:
            raise ConfigError(f"{prefix}{name} is unknown; {valid_names(name, valid)}")
    for name in valid:
        if name not in values and parameters[name].default is inspect.Parameter.empty:
            raise ConfigError(f"{prefix}{name} is missing")


def _validate(key: str, hint: Any, value: Any) -> Any:
    adapter = pydantic.TypeAdapter(hint)
    try:
        adapter.validate_python(value, strict=True)
    except pydantic.ValidationError as error:
        if isinstance(value, float) and value.is_integer():  # 1e5 env steps
            return _validate(key, hint, int(value))
        first = error.errors()[0]
        raise ConfigError(f"{key}={value}: {first['msg'][0].lower()}{first['msg'][1:]}") from error
    return value


def arguments(command: Callable[..., Any]) -> dict[str, Any]:
    """The `key=value` words of the command line, held against the signature of the command.

    Raises:
        ConfigError: Unknown or missing key, wrong type, out of range.
    """
    for word in sys.argv[1:]:
        if "=" not in word:
            raise ConfigError(f"{word} is not of the form key=value")
    section = OmegaConf.from_dotlist(sys.argv[1:])
    _bind(command, "", section)
    return plain(section)


def load(run: Path) -> DictConfig:
    """The config that a run was made from.

    Raises:
        ConfigError: The folder has none.
    """
    path = run / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"run={run} is no run folder: it has no config.yaml")
    config = OmegaConf.load(path)
    assert isinstance(config, DictConfig)
    return config


def load_env(run: Path) -> "EnvConfig":
    """The env that a run was made in."""
    from levin.envs import EnvConfig

    return EnvConfig(**plain(load(run).env))


def plain(section: DictConfig) -> dict[str, Any]:
    """The section as a resolved dict."""
    return OmegaConf.to_container(section, resolve=True)  # type: ignore[return-value]


def _without_hydra(config: DictConfig) -> DictConfig:
    OmegaConf.set_struct(config, False)
    del config["hydra"]
    OmegaConf.resolve(config)
    OmegaConf.set_struct(config, True)
    return config


def _parse(overrides: list[str]) -> list[Override]:
    try:
        return OverridesParser.create().parse_overrides(overrides)
    except HydraException as error:
        raise ConfigError(f"{' '.join(overrides)} is not of the form key=value") from error


def _with_search_path(overrides: list[str]) -> list[str]:
    """Add the forks, so that `algo=my_idea` finds `experiments/my_idea/algo/my_idea.yaml`."""
    if any(each.startswith(SEARCH_PATH) for each in overrides):
        return overrides
    folders = sorted({file.parents[1] for file in ROOT.glob("experiments/*/algo/*.yaml")})
    return [*overrides, f"{SEARCH_PATH}=[{','.join(map(str, folders))}]"] if folders else overrides


def _check_groups(overrides: list[Override]) -> None:
    folders = [CONFIGS]
    for override in overrides:
        if override.key_or_group == SEARCH_PATH:
            folders += [Path(str(folder)) for folder in override.value()]  # type: ignore[union-attr]
    for override in overrides:
        group, choice = override.key_or_group, override.value()
        if group in GROUPS and choice is not None:
            valid = [file.stem for folder in folders for file in (folder / group).glob("*.yaml")]
            if choice not in valid:
                raise ConfigError(f"{group}={choice} is unknown; {valid_names(str(choice), valid)}")


def _explain(error: Exception, overrides: list[str]) -> ConfigError:
    """Hydra says that a key is not in the struct; find which, and what it could have been."""
    parsed = _parse(overrides)
    groups = [str(each.input_line) for each in parsed if each.key_or_group in (*GROUPS, SEARCH_PATH)]
    if len(groups) < len(parsed):
        valid = list(flatten(plain(compose(groups, check_values=False))))
        for each in parsed:
            key = each.key_or_group
            if (
                key not in (*GROUPS, SEARCH_PATH)
                and not each.is_add()
                and not any(v == key or v.startswith(f"{key}.") for v in valid)
            ):
                return ConfigError(f"{key} is unknown; {valid_names(key, valid)}")
    return ConfigError(" ".join(str(error).split()))


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """`{"a": {"b": 1}} -> "a.b"`: the keys of all leaves."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def origins(overrides: list[str]) -> dict[str, str]:
    """Every key, and the file that set its value."""
    overrides = _with_search_path(overrides)
    parsed = _parse(overrides)
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
        from hydra.core.global_hydra import GlobalHydra

        loader = GlobalHydra.instance().config_loader()
        assert isinstance(loader, ConfigLoaderImpl)
        files = loader.compute_defaults_list("train", overrides, RunMode.RUN).defaults
    origin = {"name": "configs/algo, configs/env"}
    for file in files:
        found = [folder / f"{file.config_path}.yaml" for folder in (CONFIGS, *ROOT.glob("experiments/*"))]
        for path in filter(Path.exists, found):
            values = yaml.safe_load(path.read_text()) or {}
            values.pop("defaults", None)
            prefix = f"{file.package}." if file.package and file.package != "_global_" else ""
            origin |= dict.fromkeys(flatten(values, prefix), str(path.relative_to(ROOT)))
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
        rows = [(key, OmegaConf.select(config, key)) for key in flatten(plain(config))]
        lines = [(f"{key}: {'null' if value is None else value}", origin.get(key, "")) for key, value in rows]
        width = max(len(line) for line, _ in lines)
        for line, of in lines:
            print(f"{line:<{width}}  # {of}")


if __name__ == "__main__":
    main()
