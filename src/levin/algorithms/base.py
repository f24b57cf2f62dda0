"""Base class of all algorithms: counters, optimiser steps, replay and metrics, but no mathematics."""

import os
import shutil
import sysconfig
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
from torchmetrics import Metric

from levin.core import distributed
from levin.core.errors import ConfigError
from levin.core.spaces import EnvSpec, has_mask, observation_dtypes
from levin.core.types import OptimizerName
from levin.core.validate import as_count
from levin.data.replay import Replay, to_device
from levin.data.rollout import WholeEpisodes
from levin.nn import cuda_graphs
from levin.nn.networks import StochasticPolicy
from levin.nn.normalizers import RewardNormalizer, make_observation_normalizer
from levin.nn.parameters import FlatParameter, clip_grad_norm, flatten_parameters

Batch = Mapping[NestedKey, Tensor]  # input of a loss: a TensorDict, or a dict of tensors with the same keys
PROGRESS = ("env_steps", "updates", "iterations", "recorded")


def compile_loss(loss: Callable, *, dynamic: bool) -> Callable:
    """Compile a loss with `torch.compile` as one graph that samples the same random numbers as the eager loss.

    Args:
        loss: Function `batch, *tensors -> tensors`. It must read the batch by key and have no side effects.
        dynamic: Whether the batch size varies. If false, every new size compiles the loss again.

    Raises:
        ConfigError: No C++ compiler is installed, or no headers of Python.
    """
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise ConfigError(
            f"algo.compile=true needs a C++ compiler, but {compiler} was not found: "
            "install it, name another one in the environment variable CXX, or set algo.compile=false"
        )
    searched = [sysconfig.get_path("include")]
    searched += [
        each for name in ("CPATH", "CPLUS_INCLUDE_PATH") for each in os.environ.get(name, "").split(os.pathsep)
    ]
    if not any((Path(folder) / "Python.h").is_file() for folder in searched):
        raise ConfigError(
            f"algo.compile=true needs the headers of Python, but {searched[0]}/Python.h was not found: install them "
            "(python3-dev on Debian and Ubuntu), name their folder in the environment variable CPATH, or set "
            "algo.compile=false"
        )
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, options={"fallback_random": True})

    def call(batch: TensorDictBase | dict[str, Tensor] | Tensor, *others: Any) -> Any:
        # Pass a dict, since torch.compile's guards on a TensorDict take longer than a small loss.
        return compiled(dict(batch.items(include_nested=True)) if isinstance(batch, TensorDictBase) else batch, *others)

    return call


def standardize(values: Tensor) -> Tensor:
    """Scale values to mean 0 and standard deviation 1 over all ranks; return a single value unchanged."""
    if distributed.world_size() > 1:
        count = distributed.all_reduce_number(values.numel())
        deviation = values - distributed.all_reduce_sum(values.sum()) / count
        return deviation / ((distributed.all_reduce_sum(deviation.square().sum()) / (count - 1)).sqrt() + 1e-8)
    return (values - values.mean()) / (values.std() + 1e-8) if values.numel() > 1 else values


