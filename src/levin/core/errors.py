"""Errors that a user can cause or fix; the commands print each as one line, without a traceback."""

import difflib
import io
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

from levin.core.process import discard_output


class ConfigError(ValueError):
    """A config value, a command or a path is not valid. The message says what is."""


class CheckpointError(ConfigError):
    """A checkpoint is damaged, or this run can't resume from it."""


class FolderError(ConfigError):
    """A folder can't be written."""


class LockedError(FolderError):
    """Another process uses a folder."""


class ObservationError(ValueError):
    """An env shows a value that its observation space does not have; `env` is its index in the batch."""

    def __init__(self, env: int, message: str) -> None:
        super().__init__(message)
        self.env = env


class RunError(RuntimeError):
    """A run can't continue: an env fails, a number is not finite, or the disk is full."""


class NotFiniteError(RunError):
    """A loss, a gradient, an observation or a reward is NaN or inf."""


class Interrupted(Exception):  # noqa: N818  # not an error
    """A signal has ended a rollout or an evaluation, which a resumed run repeats from its beginning."""


def valid_names(wrong: str, valid: Iterable[str]) -> str:
    """Return the end of an error message, such as `valid: sac, ppo`, with the names closest to the wrong one first."""
    names = sorted(valid)
    nearest = difflib.get_close_matches(wrong, names, n=3, cutoff=0.5)
    return "valid: " + ", ".join(nearest + [name for name in names if name not in nearest])


def one_line(error: BaseException) -> str:
    """Return the message of an error without line breaks, at most 300 characters of it."""
    return " ".join(str(error).split())[:300]


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Print a ConfigError, a RunError or an error of a file as one line on stderr, and exit with code 2 or 1.

    Ctrl-C, where it does not save a run, exits with 130. Letters that a terminal's encoding lacks are printed as `?`.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with suppress(OSError):  # its file descriptor was exchanged
                stream.reconfigure(errors="replace")
    try:
        yield
    except BrokenPipeError:  # `| head` has read enough
        discard_output(sys.stdout.fileno())
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except SystemExit as ending:
        if isinstance(ending.__context__, KeyboardInterrupt):  # Lightning turns it into exit code 1
            raise SystemExit(130) from None
        raise
    except (ConfigError, RunError, OSError) as error:
        sys.stdout.flush()
        # A message may quote a file of somebody else: no line breaks, nothing that a terminal acts on, not too long.
        text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
        message = "".join(letter if letter.isprintable() else " " for letter in text[:1500])
        print(f"levin: {message}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, ConfigError) else 1) from None
