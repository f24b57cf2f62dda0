"""Replay buffers of single transitions, on TorchRL's `ReplayBuffer`."""

import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, ClassVar, Literal, TypeVar

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import LazyMemmapStorage, LazyTensorStorage, ReplayBuffer, RoundRobinWriter

from levin.core import distributed
from levin.core.errors import ConfigError, RunError
from levin.core.spaces import EnvSpec
from levin.data.n_step import NStep
from levin.data.priorities import Priorities

Moved = TypeVar("Moved", TensorDict, TensorDictBase, Tensor)
KEYS = ("observation", "action", ("next", "observation"), ("next", "reward"), ("next", "terminated"))
MAX_SAMPLE_BYTES = 64 << 20  # of the batches that are sampled at once, unless a single batch is larger


def make_replay(
    env: EnvSpec,
    size: int,
    storage: str,
    *,
    n_step: int = 1,
    gamma: float = 1.0,
    replay: Literal["uniform", "prioritized"] = "uniform",
    exponents: tuple[float, float] = (0.6, 0.4),
) -> "Replay":
    """Build the replay buffer that fits the env: `FrameReplay` for pixels, else `Replay`.

    Args:
        env: Env description.
        size: Number of transitions that are kept; for pixels, frames.
        storage: `memory` or `memmap`, as in `Replay`.
        n_step: Length of n-step returns; 1: batches hold single transitions.
        gamma: Discount factor of n-step returns.
        replay: How transitions are sampled.
        exponents: alpha and beta of prioritized replay.

    Raises:
        ConfigError: The buffer is too small for n-step returns, or prioritized replay is not available.
    """
    if n_step > 1 and size < (least := n_step * env["num_envs"]):
        raise ConfigError(f"algo.buffer_size={size} is too small for algo.n_step={n_step}: it must be at least {least}")
    windows = NStep(size, n_step, gamma) if n_step > 1 else None
    sampler = Priorities(size, *exponents) if replay == "prioritized" else None
    if env["observation"]["dtype"] == "uint8":
        return FrameReplay(size, storage, env.get("frame_stack", 1), windows, sampler)
    return Replay(size, storage, windows, sampler)


def weigh(errors: Tensor, batch: Mapping[NestedKey, Tensor]) -> Tensor:
    """Multiply errors `[..., B, 1]` by the importance weights of a batch, which prioritized replay gives it."""
    weight = batch.get("weight")
    return errors if weight is None else weight * errors


def to_device(data: Moved, device: torch.device) -> Moved:
    """Move data from the CPU to the device; on the CPU return it as it is, for it may have no `device`.

    Only CUDA reads the memory of the CPU before the call returns. On Apple's GPUs a copy without waiting would read
    memory that may be in use for something else by then.
    """
    return data if device.type == "cpu" else data.to(device, non_blocking=device.type == "cuda")


class DeviceMemory(LazyTensorStorage):
    """Storage in the memory of the device that trains, all of it from the first rollout on."""

    def __init__(self, size: int) -> None:
        super().__init__(size, device="auto")  # type: ignore[arg-type]

    def _init(self, data: TensorDictBase) -> None:  # one entry
        try:
            super()._init(data)
        except torch.OutOfMemoryError as error:
            raise RunError(
                f"the replay buffer needs {self.max_size * data.bytes() / 1e9:.1f} GB of memory, and the device "
                "that trains has less: lower algo.buffer_size, or set algo.buffer_storage=memmap; to resume a run, "
                "which keeps both, set trainer.accelerator=cpu"
            ) from error


class UnnamedFiles(LazyMemmapStorage):
    """Storage in files without names in the folder for temporary files: they end with the process.

    TorchRL itself takes /dev/shm, which is memory, if that has room.
    """

    def __init__(self, size: int) -> None:
        super().__init__(size, auto_cleanup=False)

    def _init(self, data: TensorDictBase) -> None:  # one entry
        parent = tempfile.gettempdir()
        # Each rank has an equal part of the buffer; torchrun says how many of them are on this machine
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", distributed.world_size()))
        needed, free = ranks * self.max_size * data.bytes(), shutil.disk_usage(parent).free
        if needed > free:
            warnings.warn(
                f"the replay buffer needs {needed / 1e9:.1f} GB of {parent} when it is full, and {free / 1e9:.1f} are "
                "free; the system would kill the process: lower algo.buffer_size, or export TMPDIR=<folder on a larger "
                "disk>",
                stacklevel=1,
            )
        # Errors are ignored, since a network drive keeps open files under other names.
        with tempfile.TemporaryDirectory(prefix="levin-replay-", ignore_cleanup_errors=True) as folder:
            self.scratch_dir = f"{folder}/"
            super()._init(data)


