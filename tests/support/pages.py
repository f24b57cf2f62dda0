"""Pages of the documentation: their blocks of code, and a checkout in which the commands of a page run."""

import json
import os
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from processes import run_python, start_python
from python_blocks import DONE

ROOT = Path(__file__).parents[2]
SHELLS = ("sh", "bash", "shell")
KINDS = (*SHELLS, "python", "diff")
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
PRELOADED = ("levin.training.session", "levin.sweep", "levin.resume", "levin.plot", "rliable.library")
PYTHON = (".venv/bin/python", "python")
SAVE = re.compile(r"[Ss]ave\s(?:it|this|them|this\sexample)\sas `([\w/.-]+)`")
PARTS = ("Makefile", "pyproject.toml", "requirements.lock", "README.md", ".gitignore", "src", "configs", "experiments")


@dataclass(frozen=True)
class Block:
    """Block of code in a page.

    Args:
        kind: Language after the three backticks.
        line: Line of the first line of the code, counted from 1.
        code: The code.
        file: File that the paragraph before tells the reader to save the code as; None: the code is to be run.
    """

    kind: str
    line: int
    code: str
    file: str | None


def read_blocks(text: str) -> list[Block]:
    """Return the blocks of a page that are saved, run or applied, in order."""
    found = []
    for match in re.finditer(r"^( *)```(\w+)\n(.*?)^\1```$", text, re.DOTALL | re.MULTILINE):
        indent, kind, code = match.groups()
        before = text[: match.start()].rstrip().rpartition("\n\n")[2]
        named = SAVE.findall(before)
        if kind in KINDS or named:
            line = text.count("\n", 0, match.start(3)) + 1
            code = "".join(each.removeprefix(indent) for each in code.splitlines(keepends=True))
            found.append(Block(kind, line, code, named[-1] if named and kind != "diff" else None))
    return found


def read_commands(block: Block) -> Iterator[tuple[int, str]]:
    """Yield the line and the text of each command of a block of shell; a line that ends with a backslash continues."""
    lines = iter(enumerate(block.code.splitlines(), block.line))
    for number, text in lines:
        command = text
        while command.endswith("\\"):
            command = command[:-1] + next(lines)[1]
        if command.strip() and not command.lstrip().startswith("#"):
            yield number, command.strip()


class Checkout:
    """Copy of the repository as a git repository with one commit, in which the commands of pages run.

    Its `.venv` looks complete to make, and is never used: the commands are run by the Python of the tests.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        for name in PARTS:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            options = {"ignore": shutil.ignore_patterns("__pycache__")} if copy is shutil.copytree else {}
            copy(ROOT / name, folder / name, **options)
        (folder / ".venv" / "bin").mkdir(parents=True)
        for name in ("bin/python", ".core", *(f".{extra}" for extra in EXTRAS)):
            (folder / ".venv" / name).touch(0o755)
        self.run("git", "init", "--quiet", "--initial-branch=main")
        self.run("git", "add", "--all")
        self.run("git", "-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "--quiet", "--message", "template")

    def run(self, *words: str, stdin: str | None = None) -> subprocess.CompletedProcess:
        """Run a program in the checkout, and return what it wrote as `stdout`."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.run(words, cwd=self.folder, input=stdin, text=True, check=False, **pipes)

    def python(self, *words: str) -> subprocess.CompletedProcess:
        """Run Levin's Python with these words."""
        return run_python(*words, cwd=self.folder, env=self.environment, preloaded=PRELOADED)

    @property
    def environment(self) -> dict[str, str]:
        """Environment of the commands: `levin` is that of the checkout."""
        return {**os.environ, "PYTHONPATH": str(self.folder / "src")}

    def reset(self) -> None:
        """Remove everything that the commands of a page have left behind."""
        for words in (("checkout", "--quiet", "--force", "."), ("clean", "--quiet", "-dfx", "--exclude=.venv")):
            assert self.run("git", *words).returncode == 0


class PageError(AssertionError):
    """A block of a page that does not work."""


