"""TorchRL's collectors with several worker processes: `collector=torchrl-process`, `torchrl-async` and `ray`.

The envs of a run are divided among the workers. Every env keeps its number, so it has the same episode seeds as with
any other collector. A worker acts with a copy of the policy. New weights are sent to it by value while it waits for its
next rollout, because TorchRL's own ways, shared memory or another thread, change weights in the middle of a rollout.
The version of the weights is sent with them, and the policy writes it into the rollout.
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

from levin.collectors.worker import Worker, WorkerPolicy, WorkerShare, make_worker_env, policy_weights, summarize_error
from levin.core import distributed
from levin.core.errors import RunError
from levin.core.process import signals_blocked
from levin.core.spaces import IS_FIRST
from levin.data.rollout import ENV_INDEX, POLICY_VERSION, random_steps_left
from levin.envs.vector import SeededVectorEnv

NAMES = ("torchrl-process", "torchrl-async", "ray")
AFTER = ("observation", "reward", "terminated", "truncated", "done")  # keys under "next"
RAY_OPTIONS = {"include_dashboard": False, "log_to_driver": False, "logging_level": "error"}


class AsyncCollector(MultiAsyncCollector):
    """`MultiAsyncCollector` that sends a worker the newest weights after each of its rollouts, before the next."""

    push: Callable[[int], None]
    worker: int  # number of the worker that delivered the last rollout

    @property
    def _queue_len(self) -> int:
        # TorchRL's value is 1, with which a worker that can't deliver for a second drops its rollout.
        return len(self.create_env_fn)

    def _get_from_queue(self, timeout: float | None = None) -> tuple[int, int, TensorDictBase]:
        self.worker, number, rollout = super()._get_from_queue(timeout)
        self.push(self.worker)
        return self.worker, number, rollout

    def load(self, worker: int, *args: Any) -> None:
        """Call `Worker.load` in one worker."""
        self.pipes[worker].send((("load", args, {}), "cascade_execute"))
        result, _ = self._recv_and_check(self.pipes[worker], worker_idx=worker)
        if isinstance(result, Exception):
            raise result


class WorkersCollector(BaseCollector):
    """Collector with several workers: rollouts `[N, T]` of all workers; `torchrl-async`: `[N / workers, T]` of one.

    Rollouts also hold `policy_version` `[N, T, 1]`, the number of iterations that the acting policy had learned from,
    and `env_index` `[N, T, 1]`. The workers start with the first rollout, when a resumed run has loaded its state.
    TorchRL does not save open episodes, so a resumed run begins the next ones.

    Args:
        name: One of `NAMES`.
        env: Envs like those of the workers, N of them. It only counts their episodes and takes no step.
        policy: Policy whose weights are sent to the workers.
        steps: Vector steps per rollout, T.
        random_env_steps: Number of env steps with uniformly random actions before the policy acts.
        seed: Root of all random streams.
        version: Function that returns the version of the weights.
        workers: Number of worker processes, a divisor of N.
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
        self.num_envs = env.num_envs // workers  # of each worker
        self.vector_steps = [0] * workers  # received from each worker
        self.collector: MultiSyncCollector | AsyncCollector | RayCollector | None = None
        self.reports: Path | None = None  # folder in which workers report the error that ended them
        self._owns_ray = False

    def iterator(self) -> Iterator[TensorDictBase]:
        try:
            self.collector = self._start()
            rollouts = self.collector.iterator()
        except Exception as error:
            raise self._run_error(error) from error
        while True:
            try:
                if not isinstance(self.collector, AsyncCollector):
                    self.collector.map_fn("load", [self._load_arguments(worker) for worker in range(self.workers)])
                rollout = next(rollouts)
            except Exception as error:
                raise self._run_error(error) from error
            yield self._finish_rollout(rollout)

    def _start(self) -> MultiSyncCollector | AsyncCollector | RayCollector:
        """Start the workers."""
        self.env.reset()  # count the episodes that begin in the workers
        self.reports = Path(tempfile.mkdtemp(prefix="levin-workers-"))
        policy = copy.deepcopy(self.policy).requires_grad_(False).cpu()
        factory = partial(WorkerPolicy, policy, self.env.single_action_space, self.env.config.timeout)
        shares = [self._worker_share(worker) for worker in range(self.workers)]
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
            "num_threads": torch.get_num_threads(),  # of this process: TorchRL would change it otherwise
            "use_buffers": True,
            "total_frames": -1,
            "auto_register_policy_transforms": False,
        }
        with signals_blocked():  # workers inherit the mask
            method = multiprocessing.get_start_method()
            if sys.platform == "linux":  # with `spawn`, TorchRL's default, every worker spends seconds on imports
                multiprocessing.set_start_method("fork", force=True)
            try:
                if self.name == "torchrl-process":
                    collector = MultiSyncCollector(make_envs, cat_results=0, **common)
                else:
                    collector = AsyncCollector(make_envs, **common)
                    collector.push = lambda worker: collector.load(worker, *self._load_arguments(worker, uncounted=1))
            finally:
                multiprocessing.set_start_method(method, force=True)
        for process in collector.procs:  # they ignore SIGTERM, so end them with SIGKILL
            process._popen.terminate = process._popen.kill
        if isinstance(collector, AsyncCollector):
            collector.map_fn("load", [self._load_arguments(worker) for worker in range(self.workers)])
        return collector

    def _start_ray(self, make_envs: list[Callable[[], EnvBase]], common: dict[str, Any]) -> RayCollector:
        """Start the workers as Ray actors."""
        import ray  # type: ignore[import-not-found]

        if not ray.is_initialized():
            paths = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}  # so that workers find the user's modules
            ray.init(**RAY_OPTIONS, runtime_env={"env_vars": paths})
            self._owns_ray = True
        cpus = int(ray.cluster_resources().get("CPU", 0))
        if cpus < self.workers:  # Ray would wait for more CPUs to join
            raise RunError(f"collector=ray needs a CPU for each of collector_workers={self.workers}, but finds {cpus}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it has no policy to take weights from: Levin sends them itself
            collector = RayCollector(
                make_envs,
                total_frames=sys.maxsize,  # -1 would end it at once
                sync=True,
                weight_sync_schemes={},
                collector_class=Worker,  # type: ignore[arg-type]
                collector_kwargs={"auto_register_policy_transforms": False},
                remote_configs={"num_cpus": 1},
                **common,
            )
        collector._weight_sync_initialized = True  # otherwise it would warn again
        return collector

    def _worker_share(self, worker: int) -> WorkerShare:
        """Return the share of a worker in the run."""
        first = worker * self.num_envs
        return WorkerShare(
            stream=distributed.world_size() + self.env.rank * self.workers + worker,
            config=self.env.config,
            seed=self.seed,
            rank=self.env.rank,
            env_steps=sum(self.vector_steps) * self.num_envs,
            first=first,
            num_envs=self.num_envs,
            episodes=self.env.episodes[first : first + self.num_envs],
            is_first=IS_FIRST in self.policy.in_keys,
        )

    def _load_arguments(self, worker: int, uncounted: int = 0) -> tuple[list[np.ndarray], int, int]:
        """Return the arguments of `Worker.load`; `uncounted` is the number of rollouts not yet in `vector_steps`."""
        taken = self.vector_steps[worker] + uncounted * self.steps
        return (
            policy_weights(self.policy),
            self.version(),
            random_steps_left(self.random_env_steps, self.env.num_envs, taken),
        )

    def _finish_rollout(self, rollout: Any) -> TensorDict:
        """Convert TorchRL's rollout `[W, n, T]` or `[n, T]` to Levin's, in env order, and update the counters."""
        if rollout.ndim > 2:
            rollout = rollout.flatten(0, -2)  # [W, n, T] -> [N, T]
        sender = [self.collector.worker] if isinstance(self.collector, AsyncCollector) else None  # None: all workers
        for worker in sender or range(self.workers):
            self.vector_steps[worker] += self.steps
        index = sender[0] * self.num_envs + torch.arange(self.num_envs) if sender else torch.arange(self.env.num_envs)
        for env, num_ended in zip(index.tolist(), rollout["next", "done"].sum((1, 2)).tolist(), strict=True):
            self.env.episodes[env] += num_ended
        data: dict[str, Any] = {key: rollout[key] for key in ("observation", "action", POLICY_VERSION)}
        data["next"] = {key: rollout["next", key] for key in AFTER}
        data[ENV_INDEX] = index.view(-1, 1, 1).expand(*rollout.shape, 1)
        return TensorDict(data, batch_size=rollout.shape)

    def _run_error(self, error: Exception) -> RunError:
        """Build an error that says in one sentence which worker ended, and why."""
        if isinstance(error, RunError) and not hasattr(error, "cause"):
            return error
        timed_out = f"did not come back within env.timeout={self.env.config.timeout:g} seconds"
        timed_out += " (raise env.timeout if its steps may take longer)"
        cause = getattr(error, "cause", None) or error  # Ray's errors hold the worker's own as `cause`
        name, reason = "a worker", summarize_error(cause)
        if "ActorDied" in type(error).__name__:
            reason = f"died, or {timed_out}"
        for worker, process in enumerate(getattr(self.collector, "procs", ())):
            if not process._closed and process.exitcode:
                name, code = f"worker {worker}", process.exitcode
                reason = timed_out if code == -signal.SIGALRM else f"ended with exit code {code}"
        for report in sorted(self.reports.glob("*")) if self.reports else []:
            name = f"worker {report.name}"
            reason, trace = json.loads(report.read_text(encoding="utf-8"))
            error.add_note(trace)
        return RunError(f"{name} of {self.workers} (collector={self.name}, {self.env.config.id}): {reason}")

    def shutdown(self, timeout: float | None = None, close_env: bool = True, raise_on_error: bool = True) -> None:
        """End the workers, Ray if this collector started it, and by default close the env."""
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
        """Do nothing: workers start after a resumed run has loaded its state, with the current episodes of `env`."""

    def set_seed(self, seed: int, static_seed: bool = False) -> int:
        raise RuntimeError(
            "every episode has its own seed already: pass `seed` to levin.collectors.factory.make_loader"
        )

    def state_dict(self) -> OrderedDict[str, Any]:
        return OrderedDict(vector_steps=list(self.vector_steps))

    def load_state_dict(self, state_dict: OrderedDict[str, Any]) -> None:
        self.vector_steps = list(state_dict["vector_steps"])
