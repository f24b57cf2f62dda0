"""TorchRL's collectors of several processes: `collector=torchrl-process`, `torchrl-async` and `ray`.

The envs of a run are shared among workers, which are numbered so that every env keeps the episodes that it would have
with any other collector. A worker acts with a copy of the policy. Weights are sent to it, by value, while it waits for
its next rollout: TorchRL's own ways share memory with it or write from another thread, and so change weights in the
middle of a rollout. Their version travels with them and is written into the rollout by the policy itself.
"""

import copy
import ctypes
import json
import os
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Space
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from torch import Tensor, multiprocessing, nn
from torchrl.collectors import BaseCollector, Collector, MultiAsyncCollector, MultiSyncCollector
from torchrl.collectors.distributed import RayCollector
from torchrl.envs import EnvBase

from levin import collectors, envs, rng
from levin.algorithms.base import Algorithm
from levin.collectors import IS_FIRST, WholeEpisodes
from levin.envs import EnvConfig, SeededVectorEnv
from levin.errors import ConfigError, RunError
from levin.exploration import OrnsteinUhlenbeckNoise
from levin.guards import SIGNALS

NAMES = ("torchrl-process", "torchrl-async", "ray")
ENV_INDEX, POLICY_VERSION = "env_index", "policy_version"
AFTER = ("observation", "reward", "terminated", "truncated", "done")
PR_SET_PDEATHSIG = 1  # prctl.h
START = 60.0  # seconds in which a worker makes its envs
RAY = {"include_dashboard": False, "log_to_driver": False, "logging_level": "error"}


@dataclass(frozen=True, kw_only=True)
class Share:
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


def make_env(share: Share) -> EnvBase:
    """Seed the process of a worker, and make its envs."""
    for each in SIGNALS:  # are for the run's own process: it saves, and the workers live until it is done
        signal.signal(each, signal.SIG_IGN)
    if sys.platform == "linux" and multiprocessing.parent_process() is not None:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # and no longer than that, however it ends
    signal.setitimer(signal.ITIMER_REAL, START + share.config.timeout)  # until the first reset is over: see `Worker`
    torch.set_num_threads(1)
    rng.seed_everything(share.seed, rank=1 + share.worker, env_steps=share.env_steps)
    env = envs.make(share.config, seed=share.seed, num_envs=share.num_envs, first=share.first)
    env.begin(share.episodes, np.ones(share.num_envs, dtype=bool))
    return collectors.wrap(env, is_first=share.is_first)


def make_policy(policy: TensorDictModule, space: Space, timeout: float) -> "Acting":
    """In the process of a worker, where `policy` is a copy."""
    return Acting(policy, space, timeout)


class Acting(TensorDictModuleBase):
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
            action = torch.from_numpy(collectors.random_actions(self.space, *tensordict.shape))
        else:
            action = self.policy.module(*[tensordict.get(key) for key in self.in_keys])
        version = self.version.expand(*tensordict.shape, 1).clone()
        return tensordict.update({"action": action, POLICY_VERSION: version})

    @torch.no_grad()
    def load(self, weights: list[np.ndarray], version: int) -> None:
        """Take over what `weights_of` gave."""
        for tensor, value in zip(tensors_of(self.policy), weights, strict=True):
            tensor.copy_(torch.tensor(value))
        self.version.fill_(version)


def tensors_of(policy: nn.Module) -> list[Tensor]:
    """All that a policy's actions depend on."""
    return [*policy.parameters(), *policy.buffers()]


def weights_of(policy: nn.Module) -> list[np.ndarray]:
    """Not a copy, where they are on the CPU: what is sent to another process is copied then and there."""
    return [each.detach().cpu().numpy() for each in tensors_of(policy)]


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
        assert isinstance(self.policy, Acting)
        self.policy.load(weights, version)
        self.policy.random_steps = random_steps

    def rollout(self) -> TensorDictBase:
        try:
            return super().rollout()
        except Exception as error:
            if self.reports is None:
                raise
            report = Path(self.reports) / str(self.worker_idx)
            report.write_text(json.dumps([_said(error), traceback.format_exc()]))
            os._exit(1)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)


