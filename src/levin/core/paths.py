"""Paths of the repository and its folders."""

import sys
from pathlib import Path

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


def output_folder(run: Path) -> Path:
    """Return the folder for files about a run: its own, or `runs/results/<name>` for a result in `experiments/`."""
    if not run.resolve().is_relative_to(EXPERIMENTS):
        return run
    folder = Path("runs/results") / run.resolve().relative_to(EXPERIMENTS)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
