"""The loader that hands rollouts to Lightning's Trainer, and what it knows of the episodes in them."""

from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.collectors import BaseCollector

from levin.collectors.episodes import EpisodeStatistics, step_count
from levin.collectors.vector import VectorCollector
from levin.core import distributed
from levin.core.errors import RunError
from levin.data.rollout import ENV_INDEX, POLICY_VERSION
from levin.envs.vector import SeededVectorEnv


class CollectorLoader:
    """What the Trainer iterates: one batch is one iteration's fresh rollout.

    It has a length because Lightning prefetches from a loader without one, and a prefetched rollout is one update
    stale. The length is out of reach: the run ends by its count of env steps, and a resumed run may go on for longer.

    Args:
        collector: Any TorchRL collector whose rollouts are `[N, T]`.
        env: What it collects from, N envs.
        version: The version of the policy; every rollout carries that of the policy that acted as `policy_version`
            `[N, T, 1]`.
        step_count: Whether rollouts carry `step_count` `[N, T, 1]`, the number of each step in its episode, from 0.
        collects: Whether there is a rollout at all; without one the batch is empty, `[0]`, and no env takes a step.
    """

    def __init__(
        self,
        collector: BaseCollector,
        env: SeededVectorEnv,
        version: Callable[[], int],
        *,
        step_count: bool = False,
        collects: Callable[[], bool] = lambda: True,
    ) -> None:
        self.collector, self.env, self.version, self.step_count = collector, env, version, step_count
        self.collects = collects
        self.statistics = EpisodeStatistics(env.num_envs)
        self.returns: list[float] = []  # of episodes that ended since `take`
        self.lengths: list[int] = []
        self.lags: list[float] = []  # iterations by which the policies of workers were behind, since `take`
        self.seconds = 0.0
        self.not_replayed = np.zeros(
            env.num_envs, dtype=bool
        )  # [N]: whose open episode was truncated when the run resumed
        self._iterator: Iterator[TensorDictBase] | None = None

    def __len__(self) -> int:
        return 2**31

    def __iter__(self) -> "CollectorLoader":
        return self

    def __next__(self) -> TensorDictBase:
        if not self.collects():
            return TensorDict({}, batch_size=[0])
        start = perf_counter()
        # One iterator for the whole run: Lightning calls `iter` anew in every epoch.
        self._iterator = self._iterator or iter(self.collector.iterator())
        version = self.version()
        rollout = next(self._iterator)
        if POLICY_VERSION in rollout.keys():  # noqa: SIM118  # workers may have acted with an older one
            self.lags.append(version - rollout[POLICY_VERSION].float().mean().item())
        else:
            rollout[POLICY_VERSION] = torch.full((*rollout.shape, 1), version)
        indices = rollout.get(ENV_INDEX, None)  # [N, T, 1]: of the envs of one worker only, or of all
        envs = np.arange(len(rollout)) if indices is None else indices[:, 0, 0].numpy()
        after: TensorDict = rollout.get("next")
        reward, done = (after.get(key).squeeze(-1).numpy() for key in ("reward", "done"))  # [N, T, 1] -> [N, T]
        for what in (
            *observation_tensors(after.get("observation")),
            *observation_tensors(rollout.get("observation")),
            reward,
        ):
            self._check_finite(np.asarray(what), done, envs)
        if self.step_count:
            count = step_count(done, self.statistics.open_length[envs])
            rollout["step_count"] = torch.from_numpy(count).unsqueeze(-1)  # [N, T] -> [N, T, 1]
        returns, lengths = self.statistics.update(reward, done, envs)
        if self.env.games is not None:  # what is published is the score of whole games
            returns, lengths = [score for score, _ in self.env.games], [length for _, length in self.env.games]
            self.env.games.clear()
        self.returns += returns
        self.lengths += lengths
        self.seconds += perf_counter() - start
        return rollout

    def _check_finite(self, values: np.ndarray, done: np.ndarray, envs: np.ndarray) -> None:
        if values.dtype != np.uint8 and not np.isfinite(values).all():  # [N, T, *]
            row, step = (int(each[0]) for each in np.nonzero(~np.isfinite(values))[:2])
            env = int(envs[row])
            episode = self.env.episodes[env] - int(done[row, step:].sum())
            count = step_count(done, self.statistics.open_length[envs])[row, step] + 1
            raise RunError(
                f"{self.env.config.id} gave {values[row, step]}, not finite, in iteration {self.version() + 1}: "
                f"env {env}, step {count} of episode {episode}, seed {self.env.episode_seed_of(env, episode)}"
            )

    def pop_metrics(self) -> dict[str, float]:
        """Means over the episodes that ended since the last call, their count, and the seconds spent collecting."""
        row = {"time/collect": self.seconds}
        returns, lengths = (
            [x for part in distributed.gather_objects(each) for x in part] for each in (self.returns, self.lengths)
        )
        if returns:
            row |= {"episode/return": float(np.mean(returns)), "episode/length": float(np.mean(lengths))}
            row["episode/count"] = len(returns)
        if self.lags:
            row["collect/policy_lag"] = float(np.mean(self.lags))
        self.returns, self.lengths, self.lags, self.seconds = [], [], [], 0.0
        return row

    def state_dict(self) -> dict[str, Any]:
        return {
            "collector": self.collector.state_dict(),
            "episodes": list(self.env.episodes),
            "open_return": self.statistics.open_return.tolist(),
            "open_length": self.statistics.open_length.tolist(),
            "returns": list(self.returns),
            "lengths": list(self.lengths),
            "lags": list(self.lags),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.collector.load_state_dict(state_dict["collector"])
        self.statistics.open_return = np.array(state_dict["open_return"])
        self.statistics.open_length = np.array(state_dict["open_length"])
        self.returns, self.lengths = list(state_dict["returns"]), list(state_dict["lengths"])
        self.lags = list(state_dict.get("lags", []))  # checkpoints of before they were kept have none
        if isinstance(self.collector, VectorCollector):
            self.not_replayed = self.collector.not_replayed
        else:  # TorchRL's collectors save no open episode: the next one begins
            self.not_replayed = np.ones(self.env.num_envs, dtype=bool)
            self.env.begin([episode + 1 for episode in state_dict["episodes"]], self.not_replayed)
            self.collector.reset()  # type: ignore[attr-defined]
        if self.env.games is not None:
            self.env.games.clear()  # those that were replayed
        self.statistics.open_return[self.not_replayed] = 0
        self.statistics.open_length[self.not_replayed] = 0


def observation_tensors(observation: Tensor | TensorDictBase) -> list[Tensor]:
    """The tensors of an observation: one, unless it is a dict."""
    return [observation] if isinstance(observation, Tensor) else list(observation.values())
