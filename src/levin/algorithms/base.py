"""What every algorithm needs: counters, optimiser steps, replay, metrics. No mathematics."""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from time import perf_counter
from types import MethodType
from typing import Any, ClassVar

import torch
from lightning import LightningModule
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer, RMSprop

from levin.core import distributed
from levin.core.errors import ConfigError
from levin.core.spaces import EnvSpec, observation_dtypes
from levin.core.types import OptimizerName
from levin.data.replay import Replay
from levin.data.rollout import WholeEpisodes
from levin.nn import cuda_graphs
from levin.nn.networks import StochasticPolicy
from levin.nn.normalizers import ObservationNormalizer, RewardNormalizer
from levin.nn.parameters import FlatParameter, clip_grad_norm, flatten_parameters

Batch = Mapping[NestedKey, Tensor]  # what a loss reads: a TensorDict, or a dict of its tensors by the same keys
PROGRESS = ("env_steps", "updates", "iterations", "recorded")


def compile_loss(loss: Callable, *, dynamic: bool) -> Callable:
    """`torch.compile` of a function of a batch, as one graph; it draws the random numbers of the eager one.

    Args:
        loss: `batch, *tensors -> tensors`. It reads the batch by key and changes nothing but what it returns.
        dynamic: The batch has another size each time. Else every other size is compiled anew.

    Raises:
        ConfigError: There is no C++ compiler to do it with.
    """
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise ConfigError(f"algo.compile=true needs a C++ compiler, and {compiler} is not there")
    traced = torch.compile(loss, fullgraph=True, dynamic=dynamic, options={"fallback_random": True})

    def call(batch: TensorDictBase | dict[str, Tensor] | Tensor, *others: Any) -> Any:
        # A dict, since what guards a TensorDict takes longer than a small loss.
        return traced(dict(batch.items(include_nested=True)) if isinstance(batch, TensorDictBase) else batch, *others)

    return call


def standardize(values: Tensor) -> Tensor:
    """To mean 0 and deviation 1, over all ranks; a single one, which has no deviation, stays what it is."""
    if distributed.world_size() > 1:
        count = distributed.all_reduce_number(values.numel())
        deviation = values - distributed.all_reduce_sum(values.sum()) / count
        return deviation / ((distributed.all_reduce_sum(deviation.square().sum()) / (count - 1)).sqrt() + 1e-8)
    return (values - values.mean()) / (values.std() + 1e-8) if values.numel() > 1 else values


