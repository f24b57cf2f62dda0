"""The default collector: a tight loop over a gymnasium vector env, in this process.

Every collector is a TorchRL `BaseCollector` and yields the rollout that `levin.data.rollout` describes.
"""

import warnings
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor
from torchrl.collectors import BaseCollector

from levin.collectors.episodes import EpisodeEnd
from levin.core.errors import Interrupted
from levin.core.rng import Generators
from levin.core.spaces import ACTION_MASK, IS_FIRST, random_actions, random_allowed_actions, to_tensors
from levin.data.rollout import WholeEpisodes, policy_device, random_steps_left
from levin.envs.vector import SeededVectorEnv

CHUNK = 256  # vector steps to allocate at a time, when the length of a rollout is not known in advance
SLOW = 1.0  # seconds; a rollout that takes longer is abandoned on a signal, a shorter one is finished
STATE = ("vector_steps", "_observation", "_first", "_seeded_at", "_history", "_history_start")  # that a rollout changes
MAX_REPLAY = 1_000_000  # vector steps; a longer open episode is not replayed when a run resumes


@dataclass(kw_only=True)
class RolloutArrays:
    """Preallocated arrays `[N, T, *]` that one rollout is written into.

    `observation` and `following` (the next observations) have one array for each part of a dict observation. `ended`
    has an entry for every step at which episodes ended: the step, a mask `[N]` of the envs, and their last
    observations. `states` holds the state of a policy with memory, `[N, *]` for each step.
    """

    observation: list[np.ndarray]
    following: list[np.ndarray]
    action: np.ndarray
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    ended: list[tuple[int, np.ndarray, list[np.ndarray]]] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)


class Before:
    """State of a collector, its policy and the random generators before a rollout, as far as checkpoints hold it."""

    def __init__(self, collector: "VectorCollector") -> None:
        self.generators = Generators()
        self.buffers = [
            (module, name, each.clone())
            for module in collector.policy.modules()
            for name, each in module._buffers.items()
            if each is not None
        ]
        self.episodes = list(collector.env.episodes)
        self.attributes = {name: copy(getattr(collector, name)) for name in STATE}

    def restore(self, collector: "VectorCollector") -> None:
        """Set the collector, its policy and the random generators to this state."""
        self.generators.restore()
        for module, name, each in self.buffers:  # replaced, not copied: in a rollout they may become inference tensors
            module._buffers[name] = each
        collector.env.episodes = self.episodes
        for name, value in self.attributes.items():
            setattr(collector, name, value)


