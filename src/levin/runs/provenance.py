"""Where a run came from: code, lock, versions, hardware."""

import hashlib
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from levin.core.paths import ROOT
from levin.runs import slurm

PACKAGES = ("levin", "torch", "torchrl", "tensordict", "lightning", "gymnasium", "mujoco", "numpy", "hydra-core")
CODE = ("src", "configs", "requirements.lock", "experiments/*.py", "experiments/*/*.py", "experiments/*/algo")


def collect_provenance() -> dict[str, Any]:
    """Plain values, for `provenance.json`. `git_dirty` says that the code or its configs are not the commit's."""
    lock = ROOT / "requirements.lock"
    return {
        "command": command_line(),
        "slurm_job": slurm.job_id(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_sha": run_git("rev-parse", "HEAD"),
        "git_dirty": bool(run_git("status", "--porcelain", "--untracked-files=no", "--", *CODE)),
        "lock_sha256": hashlib.sha256(lock.read_bytes()).hexdigest() if lock.exists() else None,
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in PACKAGES},
        "processor": processor_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def command_line() -> str:
    """The command line of this process."""
    return " ".join([Path(sys.executable).name, *sys.orig_argv[1:]])


def run_git(*words: str) -> str:
    """What git prints, or an empty string outside a repository."""
    answer = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    return answer.stdout.strip()


def processor_name() -> str:
    """The processor's name, as the system gives it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # an extra that is not installed
        return None
