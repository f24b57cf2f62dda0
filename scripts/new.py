"""Make a project of one's own from a copy of the template, and merge later versions of the template into it.

`make new NAME=my_lab` renames the package and everything that carries its name, and commits that. The branch `template`
keeps the renamed template without your changes. `make new BASE=upstream/main` renames a later version of the template
in the same way, commits it to that branch, and merges it: conflicts arise only where both sides changed the same lines.
"""

import argparse
import hashlib
import importlib.util
import json
import keyword
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEMPLATE, BRANCH = "levin", "template"
KEEPS_NAME = ("LICENSE", "scripts/new.py", "tests/scripts/test_new.py")  # say where it comes from
RUFF = (sys.executable, "-m", "ruff", "--quiet")


class UsageError(Exception):
    """Error in what the user typed: a sentence with the reason."""


def git(*arguments: str, root: Path = ROOT) -> str:
    """Run git and return its output.

    Raises:
        UsageError: git failed, or there is none.
    """
    if shutil.which("git") is None:
        raise UsageError("git is not installed")
    answer = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise UsageError(f"git {' '.join(arguments)} failed: {(answer.stderr or answer.stdout).strip()}")
    return answer.stdout.strip()


def package_name(root: Path) -> str:
    """Return the name of the package, which is the first that a wheel would hold."""
    wheel = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]["targets"]
    return Path(wheel["wheel"]["packages"][0]).name


def check_name(name: str) -> None:
    """Check that a name can be that of a new package.

    Raises:
        UsageError: It can't.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise UsageError(f"NAME={name} can't be a package: use small letters, digits and _, as in my_lab")
    locked = (ROOT / "requirements.lock").read_text(encoding="utf-8").lower().replace("-", "_").splitlines()
    packages = (line.partition("==")[0] for line in locked)  # the packages of an extra may be missing
    if name in {*sys.stdlib_module_names, "tests", "experiments", *packages} or importlib.util.find_spec(name):
        raise UsageError(f"NAME={name} is the name of another package")


def rename(root: Path, name: str) -> None:
    """Rename the package in a checkout of the template: its folder, its name in all texts, and checksums of configs."""
    for file in git("ls-files", root=root).splitlines():
        path = root / file
        if file in KEEPS_NAME or path.is_symlink() or not path.is_file():
            continue
        try:
            before = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        after = (
            before.replace(TEMPLATE, name).replace(TEMPLATE.capitalize(), name).replace(TEMPLATE.upper(), name.upper())
        )
        if after != before:
            path.write_text(after, encoding="utf-8")
    git("mv", f"src/{TEMPLATE}", f"src/{name}", root=root)
    for provenance in (root / "experiments").glob("*/provenance.json"):
        _update_checksum(provenance)
    _allow_longer_lines(root / "pyproject.toml", len(name) - len(TEMPLATE))
    subprocess.run([*RUFF, "check", "--fix-only", "--select", "I", "."], cwd=root, check=True)
    subprocess.run([*RUFF, "format", "."], cwd=root, check=True)


def _update_checksum(provenance: Path) -> None:
    """Write the checksum of a result's config, whose targets have a new name, to its provenance.json."""
    config = provenance.with_name("config.yaml")
    facts = json.loads(provenance.read_text(encoding="utf-8"))
    if not config.exists() or config.name not in facts.get("files", {}):
        return
    lines = config.read_bytes().splitlines(keepends=True)
    content = b"".join(line for line in lines if not line.startswith(b"#"))
    facts["files"][config.name] = hashlib.sha256(content).hexdigest()
    provenance.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _allow_longer_lines(pyproject: Path, more: int) -> None:
    """Let docstrings that contain the name several times be longer, by as much as the new name is."""
    if more > 0:
        text = pyproject.read_text(encoding="utf-8")
        limit = f"[tool.ruff.lint.pycodestyle]\nmax-line-length = {120 + 4 * more}\n\n"
        pyproject.write_text(
            text.replace("[tool.ruff.lint.per-file-ignores]", limit + "[tool.ruff.lint.per-file-ignores]"),
            encoding="utf-8",
        )


def begin(name: str) -> None:
    """Turn this checkout into a project with this name, commit it, and start the branch `template` there."""
    check_name(name)
    if (current := package_name(ROOT)) != TEMPLATE:
        raise UsageError(f"this project is called {current} already; make new BASE=<commit> merges a later template")
    if changed := git("status", "--porcelain", "--untracked-files=normal"):
        raise UsageError(
            f"there are changes that are not committed: commit or stash them first, new files too:\n{changed}"
        )
    git("var", "GIT_COMMITTER_IDENT")  # fails without a name and an address, with git's advice
    rename(ROOT, name)
    git("add", "--all", "src", "experiments")
    try:
        git("commit", "--quiet", "--all", "--message", f"Make {name} from the template {TEMPLATE}")
    except UsageError:  # a hook or a signature: all was committed before, so undo the change
        git("mv", f"src/{name}", f"src/{TEMPLATE}")  # with files that git ignores
        git("reset", "--quiet", "--hard")
        raise
    git("branch", "--force", BRANCH)
    print(
        f"this project is called {name} now, and runs from before can't be continued here; run make setup, then make "
        "test"
    )


def _is_behind(other: str) -> bool:
    """Return whether the branch `template` does not exist here, or is older than another branch."""
    return not git("branch", "--list", BRANCH) or git("merge-base", BRANCH, other) == git("rev-parse", BRANCH)


def update(base: str) -> None:
    """Merge a later version of the template: rename it, commit it to the branch `template`, and merge that."""
    name = package_name(ROOT)
    shared = git("branch", "--list", "--remotes", f"origin/{BRANCH}")
    if not shared and not git("branch", "--list", BRANCH):
        raise UsageError(
            f"there is no branch {BRANCH}, which make new NAME={name} has made in the first clone: push it from there, "
            "and type git fetch origin here"
        )
    if shared and _is_behind(f"origin/{BRANCH}"):
        git("branch", "--force", BRANCH, f"origin/{BRANCH}")
    commit = git("rev-parse", "--verify", f"{base}^{{commit}}")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "template")
        git("worktree", "add", "--quiet", "--detach", str(copy), commit)
        try:
            rename(copy, name)
            git("add", "--all", root=copy)
            tree = git("write-tree", root=copy)
        finally:
            git("worktree", "remove", "--force", str(copy))
    message = f"Template {TEMPLATE} at {commit[:10]}"
    merged = git("commit-tree", tree, "-p", BRANCH, "-p", commit, "-m", message)
    git("branch", "--force", BRANCH, merged)
    print(git("merge", "--no-edit", BRANCH))


def main() -> None:
    """Begin a project (`--name`) or update it (`--base`)."""
    parser = argparse.ArgumentParser(description=__doc__)
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--name", help="name of the new package")
    choice.add_argument("--base", help="commit or branch of a later version of the template")
    arguments = parser.parse_args()
    try:
        if arguments.name is not None:
            begin(arguments.name)
        else:
            update(arguments.base)
    except UsageError as error:
        sys.exit(f"make new: {error}")


if __name__ == "__main__":
    main()
