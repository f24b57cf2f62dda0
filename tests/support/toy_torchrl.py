"""Small TorchRL envs with predictable transitions. Targets: `toy_torchrl:line` and so on."""

from functools import partial

import torch
from tensordict import TensorDict
from torchrl.data import Bounded, Categorical, Composite, OneHot, Unbounded
from torchrl.envs import (
    Compose,
    EnvBase,
    GymEnv,
    ObservationNorm,
    ParallelEnv,
    RewardSum,
    SerialEnv,
    StepCounter,
    TransformedEnv,
)


class Line(EnvBase):
    """Point on a line with the reward -|position|; terminates within 0.05 of 0 and is never truncated.

    Resets and steps sample from torch's global generator.

    Args:
        batch: Batch size B of the env `[B]`; None for an env without a batch dimension `[]`.
        choices: None for continuous actions; `categorical` or `one_hot` for three discrete actions.
        parts: Whether the observation is split into position and speed.
        mask: Whether the observation also has an action mask, which forbids to move away from 0; such an action raises.
    """

    def __init__(
        self, batch: int | None = None, choices: str | None = None, parts: bool = False, mask: bool = False
    ) -> None:
        shape = () if batch is None else (batch,)
        super().__init__(batch_size=shape)
        self.choices, self.parts, self.mask = choices, parts, mask
        where = {"position": Unbounded((*shape, 1)), "speed": Unbounded((*shape, 2))} if parts else {}
        where = where or {"observation": Unbounded((*shape, 1))}
        where |= {"action_mask": Categorical(2, shape=(*shape, 3), dtype=torch.bool)} if mask else {}
        self.observation_spec = Composite(where, shape=shape)
        self.action_spec = {
            None: Bounded(-0.5, 0.5, (*shape, 1)),
            "categorical": Categorical(3, shape=shape),
            "one_hot": OneHot(3, shape=(*shape, 3)),
        }[choices]
        self.reward_spec = Unbounded((*shape, 1))

    def _reset(self, tensordict, **kwargs):
        start = torch.rand(*self.batch_size, 1) * 2 - 1
        mask = None if tensordict is None else tensordict.get("_reset", None)
        self.position = start if mask is None else torch.where(mask, start, self.position)
        return TensorDict(self._show(), batch_size=self.batch_size)

    def _step(self, tensordict):
        action = tensordict["action"]
        if self.choices is not None:
            index = action.int().argmax(-1) if self.choices == "one_hot" else action
            assert not self.mask or self._allowed().gather(-1, index.unsqueeze(-1)).all()
            action = 0.5 * (index.unsqueeze(-1) - 1.0)
        noise = 0.01 * torch.randn(*self.batch_size, 1)
        self.position = (self.position + action + noise).clamp(-2, 2)
        done = self.position.abs() < 0.05
        return TensorDict({**self._show(), "reward": -self.position.abs(), "done": done}, batch_size=self.batch_size)

    def _show(self):
        if self.parts:
            return {"position": self.position, "speed": self.position.expand(*self.batch_size, 2) * 2}
        return {"observation": self.position} | ({"action_mask": self._allowed()} if self.mask else {})

    def _allowed(self):
        return torch.cat([self.position > 0, torch.ones_like(self.position).bool(), self.position < 0], -1)

    def _set_seed(self, seed):
        torch.manual_seed(seed)


def line(**kwargs) -> EnvBase:
    """Build a `Line` env."""
    return Line(**kwargs)


def transformed(max_steps: int = 20, **kwargs) -> EnvBase:
    """Build a `Line` env, truncated after `max_steps`, with reward sums and normalized observations."""
    norm = ObservationNorm(loc=0.0, scale=2.0, in_keys=["observation"])
    return TransformedEnv(Line(**kwargs), Compose(StepCounter(max_steps), RewardSum(), norm))


class Reusing(Line):
    """`Line` that returns the same tensor in every step, as simulators do."""

    def _show(self):
        if not hasattr(self, "shown"):
            self.shown = torch.empty_like(self.position)
        return {"observation": self.shown.copy_(self.position)}


