"""Updates as CUDA graphs: one launch where eager code makes hundreds, which for small networks is where the time goes.

A graph repeats what the GPU did while it was recorded, on the same memory, and runs no Python: no hook of a callback
around the backward pass, no branch. What changes from call to call has to be a tensor that the method is called with,
a parameter, a state, or the learning rate of an optimiser. Random numbers go on as they would have.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torch.optim import Optimizer, RMSprop

from levin.core import distributed

WARM_UP = 3  # calls before a method is recorded: what compiles does so, and optimisers make their state
Metrics = dict[str, tuple[Tensor, int]]  # name -> sum, count
Result = TypeVar("Result")


def can_capture(device: torch.device) -> bool:
    """Whether methods can be recorded there: on a GPU, and without messages to other ranks in between."""
    return device.type == "cuda" and distributed.world_size() == 1


def capture_graph(function: Callable[[], Result], stream: torch.cuda.Stream) -> tuple[Result, Callable[[], None]]:
    """What the function gives, in memory that every replay fills; and the replay. Recording itself computes nothing."""
    graph = torch.cuda.CUDAGraph()
    # Other threads may use the device meanwhile.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        result = function()
    return result, graph.replay


@contextmanager
def on_stream(stream: torch.cuda.Stream) -> Iterator[None]:
    """On the stream of the recording, as gradients belong to the stream that they were first accumulated on."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


class Captured:
    """A method `batch, *tensors -> tensor | None` of an algorithm, as a CUDA graph from its fourth call on.

    Every call is one call of the method: those that warm up are made eagerly, and the recording is replayed at once.

    Args:
        method: It may step optimisers and `record` metrics, and must not wait for the device. Other arguments than
            tensors stay what they are when it is recorded.
        recorded: Gives the metrics that an algorithm has recorded so far, a dict which the method adds to.
        optimizers: Those that it may step.
        device: Where all of this is.
    """

    def __init__(
        self,
        method: Callable[..., Tensor | None],
        recorded: Callable[[], Metrics],
        optimizers: Sequence[Optimizer],
        device: torch.device,
    ) -> None:
        self.method, self.recorded, self.optimizers = method, recorded, optimizers
        self.stream = torch.cuda.Stream(device)
        self.calls = 0
        self.replay: Callable[[], None] | None = None
        self.inputs: list[Tensor] = []
        self.lrs: list[tuple[dict[str, Any], Tensor, float]] = []  # group of an optimiser, what is read, what it is
        self.result: Tensor | None = None
        self.metrics: Metrics = {}

    def __call__(self, batch: TensorDictBase, *others: Tensor | None) -> Tensor | None:
        """Raises ValueError when a tensor has another shape than when the method was recorded."""
        self.calls += 1
        if self.calls <= WARM_UP:
            with on_stream(self.stream):
                return self.method(batch, *others)
        if self.replay is None:
            self._record(batch, others)
        self._fill(batch, others)
        assert self.replay is not None
        self.replay()
        totals = self.recorded()
        for name, (value, count) in self.metrics.items():
            total, counted = totals.get(name, (0, 0))
            totals[name] = (total + value, counted + count)
        return None if self.result is None else self.result.clone()

    def _record(self, batch: TensorDictBase, others: Sequence[Tensor | None]) -> None:
        static = batch.clone()
        constants = [each.clone() if isinstance(each, Tensor) else each for each in others]
        self.inputs = all_tensors(static, constants)  # listed first: a method may put other entries into its batch
        totals = self.recorded()
        before = dict(totals)
        totals.clear()
        with self._capturable():
            self.result, self.replay = capture_graph(lambda: self.method(static, *constants), self.stream)
        self.metrics = dict(totals)
        totals.clear()
        totals.update(before)

    def _fill(self, batch: TensorDictBase, others: Sequence[Tensor | None]) -> None:
        given = all_tensors(batch, others)
        shapes = [each.shape for each in given]
        if shapes != [each.shape for each in self.inputs]:
            raise ValueError(f"what was recorded with other shapes is called with {shapes}")
        torch._foreach_copy_(self.inputs, given)
        for index, (group, static, lr) in enumerate(self.lrs):
            if group["lr"] != lr:
                static.fill_(group["lr"])
                self.lrs[index] = (group, static, group["lr"])

    @contextmanager
    def _capturable(self) -> Iterator[None]:
        """The optimisers in the form that can be recorded; what they save stays that of an eager run."""
        groups = [(optimizer, group) for optimizer in self.optimizers for group in optimizer.param_groups]
        before = [dict(group) for _, group in groups]
        for optimizer, group in groups:
            device = group["params"][0].device
            static = torch.tensor(group["lr"], device=device, dtype=torch.float32)
            self.lrs.append((group, static, group["lr"]))
            group["lr"] = static
            if "capturable" in group:
                group["capturable"] = True
            if isinstance(optimizer, RMSprop):  # which waits for the device to read the rate of a single tensor
                group["foreach"] = True
            for state in optimizer.state.values():
                if "step" in state:
                    state["step"] = state["step"].to(device)
        yield
        for (_, group), old in zip(groups, before, strict=True):
            group.update(old)


def all_tensors(batch: TensorDictBase, others: Sequence[Tensor | None]) -> list[Tensor]:
    """All of a call, in one order."""
    entries = batch.items(include_nested=True, leaves_only=True, sort=True)
    return [value for _, value in entries] + [each for each in others if isinstance(each, Tensor)]