def _said(error: Exception) -> str:
    first = (str(error).splitlines() or [""])[0]
    return first if isinstance(error, RunError) else f"raised {type(error).__name__}: {first}"


class AsyncCollector(MultiAsyncCollector):
    """Sends a worker that has just delivered the newest weights, and only then lets it go on."""

    push: Callable[[int], None]
    worker: int  # whose rollout came last

    @property
    def _queue_len(self) -> int:
        # With TorchRL's 1, a worker that can't deliver for a second throws its rollout away.
        return len(self.create_env_fn)

    def _get_from_queue(self, timeout: float | None = None) -> tuple[int, int, TensorDictBase]:
        self.worker, number, rollout = super()._get_from_queue(timeout)
        self.push(self.worker)
        return self.worker, number, rollout

    def load(self, worker: int, *args: Any) -> None:
        """`Worker.load`, of one of them."""
        self.pipes[worker].send((("load", args, {}), "cascade_execute"))
        result, _ = self._recv_and_check(self.pipes[worker], worker_idx=worker)
        if isinstance(result, Exception):
            raise result


class WorkersCollector(BaseCollector):
    """The rollouts of several workers: `[N, T]` of all of them, or of `torchrl-async` `[N / workers, T]` of one.

    Beside what every collector yields they carry `policy_version` `[N, T, 1]`, the iterations that the policy which
    acted had learned from, and `env_index` `[N, T, 1]`. The workers start with the first rollout: by then a run that is
    resumed knows where it was. Of open episodes TorchRL saves nothing: the next ones begin.

    Args:
        name: One of `NAMES`.
        env: N envs as those of the workers; here nothing but the numbers of their episodes is kept.
        policy: Whose weights are sent.
        seed: The root of all random streams.
        version: That of the weights.
        workers: Processes; they divide N.
    """

    def __init__(
        self,
        name: str,
        env: SeededVectorEnv,
        policy: TensorDictModule,
        *,
        steps: int,
        random_env_steps: int,
        seed: int,
        version: Callable[[], int],
        workers: int,
    ) -> None:
        super().__init__()
        self.name, self.env, self.policy, self.steps, self.version = name, env, policy, steps, version
        self.random_env_steps, self.seed, self.workers = random_env_steps, seed, workers
        self.num_envs = env.num_envs // workers  # of each
        self.vector_steps = [0] * workers  # that have come from each
        self.collector: MultiSyncCollector | AsyncCollector | RayCollector | None = None
        self.reports: Path | None = None  # the folder in which workers leave word of what ended them
        self._owns_ray = False

    def iterator(self) -> Iterator[TensorDictBase]:
        try:
            self.collector = self._start()
            rollouts = self.collector.iterator()
        except Exception as error:
            raise self._failure(error) from error
        while True:
            try:
                if not isinstance(self.collector, AsyncCollector):
                    self.collector.map_fn("load", [self._orders(worker) for worker in range(self.workers)])
                rollout = next(rollouts)
            except Exception as error:
                raise self._failure(error) from error
            yield self._finish(rollout)

    def _start(self) -> MultiSyncCollector | AsyncCollector | RayCollector:
        self.env.reset()  # the episodes that begin now
        self.reports = Path(tempfile.mkdtemp(prefix="levin-workers-"))
        policy = copy.deepcopy(self.policy).requires_grad_(False).cpu()
        factory = partial(make_policy, policy, self.env.single_action_space, self.env.config.timeout)
        shares = [self._share(worker) for worker in range(self.workers)]
        make_envs: list[Callable[[], EnvBase]] = [partial(make_env, share) for share in shares]
        num_envs = self.num_envs if self.name == "torchrl-async" else self.env.num_envs
        common: dict[str, Any] = {
            "policy_factory": [factory] * self.workers,
            "frames_per_batch": self.steps * num_envs,
            "trust_policy": True,
        }
        if self.name == "ray":
            return self._start_ray(make_envs, common)
        common |= {
            "collector_class": partial(Worker, reports=str(self.reports)),
            "num_threads": torch.get_num_threads(),  # of this process, which TorchRL would change
            "use_buffers": True,
            "total_frames": -1,
            "auto_register_policy_transforms": False,
        }
        # Blocked signals stay so in the processes that are started meanwhile; here they come when it is over.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        method = multiprocessing.get_start_method()
        if sys.platform == "linux":  # with TorchRL's own, `spawn`, every worker would import all of this for seconds
            multiprocessing.set_start_method("fork", force=True)
        try:
            if self.name == "torchrl-process":
                collector = MultiSyncCollector(make_envs, cat_results=0, **common)
            else:
                collector = AsyncCollector(make_envs, **common)
                collector.push = lambda worker: collector.load(worker, *self._orders(worker, begun=1))
        finally:
            multiprocessing.set_start_method(method, force=True)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for process in collector.procs:  # are deaf to what `terminate` sends
            process._popen.terminate = process._popen.kill
        if isinstance(collector, AsyncCollector):
            collector.map_fn("load", [self._orders(worker) for worker in range(self.workers)])
        return collector

    def _start_ray(self, make_envs: list[Callable[[], EnvBase]], common: dict[str, Any]) -> RayCollector:
        import ray

        if not ray.is_initialized():
            paths = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}  # else workers don't find a user's modules
            ray.init(**RAY, runtime_env={"env_vars": paths})
            self._owns_ray = True
        cpus = int(ray.cluster_resources().get("CPU", 0))
        if cpus < self.workers:  # Ray would wait for more to join
            raise RunError(f"collector=ray finds {cpus} CPUs for collector_workers={self.workers}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is no policy to take weights from: they are sent by us
            collector = RayCollector(
                make_envs,
                total_frames=sys.maxsize,  # with -1 it would end at once
                sync=True,
                weight_sync_schemes={},
                collector_class=Worker,  # type: ignore[arg-type]
                collector_kwargs={"auto_register_policy_transforms": False},
                remote_configs={"num_cpus": 1},
                **common,
            )
        collector._weight_sync_initialized = True  # again: it would warn
        return collector

    def _share(self, worker: int) -> Share:
        first = worker * self.num_envs
        return Share(
            worker=worker,
            config=self.env.config,
            seed=self.seed,
            env_steps=sum(self.vector_steps) * self.num_envs,
            first=first,
            num_envs=self.num_envs,
            episodes=self.env.episodes[first : first + self.num_envs],
            is_first=IS_FIRST in self.policy.in_keys,
        )

    def _orders(self, worker: int, begun: int = 0) -> tuple[list[np.ndarray], int, int]:
        """What `Worker.load` takes, `begun` rollouts of the worker not being counted yet."""
        taken = self.vector_steps[worker] + begun * self.steps
        return weights_of(self.policy), self.version(), max(0, -(-self.random_env_steps // self.env.num_envs) - taken)

    def _finish(self, rollout: Any) -> TensorDict:
        """What TorchRL collected `[W, n, T]` or `[n, T]`, in the order of the envs and nothing beside it."""
        if rollout.ndim > 2:
            rollout = rollout.flatten(0, -2)  # [W, n, T] -> [N, T]
        one = [self.collector.worker] if isinstance(self.collector, AsyncCollector) else None
        for worker in one or range(self.workers):
            self.vector_steps[worker] += self.steps
        index = one[0] * self.num_envs + torch.arange(self.num_envs) if one else torch.arange(self.env.num_envs)
        for env, ends in zip(index.tolist(), rollout["next", "done"].sum((1, 2)).tolist(), strict=True):
            self.env.episodes[env] += ends
        data: dict[str, Any] = {key: rollout[key] for key in ("observation", "action", POLICY_VERSION)}
        data["next"] = {key: rollout["next", key] for key in AFTER}
        data[ENV_INDEX] = index.view(-1, 1, 1).expand(*rollout.shape, 1)
        return TensorDict(data, batch_size=rollout.shape)

    def _failure(self, error: Exception) -> RunError:
        """What is known of the end of a worker, in one sentence."""
        if isinstance(error, RunError) and not hasattr(error, "cause"):
            return error
        late = f"did not come back within env.timeout={self.env.config.timeout:g} seconds"
        cause = getattr(error, "cause", None) or error  # of Ray's: what a worker raised
        who, said = "a worker", _said(cause)
        if "ActorDied" in type(error).__name__:
            said = f"died, or {late}"
        for worker, process in enumerate(getattr(self.collector, "procs", ())):
            if not process._closed and process.exitcode:
                who, code = f"worker {worker}", process.exitcode
                said = late if code == -signal.SIGALRM else f"ended with exit code {code}"
        for report in sorted(self.reports.glob("*")) if self.reports else []:
            who = f"worker {report.name}"
            said, trace = json.loads(report.read_text())
            error.add_note(trace)
        return RunError(f"{who} of {self.workers} (collector={self.name}, {self.env.config.id}): {said}")

    def shutdown(self, timeout: float | None = None, close_env: bool = True, raise_on_error: bool = True) -> None:
        """End the workers."""
        collector, self.collector = self.collector, None
        if isinstance(collector, RayCollector):
            collector.shutdown()
        elif collector is not None:
            threads = torch.get_num_threads()
            collector.shutdown(timeout=timeout, raise_on_error=False)
            torch.set_num_threads(threads)
        if self._owns_ray:
            import ray

            ray.shutdown()
            self._owns_ray = False
        if self.reports:
            shutil.rmtree(self.reports, ignore_errors=True)
        if close_env:
            self.env.close()

    def reset(self) -> None:
        """Nothing: the workers of a run that is resumed begin with the episodes that `env` is in."""

    def set_seed(self, seed: int, static_seed: bool = False) -> int:
        raise RuntimeError("every episode has its own seed already: pass `seed` to levin.torchrl_collectors.make")

    def state_dict(self) -> OrderedDict[str, Any]:
        return OrderedDict(vector_steps=list(self.vector_steps))

    def load_state_dict(self, state_dict: OrderedDict[str, Any]) -> None:
        self.vector_steps = list(state_dict["vector_steps"])


def make(name: str, env: SeededVectorEnv, algorithm: Algorithm, *, seed: int, workers: int) -> WorkersCollector:
    """The rollouts of an algorithm's policy by workers.

    Raises:
        ConfigError: The envs can't be shared among them, or the algorithm can't learn from such rollouts.
    """
    num_envs, policy, steps = env.num_envs, algorithm.policy(), algorithm.steps_per_iteration
    if num_envs % workers:
        more = -(-num_envs // workers) * workers
        raise ConfigError(
            f"env.num_envs={num_envs} can't be shared among collector_workers={workers}: "
            f"set env.num_envs={more}, or collector_workers to a divisor"
        )
    if isinstance(steps, WholeEpisodes):
        raise ConfigError(f"collector={name} has rollouts of one length; whole episodes need collector=vector")
    if env.config.vectorization == "async":
        raise ConfigError(f"the workers of collector={name} are processes already: set env.vectorization=sync")
    if any(isinstance(each, OrnsteinUhlenbeckNoise) for each in policy.modules()):
        raise ConfigError(
            f"noise that remembers itself can't be sent to the workers of collector={name}: set algo.noise=gaussian"
        )
    if name == "torchrl-async" and algorithm.buffer is None:
        raise ConfigError(
            f"{type(algorithm).__name__} learns from what its own policy did, and collector=torchrl-async yields what "
            "older ones did: set collector=torchrl-process"
        )
    if name == "torchrl-async" and env.config.normalize_reward:
        raise ConfigError(
            "env.normalize_reward looks at all envs step by step, and collector=torchrl-async yields those of one "
            "worker: set env.normalize_reward=false"
        )
    if name == "ray":
        try:
            import ray  # noqa: F401
        except ImportError as error:
            raise ConfigError("collector=ray needs a package that is missing: pip install -e '.[scale]'") from error
    return WorkersCollector(
        name,
        env,
        policy,
        steps=steps,
        random_env_steps=algorithm.random_env_steps,
        seed=seed,
        version=lambda: algorithm.iterations,
        workers=workers,
    )
