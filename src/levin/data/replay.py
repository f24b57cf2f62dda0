"""Replay buffers of single transitions, on TorchRL's `ReplayBuffer`."""

from functools import cached_property
from typing import Any, ClassVar

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import LazyMemmapStorage, LazyTensorStorage, ReplayBuffer

from levin.core.errors import ConfigError
from levin.core.spaces import EnvSpec

KEYS = ("observation", "action", ("next", "observation"), ("next", "reward"), ("next", "terminated"))
MAX_SAMPLE_BYTES = 64 << 20  # of the batches that are sampled at once, unless a single batch is larger


def make_replay(env: EnvSpec, size: int, storage: str) -> "Replay":
    """Build the replay buffer that fits the env: `FrameReplay` for pixels, else `Replay`."""
    if env["observation"]["dtype"] == "uint8":
        return FrameReplay(size, storage, env.get("frame_stack", 1))
    return Replay(size, storage)


def to_device(sample: TensorDict, device: torch.device) -> TensorDict:
    """Move a sample to the device, except to the CPU: a sample there may have no `device`, and would be copied."""
    return sample if device.type == "cpu" else sample.to(device, non_blocking=True)


class Replay:
    """Replay of the last `size` transitions (s, a, r, s', terminated), sampled uniformly with replacement.

    Every call costs half a millisecond, whatever its size. Therefore a whole rollout is stored in one call, and the
    batches of all updates that are due are sampled in one call.

    Args:
        size: Number of transitions that are kept.
        storage: `memory`, on the device of the rollouts, or `memmap`, a file.
    """

    # Names of attributes that `state_dict` saves or that need not be saved; those of base classes are added. Others
    # that change are saved by levin.runs.extra_state.
    not_saved: ClassVar[tuple[str, ...]] = ("buffer", "transition_bytes")

    def __init__(self, size: int, storage: str) -> None:
        lazy = LazyTensorStorage(size, device="auto") if storage == "memory" else LazyMemmapStorage(size)  # type: ignore[arg-type]
        self.size, self.storage = size, storage
        self.buffer = ReplayBuffer(storage=lazy)

    def __len__(self) -> int:
        return len(self.buffer)

    @property
    def written(self) -> int:
        """Number of entries stored so far, overwritten ones included; entry k lies at index k modulo `size`."""
        return self.buffer.writer.state_dict()["_write_count"]

    @property
    def data(self) -> TensorDict:
        """Stored entries, not a copy."""
        return self.buffer[:]

    @cached_property
    def transition_bytes(self) -> int:
        """Bytes of one sampled transition."""
        return self.data.bytes() // len(self)

    def batches_per_draw(self, batch_size: int) -> int:
        """Return the number of batches to sample at once: a call costs as much as a small update, whatever its size."""
        return min(128, max(1, MAX_SAMPLE_BYTES // (batch_size * self.transition_bytes)))

    def extend(self, rollout: TensorDictBase) -> None:
        """Store the transitions of a rollout `[N, T]`."""
        self.buffer.extend(rollout.select(*KEYS).reshape(-1))  # [N, T] -> [N * T]

    def sample(self, num: int, batch_size: int, device: torch.device) -> TensorDictBase:
        """Sample `num` batches at once, `[num, batch_size]` on the device."""
        return self.draw(num * batch_size, device).unflatten(0, (num, batch_size))

    def draw(self, num: int, device: torch.device) -> TensorDict:
        """Sample `num` transitions, `[num]` on the device."""
        return to_device(self.buffer.sample(num), device)  # type: ignore[arg-type]

    def restart(self, envs: Tensor) -> None:
        """Mark envs, by a mask `[N]`, whose next transition does not continue the last stored one.

        Here this does nothing, because single transitions do not depend on each other.
        """

    def state_dict(self) -> dict[str, Any] | None:
        """Return the counters and the stored data, which is not copied; None while the buffer is empty."""
        if not len(self):
            return None
        state = {"written": self.written, "length": len(self), "data": self.data}
        sampler = self.buffer.sampler.state_dict()
        return {**state, "sampler": sampler} if sampler else state

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Restore the stored data at the same indices.

        Args:
            state: Result of `state_dict`, with `data` as an iterable of pieces, oldest first, and in `rewritten` the
                tensors `[length, ...]` of keys whose entries were changed after they were stored.
            device: Device of the rollouts to come, which `memory` storage uses.
        """
        first = state["written"] - state["length"]
        self.buffer.writer.load_state_dict({"_cursor": first % self.size, "_write_count": first})
        rewritten = {tuple(key.split(".")): value for key, value in state.get("rewritten", {}).items()}
        for piece in state["data"]:
            for key, value in rewritten.items():  # also for files written before the key existed
                piece.set(key, value.new_zeros(len(piece), *value.shape[1:]))
            self.buffer.extend(piece.to(device))
        for key, value in rewritten.items():
            self.data[key].copy_(value)
        if "sampler" in state:
            self.buffer.sampler.load_state_dict(state["sampler"])


class FrameReplay(Replay):
    """Replay of transitions between stacked frames that stores each frame once.

    A transition adds one new frame to those of the transition before it. An entry of the storage is therefore one
    frame: the newest one of s', with (a, r, terminated) and the entries of the K frames of s (`starts`). Before its
    first transition, an episode has the K entries of its first stack. These are the end of no transition (`leads_on` is
    false) and are never sampled.

    Source: Mnih et al. 2015, whose replay memory also holds single frames.

    Args:
        size: Number of frames that are kept: one per transition, and the first stack of each episode.
        storage: `memory`, on the device of the rollouts, or `memmap`, a file.
        stack: Number of frames K of an observation `[K * C, H, W]`, oldest first. Successive observations have K - 1
            frames in common.
    """

    not_saved: ClassVar[tuple[str, ...]] = ("current",)

    def __init__(self, size: int, storage: str, stack: int) -> None:
        super().__init__(size, storage)
        self.stack = stack
        self.current: Tensor | None = None  # [N, K]: the entries of each env's last observation

    def extend(self, rollout: TensorDictBase) -> None:
        """Store the transitions of a rollout `[N, T]`."""
        (num_envs, steps), stack = rollout.shape, self.stack
        if self.size < (least := 2 * num_envs * steps * (1 + stack)):  # then some transition can always be sampled
            raise ConfigError(
                f"algo.buffer_size={self.size} is less than {least}, the frames of two rollouts in which every step "
                "begins an episode; increase it"
            )
        if self.storage == "memmap":
            rollout = rollout.cpu()
        observation, after = rollout["observation"], rollout["next", "observation"]  # [N, T, K * C, H, W]
        begins = torch.zeros(num_envs, steps, dtype=torch.bool, device=rollout.device)
        begins[:, 1:] = rollout["next", "done"][:, :-1, 0]
        begins[:, 0] = True if self.current is None else ~self.matches_stack(observation[:, 0], self.current)
        num_entries = 1 + stack * begins  # [N, T]
        end = num_entries.flatten().cumsum(0)  # [N * T]
        to = end - 1  # [N * T]: the entry of each transition, counted from the first of this rollout
        total = int(end[-1])

        first = self.written
        frames = observation.shape[2] // stack  # C
        frame = torch.empty((total, frames, *observation.shape[3:]), dtype=torch.uint8, device=observation.device)
        frame[to] = after[:, :, -frames:].flatten(0, 1)
        at = to[begins.flatten()].unsqueeze(-1) + torch.arange(-stack, 0, device=to.device)  # [E, K]
        frame[at] = observation[begins].unflatten(1, (stack, frames))
        # The frames of an env in time order are those of its last observation, then its entries of this rollout. A
        # transition starts from the K frames before its own.
        starts = to.new_zeros(total, stack)
        current = to.new_zeros(num_envs, stack) if self.current is None else self.current.clone()
        before = 0
        for env, last in enumerate(end.view(num_envs, steps)[:, -1].tolist()):
            timeline = torch.cat([current[env], torch.arange(first + before, first + last, device=to.device)])
            starts[before:last] = timeline.unfold(0, stack, 1)[:-1]
            current[env] = timeline[-stack:]
            before = last
        self.current = current
        transition = torch.repeat_interleave(num_entries.flatten())  # [R]: of each entry, first stacks included
        flat = rollout.select("action", ("next", "reward"), ("next", "terminated")).reshape(-1)[transition]
        leads_on = torch.arange(total, device=to.device) == to[transition]
        entries = {"frame": frame, "starts": starts, "leads_on": leads_on}
        entries |= {
            "action": flat["action"],
            "reward": flat["next", "reward"],
            "terminated": flat["next", "terminated"],
        }
        self.buffer.extend(TensorDict(entries, batch_size=[total]))

    @cached_property
    def transition_bytes(self) -> int:
        return (1 + self.stack) * self.data.bytes() // len(self)

    def matches_stack(self, observation: Tensor, entries: Tensor) -> Tensor:
        """Return `[N]`, whether each observation `[N, K * C, H, W]` is the stack of the frames in entries `[N, K]`."""
        return (self.data["frame"][entries % self.size].flatten(1, 2) == observation).flatten(1).all(1)

    def draw(self, num: int, device: torch.device) -> TensorDict:
        data, oldest = self.data, self.written - len(self)
        starts, leads_on = data["starts"], data["leads_on"]

        def uniform(num: int) -> Tensor:
            return torch.randint(oldest, self.written, (num,), device=starts.device)

        entry = uniform(num)
        # Sample again where the entry is the end of no transition, or the transition starts from an overwritten frame.
        while len(bad := (~leads_on[entry % self.size] | (starts[entry % self.size, 0] < oldest)).nonzero().squeeze(1)):
            entry[bad] = uniform(len(bad))
        at = entry % self.size
        stacks = torch.cat([starts[at], entry.unsqueeze(1)], 1) % self.size  # [num, K + 1]
        # Indexing with brackets takes 5 times as long.
        frames = data["frame"].index_select(0, stacks.flatten()).unflatten(0, stacks.shape)
        frames = frames.to(device, non_blocking=True)
        after = {"observation": frames[:, 1:].flatten(1, 2)}  # a view, like s: both share the frames
        after |= {key: data[key][at] for key in ("reward", "terminated")}
        sample = {"observation": frames[:, :-1].flatten(1, 2), "action": data["action"][at], "next": after}
        return to_device(TensorDict(sample, batch_size=[num]), device)

    def state_dict(self) -> dict[str, Any] | None:
        state = super().state_dict()
        return state and {**state, "current": self.current}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        super().load_state_dict(state, device)
        self.current = state["current"].to(self.data["frame"].device)
