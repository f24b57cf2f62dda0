"""Replay memory of single transitions, on TorchRL's `ReplayBuffer`."""

from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import LazyMemmapStorage, LazyTensorStorage, ReplayBuffer

KEYS = ("observation", "action", ("next", "observation"), ("next", "reward"), ("next", "terminated"))


class Replay:
    """The last `size` transitions (s, a, r, s', terminated), drawn uniformly with replacement.

    Every call costs half a millisecond whatever its size, so a rollout is stored at once and the batches of all updates
    that are due are drawn at once.

    Args:
        size: Transitions that are kept.
        storage: `memory`, on the device of the rollouts, or `memmap`, a file.
    """

    def __init__(self, size: int, storage: str) -> None:
        lazy = LazyTensorStorage(size, device="auto") if storage == "memory" else LazyMemmapStorage(size)  # type: ignore[arg-type]
        self.size = size
        self.buffer = ReplayBuffer(storage=lazy)

    def __len__(self) -> int:
        return len(self.buffer)

    def extend(self, rollout: TensorDictBase) -> None:
        """Store the transitions of a rollout `[N, T]`."""
        self.buffer.extend(rollout.select(*KEYS).reshape(-1))  # [N, T] -> [N * T]

    def sample(self, num: int, batch_size: int, device: torch.device) -> TensorDictBase:
        """`num` batches `[num, batch_size]` on the device."""
        sample: TensorDict = self.buffer.sample(num * batch_size)  # type: ignore[assignment]
        if device.type != "cpu":  # what is on a CPU may have no device, and would be copied
            sample = sample.to(device, non_blocking=True)
        return sample.reshape(num, batch_size)

    @property
    def data(self) -> TensorDict:
        """All transitions that are stored, not a copy."""
        return self.buffer[:]

    def state_dict(self) -> dict[str, Any] | None:
        """How much was ever stored, and what is there, not a copy; None while nothing is."""
        if not len(self):
            return None
        return {"written": self.buffer.writer.state_dict()["_write_count"], "length": len(self), "data": self.data}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Store what was stored, in the same places, on the device on which the rollouts will be.

        Args:
            state: As `state_dict` gave it, `data` in pieces, oldest first.
            device: Of the rollouts.
        """
        first = state["written"] - state["length"]
        self.buffer.writer.load_state_dict({"_cursor": first % self.size, "_write_count": first})
        for rows in state["data"]:
            self.buffer.extend(rows.to(device))
