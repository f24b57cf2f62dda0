"""Levin: deep reinforcement learning on TorchRL and Lightning."""

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from levin.runs.policy import Policy

__version__ = version("levin")


def load(run: str | Path, *, trust: bool = False) -> "Policy":
    """Load the trained policy of a run folder: `action = levin.load("runs/...")(observation)`.

    Args:
        run: Run folder, or a result in experiments/.
        trust: Whether to import an algorithm from outside this checkout that the run's config names. Without it, that
            is done only for a run that was begun here.

    Raises:
        ConfigError: The folder holds no checkpoint, or the algorithm is from outside this checkout.
    """
    from levin.runs.policy import Policy  # torch and TorchRL take seconds to import
    from levin.runs.trust import trusted

    with trusted(trust):
        return Policy.load(Path(run))
