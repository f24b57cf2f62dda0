"""Paths of the repository and its folders."""

from pathlib import Path

ROOT = Path(__file__).parents[3]
CONFIGS = ROOT / "configs"
EXPERIMENTS = ROOT / "experiments"


def fork_files() -> list[Path]:
    """Return the YAML files of all forked algorithms: `experiments/<fork>/algo/<fork>.yaml`."""
    return sorted(EXPERIMENTS.glob("*/algo/*.yaml"))
