"""Read a search space: `configs/tune/<algo>.yaml`, and `configs/tune/<algo>_<env>.yaml` on top of it.

Each line is a config key and what it may be, checked against the type hints that check every value of a config:

    algo.lr: {low: 1e-5, high: 1e-2, log: true}   # log: uniform in the logarithm
    algo.epochs: {low: 1, high: 20}               # whole numbers, since algo.epochs is one
    algo.gamma: {choices: [0.9, 0.99]}
    algo.batch_size: null                         # in the file of an env: keep the value of the config
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any

import optuna
import pydantic
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from yaml import YAMLError

from levin.config import cli
from levin.config.compose import chosen_algo_and_env, compose
from levin.core import paths
from levin.core.errors import ConfigError, one_line
from levin.core.omega import flat_keys, to_plain

FOLDER = "tune"  # in configs/, or in the folder of a fork


class Range(pydantic.BaseModel, extra="forbid"):
    """Numbers from `low` to `high`, both included."""

    low: int | float
    high: int | float
    log: bool = False
    step: int | float | None = None

    @property
    def texts(self) -> list[str]:
        """Return both ends as on the command line."""
        return [as_word(self.low), as_word(self.high)]


class Choices(pydantic.BaseModel, extra="forbid"):
    """One of several values of any type."""

    choices: list[Any] = pydantic.Field(min_length=2)

    @property
    def texts(self) -> list[str]:
        """Return the values as on the command line."""
        return [as_word(value) for value in self.choices]


def read_space(overrides: list[str]) -> dict[str, BaseDistribution]:
    """Return the search space of the algorithm and env that these overrides choose, by config key.

    Keys that the overrides set are not searched.

    Values of categorical distributions are texts, as on the command line.

    Raises:
        ConfigError: There is no space, a key is unknown, a range is empty, a value is not one of its key, or a key that
            is not searched refers to one that is.
    """
    algo, env = chosen_algo_and_env(overrides)
    folders = [paths.CONFIGS / FOLDER, *(file.parents[1] / FOLDER for file in paths.fork_files() if file.stem == algo)]
    paths_of = [folder / f"{name}.yaml" for name in (algo, f"{algo}_{env}") for folder in folders]
    files = [path for path in paths_of if path.is_file()]
    if not files:
        raise ConfigError(
            f"algo={algo} has no search space: write {' or '.join(str(each) for each in paths_of[: len(folders)])}"
        )
    lines: dict[str, tuple[Path, Any]] = {}
    for file in files:
        lines |= {str(key): (file, content) for key, content in _read(file).items()}
    parts: dict[str, Range | Choices] = {}
    for key, (file, content) in lines.items():
        if content is not None and key not in cli.keys_of(overrides):
            with _named(file):
                parts[key] = _read_part(key, content)
    if not parts:
        raise ConfigError(
            f"{files[-1].relative_to(paths.ROOT)} leaves nothing to search beside the values that are typed"
        )
    together = _compose_together({key: part.texts for key, part in parts.items()}, overrides)
    space = {}
    for key, part in parts.items():
        with _named(lines[key][0]):
            values = together[key] if together else [_compose_value(key, text, overrides) for text in part.texts]
            space[key] = _distribution(key, part, values)
    return space


@contextmanager
def _named(file: Path) -> Iterator[None]:
    """Put the name of a file before the sentence of an error."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{file.relative_to(paths.ROOT)}: {error}") from error


def _read(file: Path) -> dict[str, Any]:
    try:
        content = OmegaConf.to_container(OmegaConf.load(file))
    except (OmegaConfBaseException, YAMLError, OSError) as error:
        raise ConfigError(f"{file} can't be read: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file} must hold lines such as algo.lr: {{low: 1e-5, high: 1e-2, log: true}}")
    return {str(key): value for key, value in content.items()}


def _read_part(key: str, content: Any) -> Range | Choices:
    """Return what a line says that a key may be."""
    if not isinstance(content, dict) or not ({"choices"} == content.keys() or {"low", "high"} <= content.keys()):
        raise ConfigError(f"{key} must be {{low: ..., high: ...}}, with log or step, or {{choices: [...]}}")
    try:
        part = Choices(**content) if "choices" in content else Range(**content)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{key}: {'.'.join(map(str, first['loc']))}: {first['msg'].lower()}") from error
    if isinstance(part, Choices):
        if len(set(part.texts)) < len(part.texts):
            raise ConfigError(f"{key} has equal choices")
        return part
    if part.low >= part.high:
        raise ConfigError(f"{key}: low={part.low} is not below high={part.high}")
    if part.log and (part.low <= 0 or part.step is not None):
        raise ConfigError(f"{key}: log: true needs low above 0, and no step")
    return part


def _compose_together(texts: dict[str, list[str]], overrides: list[str]) -> dict[str, list[Any]]:
    """Return the values that configs have for the texts of all keys, composing few configs.

    The first config has the first text of every key, and so on. Empty if one of these configs is not valid, because of
    one text or because of texts that exclude each other.
    """
    values: dict[str, list[Any]] = {key: [] for key in texts}
    configs = []
    try:
        for turn in zip_longest(*texts.values()):
            chosen = {key: text for key, text in zip(texts, turn, strict=True) if text is not None}
            config = compose([*overrides, *(f"{key}={text}" for key, text in chosen.items())])
            configs.append(config)
            for key in chosen:
                values[key].append(OmegaConf.select(config, key))
    except ConfigError:
        return {}
    _refuse_references(configs[0], configs[1], set(texts))
    return values


def _refuse_references(first: DictConfig, second: DictConfig, searched: set[str]) -> None:
    """Check that two configs differ in the searched keys alone.

    Raises:
        ConfigError: Another key refers to one of them. A trial changes single values of a config without references.
    """
    for key in flat_keys(to_plain(first)):
        inside = any(f"{key}.".startswith(f"{each}.") for each in searched)
        if not inside and OmegaConf.select(first, key) != OmegaConf.select(second, key):
            raise ConfigError(f"{key} refers to a key that is searched: give it a value of its own in the YAML")


def _compose_value(key: str, text: str, overrides: list[str]) -> Any:
    return OmegaConf.select(compose([*overrides, f"{key}={text}"]), key)


def _distribution(key: str, part: Range | Choices, values: list[Any]) -> BaseDistribution:
    """Return the distribution of a key, given the values that configs have for the texts of its line."""
    if isinstance(part, Choices):
        return CategoricalDistribution(part.texts)
    try:
        if all(type(end) is int for end in values):
            return IntDistribution(*values, log=part.log, step=int(part.step or 1))
        return FloatDistribution(*map(float, values), log=part.log, step=part.step)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{key}: {error}") from error


def as_word(value: Any) -> str:
    """Return a value as it is written on the command line: `null`, `true`, `[64,64]`."""
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def suggest(trial: optuna.Trial, key: str, distribution: BaseDistribution) -> Any:
    """Return the value of a parameter in a trial; the same each time."""
    if isinstance(distribution, CategoricalDistribution):
        return trial.suggest_categorical(key, distribution.choices)
    if isinstance(distribution, IntDistribution):
        return trial.suggest_int(key, distribution.low, distribution.high, step=distribution.step, log=distribution.log)
    assert isinstance(distribution, FloatDistribution)
    return trial.suggest_float(key, distribution.low, distribution.high, step=distribution.step, log=distribution.log)
