"""TorchRL's collectors of several processes: `collector=torchrl-process`, `torchrl-async` and `ray`.

The envs of a run are shared among workers, which are numbered so that every env keeps the episodes that it would have
with any other collector. A worker acts with a copy of the policy. Weights are sent to it, by value, while it waits for
its next rollout: TorchRL's own ways share memory with it or write from another thread, and so change weights in the
middle of a rollout. Their version travels with them and is written into the rollout by the policy itself.
"""

import copy
import json
import os
import shutil
import signal
import sys
import tempfile
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import multiprocessing
from torchrl.collectors import BaseCollector, MultiAsyncCollector, MultiSyncCollector
from torchrl.collectors.distributed import RayCollector
from torchrl.envs import EnvBase

from levin.collectors.worker import Worker, WorkerShare, make_policy, make_worker_env, policy_weights, summarize_error
from levin.core.errors import RunError
from levin.core.process import SIGNALS
from levin.core.spaces import IS_FIRST
from levin.data.rollout import ENV_INDEX, POLICY_VERSION
from levin.envs.vector import SeededVectorEnv

NAMES = ("torchrl-process", "torchrl-async", "ray")
AFTER = ("observation", "reward", "terminated", "truncated", "done")
RAY = {"include_dashboard": False, "log_to_driver": False, "logging_level": "error"}


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
        make_envs: list[Callable[[], EnvBase]] = [partial(make_worker_env, share) for share in shares]
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
        import ray  # type: ignore[import-not-found]

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

    def _share(self, worker: int) -> WorkerShare:
        first = worker * self.num_envs
        return WorkerShare(
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
        return (
            policy_weights(self.policy),
            self.version(),
            max(0, -(-self.random_env_steps // self.env.num_envs) - taken),
        )

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
        who, said = "a worker", summarize_error(cause)
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
            import ray  # type: ignore[import-not-found]

            ray.shutdown()
            self._owns_ray = False
        if self.reports:
            shutil.rmtree(self.reports, ignore_errors=True)
        if close_env:
            self.env.close()

    def reset(self) -> None:
        """Nothing: the workers of a run that is resumed begin with the episodes that `env` is in."""

    def set_seed(self, seed: int, static_seed: bool = False) -> int:
        raise RuntimeError(
            "every episode has its own seed already: pass `seed` to levin.collectors.factory.make_loader"
        )

    def state_dict(self) -> OrderedDict[str, Any]:
        return OrderedDict(vector_steps=list(self.vector_steps))

    def load_state_dict(self, state_dict: OrderedDict[str, Any]) -> None:
        self.vector_steps = list(state_dict["vector_steps"])
