"""Replay memory of single transitions, on TorchRL's `ReplayBuffer`."""

from functools import cached_property
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import LazyMemmapStorage, LazyTensorStorage, ReplayBuffer

from levin.core.errors import ConfigError
from levin.core.spaces import EnvSpec

KEYS = ("observation", "action", ("next", "observation"), ("next", "reward"), ("next", "terminated"))
DRAW_BYTES = 64 << 20  # at most, however many batches are due


def make_replay(env: EnvSpec, size: int, storage: str) -> "Replay":
    """What fits the env: pixels are stored frame by frame."""
    if env["observation"]["dtype"] == "uint8":
        return FrameReplay(size, storage, env.get("frame_stack", 1))
    return Replay(size, storage)


def to_device(sample: TensorDict, device: torch.device) -> TensorDict:
    """On the device; what is on a CPU may have no device, and would be copied."""
    return sample if device.type == "cpu" else sample.to(device, non_blocking=True)


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
        self.size, self.storage = size, storage
        self.buffer = ReplayBuffer(storage=lazy)

    def __len__(self) -> int:
        return len(self.buffer)

    @property
    def written(self) -> int:
        """How many rows were ever stored; the k-th lies at k modulo `size`."""
        return self.buffer.writer.state_dict()["_write_count"]

    @property
    def data(self) -> TensorDict:
        """All rows that are stored, not a copy."""
        return self.buffer[:]

    @cached_property
    def transition_bytes(self) -> int:
        """Of one that is drawn."""
        return self.data.bytes() // len(self)

    def batches_per_draw(self, batch_size: int) -> int:
        """How many batches to draw at once: a draw costs as much as a small update, whatever its size."""
        return min(128, max(1, DRAW_BYTES // (batch_size * self.transition_bytes)))

    def extend(self, rollout: TensorDictBase) -> None:
        """Store the transitions of a rollout `[N, T]`."""
        self.buffer.extend(rollout.select(*KEYS).reshape(-1))  # [N, T] -> [N * T]

    def sample(self, num: int, batch_size: int, device: torch.device) -> TensorDictBase:
        """`num` batches `[num, batch_size]` on the device."""
        return self.draw(num * batch_size, device).unflatten(0, (num, batch_size))

    def draw(self, num: int, device: torch.device) -> TensorDict:
        """`num` transitions `[num]` on the device."""
        return to_device(self.buffer.sample(num), device)  # type: ignore[arg-type]

    def restart(self, envs: Tensor) -> None:
        """Of these envs `[N]` an open episode could not be resumed: what comes next does not follow what came last."""

    def state_dict(self) -> dict[str, Any] | None:
        """How much was ever stored, and what is there, not a copy; None while nothing is."""
        if not len(self):
            return None
        return {"written": self.written, "length": len(self), "data": self.data}

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


class FrameReplay(Replay):
    """Transitions between stacks of frames, of which every frame is stored once.

    A transition shares all frames of its two stacks but one with the transition before it. A row is therefore a frame:
    the one that a transition leads to, with (a, r, terminated) and with where the stack that it starts from lies. An
    episode begins with the rows of its first stack, which lead to nothing and are never drawn.

    Source: the idea is that of Mnih et al. 2015, whose replay memory holds single frames.

    Args:
        size: Frames that are kept: transitions, and the stack that each episode begins with.
        storage: `memory`, on the device of the rollouts, or `memmap`, a file.
        stack: K, frames of an observation `[K * C, H, W]`, oldest first. An observation and the next have K - 1 in
            common.
    """

    def __init__(self, size: int, storage: str, stack: int) -> None:
        super().__init__(size, storage)
        self.stack = stack
        self.current: Tensor | None = None  # [N, K]: the rows of the stack that each env showed last

    def extend(self, rollout: TensorDictBase) -> None:
        """Store the transitions of a rollout `[N, T]`."""
        (num_envs, steps), stack = rollout.shape, self.stack
        if self.size < (least := 2 * num_envs * steps * (1 + stack)):  # so that something can always be drawn
            raise ConfigError(
                f"algo.buffer_size={self.size} is less than {least}: two rollouts in which every step begins an episode"
            )
        if self.storage == "memmap":
            rollout = rollout.cpu()
        observation, after = rollout["observation"], rollout["next", "observation"]  # [N, T, K * C, H, W]
        begins = torch.zeros(num_envs, steps, dtype=torch.bool, device=rollout.device)
        begins[:, 1:] = rollout["next", "done"][:, :-1, 0]
        begins[:, 0] = True if self.current is None else ~self.matches_stack(observation[:, 0], self.current)
        rows = 1 + stack * begins  # [N, T]
        end = rows.flatten().cumsum(0)  # [N * T]
        to = end - 1  # [N * T]: the row of each transition, counted from the first of this rollout
        num_rows = int(end[-1])

        first = self.written
        frames = observation.shape[2] // stack  # C
        frame = torch.empty((num_rows, frames, *observation.shape[3:]), dtype=torch.uint8, device=observation.device)
        frame[to] = after[:, :, -frames:].flatten(0, 1)
        at = to[begins.flatten()].unsqueeze(-1) + torch.arange(-stack, 0, device=to.device)  # [E, K]
        frame[at] = observation[begins].unflatten(1, (stack, frames))
        # The rows of one env follow each other, behind those of the stack that it showed last. A transition starts from
        # the K rows before its own.
        starts = to.new_zeros(num_rows, stack)
        current = to.new_zeros(num_envs, stack) if self.current is None else self.current.clone()
        before = 0
        for env, last in enumerate(end.view(num_envs, steps)[:, -1].tolist()):
            line = torch.cat([current[env], torch.arange(first + before, first + last, device=to.device)])
            starts[before:last] = line.unfold(0, stack, 1)[:-1]
            current[env] = line[-stack:]
            before = last
        self.current = current
        belongs = torch.repeat_interleave(rows.flatten())  # [R]: the transition of each row, the frames before it too
        flat = rollout.select("action", ("next", "reward"), ("next", "terminated")).reshape(-1)[belongs]
        row = {"frame": frame, "starts": starts, "leads_on": torch.arange(num_rows, device=to.device) == to[belongs]}
        row |= {"action": flat["action"], "reward": flat["next", "reward"], "terminated": flat["next", "terminated"]}
        self.buffer.extend(TensorDict(row, batch_size=[num_rows]))

    @cached_property
    def transition_bytes(self) -> int:
        return (1 + self.stack) * self.data.bytes() // len(self)

    def matches_stack(self, observation: Tensor, rows: Tensor) -> Tensor:
        """`[N]`: whether an observation `[N, K * C, H, W]` is the stack in the rows `[N, K]`."""
        return (self.data["frame"][rows % self.size].flatten(1, 2) == observation).flatten(1).all(1)

    def draw(self, num: int, device: torch.device) -> TensorDict:
        data, oldest = self.data, self.written - len(self)
        starts, leads_on = data["starts"], data["leads_on"]

        def uniform(num: int) -> Tensor:
            return torch.randint(oldest, self.written, (num,), device=starts.device)

        row = uniform(num)
        # What begins an episode, or starts from a frame that was overwritten, is drawn again.
        while len(bad := (~leads_on[row % self.size] | (starts[row % self.size, 0] < oldest)).nonzero().squeeze(1)):
            row[bad] = uniform(len(bad))
        at = row % self.size
        rows = torch.cat([starts[at], row.unsqueeze(1)], 1) % self.size  # [num, K + 1]
        frames = data["frame"].index_select(0, rows.flatten()).unflatten(0, rows.shape)  # by brackets it takes 5 times
        frames = frames.to(device, non_blocking=True)
        after = {"observation": frames[:, 1:].flatten(1, 2)}  # views: one copy serves both
        after |= {key: data[key][at] for key in ("reward", "terminated")}
        sample = {"observation": frames[:, :-1].flatten(1, 2), "action": data["action"][at], "next": after}
        return to_device(TensorDict(sample, batch_size=[num]), device)

    def state_dict(self) -> dict[str, Any] | None:
        state = super().state_dict()
        return state and {**state, "current": self.current}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        super().load_state_dict(state, device)
        self.current = state["current"].to(self.data["frame"].device)
