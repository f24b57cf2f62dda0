"""Code inside a worker process of `levin.collectors.workers`: build the envs, act in them, report errors."""

import json
import os
import signal
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Space
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from torch import Tensor, multiprocessing, nn
from torchrl.collectors import Collector
from torchrl.envs import EnvBase

from levin.collectors.torchrl import to_torchrl
from levin.core import rng
from levin.core.errors import RunError
from levin.core.process import ignore_signals, signal_at_parents_end
from levin.core.spaces import ACTION_MASK, random_actions, random_allowed_actions
from levin.data.rollout import POLICY_VERSION
from levin.envs.config import EnvConfig
from levin.envs.factory import make_env

START_SECONDS = 60.0  # time for a worker to make its envs


@dataclass(frozen=True, kw_only=True)
class WorkerShare:
    """Share of one worker in a run: the envs `first` to `first + num_envs - 1`, and how to seed them.

    Args:
        stream: Number of the worker's random stream; the ranks of the run have the first ones.
        config: Options of the envs.
        seed: Root of all random streams.
        rank: Rank that the worker collects for.
        env_steps: Env steps of the run so far; they are part of the seed, so a resumed run samples new numbers.
        first: Number of the first env.
        num_envs: Number of envs of this worker.
        episodes: Number of the episode that each env begins with.
        is_first: Whether the policy reads `is_first`.
    """

    stream: int
    config: EnvConfig
    seed: int
    rank: int
    env_steps: int
    first: int
    num_envs: int
    episodes: list[int]
    is_first: bool


def make_worker_env(share: WorkerShare) -> EnvBase:
    """Seed the worker process, and build its envs."""
    ignore_signals()
    if (parent := multiprocessing.parent_process()) is not None:
        signal_at_parents_end(signal.SIGKILL, parent.pid)
    signal.setitimer(signal.ITIMER_REAL, START_SECONDS + share.config.timeout)  # `Worker` stops this alarm
    torch.set_num_threads(1)
    rng.seed_everything(share.seed, rank=share.stream, env_steps=share.env_steps)
    env = make_env(share.config, seed=share.seed, rank=share.rank, num_envs=share.num_envs, first=share.first)
    env.begin(share.episodes, np.ones(share.num_envs, dtype=bool))
    return to_torchrl(env, is_first=share.is_first)


class WorkerPolicy(TensorDictModuleBase):
    """Policy of a worker that adds `policy_version` to every action, and acts randomly for the first `random_steps`.

    Args:
        policy: Copy of the policy that belongs to the worker.
        space: Action space, in the units of the policy.
        timeout: Seconds that the envs may take for a step.
    """

    version: Tensor

    def __init__(self, policy: TensorDictModule, space: Space, timeout: float) -> None:
        super().__init__()
        self.policy, self.space, self.timeout = policy, space, timeout
        self.in_keys = policy.in_keys  # type: ignore[assignment]
        self.out_keys = ["action", POLICY_VERSION]
        self.register_buffer("version", torch.zeros((), dtype=torch.int64))
        self.random_steps = 0  # remaining vector steps with random actions

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Add actions `[n, *A]` and `policy_version` `[n, 1]` to the TensorDict of n envs, and restart the alarm."""
        signal.setitimer(signal.ITIMER_REAL, self.timeout)
        if self.random_steps > 0:
            self.random_steps -= 1
            observation = tensordict.get("observation")
            mask = observation.get(ACTION_MASK, None) if isinstance(observation, TensorDictBase) else None
            if mask is None:
                action = torch.from_numpy(random_actions(self.space, *tensordict.shape))
            else:
                action = random_allowed_actions(self.space, mask)
        else:
            action = self.policy.module(*[tensordict.get(key) for key in self.in_keys])
        version = self.version.expand(*tensordict.shape, 1).clone()
        return tensordict.update({"action": action, POLICY_VERSION: version})

    @torch.no_grad()
    def load(self, weights: list[np.ndarray], version: int) -> None:
        """Load the weights that `policy_weights` returned, and their version."""
        for tensor, value in zip(policy_tensors(self.policy), weights, strict=True):
            tensor.copy_(torch.tensor(value))
        self.version.fill_(version)


def policy_tensors(policy: nn.Module) -> list[Tensor]:
    """List the parameters and buffers of a policy."""
    return [*policy.parameters(), *policy.buffers()]


def policy_weights(policy: nn.Module) -> list[np.ndarray]:
    """Return the weights of a policy as arrays. On the CPU they share memory with it; sending them copies them."""
    return [each.detach().cpu().numpy() for each in policy_tensors(policy)]


class Worker(Collector):
    """TorchRL's collector inside a worker process.

    Every action restarts an alarm (SIGALRM), which ends the process if an env takes too long.

    Args:
        args: Passed on to `Collector`.
        reports: Folder for the report of an error before the process ends; None: raise the error (Ray passes it on).
        kwargs: Passed on to `Collector`.
    """

    def __init__(self, *args: Any, reports: str | None = None, **kwargs: Any) -> None:
        self.reports = reports
        super().__init__(*args, track_traj_ids=reports is not None, **kwargs)  # TorchRL's multi-collectors read the ids
        signal.setitimer(signal.ITIMER_REAL, 0)

    def __bool__(self) -> bool:
        return True  # Ray tests it before it passes on an error; a collector without an end has no length to test

    def load(self, weights: list[np.ndarray], version: int, random_steps: int) -> None:
        """Set weights, version and number of random steps for the next rollout. It is called between two rollouts."""
        assert isinstance(self.policy, WorkerPolicy)
        self.policy.load(weights, version)
        self.policy.random_steps = random_steps

    def rollout(self) -> TensorDictBase:
        try:
            return super().rollout()
        except Exception as error:
            if self.reports is None:
                raise
            report = Path(self.reports) / str(self.worker_idx)
            report.write_text(json.dumps([summarize_error(error), traceback.format_exc()]))
            os._exit(1)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)


def summarize_error(error: Exception) -> str:
    """Return an error as one line of text."""
    first = (str(error).splitlines() or [""])[0]
    return first if isinstance(error, RunError) else f"raised {type(error).__name__}: {first}"