class VectorCollector(BaseCollector):
    """Collector with a tight loop over a gymnasium `VectorEnv` that writes into preallocated arrays.

    TorchRL's `Collector` over the same env costs several times as much per vector step. This one calls the policy's
    module directly, without a TensorDict: with the observation, and with `is_first` `[N, 1]` if that is among the
    policy's `in_keys`. If the policy returns a second output, the rollout holds it under the second of `out_keys`; such
    a policy can't be combined with random actions (`random_env_steps` must be 0).

    An open episode is resumed by replay: its seed is known, its actions are in `state_dict`, and the observation after
    them is compared with the saved one. If it began without a seed (`SeededVectorEnv.continues_without_seed`), all
    episodes since the last seed are replayed. An episode of more than `MAX_REPLAY` steps is truncated instead.

    A signal handler sets `interrupted`. Then a rollout in progress is abandoned: it raises `Interrupted`, with the
    state and the random generators as they were before it.

    Args:
        env: Envs to collect from, N of them.
        policy: Policy that acts.
        steps: Vector steps per rollout (T), or whole episodes.
        random_env_steps: Number of env steps with uniformly random actions before the policy acts.
    """

    def __init__(
        self,
        env: SeededVectorEnv,
        policy: TensorDictModule,
        *,
        steps: int | WholeEpisodes,
        random_env_steps: int = 0,
    ) -> None:
        super().__init__()
        self.env, self.policy, self.steps = env, policy, steps
        env.paired_episodes = isinstance(steps, WholeEpisodes) and steps.paired_episodes
        self.takes_is_first = IS_FIRST in policy.in_keys
        self.random_env_steps = random_env_steps
        self.vector_steps = 0
        self.interrupted = False
        self._slow = True  # whether the last rollout was slow, or there was none
        self._before: Before | None = None  # state before this rollout; None: a signal does not end it
        self.parts = list(env.observation.get("spaces", {}))  # names of the parts of a dict observation; else empty
        self._observation: list[np.ndarray] | None = None  # current observation, [N, *S] for each part
        self._first = np.ones(env.num_envs, dtype=bool)  # [N]: whether the current observation begins an episode
        self._seeded_at = np.zeros(env.num_envs, dtype=np.int64)  # [N]: vector step at which each env was last seeded
        self._history: deque[np.ndarray] = deque()  # [N, T, *A] each: all actions since the earliest `_seeded_at`
        self._history_start = 0  # vector step of the first action in `_history`
        self.not_replayed = np.zeros(env.num_envs, dtype=bool)  # [N]: whether the open episode could not be resumed

    def iterator(self) -> Iterator[TensorDictBase]:
        while True:
            yield self.rollout()

    def rollout(self) -> TensorDict:
        """Collect the next rollout, `[N, T]` transitions.

        Raises:
            Interrupted: A signal has ended the rollout.
        """
        start = perf_counter()
        self._before = Before(self) if self._slow or not isinstance(self.steps, int) else None
        try:
            rollout = self._collect(self.steps) if isinstance(self.steps, int) else self._collect_episodes(self.steps)
        except Interrupted:
            assert self._before is not None
            self._before.restore(self)
            raise
        self._slow = perf_counter() - start > SLOW
        return rollout

    def _collect_episodes(self, steps: WholeEpisodes) -> TensorDict:
        chunks: list[TensorDict] = []
        episodes = transitions = 0
        while episodes < steps.episodes or transitions < steps.transitions or (steps.paired_episodes and episodes % 2):
            end, length, done = EpisodeEnd(self.env.config), 0, False
            while not done:
                chunks.append(self._collect(CHUNK, until_done=True))
                length += chunks[-1].shape[1]
                done = bool(chunks[-1]["next", "done"][0, -1])
                end.check(length)
            episodes, transitions = episodes + 1, transitions + length
        return torch.cat(chunks, 1)  # type: ignore[arg-type, return-value]

    def _collect(self, steps: int, *, until_done: bool = False) -> TensorDict:
        """Collect `steps` transitions of every env; with `until_done`, stop when the first episode ends."""
        if self._observation is None:
            self._observation = self._copy_parts(self.env.reset()[0])
        arrays = self._allocate(self._observation, steps)
        taken = self._step(arrays, self._observation, until_done=until_done)
        return self._assemble(arrays, taken)

    def _allocate(self, now: list[np.ndarray], steps: int) -> RolloutArrays:
        """Allocate the arrays of one rollout. They are never reused, so earlier rollouts are not overwritten."""
        num_envs = self.env.num_envs
        observation = [np.empty((num_envs, steps, *part.shape[1:]), part.dtype) for part in now]
        terminated, truncated = np.empty((2, num_envs, steps), bool)
        return RolloutArrays(
            observation=observation,
            following=[np.empty_like(part) for part in observation],
            action=self._allocate_actions(steps),
            reward=np.empty((num_envs, steps), np.float32),
            terminated=terminated,
            truncated=truncated,
        )

    def _step(self, arrays: RolloutArrays, now: list[np.ndarray], *, until_done: bool) -> int:
        """Run the hot loop: let the policy act in the envs and fill the arrays. Return the number of steps taken."""
        env, observation, following, action = self.env, arrays.observation, arrays.following, arrays.action
        rewards, terminations, truncations = arrays.reward, arrays.terminated, arrays.truncated
        steps = taken = action.shape[1]
        device = policy_device(self.policy)
        num_random = min(steps, random_steps_left(self.random_env_steps, env.num_envs, self.vector_steps))
        if num_random and not env.read.mask:
            action[:, :num_random] = random_actions(env.single_action_space, env.num_envs, num_random)
        current: list[Any] = now
        with torch.inference_mode():  # around the loop only: a loss can't use inference tensors
            for t in range(steps):
                if self.interrupted and self._before is not None:
                    raise Interrupted
                if t >= num_random:
                    chosen, state = self._act(current, device)
                    action[:, t] = chosen.numpy()
                    if state is not None:
                        arrays.states.append(state)
                elif env.read.mask:
                    mask = torch.from_numpy(self._join_parts(current)[ACTION_MASK])
                    action[:, t] = random_allowed_actions(env.single_action_space, mask).numpy()
                env.send(action[:, t])
                # An observation is also the next observation of the step before, except after the end of an episode:
                # `_assemble` corrects that, and the index -1 that t = 0 writes to.
                for part, next_part, value in zip(observation, following, current, strict=True):
                    part[:, t] = next_part[:, t - 1] = value
                observed, reward, terminated, truncated, _ = env.receive()
                current = self._split_parts(observed)
                rewards[:, t] = reward
                terminations[:, t] = terminated
                truncations[:, t] = truncated
                self._first = done = terminated | truncated
                if np.count_nonzero(done):  # much faster than `done.any()`
                    arrays.ended.append((t, done, [np.asarray(value)[done] for value in current]))
                    self._seeded_at[done & ~env.continues_without_seed] = self.vector_steps + t + 1
                    current = self._split_parts(env.reset(options={"reset_mask": done})[0])
                    if until_done:
                        taken = t + 1
                        break
        self._observation = [
            np.array(value, dtype=part.dtype) for value, part in zip(current, observation, strict=True)
        ]
        self.vector_steps += taken
        self._append_history(action[:, :taken])
        return taken

    def _assemble(self, arrays: RolloutArrays, steps: int) -> TensorDict:
        """Build the rollout `[N, steps]` from the arrays, and set the true last observation of every episode."""
        assert self._observation is not None
        for part, last in zip(arrays.following, self._observation, strict=True):
            part[:, steps - 1] = last
        for t, done, parts in arrays.ended:
            for part, last in zip(arrays.following, parts, strict=True):
                part[done, t] = last
        flags = (arrays.reward, arrays.terminated, arrays.truncated)
        reward, terminated, truncated = (torch.from_numpy(x[:, :steps]).unsqueeze(-1) for x in flags)  # [N, T, 1]
        state = {self.policy.out_keys[1]: torch.stack(arrays.states, 1).cpu()} if arrays.states else {}
        observation, following = (
            self._join_parts([torch.from_numpy(part[:, :steps]) for part in parts])
            for parts in (arrays.observation, arrays.following)
        )
        return TensorDict(
            {
                **state,
                "observation": observation,
                "action": torch.from_numpy(arrays.action[:, :steps]),
                "next": {
                    "observation": following,
                    "reward": reward,
                    "terminated": terminated,
                    "truncated": truncated,
                    "done": terminated | truncated,
                },
            },
            batch_size=(self.env.num_envs, steps),
        )

    def _act(self, current: Sequence[Any], device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Return the policy's actions `[N, *A]`, and its second output (None: it has none)."""
        inputs = [to_tensors(self.env.observation, self._join_parts(current), device)]
        if self.takes_is_first:
            inputs.append(torch.from_numpy(self._first).unsqueeze(-1).to(device))  # [N] -> [N, 1]
        chosen = self.policy.module(*inputs)
        return (chosen[0].cpu(), chosen[1]) if isinstance(chosen, tuple) else (chosen.cpu(), None)

    def _split_parts(self, observation: Any) -> list[Any]:
        """Split an observation into the list of its parts."""
        return [observation[name] for name in self.parts] if self.parts else [observation]

    def _join_parts(self, parts: Sequence[Any]) -> Any:
        """Build an observation from the list of its parts."""
        return dict(zip(self.parts, parts, strict=True)) if self.parts else parts[0]

    def _copy_parts(self, observation: Any) -> list[np.ndarray]:
        """Split an observation into copies of its parts, with the dtypes of rollouts."""
        spaces = self.env.observation.get("spaces", {"": self.env.observation}).values()
        parts = zip(self._split_parts(observation), spaces, strict=True)
        return [np.array(part, dtype=space["dtype"]) for part, space in parts]

    def _allocate_actions(self, num: int) -> np.ndarray:
        """Allocate an array for the actions of `num` vector steps, `[N, num, *A]`."""
        space = self.env.single_action_space
        dtype = np.float32 if isinstance(space, Box) else np.int64
        return np.empty((self.env.num_envs, num, *(space.shape or ())), dtype)

    def _append_history(self, action: np.ndarray) -> None:
        """Append actions `[N, T, *A]` to the history, and drop those that no open episode needs for its replay."""
        self._history.append(action)
        oldest = self._seeded_at[self.vector_steps - self._seeded_at <= MAX_REPLAY].min(initial=self.vector_steps)
        while self._history and self._history_start + self._history[0].shape[1] <= oldest:
            self._history_start += self._history.popleft().shape[1]

    def shutdown(self, timeout: float | None = None, close_env: bool = True, raise_on_error: bool = True) -> None:
        if close_env:
            self.env.close()

    def set_seed(self, seed: int, static_seed: bool = False) -> int:
        raise RuntimeError("every episode has its own seed already: pass `seed` to levin.envs.factory.make_env")

    def state_dict(self) -> OrderedDict[str, Any]:
        """Return the state as plain values and tensors: counters, the current observation, actions of open episodes."""
        if self._observation is None:
            return OrderedDict()
        lengths = self.vector_steps - self._seeded_at  # [N]
        history = np.concatenate([self._allocate_actions(0), *self._history], axis=1)  # [N, L, *A]
        start = history.shape[1] - int(lengths[lengths <= MAX_REPLAY].max(initial=0))
        return OrderedDict(
            vector_steps=self.vector_steps,
            episodes=list(self.env.episodes),
            lengths=lengths.tolist(),
            observation=self._join_parts([torch.from_numpy(part.copy()) for part in self._observation]),
            actions=torch.from_numpy(history[:, start:].copy()),
        )

    def load_state_dict(self, state_dict: OrderedDict[str, Any]) -> None:
        """Continue from a saved state: replay the open episodes from their seeds and actions."""
        if not state_dict:
            return
        self.vector_steps = state_dict["vector_steps"]
        lengths, actions = np.array(state_dict["lengths"]), state_dict["actions"].numpy()
        saved = self._copy_parts(state_dict["observation"])
        too_long = lengths > actions.shape[1]
        lengths[too_long] = 0
        actions = actions[:, actions.shape[1] - lengths.max() :]
        self._history = deque([actions])
        self._history_start = self.vector_steps - actions.shape[1]
        self._seeded_at = self.vector_steps - lengths
        self._observation = self._replay(state_dict["episodes"], lengths, actions)
        differs = np.array(
            [
                any(not np.array_equal(part[i], was[i]) for part, was in zip(self._observation, saved, strict=True))
                for i in range(self.env.num_envs)
            ]
        )
        self.not_replayed = not_replayed = too_long | differs
        if not_replayed.any():
            reasons = []
            if too_long.any():
                reasons.append(f"an open episode has more than {MAX_REPLAY:,} steps (env.time_limit would end it)")
            if (differs & ~too_long).any():
                reasons.append("the same actions led to another observation")
            warnings.warn(
                f"{self.env.config.id} does not replay: {' and '.join(reasons)}. The open episode "
                f"of {int(not_replayed.sum())} env(s) is truncated, and this run differs from an uninterrupted one",
                stacklevel=1,
            )
            self._seeded_at[not_replayed], self._first[not_replayed] = self.vector_steps, True
            episodes = [episode + 1 for episode in self.env.episodes]
            self._observation = self._copy_parts(self.env.begin(episodes, not_replayed))

    def _replay(self, episodes: list[int], lengths: np.ndarray, actions: np.ndarray) -> list[np.ndarray]:
        """Replay the open episode of every env; return the observations `[N, *S]` of each part at the end.

        All envs step together, so a shorter episode begins later.

        Args:
            episodes: Number of each env's open episode.
            lengths: Number of steps since each env was last seeded, `[N]`.
            actions: Last L actions of each env, `[N, L, *A]`, where L is the maximum of `lengths`.
        """
        longest = actions.shape[1]
        all_envs = np.ones(len(lengths), dtype=bool)
        current = self.env.begin(episodes, all_envs)
        first = all_envs
        for t in range(longest):
            begins = lengths == longest - t
            if begins.any():
                current = self.env.begin(episodes, begins)
            given, waits = actions[:, t], lengths < longest - t
            if self.env.read.mask and waits.any():  # their episode has not begun, so another mask holds
                mask = torch.from_numpy(current[ACTION_MASK][waits])
                allowed = random_allowed_actions(self.env.single_action_space, mask, torch.Generator())
                given = given.copy()
                given[waits] = allowed.numpy()
            current, _, terminated, truncated, _ = self.env.step(given)
            first, continues_without_seed = terminated | truncated, self.env.continues_without_seed
            # These envs wait for the start of their episode, or do not replay.
            if (first & ~continues_without_seed).any():
                current = self.env.begin(episodes, first & ~continues_without_seed)
            if (first & continues_without_seed).any():
                current, _ = self.env.reset(options={"reset_mask": first & continues_without_seed})
        self._first = first | (lengths == 0)
        if (lengths == 0).any():
            current = self.env.begin(episodes, lengths == 0)
        return self._copy_parts(current)
