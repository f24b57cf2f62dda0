"""What is left of a run when training is over: observation in, action out."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from levin import checkpoint, config, files, schema
from levin.algorithms.base import Algorithm
from levin.cells import POLICY
from levin.episodes import act
from levin.errors import ConfigError
from levin.spaces import action_units, is_single, readable, tensors, unsqueeze


def load_algorithm(run: Path) -> Algorithm:
    """The algorithm of a run, with its newest weights, statistics and counters; on the CPU, without its buffer.

    Of a result in experiments/, only what its policy needs has been kept: the rest is as it was initialised.
    """
    if (run / POLICY).is_file():
        saved = files.load(run / POLICY)
        algorithm = _class_of(run)(**saved["hyper_parameters"])
        algorithm.policy(deterministic=True).load_state_dict(saved["policy"])
        algorithm.env_steps = saved["env_steps"]
        return algorithm
    path = checkpoint.newest(run)
    return _class_of(path.resolve().parents[2]).load_from_checkpoint(path, map_location="cpu", weights_only=True)


def export(run: Path, path: Path) -> None:
    """Write the newest policy of a run, and nothing else of its algorithm, to a file that `load_algorithm` reads."""
    algorithm = load_algorithm(run)
    policy = algorithm.policy(deterministic=True).state_dict()
    files.save({"hyper_parameters": dict(algorithm.hparams), "env_steps": algorithm.env_steps, "policy": policy}, path)


def _class_of(run: Path) -> type[Algorithm]:
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"run={run} has no config.yaml beside its checkpoints folder")
    return schema.algorithm_class(config.load(run))


class Policy:
    """A trained policy with its normaliser inside: raw observation in, action in the env's own units out.

    Observations are what the env shows, `[*S]` or a batch `[N, *S]`, and the actions then `[*A]` or `[N, *A]`. Stacks
    of frames are the caller's to keep. The policy is deterministic. One with a memory is told where episodes begin,
    `policy(observation, is_first)`; without a word, its first call is where.
    """

    def __init__(self, algorithm: Algorithm) -> None:
        self.algorithm = algorithm.eval()
        self.env = algorithm.env
        self.policy = algorithm.policy(deterministic=True)
        self.module = self.policy.module
        self._begun = False
        self.shown = self.env.get("shown", self.env["observation"])
        self._read = readable(self.shown)[1]
        self._to_env = action_units(self.env["action"], self.env["action_units"])

    @classmethod
    def load(cls, run: Path) -> "Policy":
        """The newest policy of a run folder."""
        return cls(load_algorithm(run))

    @torch.inference_mode()
    def __call__(self, observation: Any, is_first: bool | np.ndarray | None = None) -> np.ndarray:
        single = is_single(self.shown, observation)
        batch = unsqueeze(observation) if single else observation
        batch = tensors(self.env["observation"], self._read(batch) if self._read else batch)
        first = np.asarray(not self._begun if is_first is None else is_first)
        num = len(next(iter(batch.values())) if isinstance(batch, dict) else batch)
        action = self._to_env(act(self.policy, batch, np.broadcast_to(first, num).copy()).numpy())
        self._begun = True
        return action[0] if single else action
