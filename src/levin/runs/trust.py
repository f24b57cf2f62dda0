"""Decide whether code that a saved config names may run: a run folder may come from somebody else.

A config can name an algorithm class, its network, an env's module and callbacks. Code of this checkout is accepted:
the algorithms of Levin, forks that git tracks here, and the envs of the families that Levin supports. All other code
runs only if a run with the same entry was begun here, or if the user says `trust=true`.

The record of such entries lies outside the run folder, in `$XDG_STATE_HOME/levin/` (`~/.local/state/levin/` by
default): one file per entry, named by a checksum of the entry and of the place that its module is imported from. So
neither a changed config nor another module of the same name is accepted.
"""

import errno
import hashlib
import importlib
import importlib.util
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from levin.core import files, paths
from levin.core.errors import ConfigError
from levin.core.omega import to_plain
from levin.runs.provenance import run_git

SECTIONS = ("algo", "env", "callbacks")  # sections of a config that can name code
ALGORITHM = re.compile(r"levin\.algorithms\.\w+\.\w+")
FORK = re.compile(r"experiments\.(\w+)\.algorithm\.\w+")
ENV_MODULES = ("levin.dodge", "levin.racing")  # modules named in ids of Levin's own envs
ENV_PACKAGES = ("gymnasium", "levin", "ale_py")  # packages whose registered gymnasium ids are accepted
UNRECORDED: set[Path] = set()  # entries of this command that could not be written; the processes it forks have them too
VARIABLE = "LEVIN_TRUST"  # set while `trust=true` holds, so that the processes of a run inherit it


@dataclass(frozen=True)
class Code:
    """Code that a config names: `key` is the config key, `name` its value, `content` all that the code is given."""

    key: str
    name: str
    content: Any

    @property
    def module(self) -> str:
        """Top-level module or package of the code."""
        return _top_level(self.name)


@contextmanager
def trusted(given: bool) -> Iterator[None]:
    """Accept all code within the context if `given`, in this process and in those that it starts."""
    before = os.environ.get(VARIABLE)
    if given:
        os.environ[VARIABLE] = "1"
    try:
        yield
    finally:
        if given and before is None:
            del os.environ[VARIABLE]


def check(config: DictConfig, sections: tuple[str, ...], where: Path) -> None:
    """Check that the code which these sections of a saved config name may run.

    Args:
        config: Saved config.
        sections: Sections that the caller runs code of, from `SECTIONS`.
        where: Path of the config, for the message.

    Raises:
        ConfigError: The config names code that was not accepted.
    """
    for code in foreign_code(config, sections):
        if not is_accepted(code):
            if re.search(r"[:.]", code.name) and origin(code.module) is None:
                raise ConfigError(
                    f"{where} names {code.key}={code.name}, but Python does not find the module {code.module}: "
                    "run the command in the folder that holds it, or install it"
                )
            raise ConfigError(
                f"{where} names code that is not a part of Levin, and no run begun here has used it in the same way: "
                f"{code.key}={code.name} would run the module {code.module}; "
                "if you trust it, repeat the command with trust=true (with make: TRUST=1)"
            )


def is_accepted(code: Code) -> bool:
    """Return whether the code may run: a run begun here has used it in the same way, or the user trusts it."""
    path = _record_path(code)
    recorded = path.is_absolute() and os.path.isfile(path)  # false if it can't be read
    return os.environ.get(VARIABLE) == "1" or path in UNRECORDED or recorded


def record(config: DictConfig) -> None:
    """Record that the user has begun a run with the code that a config names. Print a line if that is not possible."""
    for code in foreign_code(config, SECTIONS):
        record_code(code)


def record_code(code: Code) -> None:
    """Record that the user has chosen to run this code."""
    path = _record_path(code)
    try:
        if not path.is_absolute():
            raise FileNotFoundError(errno.ENOENT, "there is no home folder")
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        files.save_json({**asdict(code), "imported_from": origin(code.module)}, path.parent, path.name)
    except OSError as error:
        UNRECORDED.add(path)
        print(
            f"levin: {path} can't be written ({error.strerror}): "
            f"later commands on this run need trust=true for {code.key}={code.name}",
            file=sys.stderr,
        )


