"""Stand-in for the trees of priorities in TorchRL's C++ extension, where that does not load."""

import numpy as np
import torch
from torchrl.data.replay_buffers.samplers import prioritized

LOADS = prioritized.SumSegmentTreeFp32 is not None
REASON = f"TorchRL's C++ extension does not load with torch {torch.__version__}"
NAMES = [f"{kind}SegmentTreeFp{bits}" for kind in ("Sum", "Min") for bits in (32, 64)]


class Tree:
    """Binary tree whose inner nodes are a function of their two children; the leaves are indexed from 0."""

    def __init__(self, operation, neutral, size):
        self.operation, self.capacity = operation, 1 << (size - 1).bit_length()
        self.nodes = np.full(2 * self.capacity, neutral, np.float32)

    def __getitem__(self, index):
        return torch.from_numpy(self.nodes[self.capacity + np.asarray(index)])

    def __setitem__(self, index, value):
        node = self.capacity + np.atleast_1d(np.asarray(index))
        self.nodes[node] = np.asarray(value)  # of several values for one leaf the last stays
        while node[0] > 1:
            node = np.unique(node // 2)
            self.nodes[node] = self.operation(self.nodes[2 * node], self.nodes[2 * node + 1])

    def query(self, start, stop):
        return float(self.operation.reduce(self.nodes[self.capacity + start : self.capacity + stop]))

    def scan_lower_bound(self, mass):
        """Return the first leaf up to which the sum is at least the mass."""
        mass, node = np.asarray(mass, np.float32).copy(), np.ones(len(mass), int)
        while node[0] < self.capacity:
            left = self.nodes[2 * node]
            right = mass > left
            mass -= left * right
            node = 2 * node + right
        return node - self.capacity


def use(monkeypatch):
    """Replace TorchRL's trees."""
    for name in NAMES:
        least = name.startswith("Min")
        operation, neutral = (np.minimum, np.finfo(np.float32).max) if least else (np.add, 0)
        monkeypatch.setattr(
            prioritized, name, lambda size, operation=operation, neutral=neutral: Tree(operation, neutral, size)
        )