class Replay:
    """Replay of the last `size` transitions (s, a, r, s', terminated), sampled with replacement.

    Every call costs half a millisecond, whatever its size. Therefore a whole rollout is stored in one call, and the
    batches of all updates that are due are sampled in one call, unless an update changes the priorities of the next.

    With `n_step`, a batch has the n-step return as reward, s_{t+m} and its `terminated` under "next", and gamma^m as
    `discount` `[B, 1]`. With `priorities`, it has the storage indices `index` `[B]` and the importance weights `weight`
    `[B, 1]`, divided by the largest of the sample as in Dopamine's Rainbow.

    Args:
        size: Number of transitions that are kept.
        storage: `memory`, on the device of the rollouts, or `memmap`, files in the folder for temporary ones.
        n_step: Windows of n-step returns; None: single transitions.
        priorities: Prioritized sampler; None: sampling is uniform.
    """

    # Names of attributes that `state_dict` saves or that need not be saved; those of base classes are added. Others
    # that change are saved by levin.runs.extra_state.
    not_saved: ClassVar[tuple[str, ...]] = ("buffer", "transition_bytes", "n_step", "priorities")

    def __init__(
        self, size: int, storage: str, n_step: NStep | None = None, priorities: Priorities | None = None
    ) -> None:
        lazy = DeviceMemory(size) if storage == "memory" else UnnamedFiles(size)
        self.size, self.storage, self.n_step, self.priorities = size, storage, n_step, priorities
        # Compilable: with counters of Python, which do not wrap at 2^31.
        self.buffer = ReplayBuffer(storage=lazy, sampler=priorities, writer=RoundRobinWriter(compilable=True))

    def __len__(self) -> int:
        return len(self.buffer)

    @property
    def written(self) -> int:
        """Number of entries stored so far, overwritten ones included; entry k lies at index k modulo `size`."""
        return self.buffer.write_count

    @property
    def ready(self) -> bool:
        """Whether a batch can be sampled once something is stored."""
        return self.n_step is None or self.n_step.ready

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
        return 1 if self.priorities else min(128, max(1, MAX_SAMPLE_BYTES // (batch_size * self.transition_bytes)))

    def extend(self, rollout: TensorDictBase) -> None:
        """Store the transitions of a rollout `[N, T]`.

        Raises:
            ConfigError: They are more than `size`: which of two would be kept in a place is not defined.
        """
        if rollout.numel() > self.size:
            raise ConfigError(
                f"algo.buffer_size={self.size} is less than {rollout.numel()}, the transitions of one rollout; "
                "increase it"
            )
        if self.n_step:
            done = rollout["next", "done"].squeeze(-1)  # [N, T]
            entry = self.written + torch.arange(done.numel(), device=done.device).view_as(done)
            self.n_step.link(*((entry.cpu(), done.cpu()) if self.storage == "memmap" else (entry, done)))
        self.buffer.extend(rollout.select(*KEYS).reshape(-1))  # [N, T] -> [N * T]

    def sample(
        self,
        num: int,
        batch_size: int,
        device: torch.device,
        normalize: Callable[[TensorDictBase], TensorDictBase] | None = None,
    ) -> TensorDictBase:
        """Sample `num` batches at once, `[num, batch_size]` on the device.

        Args:
            num: Number of batches.
            batch_size: Transitions per batch.
            device: Device of the batches.
            normalize: Function applied to observations and to single rewards, before n-step returns sum them.
        """
        sample: Any = self.draw(num * batch_size, device).unflatten(0, (num, batch_size))
        if normalize:
            sample = normalize(sample)
        if self.n_step:
            reward = self.n_step.sum_rewards(sample.get(("next", "reward")))
            sample.set(("next", "reward"), reward)
        return sample

    def draw(self, num: int, device: torch.device) -> TensorDict:
        """Sample `num` transitions, `[num]` on the device; with `n_step` their rewards are those of a window."""
        if not self.n_step and not self.priorities:
            return to_device(self.buffer.sample(num), device)  # type: ignore[arg-type]
        window, extra = self.sample_windows(num)
        first, last, data = window[:, 0] % self.size, window[:, -1] % self.size, self.data
        after = {key: data["next", key][last] for key in ("observation", "terminated")}
        after["reward"] = self.rewards_of(window, data["next", "reward"])
        sample = {"observation": data["observation"][first], "action": data["action"][first], "next": after}
        return to_device(TensorDict({**sample, **extra}, batch_size=[num]), device)

    def sample_windows(self, num: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Sample transitions until all can be used.

        Returns:
            The entries of the windows that begin with them `[num, n]`, and what a batch has besides the transitions.
        """
        entry, weight = self.propose(num)
        window = self.follow(entry)
        while len(bad := (~self.is_usable(window)).nonzero().squeeze(1)):
            entry, weight[bad] = self.propose(len(bad))
            window[bad] = self.follow(entry)
        extra = {}
        if self.n_step:
            extra["discount"] = self.n_step.discount(window)
        if self.priorities:
            extra |= {"index": window[:, 0] % self.size, "weight": (weight / weight.max()).unsqueeze(-1)}
        return window, extra

    def propose(self, num: int) -> tuple[Tensor, Tensor]:
        """Sample entries `[num]` and their importance weights, whether they can be used or not."""
        oldest, device = self.written - len(self), self.data.get("action").device
        if self.priorities is None:
            return torch.randint(oldest, self.written, (num,), device=device), torch.empty(num, device=device)
        index, info = self.priorities.sample(self.buffer.storage, num)  # type: ignore[arg-type]
        return oldest + (index.to(device) - oldest) % self.size, info["priority_weight"].to(device)  # type: ignore[call-overload]

    def follow(self, entry: Tensor) -> Tensor:
        """Return the entries of the windows `[num, n]` that begin with the entries `[num]`; without n-step, n is 1."""
        return self.n_step.follow(entry) if self.n_step else entry.unsqueeze(1)

    def is_usable(self, window: Tensor) -> Tensor:
        """Return `[num]`, whether each window `[num, n]` may be part of a batch."""
        return self.n_step.is_complete(window) if self.n_step else torch.ones_like(window[:, 0], dtype=torch.bool)

    def rewards_of(self, window: Tensor, reward: Tensor) -> Tensor:
        """Return the rewards of windows `[num, n]`, 0 beyond their ends, from the stored ones `[size, 1]`."""
        rewards = reward[window % self.size].squeeze(-1)
        return rewards * self.n_step.is_within(window) if self.n_step else rewards

    def set_priorities(self, batch: TensorDictBase, td_error: Tensor) -> None:
        """Set the priorities of a sampled batch to its absolute TD errors, averaged over critics.

        Uniform replay ignores them. Nothing may have been stored since the batch was sampled.

        Args:
            batch: Transitions `[B]` from `sample`.
            td_error: TD errors `[B, 1]`, or of each critic `[C, B, 1]`.
        """
        if self.priorities:
            priority = td_error.abs().reshape(-1, len(batch)).mean(0).float().cpu()
            # NaN or inf in a loss ends the run after this iteration; until then they must not break the sampler.
            self.priorities.update_priority(batch["index"].cpu(), priority.nan_to_num(0.0, 0.0))

    def anneal(self, remaining: float) -> None:
        """Set the exponent of the importance weights; `remaining` falls from 1 to 0 over the schedule."""
        if self.priorities:
            self.priorities.anneal(remaining)

    def restart(self, envs: Tensor) -> None:
        """Mark envs, by a mask `[N]`, whose next transition does not continue the last stored one."""
        if self.n_step:
            self.n_step.restart(envs)

    def state_dict(self) -> dict[str, Any] | None:
        """Return the counters and the stored data, which is not copied; None while the buffer is empty."""
        if not len(self):
            return None
        state = {"written": self.written, "length": len(self), "data": self.data}
        if self.n_step:
            state["n_step"] = self.n_step.state_dict()
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
        if self.n_step:
            self.n_step.load_state_dict(state["n_step"], self.data.get("action").device)


class FrameReplay(Replay):
    """Replay of transitions between stacked frames that stores each frame once.

    A transition adds one new frame to those of the transition before it. An entry of the storage is therefore one
    frame: the newest one of s', with (a, r, terminated) and the entries of the K frames of s (`starts`). Before its
    first transition, an episode has the K entries of its first stack. These are the end of no transition (`leads_on` is
    false) and are never sampled.

    Source: Mnih et al. 2015, whose replay memory also holds single frames.

    Args:
        size: Number of frames that are kept: one per transition, and the first stack of each episode.
        storage: `memory`, on the device of the rollouts, or `memmap`, files in the folder for temporary ones.
        stack: Number of frames K of an observation `[K * C, H, W]`, oldest first. Successive observations have K - 1
            frames in common.
        n_step: As in `Replay`.
        priorities: As in `Replay`.
    """

    not_saved: ClassVar[tuple[str, ...]] = ("current",)

    def __init__(
        self, size: int, storage: str, stack: int, n_step: NStep | None = None, priorities: Priorities | None = None
    ) -> None:
        super().__init__(size, storage, n_step, priorities)
        self.stack = stack
        self.current: Tensor | None = None  # [N, K]: the entries of each env's last observation

    def extend(self, rollout: TensorDictBase) -> None:
        """Store the transitions of a rollout `[N, T]`.

        Raises:
            ConfigError: `size` is too small for a few rollouts in which every step begins an episode.
        """
        (num_envs, steps), stack = rollout.shape, self.stack
        rollouts = 1 + (self.n_step.n_step if self.n_step else 1)  # with these, some transition can always be sampled
        if self.size < (least := rollouts * num_envs * steps * (1 + stack)):
            raise ConfigError(
                f"algo.buffer_size={self.size} is less than {least}, the frames of {rollouts} rollouts in which every "
                "step begins an episode; increase it"
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
        if self.n_step:
            self.n_step.restart(begins[:, 0])
            self.n_step.link(first + to.view(num_envs, steps), rollout["next", "done"].squeeze(-1))
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
        if self.priorities and begins.any():
            # Nothing else lowers the priority of a first stack: each would be proposed again and again, in vain.
            first_stacks = (first + (~leads_on).nonzero().squeeze(1).cpu()) % self.size
            self.priorities.update_priority(first_stacks, torch.zeros(len(first_stacks)))

    @cached_property
    def transition_bytes(self) -> int:
        frames = 2 * self.stack if self.n_step else 1 + self.stack
        return frames * self.data.bytes() // len(self)

    def matches_stack(self, observation: Tensor, entries: Tensor) -> Tensor:
        """Return `[N]`, whether each observation `[N, K * C, H, W]` is the stack of the frames in entries `[N, K]`."""
        return (self.data["frame"][entries % self.size].flatten(1, 2) == observation).flatten(1).all(1)

    def is_usable(self, window: Tensor) -> Tensor:
        entry = window[:, 0]
        starts, leads_on = (self.data[key][entry % self.size] for key in ("starts", "leads_on"))
        # Not if the entry is the end of no transition, or the transition starts from an overwritten frame.
        usable = leads_on & (starts[:, 0] >= self.written - len(self))
        return usable & self.n_step.is_complete(window) if self.n_step else usable

    def draw(self, num: int, device: torch.device) -> TensorDict:
        window, extra = self.sample_windows(num)
        first, last, data = window[:, 0] % self.size, window[:, -1] % self.size, self.data
        # The frames of s and those of s', which are the same but one unless there are steps between them: [num, K + 1]
        # or [num, 2 K].
        between = [data["starts"][last, 1:]] if self.n_step else []
        stacks = torch.cat([data["starts"][first], *between, window[:, -1:]], 1) % self.size
        # Indexing with brackets takes 5 times as long.
        frames = data["frame"].index_select(0, stacks.flatten()).unflatten(0, stacks.shape)
        frames = to_device(frames, device)
        after = {"observation": frames[:, -self.stack :].flatten(1, 2)}  # a view, like s: both share the frames
        after |= {"reward": self.rewards_of(window, data["reward"]), "terminated": data["terminated"][last]}
        before = frames[:, : self.stack].flatten(1, 2)
        sample = {"observation": before, "action": data["action"][first], "next": after, **extra}
        return to_device(TensorDict(sample, batch_size=[num]), device)

    def state_dict(self) -> dict[str, Any] | None:
        state = super().state_dict()
        return state and {**state, "current": self.current}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        super().load_state_dict(state, device)
        self.current = state["current"].to(self.data["frame"].device)
