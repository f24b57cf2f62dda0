"""The default collector: a tight loop over a gymnasium vector env, in this process.

Every collector is a TorchRL `BaseCollector` and yields the rollout that `levin.data.rollout` describes.
"""

import warnings
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor
from torchrl.collectors import BaseCollector

from levin.core.spaces import IS_FIRST, random_actions, to_tensors
from levin.data.rollout import WholeEpisodes
from levin.envs.vector import SeededVectorEnv

CHUNK = 256  # vector steps at a time, while the length of a rollout is not known


def to_device(inputs: Any, device: torch.device) -> Any:
    """What a policy takes, on its device: a tensor, or one for each part of an observation."""
    if isinstance(inputs, dict):
        return {name: part.to(device) for name, part in inputs.items()}
    return inputs.to(device)


@dataclass(kw_only=True)
class RolloutArrays:
    """Arrays `[N, T, *]` that one rollout is written into, one of each per part of an observation that is a dict.

    `ended` holds, for every step in which episodes ended, its number, the envs `[N]`, and their last observations;
    `states` the memory of a policy that has one, `[N, *]` at each step.
    """

    observation: list[np.ndarray]
    following: list[np.ndarray]
    action: np.ndarray
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    ended: list[tuple[int, np.ndarray, list[np.ndarray]]] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)