class Algorithm(LightningModule):
    """A LightningModule whose `training_step` is one iteration of the algorithm's outer loop.

    Progress is counted by `env_steps` and `updates`. `trainer.global_step` is never used, because it counts calls of
    `optimizer.step`.

    Args:
        env: Spaces and normalisation of the env in plain values (`levin.envs.factory.describe_env`).
        gamma: Discount factor of the return by whose standard deviation `env.normalize_reward` divides rewards.

    Raises:
        ConfigError: The algorithm does not support the env's action space, observations, masks or normalisation.
    """

    # Names of attributes that need not be saved; those of base classes are added. Every other attribute that changes
    # during a run is saved in its checkpoints (levin.runs.extra_state).
    not_saved: ClassVar[tuple[str, ...]] = (
        *(*PROGRESS, "logged", "buffer", "_saved_buffer", "env"),  # saved by `on_save_checkpoint`, or constant
        *("iteration_begun", "iterations_here", "sample_seconds", "before_zero_grad", "before_optimizer_step"),
        "uncompiled",
    )
    actions: ClassVar[tuple[str, ...]]  # supported action spaces: "box", "discrete", "multi_discrete"
    observations: ClassVar[tuple[str, ...]] = ("float32",)  # supported observation dtypes; "uint8": pixels
    normalization: ClassVar[bool] = True  # whether the env may normalise observations and rewards
    action_masks: ClassVar[bool] = False  # whether the policy and the targets obey action masks
    lock_free: ClassVar[bool] = False  # whether Hogwild workers may train it (levin.training.distributed.hogwild)
    trunk: nn.Module  # observation -> features; part of the default `policy`
    actor: nn.Module  # in the default `policy`: features -> distribution over actions
    steps_per_iteration: int | WholeEpisodes  # length of a rollout: vector steps, or whole episodes
    step_count: bool = False  # whether rollouts contain `step_count`, the number of each step in its episode
    random_env_steps: int = 0  # env steps with uniformly random actions before the policy acts
    learning_starts: int  # env steps before the first update from replay
    replay_ratio: float  # updates from replay per env step
    batch_size: int  # transitions per update
    # Env steps over which linear schedules fall to 0, and beta of prioritized replay rises to 1; None: both stay.
    schedule_env_steps: int | None = None
    dream_steps_per_update: int = 0  # imagined steps per update
    collects: bool = True  # whether the next iteration collects env steps; if not, its rollout is empty
    status: str = ""  # text that the progress bar appends

    def __init__(self, env: EnvSpec, gamma: float) -> None:
        super().__init__()
        if env["action"]["type"] not in self.actions:
            raise ConfigError(
                f"{type(self).__name__} acts in {' and '.join(self.actions)} action spaces, "
                f"but the action space of {env['id']} is {env['action']['type']}: choose another algo or env"
            )
        if not observation_dtypes(env["observation"]) <= set(self.observations):
            names = {"float32": "vectors", "uint8": "pixels"}
            supported, observed = (
                {names[dtype] for dtype in dtypes}
                for dtypes in (self.observations, observation_dtypes(env["observation"]))
            )
            raise ConfigError(
                f"{type(self).__name__} reads {' and '.join(sorted(supported))}, "
                f"but the observations of {env['id']} contain {' and '.join(sorted(observed - supported))}: "
                "choose another algo or env"
            )
        if has_mask(env["observation"]) and not self.action_masks:
            raise ConfigError(
                f"{type(self).__name__} does not obey action masks: set env.action_mask=null, or choose another algo, "
                "such as dqn, ppo, a2c or sac_discrete"
            )
        if not self.normalization and (env["observation_clip"] is not None or env["reward_clip"] is not None):
            raise ConfigError(
                f"{type(self).__name__} needs unnormalized observations and rewards: set "
                "env.normalize_observation=false and env.normalize_reward=false"
            )
        self.automatic_optimization = False
        self.save_hyperparameters(logger=False)  # the loggers receive the whole config instead
        self.env = env
        self.env_steps = 0  # env steps taken, over all envs and ranks
        self.updates = 0  # calls of `update`
        self.iteration_begun = 0  # env steps taken before this iteration's rollout
        self.iterations = 0  # iterations begun, each after its rollout; during collection it is the policy version
        self.iterations_here = 0  # iterations begun by this process
        self.buffer: Replay | None = None
        self._saved_buffer: dict[str, Any] | None = None
        self.observation_normalizer: nn.Module = nn.Identity()
        self.reward_normalizer: nn.Module = nn.Identity()
        if env["observation_clip"] is not None:
            self.observation_normalizer = make_observation_normalizer(env["observation"], env["observation_clip"])
        if env["reward_clip"] is not None:
            self.reward_normalizer = RewardNormalizer(env["num_envs"], gamma, env["reward_clip"])
        self.recorded: dict[str, tuple[Tensor, int]] = {}  # name -> sum and count since the last row of metrics
        self.logged: dict[str, tuple[float, int]] = {}  # the same of values that callbacks log
        self.sample_seconds = 0.0
        self.uncompiled: set[str] = set()  # names of methods that will be compiled when they are first called
        self.captured: tuple[str, ...] = ()  # names of methods that run as CUDA graphs on a GPU
        # Hooks `on_before_zero_grad` and `on_before_optimizer_step` of this run (levin.training.hooks).
        self.before_zero_grad: tuple[Callable[[Optimizer], None], ...] = ()
        self.before_optimizer_step: tuple[Callable[[Optimizer], None], ...] = ()

    def __setattr__(self, name: str, value: Any) -> None:
        # The Trainer sets an attribute before and after every hook, and nn.Module's version takes longer than a hook.
        if name in self.__dict__ and (value is None or isinstance(value, str | int | float)):
            self.__dict__[name] = value
            return
        if isinstance(value, nn.Module) and name in self.__dict__.get("_modules", ()) and self.iterations_here:
            raise RuntimeError(
                f"self.{name} is replaced in training, but the acting policy and the optimisers keep the old module: "
                f"copy into it, as with self.{name}.load_state_dict(...)"
            )
        super().__setattr__(name, value)

    def policy(self, *, deterministic: bool = False) -> TensorDictModule:
        """Build the policy `observation -> action` for raw observations; it shares the parameters of this module.

        The policy that collects is built once per process. A value that changes in training, such as the epsilon of
        DQN, must therefore be a buffer of a module: a Python number would stay as it was.

        This default uses `trunk` and a stochastic `actor`. Algorithms with other networks override it.
        """
        module = StochasticPolicy(
            self.observation_normalizer,
            self.trunk,
            self.actor,
            deterministic=deterministic,
        )
        return TensorDictModule(module, in_keys=["observation"], out_keys=["action"])

    def transfer_batch_to_device(
        self, batch: TensorDictBase, device: torch.device, dataloader_idx: int
    ) -> TensorDictBase:
        # Lightning's version visits every entry of a TensorDict, even when there is nothing to move.
        return to_device(batch, device)

    def on_train_batch_start(self, batch: TensorDictBase, batch_idx: int) -> None:
        self.iteration_begun = self.env_steps
        if isinstance(self.steps_per_iteration, WholeEpisodes):  # their lengths differ between ranks
            self.env_steps += int(distributed.all_reduce_number(batch.shape.numel()))
        else:
            # Not `batch.numel()`, which is 1 for an empty TensorDict.
            self.env_steps += batch.shape.numel() * distributed.world_size()
        self.iterations += 1
        self.iterations_here += 1
        if isinstance(self.reward_normalizer, RewardNormalizer):
            self.reward_normalizer.update(batch["next", "reward"], batch["next", "done"])

    @property
    def clock(self) -> int:
        """Progress counter: env steps, plus other progress in stages without env steps.

        Every `*.every` is an interval of this counter, and checkpoints and pictures are named by it.
        """
        return self.env_steps

    @property
    def dream_steps(self) -> int:
        """Number of imagined steps, over all ranks."""
        return self.updates * self.dream_steps_per_update * distributed.world_size()

    def finished(self, total_env_steps: int) -> bool:
        """Return whether the run is complete."""
        return self.env_steps >= total_env_steps

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Set gradients to zero, by default not to None, because they may be views of one vector.

        The Trainer calls this when a run begins.
        """
        super().zero_grad(set_to_none)

    @property
    def remaining(self) -> float:
        """Fraction of `schedule_env_steps` that is left: falls linearly from 1 to 0; always 1 if it is None."""
        return max(0.0, 1 - self.iteration_begun / self.schedule_env_steps) if self.schedule_env_steps else 1.0

    def scheduled(self, value: float, schedule: str) -> float:
        """Return the value in this iteration; the schedule `linear` lowers it to 0 at `schedule_env_steps`."""
        return value * self.remaining if schedule == "linear" else value

    def on_evaluation(self, folder: Path) -> dict[str, float]:
        """Write pictures to `folder` and return additional metrics of an evaluation.

        The first rank calls this at every evaluation.
        """
        return {}

    def imagine_pictures(self, observation: Any, length: int) -> Tensor | None:
        """Return pictures `[length, C, H, W]` uint8 of an imagined episode, or None if the algorithm has none.

        Args:
            observation: First observation of the episode, `[1, *S]`.
            length: Number of pictures.
        """
        return None

    def compile_losses(self, *names: str) -> None:
        """Replace these methods by compiled ones. Raises ConfigError if they can't be compiled here."""
        self.uncompiled = {*names}
        torch.compiler.reset()  # else several runs in one process would count as recompilations
        dynamic = isinstance(self.steps_per_iteration, WholeEpisodes)
        for name in names:
            setattr(self, name, self._note_call(name, compile_loss(getattr(self, name), dynamic=dynamic)))

    def _note_call(self, name: str, compiled: Callable) -> Callable:
        """Return a function that calls a compiled method, and notes that it has been compiled."""

        def call(*arguments: Any) -> Any:
            self.uncompiled.discard(name)
            return compiled(*arguments)

        return call

    def capture(self, *names: str) -> None:
        """Run these methods as CUDA graphs if the whole run is on one GPU; otherwise they stay as they are."""
        self.captured = names

    def make_optimizer(self, name: OptimizerName, parameters: Iterable[nn.Parameter], lr: float) -> Optimizer:
        """Build an optimiser that steps on one vector of all parameters.

        Adam and RMSprop have the epsilon of common on-policy code (1e-5); SGD is plain.
        """
        parameters = [flatten_parameters(parameters)]
        if name == "adam":
            return Adam(parameters, lr=lr, eps=1e-5, fused=True)
        if name == "rmsprop":
            return RMSprop(parameters, lr=lr, alpha=0.99, eps=1e-5, foreach=False)
        return SGD(parameters, lr=lr, fused=True)

    def pull(self) -> None:
        """Update the local parameters from the shared ones; does nothing where the algorithm has no local copy."""

    def step(self, optimizer: Optimizer, loss: Tensor, max_grad_norm: float | None = None) -> None:
        """Take one optimiser step on a scalar loss, with the gradient norm clipped to `max_grad_norm`.

        Raises:
            ValueError: The loss is not a scalar.
        """
        if loss.ndim:
            raise ValueError(f"a loss must be a scalar, got shape {tuple(loss.shape)}")
        for hook in self.before_zero_grad:
            hook(optimizer)
        parameters = [each for group in optimizer.param_groups for each in group["params"]]
        for each in parameters:
            if isinstance(each, FlatParameter):
                each.zero()
            else:
                each.grad = None
        self.manual_backward(loss)
        distributed.average_gradients(parameters)
        for hook in self.before_optimizer_step:
            hook(optimizer)
        if max_grad_norm is not None:
            clip_grad_norm(parameters, max_grad_norm)
        optimizer.step()

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Compute the gradients of a loss, each in the precision of its forward computation.

        Under mixed precision, the products of a backward pass would be rounded even where the forward pass is exact.
        """
        with self.full_precision():
            super().manual_backward(loss, *args, **kwargs)

    def full_precision(self) -> torch.autocast:
        """Return a context without mixed precision, to match collection or for results that must be exact."""
        return torch.autocast(self.device.type, enabled=False)

    def record(self, **metrics: Tensor | float) -> None:
        """Add values to the means `train/<name>` of the next row of metrics, without waiting for the device.

        Raises:
            ValueError: A tensor holds more than one number.
        """
        for name, value in metrics.items():
            total, count = self.recorded.get(name, (0, 0))
            number = value.detach() if isinstance(value, Tensor) else torch.tensor(float(value))
            number = number if number.is_floating_point() else number.float()  # a count, too, can be NaN in the means
            if number.numel() != 1:
                raise ValueError(
                    f"record({name}=...) takes one number, got a tensor {list(number.shape)}: take its mean"
                )
            self.recorded[name] = (total + number, count + 1)

    def log(self, name: str, value: Any, *_: Any, **__: Any) -> None:
        """Add a value to the mean `name` of the next row of metrics, and let monitors read it.

        This takes the place of Lightning's `log`, whose x-axis is a count of batches. For use in callbacks: unlike
        `record` it waits for the device. Other arguments of Lightning's method have no effect.
        """
        number = float(value.compute() if isinstance(value, Metric) else value)
        total, count = self.logged.get(name, (0.0, 0))
        self.logged[name] = (total + number, count + 1)
        self.trainer.callback_metrics[name] = torch.tensor(number)

    def pop_logged(self) -> dict[str, float]:
        """Return the means of the values that callbacks have logged since the last call, and reset them."""
        means = {name: total / count for name, (total, count) in self.logged.items()}
        self.logged = {}
        return means

    def pop_metrics(self) -> dict[str, float]:
        """Return the means and the sampling seconds since the last call, and reset them. This waits for the device."""
        metrics = {f"train/{name}": float(total) / count for name, (total, count) in self.recorded.items()}
        if distributed.world_size() > 1:
            ranks = distributed.gather_objects(metrics)  # some metrics may be recorded on a few ranks only
            names = dict.fromkeys(name for each in ranks for name in each)
            values = {name: torch.tensor([each[name] for each in ranks if name in each]) for name in names}
            metrics = {name: float(each.mean()) for name, each in values.items()}
        metrics["time/sample"] = self.sample_seconds
        self.recorded, self.sample_seconds = {}, 0.0
        return metrics

    def normalize(self, batch: TensorDictBase) -> TensorDictBase:
        """Return the batch with normalised observations and rewards, if the env is configured to normalise them."""
        if self.env["observation_clip"] is None and self.env["reward_clip"] is None:
            return batch
        batch = batch.copy()  # a shallow copy: the tensors of the original stay as they are
        for key in ("observation", ("next", "observation")):
            batch[key] = self.observation_normalizer(batch[key])
        batch["next", "reward"] = self.reward_normalizer(batch["next", "reward"])
        return batch

    def replay(self) -> Iterator[TensorDictBase]:
        """Yield the batches `[B]` of all updates due now: `replay_ratio` per env step after `learning_starts`.

        Due updates are counted from the start of the run, so fractions carry over to later iterations and resumed runs.
        """
        assert self.buffer is not None
        self.buffer.anneal(self.remaining)
        due = int(self.replay_ratio * max(0, self.env_steps - self.learning_starts)) - self.updates
        while due > 0 and self.buffer.ready:
            num = min(due, self.buffer.batches_per_draw(self.batch_size))
            start = perf_counter()
            batches = self.buffer.sample(num, self.batch_size, self.device, self.normalize).unbind(0)
            self.sample_seconds += perf_counter() - start
            for batch in batches:
                yield batch
                self.updates += 1
            due -= num

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["algorithm"] = type(self).__name__
        checkpoint["levin"] = {name: getattr(self, name) for name in PROGRESS}
        if self.logged:
            checkpoint["logged"] = dict(self.logged)
        if self.buffer is not None:
            checkpoint["buffer"] = self.buffer.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for name in PROGRESS:
            saved = checkpoint["levin"][name]
            setattr(self, name, saved if name == "recorded" else as_count(name, saved))
        self.logged = dict(checkpoint.get("logged", {}))
        self._saved_buffer = checkpoint.get("buffer")

    def restore_buffer(self) -> None:
        """Restore the replay buffer of the loaded checkpoint, once the device is known and unless that is done.

        Without the buffer's files (`load_from_checkpoint`) it stays empty.
        """
        if self.buffer is not None and self._saved_buffer is not None and "data" in self._saved_buffer:
            self.buffer.load_state_dict(self._saved_buffer, self.device)
            self.buffer.restart(torch.as_tensor(self.trainer.train_dataloader.not_replayed))  # type: ignore[union-attr]
            self._saved_buffer = None

    def on_train_start(self) -> None:
        self.recorded = {name: (total.to(self.device), count) for name, (total, count) in self.recorded.items()}
        if isinstance(self.reward_normalizer, RewardNormalizer):  # an episode that a resume could not replay is over
            not_replayed = torch.as_tensor(self.trainer.train_dataloader.not_replayed)  # type: ignore[union-attr]
            self.reward_normalizer.running_return[not_replayed] = 0
        self.restore_buffer()
        if cuda_graphs.can_capture(self.device):
            for name in self.captured:
                method = MethodType(getattr(type(self), name), self)
                graph = cuda_graphs.Captured(method, lambda: self.recorded, self.trainer.optimizers, self.device)
                setattr(self, name, graph)
