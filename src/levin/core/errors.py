"""Mistakes a user can make: one sentence each, never a traceback."""

import difflib
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class ConfigError(ValueError):
    """Something the user said is not valid. The message says what is."""


class CheckpointError(ConfigError):
    """A checkpoint is damaged, or not one that this run can go on from."""


class RunError(RuntimeError):
    """A run can't go on: an env that fails, a number that is not finite, a disk that is full."""


def valid_names(wrong: str, valid: Iterable[str]) -> str:
    """`valid: sac, ppo`: the nearest matches of the wrong name first."""
    names = sorted(valid)
    nearest = difflib.get_close_matches(wrong, names, n=3, cutoff=0.5)
    return "valid: " + ", ".join(nearest + [name for name in names if name not in nearest])


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turn a `ConfigError` into its sentence and exit code 2, a `RunError` into its sentence and exit code 1."""
    try:
        yield
    except (ConfigError, RunError) as error:
        sys.stdout.flush()
        print(f"levin: {error}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, ConfigError) else 1) from None
