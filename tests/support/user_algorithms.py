"""Algorithms as users write them: some keep state of their own, one has prioritized replay.

They add their attributes in `configure_optimizers`, because an `__init__` would have to repeat all hyper-parameters.
"""

import decimal
import random
from collections import Counter, OrderedDict, defaultdict, deque

import numpy as np
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.data import ReplayBuffer
from torchrl.data.replay_buffers import LazyTensorStorage, SamplerWithoutReplacement

from levin.algorithms.dqn import DQN
from levin.algorithms.ppo import PPO
from levin.data.replay import KEYS, Replay


class PrioritizedReplay(Replay):
    """Replay that samples in proportion to the priorities that it stores beside the transitions."""

    def __init__(self, size, storage):
        super().__init__(size, storage)
        self.highest = 1.0

    def extend(self, rollout):
        flat = rollout.select(*KEYS).reshape(-1)
        flat["extra"] = TensorDict({"priority": torch.full((len(flat),), self.highest)}, batch_size=[len(flat)])
        self.buffer.extend(flat)

    def draw(self, num, device):
        index = torch.multinomial(self.data["extra", "priority"], num, replacement=True)
        sample = self.data[index]
        sample["index"] = index
        return sample

    def update_priorities(self, index, priority):
        self.data["extra", "priority"][index] = priority
        self.highest = max(self.highest, float(priority.max()))


class PrioritizedDQN(DQN):
    """DQN with prioritized replay (Schaul et al. 2016), without importance weights."""

    def configure_optimizers(self):
        self.buffer = PrioritizedReplay(self.buffer.size, self.buffer.storage)
        return super().configure_optimizers()

    def update_critic(self, batch):
        super().update_critic(batch)
        with torch.no_grad():
            reward = batch["next", "reward"].squeeze(-1)
            self.buffer.update_priorities(batch["index"], 0.01 + reward.abs() + torch.rand(len(reward)))


class Window:
    """Object with default pickling that a user keeps."""

    def __init__(self):
        self.sums, self.generator = [0.0], np.random.default_rng(3)


class Head(nn.Module):
    """Module with a count that is no buffer, and a buffer that is not persistent."""

    def __init__(self):
        super().__init__()
        self.calls = 0
        self.register_buffer("mean", torch.zeros(2), persistent=False)


class Hoarder(PPO):
    """PPO whose learning rate depends on state in attributes of all kinds."""

    def configure_optimizers(self):
        self.history, self.best, self.window = [], {}, deque(maxlen=5)
        self.numpy_generator, self.torch_generator = np.random.default_rng(1), torch.Generator().manual_seed(1)
        self.old_generator, self.python_generator = np.random.RandomState(1), random.Random(1)
        self.counts, self.groups, self.ordered = Counter(), defaultdict(list), OrderedDict()
        self.seen, self.pair, self.number, self.array = set(), (0, None), 0, np.zeros((2, 2), np.float32)
        self.tensor, self._private, self.object, self.head = torch.zeros(3), 0, Window(), Head()
        self.lambdas = [lambda x: x, 0]
        self.same_list = self.history
        return super().configure_optimizers()

    def on_train_start(self):
        super().on_train_start()
        self.late = [0]

    def training_step(self, rollout, index):
        state = [
            float(self.numpy_generator.random()) + float(self.old_generator.rand()) + self.python_generator.random(),
            float(torch.rand((), generator=self.torch_generator)) + float(self.object.generator.random()),
        ]
        self.history.append(state[0])
        self.window.append(state[1])
        self.best[len(self.history)] = max(self.history)
        self.counts["a"] += 1
        self.groups[len(self.history) % 2].append(state)
        self.ordered[str(len(self.history))] = True
        self.seen.add(len(self.history))
        self.pair, self.number, self._private = (self.number, "x"), self.number + 1, self._private + 2
        self.array += 1
        self.tensor += state[1]
        self.object.sums.append(state[0])
        self.head.calls += 1
        self.head.mean += 1
        self.lambdas[1] += 1
        self.late.append(len(self.late))
        self.new_list = [*getattr(self, "new_list", []), self.number]
        total = (
            *(sum(self.history), sum(self.window), sum(self.best.values()), self.counts["a"], len(self.groups[0])),
            *(len(self.ordered), sum(self.seen), self.pair[0], self.number, self._private, float(self.array.sum())),
            *(float(self.tensor.sum()), sum(self.object.sums), self.head.calls, float(self.head.mean.sum())),
            *(self.lambdas[1], sum(self.late), sum(self.new_list), len(self.same_list)),
        )
        self.record(total=torch.tensor(sum(float(each) for each in total)))
        self.optimizers().param_groups[0]["lr"] = 1e-4 / (1 + sum(float(each) for each in total))
        super().training_step(rollout, index)


class Lost(PPO):
    """PPO that keeps something that no checkpoint can hold; `what` names it."""

    what = "iterator"

    def configure_optimizers(self):
        self.kept = None
        return super().configure_optimizers()

    def training_step(self, rollout, index):
        super().training_step(rollout, index)
        self.kept = {
            "iterator": lambda: iter([1, 2]),
            "array": lambda: np.ma.zeros(2),
            "function": lambda: print,
            "package": decimal.Context,
        }[self.what]()


class Forgiven(Lost):
    """The same, but the attribute is declared as one that a resumed run does not need."""

    not_saved = ("kept",)


class WithoutReplacement(DQN):
    """DQN that samples without replacement, by TorchRL's sampler."""

    def configure_optimizers(self):
        storage = LazyTensorStorage(self.buffer.size)
        self.buffer.buffer = ReplayBuffer(storage=storage, sampler=SamplerWithoutReplacement())
        return super().configure_optimizers()
