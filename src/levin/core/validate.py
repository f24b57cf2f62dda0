"""Check plain values, such as those of a config or a file, against type hints."""

import inspect
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

import pydantic
from omegaconf import DictConfig

from levin.core.errors import CheckpointError, ConfigError, valid_names
from levin.core.omega import to_plain


def check_section(
    target: Callable[..., Any],
    prefix: str,
    section: DictConfig | dict[str, Any],
    *,
    skip: tuple[str, ...] = (),
    given: tuple[str, ...] = (),
    ignore_unknown: bool = False,
) -> None:
    """Check a section of the config against the signature of the class or function that takes it.

    Args:
        target: Class or function; its type hints are checked.
        prefix: Dotted prefix of the section's keys, for messages.
        section: Keys and values. Whole floats where an int belongs are converted in place.
        skip: Keys of the section that are not checked.
        given: Parameters that the code passes itself, so the config must not set them.
        ignore_unknown: Accept keys that are not in the signature.

    Raises:
        ConfigError: A key is unknown or missing, or a value has the wrong type or is out of range.
    """
    function = target.__init__ if inspect.isclass(target) else target
    hints = _hints(function)
    parameters = inspect.signature(target).parameters
    content = to_plain(section) if isinstance(section, DictConfig) else section
    values = {str(key): value for key, value in content.items() if key not in skip}
    valid = [name for name in parameters if name not in given]
    for name, value in values.items():
        if name in valid:
            if name not in hints:
                raise ConfigError(f"{prefix}{name} has no type hint in {target.__qualname__}: write {name}: <type>")
            converted = _validate(f"{prefix}{name}", _adapter(function, name), value)
            if converted is not value:
                section[name] = converted
        elif not ignore_unknown:
            raise ConfigError(f"{prefix}{name} is unknown; {valid_names(name, valid)}")
    for name in valid:
        if name not in values and parameters[name].default is inspect.Parameter.empty:
            raise ConfigError(f"{prefix}{name} is missing")


@cache
def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    return get_type_hints(function, include_extras=True)


@cache  # by function and name: a hint may be unhashable, and int | str equals str | int but has other messages
def _adapter(function: Callable[..., Any], name: str) -> pydantic.TypeAdapter[Any]:
    return pydantic.TypeAdapter(_hints(function)[name])


def _validate(key: str, adapter: pydantic.TypeAdapter[Any], value: Any) -> Any:
    try:
        valid = adapter.validate_python(value, strict=True)
    except pydantic.ValidationError as error:
        if isinstance(value, float) and value.is_integer():  # such as 1e5
            return _validate(key, adapter, int(value))
        first = error.errors()[0]
        advice = " (YAML has no tuples: write the type hint Sequence[...])" if first["type"] == "tuple_type" else ""
        raise ConfigError(f"{key}={value}: {first['msg'][0].lower()}{first['msg'][1:]}{advice}") from error
    return valid if isinstance(valid, float) else value  # 1 becomes 1.0 where a float belongs


def as_count(name: str, value: Any) -> int:
    """Return a counter that was read from a file, such as `env_steps`, which also names files.

    Raises:
        CheckpointError: It is not a whole number, or negative.
    """
    if type(value) is not int or value < 0:
        raise CheckpointError(f"{name}={value!r} is not a whole number of 0 or more")
    return value


_file_adapter = cache(pydantic.TypeAdapter)  # by type


def read_json(path: Path, hint: Any) -> Any:
    """Read a JSON file and check its contents against a type hint, such as a pydantic model.

    Raises:
        ValueError: The file is missing or damaged, or a value has another type; the message is one line.
    """
    if not path.is_file():
        raise ValueError("it is missing")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        _file_adapter(hint).validate_python(value, strict=True)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except (OSError, RecursionError) as error:
        raise ValueError(str(error)) from None
    return value
