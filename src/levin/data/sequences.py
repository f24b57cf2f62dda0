"""Replay buffer of sequences, for algorithms that learn a world model."""

from functools import cached_property
from typing import Any, ClassVar

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from levin.core.errors import ConfigError
from levin.core.spaces import EnvSpec
from levin.data.replay import Replay, to_device
from levin.nn.distributions import OneHot

RECORD = ("observation", "action", "reward", "is_first", "is_terminal", "is_last")
LATENT = "latent"  # what a world model keeps with each record: see `keeps_latents`


def check_learning_starts(learning_starts: int, least: int) -> None:
    """Check that each env will have stored a sequence by the first update.

    Args:
        learning_starts: Env steps before the first update.
        least: Number of records in one sequence of each env, all envs together.

    Raises:
        ConfigError: `learning_starts` is less than `least`.
    """
    if learning_starts < least:
        raise ConfigError(
            f"algo.learning_starts={learning_starts} is too small for one sequence of each env: it must be at least "
            f"{least}"
        )


class SequenceReplay(Replay):
    """Replay of the last records of every env, sampled as sequences; each sequence comes from one env.

    A record is one time step: an observation, the reward that came with it (0 for the first of an episode), the action
    chosen there, and whether the observation is the first of an episode (`is_first`), its last (`is_last`), or terminal
    (`is_terminal`). The last observation of an episode has a record of its own, with an action of zeros. A sequence may
    continue into the next episode, since otherwise episodes shorter than a sequence would never be sampled. It never
    crosses the position that is overwritten next.

    Entry k of the storage holds the k-th record of every env. An env with shorter episodes has more records in a
    rollout, because each episode adds one. Its surplus waits until the other envs have as many.

    Args:
        env: Env description; discrete actions are stored one-hot.
        size: Number of records that are kept, of all envs together.
        storage: `memory` or `memmap`, as in `Replay`.
        length: Number of records in a sequence.
        keeps_latents: Whether records have an entry `LATENT`. DreamerV3 keeps the latent state with which the policy
            acted, zeros for the last record of an episode. World Models keeps mean and log-variance of q(z|o).
    """

    not_saved: ClassVar[tuple[str, ...]] = ("waiting", "begins", "reward")

    def __init__(self, env: EnvSpec, size: int, storage: str, length: int, *, keeps_latents: bool = False) -> None:
        self.num_envs, self.length = env["num_envs"], length
        self.keys = (*RECORD, LATENT) if keeps_latents else RECORD
        super().__init__(size // self.num_envs, storage)
        sizes = env["action"].get("nvec") or ([env["action"]["n"]] if env["action"]["n"] else None)
        self.one_hot = OneHot(sizes) if sizes else None
        self.waiting: list[TensorDict] | None = None  # for each env, its records `[n]` that are not stored yet
        self.begins: Tensor | None = None  # [N, 1]: whether the next observation of each env begins an episode
        self.reward: Tensor | None = None  # [N, 1]: reward that comes with the next observation

    def extend(self, rollout: TensorDictBase) -> None:
        """Store the records of a rollout `[N, T]`.

        Raises:
            ConfigError: They are more than `size`.
        """
        if self.storage == "memmap":
            rollout = rollout.cpu()
        if self.begins is None or self.reward is None:
            self.begins = torch.ones(self.num_envs, 1, dtype=torch.bool, device=rollout.device)
            self.reward = torch.zeros(self.num_envs, 1, device=rollout.device)
        waiting = self.waiting or [None] * self.num_envs
        joined: list[TensorDict] = []
        for env, before in enumerate(waiting):
            records = self._make_records(env, rollout[env])
            joined.append(records if before is None else torch.cat([before, records]))  # type: ignore[arg-type]
        complete = min(map(len, joined))
        if complete > self.size:
            raise ConfigError(
                f"algo.buffer_size={self.size * self.num_envs} is too small: it must be at least "
                f"{complete * self.num_envs}, the records of this rollout"
            )
        entries = {key: torch.stack([each[key][:complete] for each in joined], 1) for key in self.keys}  # [k, N, *]
        self.waiting = [each[complete:].clone() for each in joined]
        self.buffer.extend(TensorDict(entries, batch_size=[complete]))

    def _make_records(self, env: int, steps: TensorDictBase) -> TensorDict:
        """Return the records `[T + E]` of the steps `[T]` of one env, in which E episodes end."""
        assert self.begins is not None
        assert self.reward is not None
        done, reward = steps["next", "done"], steps["next", "reward"]  # [T, 1]
        first = torch.cat([self.begins[env : env + 1], done[:-1]])
        # [T, 1]: the reward that came with each observation, so that of the step before
        last_reward = torch.cat([self.reward[env : env + 1], reward[:-1] * ~done[:-1]])
        self.begins[env], self.reward[env] = done[-1], reward[-1] * ~done[-1]
        number = 1 + done.squeeze(-1).long()  # [T]: two records for a step that ends an episode
        step = torch.repeat_interleave(number)
        is_last = torch.zeros(len(step), 1, dtype=torch.bool, device=done.device)
        is_last[number.cumsum(0)[done.squeeze(-1)] - 1] = True
        observation = steps["observation"][step]
        observation[is_last.squeeze(-1)] = steps["next", "observation"][done.squeeze(-1)]
        action = steps["action"] if self.one_hot is None else self.one_hot.encode(steps["action"])
        record = {
            "observation": observation,
            "action": torch.where(is_last, 0.0, action[step]),
            "reward": torch.where(is_last, reward[step], last_reward[step]),
            "is_first": first[step] & ~is_last,
            "is_terminal": is_last & steps["next", "terminated"][step],
            "is_last": is_last,
        }
        if LATENT in self.keys:
            record[LATENT] = torch.where(is_last, 0.0, steps[LATENT][step])
        return TensorDict(record, batch_size=[len(step)])

    @cached_property
    def transition_bytes(self) -> int:
        return self.length * super().transition_bytes // self.num_envs

    def restart(self, envs: Tensor) -> None:
        """Mark envs, by a mask `[N]`, whose next observation begins an episode."""
        if self.begins is not None and self.reward is not None:
            self.begins[envs], self.reward[envs] = True, 0.0

    def draw(self, num: int, device: torch.device) -> TensorDict:
        """Sample `num` sequences, `[num, length]` on the device, uniformly from all sequences in the storage."""
        index, env = self.sample_positions(num, self.length)
        sample = self.select_records(index, env)
        if LATENT in self.keys:
            sample["row"], sample["env"] = index, env.expand_as(index)
        return to_device(sample, device)

    def select_records(self, index: Tensor, env: Tensor) -> TensorDict:
        """Return the records at the storage indices `[num, length]` of the envs `[num, 1]`."""
        # Key by key, because indexing a whole TensorDict takes several times as long.
        return TensorDict({key: value[index, env] for key, value in self.data.items()}, batch_size=index.shape)

    def overwrite_latents(self, batch: TensorDictBase, latent: Tensor) -> None:
        """Overwrite the stored latent states of a sampled batch, except those of its first step.

        Nothing may have been stored since the batch was sampled.

        Args:
            batch: Sequences `[B, 1 + T]` from `sample`.
            latent: New latent states `[B, T, *]`.
        """
        stored = self.data[LATENT]
        index, env = (batch[key][:, 1:].to(stored.device) for key in ("row", "env"))
        latent = latent.to(stored)
        for sequence in range(len(index)):  # one by one: a record that is in two sequences gets the whole state of one
            stored[index[sequence], env[sequence]] = latent[sequence]

    def sample_positions(self, num: int, length: int) -> tuple[Tensor, Tensor]:
        """Sample the positions of sequences: storage indices `[num, length]` and envs `[num, 1]`."""
        device = self.data.get("reward").device  # a TensorDict with tensors on several devices has none
        start = torch.randint(self.written - len(self), self.written - length + 1, (num, 1), device=device)
        env = torch.randint(self.num_envs, (num, 1), device=device)
        return (start + torch.arange(length, device=device)) % self.size, env

    def state_dict(self) -> dict[str, Any] | None:
        state = super().state_dict()
        if state is None:
            return None
        state["waiting"] = [dict(each.flatten_keys(".").items()) for each in self.waiting or []]
        state |= {"begins": self.begins, "reward": self.reward}
        if LATENT in self.keys:
            latents = state["data"][LATENT]
            copied = latents.cpu() if latents.is_cuda else latents.clone()  # a GPU may have no room for a copy
            state["data"], state["rewritten"] = state["data"].exclude(LATENT), {LATENT: copied}
        return state

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        super().load_state_dict(state, device)
        storage_device = self.data["reward"].device
        waiting = (TensorDict(each, batch_size=[len(each["reward"])]) for each in state["waiting"])
        self.waiting = [each.unflatten_keys(".").to(storage_device) for each in waiting]
        self.begins, self.reward = state["begins"].to(storage_device), state["reward"].to(storage_device)
