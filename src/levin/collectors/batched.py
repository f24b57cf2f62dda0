"""Collector for TorchRL envs that step N envs as tensors: `collector=batched`.

Policy, env and rollout stay on one device. A rollout is a loop of tensor operations without a wait for the device, so a
simulator on a GPU is never held up by the CPU. The statistics of episodes are tensors, too, which `BatchedLoader` reads
when a row of metrics is written.

An env has to follow TorchRL's rules for batched envs: `_step` and `_reset` take and return a TensorDict `[N]`, and
`_reset` begins a new episode in the envs that `_reset` `[N, 1]` names. docs/batched_envs.md says it in detail.
"""

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor
from torchrl.collectors import BaseCollector
from torchrl.envs import EnvBase

from levin.collectors.loader import CollectorLoader
from levin.core import distributed, rng
from levin.core.errors import ConfigError, NotFiniteError
from levin.core.process import signals_blocked
from levin.core.spaces import ACTION_MASK, IS_FIRST, random_actions, random_allowed_actions, tensor_action_converter
from levin.data.rollout import POLICY_VERSION, policy_device, random_steps_left
from levin.envs.torchrl import TorchRLVectorEnv, as_path, bare_env, end_flags
from levin.envs.vector import SeededVectorEnv
from levin.nn.exploration import EpsilonGreedy

Path = tuple[str, ...]  # key of a tensor in a nested TensorDict
TOTALS = ("returns", "lengths", "count")  # sums over the episodes that have ended: returns, lengths, their number