class Algorithm(LightningModule):
    """A LightningModule whose `training_step` is one iteration of the algorithm's outer loop.

    `trainer.global_step` counts calls of `optimizer.step`, so it is never used: `env_steps` and `updates` are ours.

    Args:
        env: Spaces and normalisation of the env (`levin.envs.factory.describe_env`); plain values.

    Raises:
        ConfigError: The algorithm can't act in that action space, or read that observation.
    """

    actions: ClassVar[tuple[str, ...]]  # action spaces it can act in: "box", "discrete", "multi_discrete"
    observations: ClassVar[tuple[str, ...]] = ("float32",)  # and "uint8": pixels
    lock_free: ClassVar[bool] = (
        False  # whether several processes may train it at once (levin.training.distributed.hogwild)
    )
    trunk: nn.Module  # of a stochastic actor, and
    actor: nn.Module  # itself: what `policy` is made of
    steps_per_iteration: int | WholeEpisodes  # vector steps of a rollout
    step_count: bool = False  # whether rollouts carry the number of each step in its episode
    random_env_steps: int = 0  # env steps with uniformly random actions before the policy is asked
    learning_starts: int  # env steps before the first update from replay
    replay_ratio: float  # updates from replay per env step
    batch_size: int  # transitions per update
    dream_steps_per_update: int = 0  # steps that are imagined
    collects: bool = True  # whether the next iteration has a rollout; else it has an empty one
    status: str = ""  # what the progress bar adds

    def __init__(self, env: EnvSpec, gamma: float) -> None:
        super().__init__()
        if env["action"]["type"] not in self.actions:
            raise ConfigError(
                f"{type(self).__name__} acts in {' and '.join(self.actions)} action spaces, "
                f"but the action space of {env['id']} is {env['action']['type']}"
            )
        if not observation_dtypes(env["observation"]) <= set(self.observations):
            names = {"float32": "vectors", "uint8": "pixels"}
            reads, shown = (
                {names[each] for each in kinds} for kinds in (self.observations, observation_dtypes(env["observation"]))
            )
            raise ConfigError(
                f"{type(self).__name__} reads {' and '.join(sorted(reads))}, but the observations of {env['id']} have "
                f"{' and '.join(sorted(shown - reads))}"
            )
        self.automatic_optimization = False
        self.save_hyperparameters(logger=False)  # the loggers get the whole config
        self.env = env
        self.env_steps = 0  # env steps taken, over all envs and ranks
        self.updates = 0  # calls of `update`
        self.iteration_begun = 0  # env steps before the rollout of this iteration
        self.iterations = 0  # begun; while a rollout is collected, those finished: the version of the policy
        self.buffer: Replay | None = None
        self._saved_buffer: dict[str, Any] | None = None
        self.observation_normalizer: nn.Module = nn.Identity()
        self.reward_normalizer: nn.Module = nn.Identity()
        if env["observation_clip"] is not None:
            self.observation_normalizer = ObservationNormalizer(
                tuple(env["observation"]["shape"]), env["observation_clip"]
            )
        if env["reward_clip"] is not None:
            self.reward_normalizer = RewardNormalizer(env["num_envs"], gamma, env["reward_clip"])
        self.recorded: dict[str, tuple[Tensor, int]] = {}  # name -> sum, count: since the last row of metrics
        self.sample_seconds = 0.0
        self.captured: tuple[str, ...] = ()  # methods that are CUDA graphs where there is a GPU

    def policy(self, *, deterministic: bool = False) -> TensorDictModule:
        """`observation -> action`, raw observations in; shares the parameters of this module.

        That of a stochastic `actor` behind a `trunk`; an algorithm whose networks are others overrides it.
        """
        chooser = StochasticPolicy(
            self.observation_normalizer,
            self.trunk,
            self.actor,
            deterministic=deterministic,
        )
        return TensorDictModule(chooser, in_keys=["observation"], out_keys=["action"])

    def transfer_batch_to_device(
        self, batch: TensorDictBase, device: torch.device, dataloader_idx: int
    ) -> TensorDictBase:
        # Lightning's own walks through a TensorDict entry by entry, also when there is nothing to move.
        return batch if device.type == "cpu" else batch.to(device, non_blocking=True)

    def on_train_batch_start(self, batch: TensorDictBase, batch_idx: int) -> None:
        self.iteration_begun = self.env_steps
        if isinstance(self.steps_per_iteration, WholeEpisodes):  # of which others have had longer or shorter ones
            self.env_steps += int(distributed.all_reduce_number(batch.shape.numel()))
        else:
            self.env_steps += (
                batch.shape.numel() * distributed.world_size()
            )  # of a TensorDict that is empty, numel is 1
        self.iterations += 1
        if isinstance(self.reward_normalizer, RewardNormalizer):
            self.reward_normalizer.update(batch["next", "reward"], batch["next", "done"])

    @property
    def clock(self) -> int:
        """What every `*.every` counts, and what names checkpoints and pictures: env steps, and more where none pass."""
        return self.env_steps

    @property
    def dream_steps(self) -> int:
        """Steps that were imagined, over all ranks."""
        return self.updates * self.dream_steps_per_update * distributed.world_size()

    def finished(self, total_env_steps: int) -> bool:
        """Whether the run is complete."""
        return self.env_steps >= total_env_steps

    def zero_grad(self, set_to_none: bool = False) -> None:
        """To zero, and not to None: gradients may be views of one vector. The Trainer calls it when a run begins."""
        super().zero_grad(set_to_none)

    def remaining(self, schedule_env_steps: int | None) -> float:
        """What a linear schedule is at: 1 in the first iteration, 0 from `schedule_env_steps` on; always 1 without."""
        return max(0.0, 1 - self.iteration_begun / schedule_env_steps) if schedule_env_steps else 1.0

    def on_evaluation(self, folder: Path) -> dict[str, float]:
        """Called with every evaluation, on the first rank: pictures in `folder`, and more numbers for the row."""
        return {}

    def imagine_pictures(self, observation: Any, length: int) -> Tensor | None:
        """Pictures `[length, C, H, W]` uint8 of a dream that begins with an observation `[1, *S]`; None: none."""
        return None

    def compile_losses(self, *names: str) -> None:
        """Compile these methods of this object. Raises ConfigError when there is no C++ compiler."""
        torch.compiler.reset()  # runs of one process do not count as recompilations of one another
        dynamic = isinstance(self.steps_per_iteration, WholeEpisodes)
        for name in names:
            setattr(self, name, compile_loss(getattr(self, name), dynamic=dynamic))

    def capture(self, *names: str) -> None:
        """Have these methods be CUDA graphs where all of the run is on one GPU; elsewhere they stay what they are."""
        self.captured = names

    def make_optimizer(self, name: OptimizerName, parameters: Iterable[nn.Parameter], lr: float) -> Optimizer:
        """Adam and RMSprop with the epsilon that on-policy codebases give them (1e-5), or plain SGD; on one vector."""
        parameters = [flatten_parameters(parameters)]
        if name == "adam":
            return Adam(parameters, lr=lr, eps=1e-5, fused=True)
        if name == "rmsprop":
            return RMSprop(parameters, lr=lr, alpha=0.99, eps=1e-5, foreach=False)
        return SGD(parameters, lr=lr, fused=True)

    def pull(self) -> None:
        """Take over what other processes have made of the parameters, where they are not simply shared."""

    def step(self, optimizer: Optimizer, loss: Tensor, max_grad_norm: float | None = None) -> None:
        """One step of one optimiser, the norm of its gradient clipped. Raises ValueError when the loss is no scalar."""
        if loss.ndim:
            raise ValueError(f"a loss is a scalar, got shape {tuple(loss.shape)}")
        parameters = [each for group in optimizer.param_groups for each in group["params"]]
        if isinstance(parameters[0], FlatParameter):
            parameters[0].zero()
        else:
            optimizer.zero_grad()
        self.manual_backward(loss)
        distributed.average_gradients(parameters)
        if max_grad_norm is not None:
            clip_grad_norm(parameters, max_grad_norm)
        optimizer.step()

    def full_precision(self) -> torch.autocast:
        """A context in which mixed precision is off: for what a rollout was collected with, and what must be exact."""
        return torch.autocast(self.device.type, enabled=False)

    def record(self, **metrics: Tensor) -> None:
        """Add to the means that the next row of metrics shows as `train/<name>`. Stays on the device."""
        for name, value in metrics.items():
            total, count = self.recorded.get(name, (0, 0))
            self.recorded[name] = (total + value.detach(), count + 1)

    def pop_metrics(self) -> dict[str, float]:
        """The means since the last call, and the seconds spent. The one place that waits for the device."""
        row = {f"train/{name}": float(total) / count for name, (total, count) in self.recorded.items()}
        if distributed.world_size() > 1:
            means = distributed.all_reduce_mean(torch.tensor(list(row.values()), device=self.device))
            row = dict(zip(row, means.tolist(), strict=True))
        row["time/sample"] = self.sample_seconds
        self.recorded, self.sample_seconds = {}, 0.0
        return row

    def normalize(self, batch: TensorDictBase) -> TensorDictBase:
        """The batch with its observations and rewards normalised, where the env asks for it."""
        if self.env["observation_clip"] is None and self.env["reward_clip"] is None:
            return batch
        batch = batch.copy()  # the tensors stay the same
        for key in ("observation", ("next", "observation")):
            batch[key] = self.observation_normalizer(batch[key])
        batch["next", "reward"] = self.reward_normalizer(batch["next", "reward"])
        return batch

    def replay(self) -> Iterator[TensorDictBase]:
        """The batches `[B]` of the updates now due: `replay_ratio` per env step after `learning_starts`.

        Counted from the start of the run, so that the remainder of a fraction is carried and survives a checkpoint.
        """
        assert self.buffer is not None
        due = int(self.replay_ratio * max(0, self.env_steps - self.learning_starts)) - self.updates
        while due > 0:
            num = min(due, self.buffer.batches_per_draw(self.batch_size))
            start = perf_counter()
            batches = self.normalize(self.buffer.sample(num, self.batch_size, self.device)).unbind(0)
            self.sample_seconds += perf_counter() - start
            for batch in batches:
                yield batch
                self.updates += 1
            due -= num

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["algorithm"] = type(self).__name__
        checkpoint["levin"] = {name: getattr(self, name) for name in PROGRESS}
        if self.buffer is not None:
            checkpoint["buffer"] = self.buffer.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for name in PROGRESS:
            setattr(self, name, checkpoint["levin"][name])
        self._saved_buffer = checkpoint.get("buffer")

    def on_train_start(self) -> None:
        # Only now is the device of the buffer known. Without its files (`load_from_checkpoint`) it is empty.
        self.recorded = {name: (total.to(self.device), count) for name, (total, count) in self.recorded.items()}
        if isinstance(self.reward_normalizer, RewardNormalizer):  # an episode that did not replay is over
            not_replayed = torch.as_tensor(self.trainer.train_dataloader.not_replayed)  # type: ignore[union-attr]
            self.reward_normalizer.running_return[not_replayed] = 0
        if self.buffer is not None and self._saved_buffer is not None and "data" in self._saved_buffer:
            self.buffer.load_state_dict(self._saved_buffer, self.device)
            self.buffer.restart(torch.as_tensor(self.trainer.train_dataloader.not_replayed))  # type: ignore[union-attr]
            self._saved_buffer = None
        if cuda_graphs.can_capture(self.device):
            for name in self.captured:
                method = MethodType(getattr(type(self), name), self)
                graph = cuda_graphs.Captured(method, lambda: self.recorded, self.trainer.optimizers, self.device)
                setattr(self, name, graph)
