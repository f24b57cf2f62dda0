"""Loader that passes rollouts to Lightning's Trainer, checks them, and keeps episode statistics."""

from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Any, cast

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.collectors import BaseCollector

from levin.collectors.episodes import EpisodeStatistics, step_count
from levin.collectors.vector import VectorCollector
from levin.core import distributed
from levin.core.errors import NotFiniteError
from levin.data.rollout import ENV_INDEX, POLICY_VERSION
from levin.envs.vector import SeededVectorEnv


class CollectorLoader:
    """Data loader of the Trainer: each batch is the fresh rollout of one iteration.

    It has a length because Lightning prefetches from a loader without one, and a prefetched rollout is one update
    stale. The length is never reached: a run ends by its number of env steps, which may be larger when it is resumed.

    Args:
        collector: TorchRL collector whose rollouts are `[N, T]`.
        env: Envs that it collects from, N of them.
        version: Function that returns the version of the policy. Rollouts hold the version of the policy that acted as
            `policy_version` `[N, T, 1]`.
        step_count: Whether rollouts hold `step_count` `[N, T, 1]`, the index of each step within its episode, from 0.
        collects: Function that returns whether to collect a rollout in this iteration; if not, the batch is empty,
            `[0]`, and no env takes a step.
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
        self.returns: list[float] = []  # of episodes that ended since `pop_metrics`
        self.lengths: list[int] = []
        self.numbers: dict[str, list[float]] = {}  # that envs report of these episodes, by name
        self.lags: list[float] = []  # iterations by which the workers' policies were behind, since `pop_metrics`
        self.seconds = 0.0  # spent collecting since `pop_metrics`
        # [N]: whether the open episode was truncated when the run resumed
        self.not_replayed = np.zeros(env.num_envs, dtype=bool)
        self.before_first: Callable[[], None] | None = None  # called once, before the next rollout
        self._iterator: Iterator[TensorDictBase] | None = None

    def __len__(self) -> int:
        return 2**31

    def __iter__(self) -> "CollectorLoader":
        return self

    def __next__(self) -> TensorDictBase:
        self.begin()
        if not self.collects():
            return TensorDict({}, batch_size=[0])
        start = perf_counter()
        # One iterator for the whole run: Lightning calls `iter` anew in every epoch.
        self._iterator = self._iterator or iter(self.collector.iterator())
        version = self.version()
        rollout = cast(TensorDict, next(self._iterator))
        self.inspect(rollout, version)
        self.seconds += perf_counter() - start
        return rollout

    def begin(self) -> None:
        """Call `before_first`, unless that is done."""
        if self.before_first is not None:
            self.before_first()
            self.before_first = None

    def inspect(self, rollout: TensorDict, version: int) -> None:
        """Check a fresh rollout, count its episodes, and add the version of the policy and the step count."""
        if POLICY_VERSION in rollout.keys():  # noqa: SIM118  # from workers, whose policy may be older
            self.lags.append(version - rollout[POLICY_VERSION].float().mean().item())
        else:
            rollout[POLICY_VERSION] = torch.full((*rollout.shape, 1), version)
        indices = rollout.get(ENV_INDEX, None)  # [N, T, 1]: numbers of the envs, which may be those of one worker only
        envs = np.arange(len(rollout)) if indices is None else indices[:, 0, 0].numpy()
        after: TensorDict = rollout.get("next")
        reward, done = (after.get(key).squeeze(-1).numpy() for key in ("reward", "done"))  # [N, T, 1] -> [N, T]
        for values in (
            *observation_tensors(after.get("observation")),
            *observation_tensors(rollout.get("observation")),
            reward,
        ):
            self._check_finite(np.asarray(values), done, envs)
        if self.step_count:
            count = step_count(done, self.statistics.open_length[envs])
            rollout["step_count"] = torch.from_numpy(count).unsqueeze(-1)  # [N, T] -> [N, T, 1]
        returns, lengths = self.statistics.update(reward, done, envs)
        if self.env.games is not None:  # papers report the score of whole games
            returns, lengths = [score for score, _ in self.env.games], [length for _, length in self.env.games]
            self.env.games.clear()
        for _, numbers in self.env.ended:
            for name, value in numbers.items():
                self.numbers.setdefault(name, []).append(value)
        self.env.ended.clear()
        self.returns += returns
        self.lengths += lengths

    def check_finite(self) -> None:
        """Raise a NotFiniteError if a rollout held NaN or inf. Nothing to do here: `inspect` checks each rollout."""

    def _check_finite(self, values: np.ndarray, done: np.ndarray, envs: np.ndarray) -> None:
        """Raise a RunError that names env, step, episode and seed if `values` `[n, T, *]` has a NaN or an infinity."""
        if values.dtype != np.uint8 and not np.isfinite(values).all():
            row, step = (int(each[0]) for each in np.nonzero(~np.isfinite(values))[:2])
            env = int(envs[row])
            episode = self.env.episodes[env] - int(done[row, step:].sum())
            count = step_count(done, self.statistics.open_length[envs])[row, step] + 1
            raise NotFiniteError(
                f"{self.env.config.id} gave {values[row, step]}, not finite, in iteration {self.version() + 1}: "
                f"env {env}, step {count} of episode {episode}, seed {self.env.episode_seed_of(env, episode)}"
            )

    def interrupt(self) -> None:
        """Make a slow rollout, this or the next one, raise `Interrupted`. Only a `VectorCollector` does."""
        if isinstance(self.collector, VectorCollector):
            self.collector.interrupted = True

    def pop_metrics(self) -> dict[str, float]:
        """Return the metrics since the last call: count and means of ended episodes, collection time, policy lag."""
        metrics = {"time/collect": self.seconds, **self.pop_episodes()}
        if self.lags:
            metrics["collect/policy_lag"] = float(np.mean(self.lags))
        self.lags, self.seconds = [], 0.0
        return metrics

    def pop_episodes(self) -> dict[str, float]:
        """Return the metrics of the episodes that have ended since the last call, on all ranks."""
        metrics: dict[str, float] = {}
        returns, lengths = (
            [x for part in distributed.gather_objects(each) for x in part] for each in (self.returns, self.lengths)
        )
        if returns:
            metrics |= {"episode/return": float(np.mean(returns)), "episode/length": float(np.mean(lengths))}
            metrics["episode/count"] = len(returns)
        for name in sorted({name for part in distributed.gather_objects(list(self.numbers)) for name in part}):
            values = [x for part in distributed.gather_objects(self.numbers.get(name, [])) for x in part]
            metrics[f"episode/{name}"] = float(np.mean(values))
        self.returns, self.lengths, self.numbers = [], [], {}
        return metrics

    def state_dict(self) -> dict[str, Any]:
        return {
            "collector": self.collector.state_dict(),
            "episodes": list(self.env.episodes),
            "open_return": self.statistics.open_return.tolist(),
            "open_length": self.statistics.open_length.tolist(),
            "returns": list(self.returns),
            "lengths": list(self.lengths),
            "lags": list(self.lags),
            **({"numbers": {name: list(values) for name, values in self.numbers.items()}} if self.numbers else {}),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.collector.load_state_dict(state_dict["collector"])
        self.statistics.open_return = np.array(state_dict["open_return"])
        self.statistics.open_length = np.array(state_dict["open_length"])
        self.returns, self.lengths = list(state_dict["returns"]), list(state_dict["lengths"])
        self.lags = list(state_dict["lags"])
        self.numbers = {str(name): list(values) for name, values in state_dict.get("numbers", {}).items()}
        if isinstance(self.collector, VectorCollector):
            self.not_replayed = self.collector.not_replayed
        else:  # TorchRL's collectors do not save open episodes, so the next ones begin
            self.not_replayed = np.ones(self.env.num_envs, dtype=bool)
            self.env.begin([episode + 1 for episode in state_dict["episodes"]], self.not_replayed)
            self.collector.reset()  # type: ignore[attr-defined]
        if self.env.games is not None:
            self.env.games.clear()  # they ended again in the replay, and were counted before
        self.env.ended.clear()
        self.statistics.open_return[self.not_replayed] = 0
        self.statistics.open_length[self.not_replayed] = 0


def observation_tensors(observation: Tensor | TensorDictBase) -> list[Tensor]:
    """Return the tensors of an observation: one, or one for each part of a dict."""
    return [observation] if isinstance(observation, Tensor) else list(observation.values())