class Declared(EnvBase):
    """Batch of points that drift and end after eight steps, with the state in a `state_spec` or in a buffer.

    Args:
        num_envs: Number of envs N.
        kind: `state_spec`, or `buffers`.
    """

    def __init__(self, num_envs: int, kind: str) -> None:
        super().__init__(batch_size=[num_envs])
        self.kind = kind
        self.observation_spec = Composite(observation=Unbounded((num_envs, 1)), shape=(num_envs,))
        self.action_spec, self.reward_spec = Bounded(-1, 1, (num_envs, 1)), Unbounded((num_envs, 1))
        if kind == "state_spec":
            self.state_spec = Composite(point=Unbounded((num_envs, 2)), shape=(num_envs,))
        else:
            self.register_buffer("point", torch.zeros(num_envs, 2))

    def _reset(self, tensordict, **kwargs):
        point = torch.cat([torch.rand(*self.batch_size, 1), torch.zeros(*self.batch_size, 1)], -1)
        mask = None if tensordict is None else tensordict.get("_reset", None)
        if self.kind == "buffers":
            self.point.copy_(point if mask is None else torch.where(mask, point, self.point))
            point = self.point.clone()
        return TensorDict(self._show(point), batch_size=self.batch_size)

    def _step(self, tensordict):
        point = tensordict["point"] if self.kind == "state_spec" else self.point
        step = torch.cat([0.1 * tensordict["action"], torch.ones(*self.batch_size, 1)], -1)
        if self.kind == "buffers":
            self.point += step
        point = point + step if self.kind == "state_spec" else self.point.clone()
        after = {"reward": -point[:, :1].abs(), "done": point[:, 1:] >= 8}
        return TensorDict({**self._show(point), **after}, batch_size=self.batch_size)

    def _show(self, point):
        shown = {"observation": point[:, :1].clone()}
        return {**shown, "point": point} if self.kind == "state_spec" else shown

    def _set_seed(self, seed):
        torch.manual_seed(seed)


class Nested(EnvBase):
    """Batch of points whose state is nested and has entries of its own for reward and end, as that of Brax has.

    Episodes end after eight steps. Resets draw from a generator that is not saved.

    Args:
        num_envs: Number of envs N.
    """

    def __init__(self, num_envs: int) -> None:
        super().__init__(batch_size=[num_envs])
        self.generator = torch.Generator()
        self.observation_spec = Composite(observation=Unbounded((num_envs, 1)), shape=(num_envs,))
        self.action_spec, self.reward_spec = Bounded(-1, 1, (num_envs, 1)), Unbounded((num_envs, 1))
        parts = {name: Unbounded((num_envs, 1)) for name in ("point", "reward", "done")}
        self.state_spec = Composite(state=Composite(parts, shape=(num_envs,)), shape=(num_envs,))

    def _reset(self, tensordict, **kwargs):
        point = torch.rand(*self.batch_size, 1, generator=self.generator)
        state = {"point": point, "reward": torch.zeros_like(point), "done": torch.zeros_like(point)}
        return TensorDict({"observation": point.clone(), "state": state}, batch_size=self.batch_size)

    def _step(self, tensordict):
        state = tensordict["state"]
        point = state["point"] + 0.1 * tensordict["action"]
        after = {"point": point, "reward": -point.abs(), "done": state["done"] + 0.125}
        ends = {"reward": after["reward"].clone(), "done": after["done"] >= 1}
        return TensorDict({"observation": point.clone(), "state": after, **ends}, batch_size=self.batch_size)

    def _set_seed(self, seed):
        self.generator.manual_seed(seed)


def nested(num_envs: int) -> EnvBase:
    """Build a `Nested` env of as many envs as are asked for."""
    return Nested(num_envs)


def declared(num_envs: int, kind: str) -> EnvBase:
    """Build a `Declared` env of as many envs as are asked for."""
    return Declared(num_envs, kind)


def declared_and_transformed(num_envs: int, kind: str) -> EnvBase:
    """Build a `Declared` env below a transform with a state of its own, the sum of an episode's rewards."""
    return TransformedEnv(Declared(num_envs, kind), RewardSum())


def poles(kind: str) -> EnvBase:
    """Build a TorchRL `SerialEnv` or `ParallelEnv` of two CartPoles."""
    return {"serial": SerialEnv, "parallel": ParallelEnv}[kind](
        2, partial(GymEnv, "CartPole-v1", categorical_action_encoding=True)
    )


def nothing() -> int:
    """Return something that is not an env."""
    return 1


def missing_package() -> EnvBase:
    """Raise the error of an env whose package is not installed."""
    raise ModuleNotFoundError("No module named 'simulator'")


def broken() -> EnvBase:
    """Raise an error with two lines, as a failing constructor may."""
    raise AssertionError("no wheels\nat all")


NUMBER = 1
