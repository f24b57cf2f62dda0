"""What a worker of `levin.collectors.workers` does: it makes its envs, acts in them, and leaves word if it can't."""

import ctypes
import json
import os
import signal
import sys
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
from levin.core.process import ignore_signals
from levin.core.spaces import random_actions
from levin.data.rollout import POLICY_VERSION
from levin.envs.config import EnvConfig
from levin.envs.factory import make_env

PR_SET_PDEATHSIG = 1  # prctl.h
START = 60.0  # seconds in which a worker makes its envs


@dataclass(frozen=True, kw_only=True)
class WorkerShare:
    """What one worker has of a run: its envs `first` to `first + num_envs - 1`.

    Args:
        episodes: The episode that each of them begins with.
        env_steps: Of the run so far: what is drawn after it has been resumed is not what was drawn before.
    """

    worker: int
    config: EnvConfig
    seed: int
    env_steps: int
    first: int
    num_envs: int
    episodes: list[int]
    is_first: bool


def make_worker_env(share: WorkerShare) -> EnvBase:
    """Seed the process of a worker, and make its envs."""
    ignore_signals()
    if sys.platform == "linux" and multiprocessing.parent_process() is not None:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # and no longer than that, however it ends
    signal.setitimer(signal.ITIMER_REAL, START + share.config.timeout)  # until the first reset is over: see `Worker`
    torch.set_num_threads(1)
    rng.seed_everything(share.seed, rank=1 + share.worker, env_steps=share.env_steps)
    env = make_env(share.config, seed=share.seed, num_envs=share.num_envs, first=share.first)
    env.begin(share.episodes, np.ones(share.num_envs, dtype=bool))
    return to_torchrl(env, is_first=share.is_first)


def make_policy(policy: TensorDictModule, space: Space, timeout: float) -> "WorkerPolicy":
    """In the process of a worker, where `policy` is a copy."""
    return WorkerPolicy(policy, space, timeout)


class WorkerPolicy(TensorDictModuleBase):
    """A policy in a worker: writes the version of its weights beside every action, and begins with random ones.

    Args:
        policy: The worker's own copy.
        space: Of the actions, in the units of the policy.
        timeout: Seconds that an env may take until the next action is asked for.
    """

    version: Tensor

    def __init__(self, policy: TensorDictModule, space: Space, timeout: float) -> None:
        super().__init__()
        self.policy, self.space, self.timeout = policy, space, timeout
        self.in_keys = policy.in_keys  # type: ignore[assignment]
        self.out_keys = ["action", POLICY_VERSION]
        self.register_buffer("version", torch.zeros((), dtype=torch.int64))
        self.random_steps = 0  # vector steps until the policy is asked

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """`[n]` envs."""
        signal.setitimer(signal.ITIMER_REAL, self.timeout)
        if self.random_steps > 0:
            self.random_steps -= 1
            action = torch.from_numpy(random_actions(self.space, *tensordict.shape))
        else:
            action = self.policy.module(*[tensordict.get(key) for key in self.in_keys])
        version = self.version.expand(*tensordict.shape, 1).clone()
        return tensordict.update({"action": action, POLICY_VERSION: version})

    @torch.no_grad()
    def load(self, weights: list[np.ndarray], version: int) -> None:
        """Take over what `weights_of` gave."""
        for tensor, value in zip(policy_tensors(self.policy), weights, strict=True):
            tensor.copy_(torch.tensor(value))
        self.version.fill_(version)


def policy_tensors(policy: nn.Module) -> list[Tensor]:
    """All that a policy's actions depend on."""
    return [*policy.parameters(), *policy.buffers()]


def policy_weights(policy: nn.Module) -> list[np.ndarray]:
    """Not a copy, where they are on the CPU: what is sent to another process is copied then and there."""
    return [each.detach().cpu().numpy() for each in policy_tensors(policy)]


class Worker(Collector):
    """TorchRL's collector in the process of a worker.

    An env that takes too long, in whatever library, is ended with its process by the alarm that every action winds up.

    Args:
        reports: Where to leave word of an error before the process ends; None: it is raised (Ray passes it on).
    """

    def __init__(self, *args: Any, reports: str | None = None, **kwargs: Any) -> None:
        self.reports = reports
        super().__init__(*args, track_traj_ids=reports is not None, **kwargs)  # TorchRL's multi-collectors read them
        signal.setitimer(signal.ITIMER_REAL, 0)

    def __bool__(self) -> bool:
        return True  # Ray asks before it passes an error on, and a collector without an end has no length to go by

    def load(self, weights: list[np.ndarray], version: int, random_steps: int) -> None:
        """What the next rollout is collected with. Called between two of them."""
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
    """What a worker says of an error, in one line."""
    first = (str(error).splitlines() or [""])[0]
    return first if isinstance(error, RunError) else f"raised {type(error).__name__}: {first}"
