"""Episode statistics during training, and evaluation of a policy over whole episodes."""

import warnings
from collections.abc import Callable
from time import perf_counter

import gymnasium
import numpy as np
import torch
from tensordict.nn import TensorDictModule

from levin.core.errors import Interrupted, NotFiniteError, RunError
from levin.core.spaces import to_tensors
from levin.data.rollout import act, policy_device
from levin.envs.config import EnvConfig
from levin.envs.vector import SeededVectorEnv

LONG_WAIT = 30.0  # seconds without the end of an episode after which the user is told
ENDLESS = 1_000_000  # steps after which an episode counts as endless, if `env.time_limit` is not set


class EpisodeStatistics:
    """Running return and length of each env's open episode, across rollouts `[N, T]`.

    It replaces Gymnasium's own wrapper, which miscounts when autoreset is disabled.
    """

    def __init__(self, num_envs: int) -> None:
        self.open_return = np.zeros(num_envs)
        self.open_length = np.zeros(num_envs, dtype=np.int64)

    def update(self, reward: np.ndarray, done: np.ndarray, envs: np.ndarray) -> tuple[list[float], list[int]]:
        """Add the rewards of a rollout; return the returns and the lengths of the episodes that ended, in time order.

        Args:
            reward: Rewards `[n, T]`.
            done: End flags `[n, T]`.
            envs: Numbers of the n envs `[n]`.
        """
        ended = []
        totals = np.cumsum(reward, axis=1, dtype=np.float64)
        for row, i in enumerate(envs):
            start, before = 0, 0.0  # first step of the open episode in this rollout, and the rewards before it
            for end in np.flatnonzero(done[row]):
                length = self.open_length[i] + end + 1 - start
                ended.append((end, self.open_return[i] + totals[row, end] - before, int(length)))
                self.open_return[i] = self.open_length[i] = 0
                start, before = end + 1, totals[row, end]
            self.open_return[i] += totals[row, -1] - before
            self.open_length[i] += done.shape[1] - start
        ended.sort(key=lambda episode: episode[0])
        return [float(each[1]) for each in ended], [each[2] for each in ended]


def step_count(done: np.ndarray, open_length: np.ndarray) -> np.ndarray:
    """Return the index of each step within its episode, `[N, T]`, counted from 0.

    Args:
        done: End flags `[N, T]`.
        open_length: Steps of each env's open episode before this rollout, `[N]`.
    """
    steps = np.arange(done.shape[1])
    end_steps = np.where(done, steps, np.iinfo(np.int64).min)[:, :-1]
    # [N, T]: the step at which the previous episode ended
    last = np.maximum.accumulate(np.concatenate([-1 - open_length[:, None], end_steps], axis=1), axis=1)
    return steps - last - 1


class EpisodeEnd:
    """Watchdog of episodes that may never end: warns after `LONG_WAIT` seconds, fails after `ENDLESS` steps.

    Args:
        config: Options of the env. With `time_limit`, or a limit of its own, every episode ends.
    """

    def __init__(self, config: EnvConfig) -> None:
        self.config = config
        spec = gymnasium.registry.get(config.id.partition(":")[2] or config.id)
        registered = spec is not None and spec.max_episode_steps is not None
        self.ends = registered or config.time_limit is not None or config.family == "atari"
        self.warned_at = perf_counter() + LONG_WAIT

    def check(self, length: int) -> None:
        """Check an open episode of `length` steps.

        Raises:
            RunError: It is too long to have an end.
        """
        if self.ends:
            return
        advice = "if its episodes have no end, train it with env.time_limit=<steps>"
        if perf_counter() > self.warned_at:
            self.warned_at = float("inf")
            warnings.warn(f"an episode of {self.config.id} has not ended for {LONG_WAIT:g} s; {advice}", stacklevel=1)
        if length >= ENDLESS:
            raise RunError(f"an episode of {self.config.id} has not ended after {length:,} steps; {advice}")


@torch.inference_mode()
def evaluate(
    policy: TensorDictModule, env: SeededVectorEnv, episodes: int, stop: Callable[[], bool] = lambda: False
) -> tuple[list[float], list[int]]:
    """Play `episodes` episodes with a policy; return their undiscounted returns and their lengths.

    `env.ended` then holds the numbers that the envs have reported of these episodes.

    Each env plays a fixed number of episodes: taking those that finish first would favour short ones.

    Args:
        policy: Policy that acts.
        env: Envs to play in.
        episodes: Number of episodes.
        stop: Function that returns whether to give up; called before each step.

    Raises:
        Interrupted: `stop` has returned true.
        NotFiniteError: A reward or an observation is not finite.
        RunError: An episode has no end.
    """
    num_envs = env.num_envs
    device = policy_device(policy)
    quota = [episodes // num_envs + (i < episodes % num_envs) for i in range(num_envs)]
    returns: list[list[float]] = [[] for _ in range(num_envs)]
    lengths: list[list[int]] = [[] for _ in range(num_envs)]
    total, length = np.zeros(num_envs), np.zeros(num_envs, dtype=int)
    done = np.ones(num_envs, dtype=bool)
    observation, end = env.begin([0] * num_envs, done), EpisodeEnd(env.config)
    env.ended.clear()
    counted: list[tuple[int, dict[str, float]]] = []
    while any(len(played) < count for played, count in zip(returns, quota, strict=True)):
        if stop():
            raise Interrupted
        batch = to_tensors(env.observation, observation, device)
        observation, reward, terminated, truncated, _ = env.step(act(policy, batch, done).cpu().numpy())
        total += reward
        length += 1
        check_finite(env, length, reward, *(observation.values() if isinstance(observation, dict) else [observation]))
        done = terminated | truncated
        if done.any():
            counted += [(i, numbers) for i, numbers in env.ended if len(returns[i]) < quota[i]]
            env.ended.clear()
            for i in np.flatnonzero(done):
                if len(returns[i]) < quota[i]:
                    end = EpisodeEnd(env.config)
                returns[i].append(float(total[i]))
                lengths[i].append(int(length[i]))
            total[done], length[done] = 0, 0
            observation, _ = env.reset(options={"reset_mask": done})
        end.check(int(length.max()))
    env.ended.extend(counted)
    pairs = list(zip(returns, lengths, quota, strict=True))
    return [x for each, _, n in pairs for x in each[:n]], [x for _, each, n in pairs for x in each[:n]]


def mean_numbers(ended: list[tuple[int, dict[str, float]]]) -> dict[str, float]:
    """Return the mean of each number that envs have reported of episodes, by name."""
    names = sorted({name for _, numbers in ended for name in numbers})
    return {name: float(np.mean([numbers[name] for _, numbers in ended if name in numbers])) for name in names}


def check_finite(env: SeededVectorEnv, length: np.ndarray, *values: np.ndarray) -> None:
    """Raise a RunError that names env, step, episode and seed if one of the arrays `[N, *]` has a NaN or an infinity.

    Args:
        env: Envs that returned the values.
        length: Number of steps of each env's open episode, `[N]`.
        values: Arrays; bytes are not checked.
    """
    for array in values:
        if array.dtype != np.uint8 and not np.isfinite(array).all():
            index = int(np.nonzero(~np.isfinite(array))[0][0])
            episode = env.episodes[index]
            raise NotFiniteError(
                f"{env.config.id} gave {array[index]}, not finite, in an evaluation: env {index}, "
                f"step {length[index]} of episode {episode}, seed {env.episode_seed_of(index, episode)}"
            )
