"""What is left of a run when training is over: observation in, action out."""

from pathlib import Path

import numpy as np
import torch
from hydra.utils import get_class
from omegaconf import OmegaConf

from levin import checkpoint
from levin.algorithms.base import Algorithm
from levin.envs import action_units
from levin.errors import ConfigError


def load_algorithm(run: Path) -> Algorithm:
    """The algorithm of a run, with its newest weights, statistics and counters; on the CPU, without its buffer."""
    path = checkpoint.newest(run)
    config = path.resolve().parents[2] / "config.yaml"
    if not config.is_file():
        raise ConfigError(f"run={run} has no config.yaml beside its checkpoints folder")
    algorithm = get_class(OmegaConf.load(config).algo._target_)
    return algorithm.load_from_checkpoint(path, map_location="cpu", weights_only=True)


class Policy:
    """A trained policy with its normaliser inside: raw observation in, action in the env's own units out.

    Observations are `[*S]` or `[N, *S]` arrays, and the actions then `[*A]` or `[N, *A]`. The policy is deterministic.
    """

    def __init__(self, algorithm: Algorithm) -> None:
        self.algorithm = algorithm.eval()
        self.env = algorithm.env
        self.module = algorithm.policy(deterministic=True).module
        self._to_env = action_units(self.env["action"], self.env["action_units"])

    @classmethod
    def load(cls, run: Path) -> "Policy":
        """The newest policy of a run folder."""
        return cls(load_algorithm(run))

    @torch.inference_mode()
    def __call__(self, observation: np.ndarray) -> np.ndarray:
        space = self.env["observation"]
        batch = torch.as_tensor(np.asarray(observation, dtype=space["dtype"]))
        single = batch.ndim == len(space["shape"])
        action = self._to_env(self.module(batch.unsqueeze(0) if single else batch).numpy())  # [*S] -> [1, *S]
        return action[0] if single else action
