"""Collect the provenance of a run: command, git commit, lock file, package versions, hardware."""

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from levin.core.paths import ROOT
from levin.runs import slurm

PACKAGES = ("levin", "torch", "torchrl", "tensordict", "lightning", "gymnasium", "mujoco", "numpy", "hydra-core")
# The value in `api_key=...`, and in `{api_key: ..., other: ...}`.
SECRET = re.compile(r"(?i)(?<![a-z0-9])(key|token|secret|passw(?:or)?d)(?:(=).+|(:)[^,}]+)")
CODE = (
    *("src", "configs", "requirements.lock"),
    *("experiments/*.py", "experiments/*/*.py", "experiments/*/algo", "experiments/*/tuned"),
)
# Facts of the process that has forked this one, from `collect_code_facts`: `levin.runs.code.inherit` sets them.
inherited_facts: dict[str, Any] = {}


def collect_provenance() -> dict[str, Any]:
    """Collect the contents of `provenance.json` as plain values."""
    import torch

    return {
        "command": command_line(),
        "slurm_job": slurm.job_id(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **collect_code_facts(),
        "python": platform.python_version(),
        "processor": processor_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def changed_packages(before: dict[str, str | None], now: dict[str, str | None]) -> list[str]:
    """Return which packages have another version, of those that both sides had installed: a run uses no other."""
    return [name for name, version in before.items() if version and now.get(name) not in (None, version)]


def collect_code_facts() -> dict[str, Any]:
    """Collect the commit, the checksum of the lock file and the versions of packages as plain values.

    `git_dirty` is True if files under `CODE` differ from the commit `git_sha`, or git does not track them. A process
    that the scheduler has forked has the facts of the first process, whose modules it runs.
    """
    lock = ROOT / "requirements.lock"
    return inherited_facts or {
        "git_sha": run_git("rev-parse", "HEAD"),
        "git_dirty": bool(run_git("status", "--porcelain", "--untracked-files=all", "--", *CODE)),
        "lock_sha256": hashlib.sha256(lock.read_bytes()).hexdigest() if lock.exists() else None,
        "versions": {package: _version(package) for package in PACKAGES},
    }


def command_line() -> str:
    """Return the command line of this process, with the values of keys, tokens and passwords masked."""
    return " ".join([Path(sys.executable).name, *(SECRET.sub(r"\1\2\3***", word) for word in sys.orig_argv[1:])])


def run_git(*arguments: str) -> str:
    """Run git in the repository and return its output; an empty string if it fails, or there is no git."""
    if shutil.which("git") is None:
        return ""
    command = ["git", *arguments]
    # A file name may hold any bytes, and its encoding does not depend on the locale of this process.
    answer = subprocess.run(
        command, cwd=ROOT, capture_output=True, encoding="utf-8", errors="surrogateescape", check=False
    )
    return "" if answer.returncode else answer.stdout.strip()


def processor_name() -> str:
    """Return the name of the processor, as the system reports it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # it belongs to an extra that is not installed
        return None