class BatchedCollector(BaseCollector):
    """Collector that steps a batched `EnvBase` in a loop of tensor operations, on the device of the policy.

    The env is moved to that device and seeded at the first rollout; that of a resumed run has a new seed. Resets draw
    from the env's own random numbers or from torch's global generator, whose state is saved in checkpoints.

    A run continues bit for bit if the env declares its state: as `state_spec`, for entries of its TensorDict, or as
    buffers, which `state_dict` returns. Other envs begin new episodes.

    Args:
        env: Vector env of one batched `EnvBase`. Only its `EnvBase`, its spaces and its seeds are used.
        policy: Policy that acts; it has the inputs and outputs that `VectorCollector` describes.
        steps: Vector steps per rollout (T).
        random_env_steps: Number of env steps with uniformly random actions before the policy acts.
        step_count: Whether rollouts hold `step_count` `[N, T, 1]`, the index of each step within its episode, from 0.
        compile: Whether to compile a step of policy and env.

    Raises:
        ConfigError: The env is not one batched `EnvBase`.
    """

    def __init__(
        self,
        env: SeededVectorEnv,
        policy: TensorDictModule,
        *,
        steps: int,
        random_env_steps: int = 0,
        step_count: bool = False,
        compile: bool = False,  # noqa: A002
    ) -> None:
        super().__init__()
        self.vector_env, self.policy, self.steps = env, policy, steps
        self.random_env_steps, self.step_count = random_env_steps, step_count
        self.source = batched_source(env)
        self.env: EnvBase = self.source.unlimited[0]
        self.time_limit = self.source.time_limit
        self.takes_is_first = IS_FIRST in policy.in_keys
        self.vector_steps = 0
        self._now: dict[Path, Tensor] = {}  # entries [N, *] of the env's current TensorDict; empty: not begun
        self._open: dict[str, Tensor] = {}  # [N] each: return and length of the open episode, and `finite`
        self._totals: dict[str, Tensor] = {}  # `TOTALS` since `pop_totals`
        self._saved: OrderedDict[str, Any] | None = None  # state to continue from, until the first rollout
        self.looks_at_done = False  # whether envs are only reset in steps in which an episode ends
        self.not_continued = False  # whether the env could not be continued after a resume
        self._advance: Callable[..., tuple[Any, ...]] = self.advance
        self.compile = compile

    def iterator(self) -> Iterator[TensorDictBase]:
        while True:
            yield self.rollout()

    def rollout(self) -> TensorDict:
        """Collect the next rollout, `[N, T]` transitions."""
        if not self._now:
            self.begin()
        num_random = self.num_random
        steps: dict[Path, Tensor] = {}
        with torch.inference_mode():  # around the loop only: a loss can't use inference tensors
            given = self._random_actions(num_random)
            for t in range(self.steps):
                action = None if t >= num_random else self._masked_action() if given is None else given[:, t]
                step, self._now, self._open, self._totals = self._advance(self._now, self._open, self._totals, action)
                if not steps:
                    steps = self._allocate(step)
                for key, value in step.items():
                    steps[key][t] = value
        self.vector_steps += self.steps
        return self._assemble(steps)

    def begin(self) -> None:
        """Move the env to the device of the policy, and reset it or restore its state."""
        self.device = policy_device(self.policy)
        self.env = move(self.env, self.device)
        on_cpu = self.device.type == "cpu"
        # On the CPU, epsilon-greedy policies draw random numbers only where they are needed, which can't be compiled.
        compiles = self.compile and not (on_cpu and any(isinstance(m, EpsilonGreedy) for m in self.policy.modules()))
        # On the CPU, a look at `done` costs less than a reset; a GPU would have to be waited for.
        self.looks_at_done = on_cpu and not compiles
        # Read once: `EnvBase` looks them up in its specs, and its cache of them would be compiled again as it grows.
        self._action_key, self._reward_key, self._reset_keys = (
            self.env.action_key,
            self.env.reward_key,
            self.env.reset_keys,
        )
        self._to_env = tensor_action_converter(self.vector_env.action, self.vector_env.config.action, self.device)
        if compiles:
            torch.compiler.reset()  # else several runs in one process would count as recompilations
            options: dict[str, Any] = {"fallback_random": True}
            # Not as CUDA graphs of torch.compile: a step reads what the last one returned, which they overwrite.
            compiled = torch.compile(self.advance, fullgraph=True, dynamic=False, options=options)

            def first(*arguments: Any) -> tuple[Any, ...]:
                """Compile and take the first step; the compiler, a child process, would die of a signal."""
                self._advance = compiled
                with signals_blocked():
                    return compiled(*arguments)

            self._advance = first
        self._totals = {name: torch.zeros((), dtype=torch.float64, device=self.device) for name in TOTALS}
        # A resumed run takes a new seed, for envs with random numbers that are neither torch's nor in a buffer.
        with rng.preserved_state(), torch.inference_mode():  # many envs set the seed of torch's generator
            number = max(self.vector_steps, self.vector_env.episodes[0] + 1)
            self.env.set_seed(self.vector_env.episode_seed_of(0, number))
        if self._saved is not None:
            self._restore(self._saved)
            self._saved = None
        if not self._now:
            num = self.vector_env.num_envs
            with torch.inference_mode():
                self._now = copies(self.env.reset())
            self._open = {
                "return": torch.zeros(num, dtype=torch.float64, device=self.device),
                "length": torch.zeros(num, dtype=torch.int64, device=self.device),
                "finite": torch.ones(num, dtype=torch.bool, device=self.device),
            }

    def advance(
        self, now: dict[Path, Tensor], opened: dict[str, Tensor], totals: dict[str, Tensor], given: Tensor | None
    ) -> tuple[dict[Path, Tensor], dict[Path, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """Take one step in all envs, and begin a new episode where one has ended. A function of tensors only.

        Args:
            now: Entries `[N, *]` of the env's current TensorDict.
            opened: Return and length `[N]` of the open episodes, and whether all numbers so far were finite.
            totals: Sums over the episodes that have ended.
            given: Actions `[N, *A]`; None: the policy acts.

        Returns:
            Step `[N, *]` of the rollout, and the next `now`, `opened` and `totals`.
        """
        env, num = self.env, self.vector_env.num_envs
        observation = self.observe(now)
        action, state = (given, None) if given is not None else self._act(observation, opened["length"] == 0)
        before = TensorDict(now, batch_size=[num], device=self.device)
        before.set(self._action_key, self.source.to_action(self._to_env(action)))
        after = env._step(before)
        reward = after.get(self._reward_key).reshape(num).float()
        terminated, truncated = (flag.reshape(-1) for flag in end_flags(after))
        length = opened["length"] + 1
        if self.time_limit is not None:
            truncated = truncated | (length >= self.time_limit)
        done = terminated | truncated
        now = now | {key: value for key, value in copies(after).items() if key in now}
        following = self.observe(now)
        finite = opened["finite"] & reward.isfinite()
        for part in following.values() if isinstance(following, dict) else [following]:
            finite = finite & (part.reshape(num, -1).isfinite().all(1) if part.is_floating_point() else True)
        step: dict[Path, Tensor] = {("action",): action, **prefixed(("observation",), observation)}
        step |= {**prefixed(("next", "observation"), following), ("next", "reward"): reward.unsqueeze(-1)}
        step |= {("next", "terminated"): terminated.unsqueeze(-1), ("next", "truncated"): truncated.unsqueeze(-1)}
        step["next", "done"] = done.unsqueeze(-1)
        if state is not None:
            step[as_path(self.policy.out_keys[1])] = state
        if self.step_count:
            step["step_count",] = opened["length"].unsqueeze(-1)
        total = opened["return"] + reward
        ended = {"returns": (total * done).sum(), "lengths": (length * done).sum(), "count": done.sum()}
        totals = {name: totals[name] + ended[name] for name in TOTALS}
        if not self.looks_at_done or done.any():
            now = self._reset(now, done)
        return step, now, {"return": total * ~done, "length": length * ~done, "finite": finite}, totals

    def observe(self, now: dict[Path, Tensor]) -> Any:
        """Return the network input for an env's TensorDict: `[N, *S]`, or a dict of such tensors."""
        parts = [now[key] for key in self.source.keys]
        parts = [part if part.dtype == torch.uint8 else part.float() for part in parts]
        names = [".".join(key) for key in self.source.keys]
        inputs = self.vector_env.read.tensors(dict(zip(names, parts, strict=True)) if len(parts) > 1 else parts[0])
        return inputs.to(getattr(torch, self.vector_env.observation["dtype"])) if isinstance(inputs, Tensor) else inputs

    def _act(self, observation: Any, is_first: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the policy's actions `[N, *A]`, and its second output (None: it has none)."""
        inputs = [observation, is_first.unsqueeze(-1)] if self.takes_is_first else [observation]
        chosen = self.policy.module(*inputs)
        return chosen if isinstance(chosen, tuple) else (chosen, None)

    def _reset(self, now: dict[Path, Tensor], done: Tensor) -> dict[Path, Tensor]:
        """Begin a new episode in the envs of the mask `[N]`; the entries of the others stay as they are."""
        flags = done.unsqueeze(-1)  # [N, 1]
        keys = {as_path(key): flags for key in self._reset_keys}
        reset = entries(self.env._reset(TensorDict(keys, batch_size=done.shape, device=self.device)))
        chosen = {key: value for key, value in reset.items() if key in now}
        return now | {
            key: torch.where(done.reshape(-1, *[1] * (value.ndim - 1)), value, now[key])
            for key, value in chosen.items()
        }

    @property
    def num_random(self) -> int:
        """Number of steps of the next rollout with random actions."""
        left = random_steps_left(self.random_env_steps, self.vector_env.num_envs, self.vector_steps)
        return min(self.steps, left)

    def _random_actions(self, steps: int) -> Tensor | None:
        """Return random actions `[N, steps, *A]`; None if action masks decide in each step which are allowed."""
        if self.vector_env.read.mask or not steps:
            return None
        space = self.vector_env.single_action_space
        return torch.from_numpy(random_actions(space, self.vector_env.num_envs, steps)).to(self.device)

    def _masked_action(self) -> Tensor:
        """Return random actions `[N, *A]` that the current action masks allow."""
        return random_allowed_actions(self.vector_env.single_action_space, self.observe(self._now)[ACTION_MASK])

    def _allocate(self, step: dict[Path, Tensor]) -> dict[Path, Tensor]:
        """Allocate the tensors `[T, N, *]` of one rollout: time first, so that a step is written in one piece."""
        with torch.inference_mode(False):
            return {
                key: torch.empty((self.steps, *value.shape), dtype=value.dtype, device=value.device)
                for key, value in step.items()
            }

    def _assemble(self, steps: dict[Path, Tensor]) -> TensorDict:
        """Build the rollout `[N, T]`."""
        rollout = TensorDict({}, batch_size=[self.vector_env.num_envs, self.steps], device=self.device)
        for key, value in steps.items():
            rollout.set(key, value.transpose(0, 1))
        return rollout

    def pop_totals(self) -> dict[str, float]:
        """Return the sums over the episodes that have ended since the last call. This waits for the device."""
        self.check_finite()
        totals = {name: float(value) for name, value in self._totals.items()}
        self._totals = {name: torch.zeros_like(value) for name, value in self._totals.items()}
        return totals

    def check_finite(self) -> None:
        """Raise a NotFiniteError if a reward or an observation was NaN or infinite. This waits for the device."""
        if self._open and not bool((finite := self._open["finite"]).all()):
            env = int((~finite).nonzero()[0, 0])
            raise NotFiniteError(
                f"{self.vector_env.config.id} gave an observation or a reward that is not finite, or a discrete value "
                f"outside its space: env {env}, at most {self.vector_steps} vector steps after the start"
            )

    @property
    def declares_state(self) -> bool:
        """Whether the env declares its state, so that it can be saved."""
        env = bare_env(self.env)
        return bool(env.state_dict()) or not env.state_spec.is_empty()

    @property
    def _parts(self) -> dict[str, EnvBase]:
        """The env and, below its transforms, the bare one: each has a `state_dict` of its own."""
        return {"env": self.env, "bare": bare_env(self.env)}

    def state_dict(self) -> OrderedDict[str, Any]:
        """Return the state as tensors and plain values: that of the env, counts of open episodes, totals."""
        if self._saved is not None:
            return self._saved
        self.check_finite()
        state: OrderedDict[str, Any] = OrderedDict(vector_steps=self.vector_steps, declared=self.declares_state)
        if self._now:
            state["now"] = {".".join(key): value.clone() for key, value in self._now.items()}
            for name, env in self._parts.items():
                state[name] = {key: value.clone() for key, value in env.state_dict().items()}
            state["open"] = {key: value.clone() for key, value in self._open.items()}
            state["totals"] = {key: value.clone() for key, value in self._totals.items()}
        return state

    def load_state_dict(self, state_dict: OrderedDict[str, Any]) -> None:
        """Continue from a saved state, where the env has declared it. Else new episodes begin."""
        self.vector_steps = state_dict["vector_steps"]
        self.not_continued = "now" in state_dict and not state_dict["declared"]
        if self.not_continued:
            warnings.warn(
                f"{self.vector_env.config.id} does not declare its state (docs/batched_envs.md): its open episodes are "
                "truncated, and this run differs from an uninterrupted one",
                stacklevel=1,
            )
        self._now = {}
        self._saved = state_dict

    def _restore(self, state: OrderedDict[str, Any]) -> None:
        """Restore the saved totals, and the env if it has declared its state."""
        for name, value in state.get("totals", {}).items():
            self._totals[name] = value.to(self.device)
        if "now" in state and state["declared"]:
            for name, env in self._parts.items():
                env.load_state_dict(state[name])
            self._now = {tuple(key.split(".")): value.to(self.device) for key, value in state["now"].items()}
            self._open = {key: value.to(self.device) for key, value in state["open"].items()}

    def shutdown(self, timeout: float | None = None, close_env: bool = True, raise_on_error: bool = True) -> None:
        if close_env:
            self.vector_env.close()

    def set_seed(self, seed: int, static_seed: bool = False) -> int:
        raise RuntimeError("the env has its seed already: pass `seed` to levin.envs.factory.make_env")


class BatchedLoader(CollectorLoader):
    """`CollectorLoader` of a `BatchedCollector`, which counts episodes itself, on the device."""

    collector: BatchedCollector

    def inspect(self, rollout: TensorDict, version: int) -> None:
        number = torch.full((1, 1, 1), version, device=rollout.device)
        rollout[POLICY_VERSION] = number.expand(*rollout.shape, 1)

    def check_finite(self) -> None:
        self.collector.check_finite()

    def pop_episodes(self) -> dict[str, float]:
        parts = distributed.gather_objects(self.collector.pop_totals())
        returns, lengths, count = (sum(part.get(name, 0.0) for part in parts) for name in TOTALS)
        if not count:
            return {}
        return {"episode/return": returns / count, "episode/length": lengths / count, "episode/count": count}

    def state_dict(self) -> dict[str, Any]:
        return {"collector": self.collector.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.collector.load_state_dict(state_dict["collector"])
        self.not_replayed[:] = self.collector.not_continued


def batched_source(env: SeededVectorEnv) -> TorchRLVectorEnv:
    """Return the vector env that holds the one `EnvBase` with a batch size `[N]`, of which `env` consists.

    Raises:
        ConfigError: It does not consist of one.
    """
    source = env.env
    if not isinstance(source, TorchRLVectorEnv):
        raise ConfigError(
            f"collector=batched steps the envs of one batched TorchRL env, and env.family={env.config.family} is not "
            "one: set env=cartpole_batched, env.family=torchrl with env.target, or collector=vector"
        )
    if not source.batched or len(source.envs) > 1:
        made = f"{len(source.envs)} envs of the batch size {list(source.envs[0].batch_size)}"
        raise ConfigError(
            f"collector=batched needs one env with the batch size [{env.num_envs}], but env.target makes {made}: let "
            "it take the argument num_envs, or set collector=vector"
        )
    return source


def entries(data: TensorDictBase) -> dict[Path, Tensor]:
    """Return the tensors of a TensorDict by their keys, without end flags, rewards and what is not a tensor.

    Entries of the same names within a nested TensorDict stay: simulators keep them in their state, as Brax does.
    """
    skipped = {"done", "terminated", "truncated", "reward", "_reset", "next"}
    items = data.items(include_nested=True, leaves_only=True)
    return {as_path(key): value for key, value in items if as_path(key)[0] not in skipped and torch.is_tensor(value)}


def copies(data: TensorDictBase) -> dict[Path, Tensor]:
    """Return `entries` as copies: an env may overwrite in the next step what it has returned."""
    return {key: value.clone() for key, value in entries(data).items()}


def prefixed(key: Path, observation: Any) -> dict[Path, Tensor]:
    """Return an observation, a tensor or a dict of tensors, as entries of a TensorDict under a key."""
    if isinstance(observation, dict):
        return {(*key, name): part for name, part in observation.items()}
    return {key: observation}


def move(env: EnvBase, device: torch.device) -> EnvBase:
    """Return the env on a device.

    Raises:
        ConfigError: The env was made for another device.
    """
    if env.device is not None and env.device.type not in ("cpu", device.type):
        raise ConfigError(f"the env is on {env.device}, but the policy on {device}: set trainer.accelerator=gpu")
    return env if (env.device or torch.device("cpu")) == device else env.to(device)