class Session:
    """Run the blocks of one page in order, as a reader would who types them.

    Args:
        name: Name of the page, for messages.
        checkout: Checkout in which they run.
        not_run: Pattern of the beginning of commands, or of code, that is only checked -> the reason.
    """

    def __init__(self, name: str, checkout: Checkout, not_run: dict[str, str]) -> None:
        self.name, self.checkout, self.not_run = name, checkout, not_run
        self.interpreter: subprocess.Popen | None = None

    def run(self, text: str) -> None:
        """Run all blocks of the text of the page.

        Raises:
            PageError: A block does not work; the message names page, line and command, and quotes the output.
        """
        try:
            for block in read_blocks(text):
                if block.file:
                    file = self.checkout.folder / block.file
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_text(block.code)
                elif block.kind in SHELLS:
                    for line, command in read_commands(block):
                        self.run_command(line, command)
                elif block.kind == "python":
                    self.run_python(block)
                else:
                    answer = self.checkout.run("git", "apply", "-", stdin=block.code)
                    self.check(answer, block.line, "git apply")
        finally:
            if self.interpreter:
                self.interpreter.kill()
                self.interpreter.communicate()

    def is_not_run(self, text: str) -> bool:
        """Return whether a command, or the code of a block, is only checked."""
        return any(re.match(pattern, text) for pattern in self.not_run)

    def check(
        self, answer: subprocess.CompletedProcess, line: int, command: str, codes: tuple[int, ...] = (0,)
    ) -> None:
        """Raise a PageError if a command has ended with another exit code."""
        if answer.returncode not in codes:
            output = f"{answer.stdout}{answer.stderr or ''}"[-4000:]
            raise PageError(f"{self.name}:{line}: {command}\nexit code {answer.returncode}\n{output}")

    def run_python(self, block: Block) -> None:
        """Execute a block of Python in the namespace of the page."""
        if self.is_not_run(block.code):
            return
        script = str(Path(__file__).with_name("python_blocks.py"))
        if self.interpreter is None:
            options = {"cwd": self.checkout.folder, "env": self.checkout.environment, "preloaded": PRELOADED}
            pipes = {"stdin": subprocess.PIPE, "stderr": subprocess.STDOUT}
            self.interpreter = start_python(script, **options, **pipes)
        process = self.interpreter
        request = {"code": "\n" * (block.line - 1) + block.code, "name": self.name}
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        output = []
        for line in process.stdout:
            if line.strip() == DONE:
                return
            output.append(line)
        raise PageError(f"{self.name}:{block.line}: Python\n{''.join(output)[-4000:]}")

    def run_command(self, line: int, command: str) -> None:
        """Run the parts of a command between `&&`, or check those that are not run."""
        for part in re.split(r"\s&&\s", command):
            words = shlex.split(part, comments=True)
            check_only = self.is_not_run(part)
            if words[0] == "make":
                self.run_make(line, part, words[1:], check_only=check_only)
            elif named := [at for at in range(1, len(words)) if words[at] == "-m" and words[at + 1 :]]:
                self.run_levin(line, part, words[named[0] :], check_only=check_only)  # also after torchrun or srun
            elif words[0] in PYTHON and not check_only:
                self.run_levin(line, part, words[1:])
            elif not check_only:
                # `git diff --no-index` ends with 1 if the files differ
                codes = (0, 1) if part.startswith("git diff --no-index") else (0,)
                self.check(self.checkout.run("bash", "-c", part), line, part, codes)

    def run_make(self, line: int, command: str, words: list[str], *, check_only: bool) -> None:
        """Run the commands of Levin that make would run."""
        if words in ([], ["help"]):
            return self.check(self.checkout.run("make", *words), line, command)
        answer = self.checkout.run("make", "--dry-run", "--no-print-directory", *words)
        self.check(answer, line, command)
        for each in answer.stdout.splitlines():
            recipe = shlex.split(each)
            if recipe[:2] == [PYTHON[0], "-m"] and recipe[2].startswith("levin."):
                self.run_levin(line, command, recipe[1:], check_only=check_only)
            elif not check_only and not each.startswith("make: "):  # that there is nothing to be done
                raise PageError(f"{self.name}:{line}: {command}\ntests do not run this part of it: {each}")
        return None

    def run_levin(self, line: int, command: str, words: list[str], *, check_only: bool = False) -> None:
        """Run Levin's Python: a command of Levin is shortened."""
        if words[0] == "-m" and words[1].startswith("levin."):
            script = str(Path(__file__).with_name("shortened.py"))
            words = [script, *(["--check"] if check_only else []), *words[1:]]
        elif check_only:
            return
        begun = sum(os.times()[:4])
        self.check(self.checkout.python(*words), line, command)
        print(f"{self.name}:{line}: {sum(os.times()[:4]) - begun:.1f} s of CPU time: {command}")
