"""Replay of sequences, for algorithms that learn a model of what follows what."""

from functools import cached_property
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from levin.core.errors import ConfigError
from levin.core.spaces import EnvSpec
from levin.data.replay import Replay, to_device
from levin.nn.distributions import OneHot

RECORD = ("observation", "action", "reward", "is_first", "is_terminal", "is_last")
LATENT = "latent"  # what a policy remembered when it acted


def check_learning_starts(learning_starts: int, least: int) -> None:
    """Raises ConfigError when there would be an update before there is a sequence of each env, of `least` records."""
    if learning_starts < least:
        raise ConfigError(f"algo.learning_starts={learning_starts} is less than a sequence of each env: {least}")


class SequenceReplay(Replay):
    """The last records of every env, drawn as sequences of one env each.

    A record is one moment: an observation, the reward that came with it (0 with the first one), whether it begins an
    episode (`is_first`) or ends it for good (`is_terminal`), and the action that was chosen there. What an episode ends
    with is a record of its own, its action zeros. A sequence may run from one episode into the next; else an episode
    that is shorter would never be drawn. It never runs over the place that is overwritten next.

    A row of the storage is the k-th record of all envs. Where episodes are shorter there are more records: they wait
    until the other envs have as many.

    Args:
        env: Spaces; finite actions are stored one-hot.
        size: Records that are kept, of all envs together.
        storage: `memory` or `memmap`.
        length: Records of a sequence.
        keeps_latents: Whether records have the state of the policy that came with them, zeros at the end of an episode.
    """

    def __init__(self, env: EnvSpec, size: int, storage: str, length: int, *, keeps_latents: bool = False) -> None:
        self.num_envs, self.length = env["num_envs"], length
        self.keys = (*RECORD, LATENT) if keeps_latents else RECORD
        super().__init__(size // self.num_envs, storage)
        sizes = env["action"].get("nvec") or ([env["action"]["n"]] if env["action"]["n"] else None)
        self.one_hot = OneHot(sizes) if sizes else None
        self.waiting: list[TensorDict] | None = None  # of each env, `[n]`
        self.begins: Tensor | None = None  # [N, 1]: whether the next observation begins an episode
        self.reward: Tensor | None = None  # [N, 1]: that comes with it

    def extend(self, rollout: TensorDictBase) -> None:
        """Store the records of a rollout `[N, T]`."""
        if self.storage == "memmap":
            rollout = rollout.cpu()
        if self.begins is None or self.reward is None:
            self.begins = torch.ones(self.num_envs, 1, dtype=torch.bool, device=rollout.device)
            self.reward = torch.zeros(self.num_envs, 1, device=rollout.device)
        waiting = self.waiting or [None] * self.num_envs
        joined: list[TensorDict] = []
        for env, before in enumerate(waiting):
            records = self.records(env, rollout[env])
            joined.append(records if before is None else torch.cat([before, records]))  # type: ignore[arg-type]
        complete = min(map(len, joined))
        if complete > self.size:
            raise ConfigError(f"algo.buffer_size={self.size * self.num_envs} holds less than a rollout")
        rows = {key: torch.stack([each[key][:complete] for each in joined], 1) for key in self.keys}  # [k, N, *]
        self.waiting = [each[complete:].clone() for each in joined]
        self.buffer.extend(TensorDict(rows, batch_size=[complete]))

    def records(self, env: int, steps: TensorDictBase) -> TensorDict:
        """Those of one env's steps `[T]`: `[T + ends]`."""
        assert self.begins is not None
        assert self.reward is not None
        done, reward = steps["next", "done"], steps["next", "reward"]  # [T, 1]
        first = torch.cat([self.begins[env : env + 1], done[:-1]])
        came_with = torch.cat([self.reward[env : env + 1], reward[:-1] * ~done[:-1]])
        self.begins[env], self.reward[env] = done[-1], reward[-1] * ~done[-1]
        number = 1 + done.squeeze(-1).long()  # [T]: a step that ends an episode has two
        step = torch.repeat_interleave(number)
        ends = torch.zeros(len(step), 1, dtype=torch.bool, device=done.device)
        ends[number.cumsum(0)[done.squeeze(-1)] - 1] = True
        observation, at_end = steps["observation"][step], ends.squeeze(-1)
        observation[at_end] = steps["next", "observation"][done.squeeze(-1)]
        action = steps["action"] if self.one_hot is None else self.one_hot.encode(steps["action"])
        record = {
            "observation": observation,
            "action": torch.where(ends, 0.0, action[step]),
            "reward": torch.where(ends, reward[step], came_with[step]),
            "is_first": first[step] & ~ends,
            "is_terminal": ends & steps["next", "terminated"][step],
            "is_last": ends,
        }
        if LATENT in self.keys:
            record[LATENT] = torch.where(ends, 0.0, steps[LATENT][step])
        return TensorDict(record, batch_size=[len(step)])

    @cached_property
    def transition_bytes(self) -> int:
        return self.length * super().transition_bytes // self.num_envs

    def restart(self, envs: Tensor) -> None:
        """What comes next of these envs `[N]` begins an episode."""
        if self.begins is not None and self.reward is not None:
            self.begins[envs], self.reward[envs] = True, 0.0

    def draw(self, num: int, device: torch.device) -> TensorDict:
        """`num` sequences `[num, length]` on the device, uniform over all that are there."""
        rows, env = self.sample_positions(num, self.length)
        drawn = self.at(rows, env)
        if LATENT in self.keys:
            drawn["row"], drawn["env"] = rows, env.expand_as(rows)
        return to_device(drawn, device)

    def at(self, rows: Tensor, env: Tensor) -> TensorDict:
        """The records in these rows `[num, length]` of these envs `[num, 1]`."""
        # Key by key: to index a whole TensorDict takes several times as long.
        return TensorDict({key: value[rows, env] for key, value in self.data.items()}, batch_size=rows.shape)

    def overwrite_latents(self, batch: TensorDictBase, latent: Tensor) -> None:
        """Keep other states for the records of sequences `[B, 1 + T]` but the first of each: `[B, T, *]`.

        Nothing may have been stored since they were drawn.
        """
        stored = self.data[LATENT]
        rows, env = (batch[key][:, 1:].to(stored.device, non_blocking=True) for key in ("row", "env"))
        latent = latent.to(stored)
        for sequence in range(len(rows)):  # one by one: where a record is in two, the one written last is whole
            stored[rows[sequence], env[sequence]] = latent[sequence]

    def sample_positions(self, num: int, length: int) -> tuple[Tensor, Tensor]:
        """Where sequences lie: rows `[num, length]` and envs `[num, 1]`."""
        device = self.data.get("reward").device  # a TensorDict of several devices has none
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
            state["data"], state["rewritten"] = state["data"].exclude(LATENT), {LATENT: state["data"][LATENT].clone()}
        return state

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        if LATENT in self.keys:
            kept = state["rewritten"][LATENT]
            state["data"] = (rows.set(LATENT, kept.new_zeros(len(rows), *kept.shape[1:])) for rows in state["data"])
        super().load_state_dict(state, device)
        where = self.data["reward"].device
        if LATENT in self.keys:
            self.data[LATENT].copy_(kept)
        waiting = (TensorDict(each, batch_size=[len(each["reward"])]) for each in state["waiting"])
        self.waiting = [each.unflatten_keys(".").to(where) for each in waiting]
        self.begins, self.reward = state["begins"].to(where), state["reward"].to(where)
