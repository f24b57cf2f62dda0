"""Paths of the repository and its folders."""

import os
import sys
from pathlib import Path

from levin.core.errors import FolderError

ROOT = Path(__file__).resolve().parents[3]
CONFIGS = ROOT / "configs"
EXPERIMENTS = ROOT / "experiments"


def fork_files() -> list[Path]:
    """Return the YAML files of all forked algorithms: `experiments/<fork>/algo/<fork>.yaml`."""
    return sorted(EXPERIMENTS.glob("*/algo/*.yaml"))


def make_forks_importable() -> None:
    """Let Python import `experiments.<fork>.algorithm` from any working directory, before any other `experiments`."""
    if sys.path[0] != str(ROOT):
        sys.path.insert(0, str(ROOT))


def output_folder(run: Path, out: str | None = None) -> Path:
    """Return the folder for files about a run: `out`, or the run's own, or `runs/results/<name>` for a result.

    Raises:
        FolderError: The folder can't be written.
    """
    if not out and not run.resolve().is_relative_to(EXPERIMENTS):
        folder = run
    else:
        folder = Path(out) if out else Path("runs/results") / run.resolve().relative_to(EXPERIMENTS)
        folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise FolderError(f'{folder} can\'t be written: set out=<another path> (with make: ARGS="out=<another path>")')
    return folder
