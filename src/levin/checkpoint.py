"""Checkpoints are Lightning's, one folder each: `state.ckpt`, and the replay buffer as files beside it.

A folder is written under a temporary name and renamed last, so a checkpoint is whole or absent. Nothing in it is
pickled: everything loads with `weights_only=True`.
"""

import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import get_class
from lightning.pytorch.plugins.io import TorchCheckpointIO
from omegaconf import OmegaConf
from tensordict import TensorDict

from levin.algorithms.base import Algorithm
from levin.envs import action_units
from levin.errors import ConfigError

STATE, BUFFER, LAST = "state.ckpt", "buffer", "last"


class FolderCheckpointIO(TorchCheckpointIO):
    """Writes `checkpoints/<env_steps>/` for the path `checkpoints/<env_steps>/state.ckpt`, and points `last` at it."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        folder = Path(path).parent
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        buffer = checkpoint.get("buffer")
        if buffer is not None:
            buffer.pop("data").cpu().memmap(partial / BUFFER, copy_existing=True)
        torch.save(checkpoint, partial / STATE)
        for file in [*(file for file in partial.rglob("*") if file.is_file()), partial]:
            _fsync(file)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        _point(folder.with_name(LAST), folder.name)
        _fsync(folder.parent)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if checkpoint.get("buffer") is not None:
            checkpoint["buffer"]["data"] = TensorDict.load_memmap(Path(path).parent / BUFFER)
        return checkpoint

    def remove_checkpoint(self, path: str | Path) -> None:
        shutil.rmtree(Path(path).parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _point(link: Path, target: str) -> None:
    partial = link.with_name(f".{link.name}.partial")
    partial.unlink(missing_ok=True)
    partial.symlink_to(target)
    partial.replace(link)


def seed_everything(seed: int, rank: int) -> None:
    """Seed python, numpy and torch. The third stream beside training and evaluation episodes."""
    python, numpy, pytorch = np.random.SeedSequence(seed, spawn_key=(2, rank)).generate_state(3).tolist()
    random.seed(python)
    np.random.seed(numpy)
    torch.manual_seed(pytorch)


def rng_state() -> dict[str, Any]:
    """The state of python's, numpy's and torch's generators, in tensors and plain values."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(words), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), int(position), int(has_gauss), cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Undo everything that has been drawn since `rng_state`."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def newest(run: Path) -> Path:
    """The newest `state.ckpt` of a run folder; a checkpoint folder or a file is taken as it is.

    Raises:
        ConfigError: There is none.
    """
    for path in (run / "checkpoints" / LAST / STATE, run / STATE, run):
        if path.is_file():
            return path
    raise ConfigError(f"run={run} holds no checkpoint; a run folder has checkpoints/last/{STATE}")


def wandb_id(path: Path) -> str | None:
    """The Weights & Biases run that a checkpoint belongs to."""
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True).get("wandb_id")


def env_steps(path: Path) -> int:
    """How far a checkpoint is."""
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)["levin"]["env_steps"]


def load_algorithm(run: Path) -> Algorithm:
    """The algorithm of a run, with its newest weights, statistics and counters; on the CPU, without its buffer."""
    path = newest(run)
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
