"""States that users keep on an algorithm: how each begins, changes, and is shown."""

import collections
import copy
import enum
import functools
import zlib
from dataclasses import dataclass, field

import numpy as np
import torch
from tensordict import TensorDict
from torch import nn

from levin.algorithms.ppo import PPO


class Phase(enum.Enum):
    """Enum that a user keeps."""

    A = 0
    B = 1


class History(list):
    """List of a user."""


class Slots:
    """Class with slots."""

    __slots__ = ("n",)

    def __init__(self):
        self.n = 0


class SubSlots(Slots):
    """Subclass of a class with slots, which has a dict as well."""


@dataclass
class Episode:
    """Dataclass that is made during training."""

    number: int
    steps: list = field(default_factory=list)


class Noise:
    """Object whose method a user keeps."""

    def __init__(self):
        self.n = 0

    def sample(self):
        self.n += 1
        return self.n


Pair = collections.namedtuple("Pair", "a b")


def begin_aliases(self):
    self.first = self.current = torch.zeros(2)


def begin_objects(self):
    self.a, self.b = Noise(), Noise()
    self.order = [self.a, self.b]


def begin_shared(self):
    self.array = np.zeros(2)
    self.same = [self.array]


def begin_optimizer(self):
    self.z = torch.zeros(2, requires_grad=True)
    self.own = torch.optim.Adam([self.z], lr=0.1)


def step_optimizer(self):
    self.own.zero_grad()
    (self.z - 3).square().sum().backward()
    self.own.step()


def set_(**values):
    def begin(self):
        for name, value in copy.deepcopy(values).items():
            setattr(self, name, value)

    return begin


def rebind(self):
    self.current = self.current + 1


def reorder(self):
    self.a.n += 1
    self.b.n += 2
    self.order.reverse()


def best(self):
    self.best = [each.detach().clone() for each in self.actor.parameters()]


def lazy(self):
    if not hasattr(self, "baseline"):
        self.baseline = self.env_steps


def delete(self):
    if hasattr(self, "warm"):
        del self.warm


def cross(self):
    if not self.pool:
        self.current = {"n": 0}
        self.pool.append(self.current)
    self.current["n"] += 1


def count(self, key):
    self.table[key] = self.table.get(key, 0) + 1


STATES = {
    "aliases": (begin_aliases, rebind, lambda s: (s.first.tolist(), s.current.tolist())),
    "parameters": (lambda s: setattr(s, "best", list(s.actor.parameters())), best, lambda s: len(s.best)),
    "a state_dict": (
        lambda s: setattr(s, "best", s.actor.state_dict()),
        lambda s: setattr(s, "best", copy.deepcopy(s.actor.state_dict())),
        lambda s: len(s.best),
    ),
    "objects in another order": (begin_objects, reorder, lambda s: (s.a.n, [each.n for each in s.order])),
    "a shared array": (begin_shared, lambda s: np.add(s.array, 1, out=s.array), lambda s: (s.array.tolist(), s.same)),
    "a dict in two places": (set_(pool=[], current=None), cross, lambda s: (s.pool, s.current)),
    "a lazy attribute": (set_(), lazy, lambda s: s.baseline),
    "a deleted attribute": (set_(warm=1), delete, lambda s: hasattr(s, "warm")),
    "enum keys": (set_(table={Phase.A: 0}), lambda s: count(s, Phase.A), lambda s: s.table),
    "tuple keys": (set_(table={}), lambda s: count(s, (Phase.B, 1)), lambda s: s.table),
    "an enum": (set_(phase=Phase.A), lambda s: setattr(s, "phase", Phase.B), lambda s: s.phase),
    "a subclass of list": (set_(kept=History()), lambda s: s.kept.append(1), lambda s: (type(s.kept), s.kept)),
    "slots": (set_(kept=SubSlots()), lambda s: setattr(s.kept, "n", s.kept.n + 1), lambda s: s.kept.n),
    "a bound method": (lambda s: setattr(s, "sample", Noise().sample), lambda s: s.sample(), lambda s: s.sample()),
    "a partial": (lambda s: setattr(s, "add", functools.partial(History.append, History())),
                  lambda s: s.add(1), lambda s: s.add.args),
    "a nested defaultdict": (
        set_(table=collections.defaultdict(functools.partial(collections.defaultdict, int))),
        lambda s: s.table[s.env_steps % 3].update({1: s.table[s.env_steps % 3][1] + 1}),
        lambda s: {key: dict(value) for key, value in s.table.items()},
    ),
    "a numpy scalar": (
        set_(scalar=np.float32(0)), lambda s: setattr(s, "scalar", s.scalar + np.float32(0.1)),
        lambda s: (s.scalar.dtype, s.scalar.item()),
    ),
    "a structured array": (
        lambda s: setattr(s, "kept", np.zeros(2, [("a", "f4"), ("b", "i8")])),
        lambda s: np.add(s.kept["b"], 1, out=s.kept["b"]), lambda s: s.kept.tolist(),
    ),
    "an optimiser": (begin_optimizer, step_optimizer, lambda s: s.z.tolist()),
    "new objects": (set_(kept=[]), lambda s: s.kept.append(Episode(s.env_steps, [1])), lambda s: s.kept),
    "a namedtuple": (
        set_(kept=Pair(0, 0)), lambda s: setattr(s, "kept", Pair(s.kept.b, s.env_steps)), lambda s: s.kept
    ),
    "a TensorDict": (
        lambda s: setattr(s, "kept", TensorDict({"x": torch.zeros(2)}, batch_size=[2])),
        lambda s: s.kept["x"].add_(1), lambda s: s.kept["x"].tolist(),
    ),
    "a lazy copy of a module": (
        set_(old=[]), lambda s: s.old.__setitem__(slice(None), [copy.deepcopy(s.actor)]),
        lambda s: [round(float(each.sum()), 4) for each in s.old[0].parameters()],
    ),
    "a sparse constant": (
        lambda s: setattr(s, "graph", torch.eye(3).to_sparse()), lambda s: None, lambda s: s.graph.to_dense().tolist()
    ),
    "a name with a dot": (
        set_(**{"a.b": 0}), lambda s: setattr(s, "a.b", getattr(s, "a.b") + 1), lambda s: vars(s)["a.b"]
    ),
}  # fmt: skip


class Holder(nn.Module):
    """Module of the algorithm that keeps one of `STATES`."""

    def __init__(self, algorithm):
        super().__init__()
        vars(self)["algorithm"] = algorithm  # not as a submodule

    @property
    def actor(self):
        return self.algorithm.actor

    @property
    def env_steps(self):
        return self.algorithm.env_steps


class Keeper(PPO):
    """PPO that keeps every one of `STATES` and records a checksum of what each shows."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        self.holders = nn.ModuleList([Holder(self) for _ in STATES])
        for holder, (begin, _, _) in zip(self.holders, STATES.values(), strict=True):
            begin(holder)
        return optimizer

    def training_step(self, rollout, index):
        for number, (holder, (_, change, show)) in enumerate(zip(self.holders, STATES.values(), strict=True)):
            change(holder)
            self.record(**{f"shown_{number}": float(zlib.crc32(repr(show(holder)).encode()) % 100_000)})
        super().training_step(rollout, index)
