"""Levin: deep reinforcement learning on TorchRL and Lightning."""

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from levin.runs.policy import Policy

__version__ = version("levin")


def load(run: str | Path) -> "Policy":
    """Load the trained policy of a run folder: `action = levin.load("runs/...")(observation)`.

    Raises:
        ConfigError: The folder holds no checkpoint.
    """
    from levin.runs.policy import Policy  # torch and TorchRL take seconds to import

    return Policy.load(Path(run))
