"""Parse the `key=value` arguments of a command line."""

import re
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from levin.core.errors import ConfigError
from levin.core.validate import check_section

FOLDERS = ("run", "runs", "env.run", "out", "hydra.sweep.dir")  # keys whose values are paths


def command_arguments(command: Callable[..., Any]) -> dict[str, Any]:
    """Return the arguments of the command line, checked against the signature of the command.

    Raises:
        ConfigError: A key is unknown or missing, or a value has the wrong type or is out of range.
    """
    hints = get_type_hints(command)
    texts = [key for key, hint in hints.items() if hint in (str, str | None)]
    values = parse_overrides(sys.argv[1:], as_typed=texts)
    values |= {key: None for key in texts if values.get(key) == "null" and hints[key] is not str}
    check_section(command, "", values)
    return values


def parse_overrides(arguments: list[str], *, as_typed: list[str]) -> dict[str, Any]:
    """Return `key=value` arguments as a dict: `["a=1", "b.c=x"] -> {"a": 1, "b.c": "x"}`.

    Args:
        arguments: Arguments of the command line.
        as_typed: Keys whose values stay strings exactly as typed, such as paths; other values are parsed by Hydra.

    Raises:
        ConfigError: An argument is not of the form key=value, or has several values.
    """
    values: dict[str, Any] = {}
    check_arguments(arguments)
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            raise ConfigError(f"{argument} is not of the form key=value")
        if key in as_typed:
            values[key] = value
        else:
            (override,) = parse_hydra_overrides([argument])
            if override.is_sweep_override():
                raise ConfigError(
                    f"{argument} has several values, and this command takes one (write 30_000, not 30,000)"
                )
            values[override.key_or_group] = override.value()
    return values


def check_arguments(arguments: list[str]) -> None:
    """Warn of a key that is given twice, whose last value is used. A seed, or a key of a sweep, is refused.

    Raises:
        ConfigError: The seed, or a key with several values for a sweep, is given twice; or a folder's path begins with
            `~`, which Python would take as the name of a folder.
    """
    given: dict[str, str] = {}
    for argument in arguments:
        key, equals, value = argument.lstrip("+~").partition("=")
        if key in FOLDERS and value.partition("/")[0] == "~":
            raise ConfigError(f"{argument}: the shell has not replaced ~ by your home folder: write $HOME instead")
        if equals and given.get(key, value) != value:
            message = f"{key} is given twice, as {given[key]} and as {value}"
            if key == "seed" or _is_sweep(key, given[key]):
                hint = "; with make, write SEED= or SEEDS= instead of seed=" if key == "seed" else ""
                raise ConfigError(f"{message}: leave one out{hint}")
            print(f"levin: {message}: the last is used", file=sys.stderr)
        given[key] = value


def _is_sweep(key: str, value: str) -> bool:
    """Return whether a value stands for several runs, such as `1,2` or `range(1,4)`, but not `[1,2]`."""
    with suppress(ConfigError):  # a path, for example, need not be a value of Hydra
        return parse_hydra_overrides([f"{key}={value}"])[0].is_sweep_override()
    return False


def pop_argument(arguments: list[str], name: str) -> tuple[list[str], str | None]:
    """Remove `name=value` from the arguments, and return the rest and the last value, None if it is not given."""
    values = [argument.removeprefix(f"{name}=") for argument in arguments if argument.startswith(f"{name}=")]
    rest = [argument for argument in arguments if not argument.startswith(f"{name}=")]
    return rest, values[-1] if values else None


def pop_flag(arguments: list[str], name: str) -> tuple[list[str], bool]:
    """Remove `name=true` or `name=false` from arguments, as `pop_argument` does; return the rest and the flag.

    Raises:
        ConfigError: The flag has another value.
    """
    rest, value = pop_argument(arguments, name)
    if value not in (None, "true", "false"):
        raise ConfigError(f"{name}={value} must be true or false")
    return rest, value == "true"


def pop_count(arguments: list[str], name: str, least: int = 1) -> tuple[list[str], int | None]:
    """Remove `name=n` from arguments, as `pop_argument` does; return the rest and the number, None if it is not given.

    Raises:
        ConfigError: The value is not a whole number of `least` or more.
    """
    rest, value = pop_argument(arguments, name)
    if value is not None and not (re.fullmatch("[0-9]+", value) and int(value) >= least):
        raise ConfigError(f"{name}={value} must be a whole number of {least} or more")
    return rest, None if value is None else int(value)


def pop_seeds(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Remove `seeds="0 1 2"` from arguments, as `pop_argument` does; return the rest and the seeds.

    Raises:
        ConfigError: They are not whole numbers, or one is given twice.
    """
    rest, text = pop_argument(arguments, "seeds")
    return rest, [] if text is None else [str(seed) for seed in parse_seeds(text)]


def parse_seeds(text: str) -> list[int]:
    """Return the seeds in a text such as `0 1 2` or `0,1,2`.

    Raises:
        ConfigError: They are not whole numbers, or one is given twice.
    """
    words = text.replace(",", " ").split()
    if not (words and all(re.fullmatch("[0-9]+", word) for word in words)):
        raise ConfigError(f"seeds={text} must be whole numbers separated by spaces")
    seeds = [int(word) for word in words]
    if twice := [seed for seed in seeds if seeds.count(seed) > 1]:
        raise ConfigError(f"seeds={text} holds {twice[0]} twice")
    return seeds


def keys_of(overrides: list[str]) -> list[str]:
    """Return the config keys that overrides set: `["algo=ppo", "+env.kwargs.n=2"] -> ["algo", "env.kwargs.n"]`."""
    return [override.lstrip("+").partition("=")[0] for override in overrides]


def parse_hydra_overrides(overrides: list[str]) -> list[Override]:
    """Return Hydra's overrides of `key=value` arguments.

    Raises:
        ConfigError: An argument is not of the form key=value.
    """
    try:
        return OverridesParser.create().parse_overrides(overrides)
    except HydraException as error:
        if len(overrides) > 1:  # name the one that is wrong
            for override in overrides:
                parse_hydra_overrides([override])
        text = " ".join(overrides)
        key, _, value = text.partition("=")
        advice = f"; quotes protect special letters and signs: \"{key}='{value}'\"" if value else ""
        raise ConfigError(f"{text} is not of the form key=value{advice}") from error
