"""Copy the code of a run that can't be restored from its commit and installed packages.

These are a fork that is not committed, changed files of Levin, and the user's own modules, such as an environment: of
every imported module outside the installed packages, those that differ from the commit `git_sha`. The run folder keeps
a copy of each, and provenance.json the checksums. A resumed run is compared with them.

A process that is forked runs the modules that the first process has imported, whatever their files hold by then: it
inherits a `Snapshot` of them.
"""

import functools
import hashlib
import sys
import sysconfig
import types
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from levin.core import files, paths
from levin.runs import provenance
from levin.runs.provenance import run_git

FOLDER = "code"  # in the run folder; the copies of a resumed run that found changes are in code_resumed_1, ...
SCRIPT = "__main__/"  # prefix of the names of scripts; a resumed run may be started by another script
MAX_BYTES = 1 << 20  # of a file that is copied; of a larger one only the checksum is kept
FORK_FILES = ("*.py", "algo/*.yaml", "tuned/*.yaml")


@dataclass(frozen=True)
class Snapshot:
    """Code that a process has imported.

    Args:
        facts: Commit and versions of packages, from `levin.runs.provenance.collect_code_facts`.
        local: Contents of all files that belong to no installed package, by their name in the run folder.
        changed: Contents of those that differ from the commit.
    """

    facts: dict[str, Any]
    local: dict[str, bytes]
    changed: dict[str, bytes]


_inherited: Snapshot | None = None  # of the process that has forked this one


def take_snapshot() -> Snapshot:
    """Read the code that this process has imported."""
    return Snapshot(provenance.collect_code_facts(), *_read_code())


def inherit(snapshot: Snapshot) -> None:
    """Take over the snapshot of the process that has forked this one."""
    global _inherited
    _inherited, provenance.inherited_facts = snapshot, snapshot.facts


def collect_code() -> dict[str, bytes]:
    """Return the imported files outside installed packages that differ from the commit, by name in the run folder.

    Call this when everything that the run imports has been imported.
    """
    return _read_code()[1]


def checksums(code: dict[str, bytes]) -> dict[str, str]:
    """Return the SHA-256 of each file."""
    return {name: hashlib.sha256(content).hexdigest() for name, content in code.items()}


def checksum_of(targets: Collection[str]) -> str:
    """Return a checksum of the code of algorithms: of Levin's own modules, and of the forks that `_target_` names."""
    package = Path(__file__).parents[1]
    found = list(package.rglob("*.py"))
    for name in {target.split(".")[1] for target in targets if target.startswith("experiments.")}:
        found += [file for pattern in FORK_FILES for file in (paths.EXPERIMENTS / name).glob(pattern)]
    contents = [file.name.encode() + file.read_bytes() for file in sorted(found)]
    return hashlib.sha256(b"".join(contents)).hexdigest()[:16]


def is_of_checkout(code: dict[str, bytes]) -> bool:
    """Return whether a file is one of Levin, of a fork or of a study."""
    return any(name.startswith(("levin/", f"{paths.EXPERIMENTS.name}/")) for name in code)


def copy_code(code: dict[str, bytes], run: Path, folder: str) -> None:
    """Copy the files into a folder of the run folder."""
    for name, content in code.items():
        if len(content) <= MAX_BYTES:
            with files.replace(run, f"{folder}/{name}") as copy:
                copy.write_bytes(content)


def describe_changes(before: dict[str, str], code: dict[str, bytes], commit: str) -> list[str]:
    """Return a text for each file that differs between an earlier session and this one, such as `x.py has changed`.

    Args:
        before: Checksums of the files of the earlier session that differed from its commit.
        code: Files of this session, from `collect_code`.
        commit: Commit of the earlier session.
    """
    local, _ = _read_code()
    # A file that is not imported yet may be imported later: look for it where Python would find it.
    places = [paths.ROOT / "src", paths.ROOT, *map(Path, sys.path)]
    for name in before:
        if name not in local and (found := [place / name for place in places if (place / name).is_file()]):
            local[name] = found[0].read_bytes()
    now = checksums({name: content for name, content in local.items() if name in before})
    lines = [f"{name} has changed" for name in now if now[name] != before[name]]
    lines += [f"{name} is gone" for name in before if name not in local and not name.startswith(SCRIPT)]
    others = [name for name in code if name not in before]
    if others and commit and not (_inherited or run_git("rev-parse", "HEAD")):
        return [*lines, f"git does not answer, so that other code can't be compared with commit {commit[:8]}"]
    return lines + [f"{name} is new, or has changed since commit {commit[:8] or 'unknown'}" for name in others]


def _read_code() -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Return the files of all imported modules that are not installed, and those that differ from the commit.

    Only files that were not inherited are read from the disk.
    """
    committed = _committed_files()
    known = _inherited or Snapshot({}, {}, {})
    found = {name: path for name, path in sorted(_local_files()) if name not in known.local}
    local = {name: path.read_bytes() for name, path in found.items()}
    changed = {name: local[name] for name, path in found.items() if str(path) not in committed}
    return known.local | local, known.changed | changed


def _local_files() -> Iterator[tuple[str, Path]]:
    """Yield name and path of the files of all imported modules that are not installed, and the files of their forks."""
    forks = set()
    for name, module in list(sys.modules.items()):
        if not is_local(module):
            continue
        path = Path(str(module.__file__)).resolve()
        if path.is_relative_to(paths.EXPERIMENTS):
            forks.add(path.relative_to(paths.EXPERIMENTS).parts[0])
        spec = getattr(module, "__spec__", None)
        parts = (spec.name if spec else name).split(".")
        if name == "__main__" and not spec:
            yield f"{SCRIPT}{path.name}", path
            continue
        yield "/".join([*parts[: None if path.stem == "__init__" else -1], path.name]), path
    for fork in forks:
        for pattern in FORK_FILES:
            for path in (paths.EXPERIMENTS / fork).glob(pattern):
                yield f"{paths.EXPERIMENTS.name}/{path.relative_to(paths.EXPERIMENTS)}", path.resolve()


def is_local(module: types.ModuleType | None) -> bool:
    """Return whether a module is a file that belongs neither to an installed package nor to Python itself."""
    file = getattr(module, "__file__", None)
    return bool(file) and not _is_installed(file) and Path(file).is_file()


@functools.cache  # a process imports thousands of modules
def _is_installed(file: str) -> bool:
    """Return whether a file belongs to an installed package or to Python itself."""
    if "/site-packages/" in file:
        return True
    standard = Path(sysconfig.get_path("stdlib"))
    if Path(file).is_relative_to(standard):  # even if it is a link out of it, as Debian's sitecustomize.py
        return True
    path = Path(file).resolve()
    return bool({"site-packages", "dist-packages"} & set(path.parts)) or path.is_relative_to(standard.resolve())


def is_in_a_commit(path: Path) -> bool:
    """Return whether a file belongs to an installed package, or is equal to the commit of this process."""
    return _is_installed(str(path)) or str(path.resolve()) in _committed_files()


def _committed_files() -> set[str]:
    """Return the paths of the files of this checkout that are equal to the commit of this process."""
    commit = (_inherited.facts["git_sha"] if _inherited else "") or run_git("rev-parse", "HEAD")
    if not commit:
        return set()
    tracked = set(run_git("ls-files", "-z").split("\0"))
    changed = set(run_git("diff", "--name-only", "--relative", "-z", commit).split("\0"))
    return {f"{paths.ROOT}/{name}" for name in tracked - changed}