class VectorCollector(BaseCollector):
    """A tight loop over a gymnasium `VectorEnv` that writes into preallocated tensors.

    TorchRL's `Collector` over the same env costs several times as much per vector step; this one runs only what
    chooses the action, and calls the policy's module without a TensorDict in between: with the observation, and with
    `is_first` `[N, 1]` when that is the policy's second key. What a policy gives beside the action, its second key, is
    in the rollout; such a policy is never replaced by random actions.

    An episode that is still open when the state is saved resumes by replay: its seed is known, its actions are in the
    state, and the observation they lead to is compared with the saved one. Where the episode before it was played with
    the same seed (`SeededVectorEnv.goes_on`), that is replayed too.
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
        self.parts = list(env.observation.get("spaces", {}))  # the names of an observation that is a dict
        self._observation: list[np.ndarray] | None = None  # [N, *S] of each part: what the envs show now
        self._first = np.ones(env.num_envs, dtype=bool)  # [N]: whether that begins an episode
        self._opened = np.zeros(env.num_envs, dtype=np.int64)  # [N]: the vector step at which each env was last seeded
        self._history: deque[np.ndarray] = deque()  # [N, T, *A] each: the actions since the first of these
        self._history_from = 0  # the vector step of the first of them
        self.not_replayed = np.zeros(env.num_envs, dtype=bool)  # [N]: whose open episode could not be resumed

    def iterator(self) -> Iterator[TensorDictBase]:
        while True:
            yield self.rollout()

    def rollout(self) -> TensorDict:
        """The next `[N, T]` transitions."""
        if isinstance(self.steps, int):
            return self._collect(self.steps)
        chunks: list[TensorDict] = []
        episodes = transitions = 0
        while (
            episodes < self.steps.episodes
            or transitions < self.steps.transitions
            or (self.steps.paired_episodes and episodes % 2)
        ):
            done = False
            while not done:
                chunks.append(self._collect(CHUNK, until_done=True))
                transitions += chunks[-1].shape[1]
                done = bool(chunks[-1]["next", "done"][0, -1])
            episodes += 1
        return torch.cat(chunks, 1)  # type: ignore[arg-type, return-value]

    def _collect(self, steps: int, *, until_done: bool = False) -> TensorDict:
        """The next `steps` transitions of every env; fewer with `until_done`, when the first episode ends."""
        if self._observation is None:
            self._observation = self._copy(self.env.reset()[0])
        arrays = self._allocate(self._observation, steps)
        taken = self._step(arrays, self._observation, until_done=until_done)
        return self._assemble(arrays, taken)

    def _allocate(self, now: list[np.ndarray], steps: int) -> RolloutArrays:
        """Make room for one rollout. Not reused: whoever holds the last rollout keeps what it was given."""
        num_envs = self.env.num_envs
        observation = [np.empty((num_envs, steps, *part.shape[1:]), part.dtype) for part in now]
        terminated, truncated = np.empty((2, num_envs, steps), bool)
        return RolloutArrays(
            observation=observation,
            following=[np.empty_like(part) for part in observation],
            action=self._actions(steps),
            reward=np.empty((num_envs, steps), np.float32),
            terminated=terminated,
            truncated=truncated,
        )

    def _step(self, arrays: RolloutArrays, now: list[np.ndarray], *, until_done: bool) -> int:
        """Let the policy act in the envs and write down what comes of it, the hot loop. Returns the steps taken."""
        env, observation, following, action = self.env, arrays.observation, arrays.following, arrays.action
        reward, terminated, truncated = arrays.reward, arrays.terminated, arrays.truncated
        steps = taken = action.shape[1]
        device = next(iter(self.policy.parameters()), torch.empty(0)).device
        num_random = self._num_random(steps)
        if num_random:
            action[:, :num_random] = random_actions(env.single_action_space, env.num_envs, num_random)
        current: list[Any] = now
        with torch.inference_mode():  # around the loop only: a loss may be differentiated on what comes out
            for t in range(steps):
                if t >= num_random:
                    chosen, state = self._ask(current, device)
                    action[:, t] = chosen.numpy()
                    if state is not None:
                        arrays.states.append(state)
                env.send(action[:, t])
                # What a step starts from is what the one before led to, but behind the end of an episode: `_assemble`
                # mends that.
                for part, before, value in zip(observation, following, current, strict=True):
                    part[:, t] = before[:, t - 1] = value
                seen, rewards, ends, cuts, _ = env.receive()
                current = self._split(seen)
                reward[:, t] = rewards
                terminated[:, t] = ends
                truncated[:, t] = cuts
                self._first = done = ends | cuts
                if done.any():
                    arrays.ended.append((t, done, [np.asarray(value)[done] for value in current]))
                    self._opened[done & ~env.continues_without_seed] = self.vector_steps + t + 1
                    current = self._split(env.reset(options={"reset_mask": done})[0])
                    if until_done:
                        taken = t + 1
                        break
        self._observation = [
            np.array(value, dtype=part.dtype) for value, part in zip(current, observation, strict=True)
        ]
        self.vector_steps += taken
        self._remember(action[:, :taken])
        return taken

    def _assemble(self, arrays: RolloutArrays, steps: int) -> TensorDict:
        """Build the rollout `[N, steps]`, in which every episode ends with its own last observation."""
        assert self._observation is not None
        for part, last in zip(arrays.following, self._observation, strict=True):
            part[:, steps - 1] = last
        for t, done, parts in arrays.ended:
            for part, last in zip(arrays.following, parts, strict=True):
                part[done, t] = last
        flags = (arrays.reward, arrays.terminated, arrays.truncated)
        reward, terminated, truncated = (torch.from_numpy(x[:, :steps]).unsqueeze(-1) for x in flags)  # [N, T, 1]
        beside = {self.policy.out_keys[1]: torch.stack(arrays.states, 1).cpu()} if arrays.states else {}
        shown, after = (
            self._joined([torch.from_numpy(part[:, :steps]) for part in parts])
            for parts in (arrays.observation, arrays.following)
        )
        return TensorDict(
            {
                **beside,
                "observation": shown,
                "action": torch.from_numpy(arrays.action[:, :steps]),
                "next": {
                    "observation": after,
                    "reward": reward,
                    "terminated": terminated,
                    "truncated": truncated,
                    "done": terminated | truncated,
                },
            },
            batch_size=(self.env.num_envs, steps),
        )

    def _ask(self, current: Sequence[Any], device: torch.device) -> tuple[Tensor, Tensor | None]:
        """The policy's actions `[N, *A]`, and what it gives beside them."""
        inputs = [to_tensors(self.env.observation, self._joined(current))]
        if self.takes_is_first:
            inputs.append(torch.from_numpy(self._first).unsqueeze(-1))  # [N] -> [N, 1]
        if device.type != "cpu":
            inputs = [to_device(each, device) for each in inputs]
        chosen = self.policy.module(*inputs)
        return (chosen[0].cpu(), chosen[1]) if isinstance(chosen, tuple) else (chosen.cpu(), None)

    def _split(self, observation: Any) -> list[Any]:
        """The parts of what the envs show."""
        return [observation[name] for name in self.parts] if self.parts else [observation]

    def _joined(self, parts: Sequence[Any]) -> Any:
        """An observation of its parts."""
        return dict(zip(self.parts, parts, strict=True)) if self.parts else parts[0]

    def _copy(self, observation: Any) -> list[np.ndarray]:
        """The parts of what the envs show, in the dtypes of rollouts."""
        spaces = self.env.observation.get("spaces", {"": self.env.observation}).values()
        parts = zip(self._split(observation), spaces, strict=True)
        return [np.array(part, dtype=space["dtype"]) for part, space in parts]

    def _actions(self, num: int) -> np.ndarray:
        """Room for `num` vector steps of actions `[N, num, *A]`."""
        space = self.env.single_action_space
        dtype = np.float32 if isinstance(space, Box) else np.int64
        return np.empty((self.env.num_envs, num, *(space.shape or ())), dtype)

    def _num_random(self, steps: int) -> int:
        """How many of the next `steps` vector steps lie before `random_env_steps`."""
        left = self.random_env_steps - self.vector_steps * self.env.num_envs
        return max(0, min(steps, -(-left // self.env.num_envs)))

    def _remember(self, action: np.ndarray) -> None:
        self._history.append(action)
        oldest = self._opened.min()
        while self._history and self._history_from + self._history[0].shape[1] <= oldest:
            self._history_from += self._history.popleft().shape[1]

    def shutdown(self, timeout: float | None = None, close_env: bool = True, raise_on_error: bool = True) -> None:
        if close_env:
            self.env.close()

    def set_seed(self, seed: int, static_seed: bool = False) -> int:
        raise RuntimeError("every episode has its own seed already: pass `seed` to levin.envs.factory.make_env")

    def state_dict(self) -> OrderedDict[str, Any]:
        """Plain values and tensors: counters, the current observation, and the actions of the open episodes."""
        if self._observation is None:
            return OrderedDict()
        lengths = self.vector_steps - self._opened  # [N]
        history = np.concatenate([self._actions(0), *self._history], axis=1)  # [N, L, *A]
        start = history.shape[1] - int(lengths.max())
        return OrderedDict(
            vector_steps=self.vector_steps,
            episodes=list(self.env.episodes),
            lengths=lengths.tolist(),
            observation=self._joined([torch.from_numpy(part.copy()) for part in self._observation]),
            actions=torch.from_numpy(history[:, start:].copy()),
        )

    def load_state_dict(self, state_dict: OrderedDict[str, Any]) -> None:
        """Continue where `state_dict` was taken: the open episodes are replayed from their seeds and actions."""
        if not state_dict:
            return
        self.vector_steps = state_dict["vector_steps"]
        lengths, actions = np.array(state_dict["lengths"]), state_dict["actions"].numpy()
        saved = self._copy(state_dict["observation"])
        self._history = deque([actions])
        self._history_from = self.vector_steps - actions.shape[1]
        self._opened = self.vector_steps - lengths
        self._observation = self._replay(state_dict["episodes"], lengths, actions)
        self.not_replayed = not_replayed = np.array(
            [
                any(not np.array_equal(part[i], was[i]) for part, was in zip(self._observation, saved, strict=True))
                for i in range(self.env.num_envs)
            ]
        )
        if not_replayed.any():
            warnings.warn(
                f"{self.env.config.id} does not replay: the open episode of {int(not_replayed.sum())} env(s) is "
                "truncated and a new one begins; this run is not the uninterrupted one",
                stacklevel=2,
            )
            self._opened[not_replayed], self._first[not_replayed] = self.vector_steps, True
            episodes = [episode + 1 for episode in self.env.episodes]
            self._observation = self._copy(self.env.begin(episodes, not_replayed))

    def _replay(self, episodes: list[int], lengths: np.ndarray, actions: np.ndarray) -> list[np.ndarray]:
        """Lead every env to where it was. All envs step together, so a shorter episode begins later.

        Args:
            episodes: The number of each env's open episode.
            lengths: `[N]`, the steps taken since its seed.
            actions: `[N, L, *A]`, the last L actions of each env, with L the longest of `lengths`.
        """
        longest = actions.shape[1]
        everyone = np.ones(len(lengths), dtype=bool)
        current = self.env.begin(episodes, everyone)
        first = everyone
        for t in range(longest):
            begins = lengths == longest - t
            if begins.any():
                current = self.env.begin(episodes, begins)
            current, _, ends, cuts, _ = self.env.step(actions[:, t])
            first, continues_without_seed = ends | cuts, self.env.continues_without_seed
            if (
                first & ~continues_without_seed
            ).any():  # an env still waiting for its turn, or one that does not replay
                current = self.env.begin(episodes, first & ~continues_without_seed)
            if (first & continues_without_seed).any():
                current, _ = self.env.reset(options={"reset_mask": first & continues_without_seed})
        self._first = first | (lengths == 0)
        if (lengths == 0).any():
            current = self.env.begin(episodes, lengths == 0)
        return self._copy(current)