def foreign_code(config: DictConfig, sections: tuple[str, ...]) -> Iterator[Code]:
    """Yield the code named by these sections that does not belong to this checkout or to a supported env family."""
    if "algo" in sections:
        target = str(config.algo.get("_target_"))
        if not ALGORITHM.fullmatch(target) and not _is_fork(target):
            yield Code("algo._target_", target, target)
        for key, section in to_plain(config.algo).items():  # such as a network of the user's own
            if isinstance(section, dict) and "_target_" in section:
                yield Code(f"algo.{key}._target_", str(section["_target_"]), section)
    if "env" in sections:
        env = to_plain(config.env)
        content = {key: env.get(key) for key in ("family", "id", "target", "kwargs")}
        if env.get("family") == "torchrl":
            yield Code("env.target", str(env.get("target")), content)
        elif not _is_known_env(str(env.get("family", "gymnasium")), str(env.get("id"))):
            yield Code("env.id", str(env.get("id")), content)
    if "callbacks" in sections:
        for key, section in to_plain(config.callbacks).items() if "callbacks" in config else ():
            target = section.get("_target_") if isinstance(section, dict) else section
            yield Code(f"callbacks.{key}._target_", str(target), section)


def _is_known_env(family: str, name: str) -> bool:
    """Return whether an env id needs no module other than those of its family."""
    import gymnasium as gym
    from gymnasium.envs.registration import _find_spec

    if family in ("atari", "dream"):  # dream: the config of the run that it names is checked when that is loaded
        return True
    if family == "dm_control":
        return name.startswith("dm_control/") and ":" not in name
    module, _, short_name = name.rpartition(":")
    if module:
        if module not in ENV_MODULES:
            return False
        importlib.import_module(module)  # registers the id
    try:
        entry_point = _find_spec(short_name).entry_point  # as `gymnasium.make` does: also an id without its version
    except gym.error.Error:  # not registered: there is nothing to run
        return True
    source = entry_point.partition(":")[0] if isinstance(entry_point, str) else getattr(entry_point, "__module__", "")
    return str(source).partition(".")[0] in ENV_PACKAGES


def _is_fork(target: str) -> bool:
    """Return whether a class is that of a fork in this checkout's `experiments/` that git tracks."""
    match = FORK.fullmatch(target)
    if match is None or not run_git("ls-files", "--", f"{paths.EXPERIMENTS}/{match[1]}/algorithm.py"):
        return False
    return origin("experiments") == str(paths.EXPERIMENTS)  # not another package of this name


def _record_path(code: Code) -> Path:
    """Return the path of the file that exists if a run with this code was begun here."""
    state = Path(os.environ.get("XDG_STATE_HOME", ""))
    if not state.is_absolute():  # as the standard says
        state = Path(os.path.expanduser("~/.local/state"))
    checkout = hashlib.sha256(str(paths.ROOT).encode()).hexdigest()[:16]
    text = json.dumps([code.key, code.content, [origin(module) for module in _modules(code)]])
    return state / "levin" / checkout / f"{hashlib.sha256(text.encode()).hexdigest()}.json"


def _modules(code: Code) -> list[str]:
    """Return the top-level modules of the code, and of every `_target_` in what it is given."""
    found = [code.module]

    def visit(value: Any) -> None:
        if isinstance(value, dict):
            found.extend(_top_level(str(name)) for key, name in value.items() if key == "_target_")
        for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            visit(each)

    visit(code.content)
    return found


def _top_level(name: str) -> str:
    """Return the top-level module or package in a name such as `package.module:Class`."""
    return re.split(r"[.:]", name)[0]


def origin(module: str) -> str | None:
    """Return the file or the first folder that a top-level module would be imported from, without importing it."""
    paths.make_forks_importable()
    try:
        spec = importlib.util.find_spec(module)
    except (ValueError, ImportError):  # not the name of a module
        return None
    if spec is None:
        return None
    return spec.origin or next(iter(spec.submodule_search_locations or ()), None)
