"""Write an issue about tests that fail with the newest versions: `broken_versions.py <pip freeze> <output of CI>`."""

import re
import subprocess
import sys
from pathlib import Path

MAX_LINES = 40


def read_pins(text: str) -> dict[str, str]:
    """Return name -> version of the lines `name==version`, with names as pip compares them."""
    pins = re.findall(r"^([\w.-]+)==([\w.]+)", text, re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pins}


def describe(locked: str, installed: str, output: str) -> str:
    """Return the text of the issue.

    Args:
        locked: Contents of requirements.lock.
        installed: Output of `pip freeze`.
        output: Output of the tests.
    """
    before, now = read_pins(locked), read_pins(installed)
    names = sorted(name for name in before.keys() & now.keys() if before[name] != now[name])
    changed = [f"| {name} | {before[name]} | {now[name]} |" for name in names]
    failed = list(dict.fromkeys(re.findall(r"^(?:FAILED|ERROR) .*", output, re.MULTILINE)))
    shown = failed[:MAX_LINES] or output.splitlines()[-MAX_LINES:]
    more = [f"and {len(failed) - MAX_LINES} more"] if len(failed) > MAX_LINES else []
    return "\n".join(
        [
            "The suite fails with the newest versions that `pyproject.toml` allows.",
            "",
            "| package | locked | installed |",
            "| --- | --- | --- |",
            *changed,
            "",
            "Tests that failed:" if failed else "No test failed; the end of the output:",
            "",
            "```text",
            *shown,
            *more,
            "```",
            "",
            "Either the code is adapted, or the range in `pyproject.toml` ends before the version that breaks it.",
        ]
    )


if __name__ == "__main__":
    lock = subprocess.run(["git", "show", "HEAD:requirements.lock"], check=True, capture_output=True, text=True).stdout
    print(describe(lock, *(Path(name).read_text(encoding="utf-8") for name in sys.argv[1:])))
