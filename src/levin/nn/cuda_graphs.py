"""Capture updates as CUDA graphs, which need one launch where eager code needs hundreds.

For small networks these launches take most of the time. A replay repeats the captured GPU work on the same memory and
runs no Python: callbacks get no hooks around the backward pass, and no branch is decided again. Whatever changes from
call to call has to be a tensor argument of the method, a parameter, a state, or the learning rate of an optimiser.
Random numbers continue as in eager code.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torch.optim import Optimizer, RMSprop

from levin.core import distributed

WARM_UP = 3  # eager calls before the capture, in which code is compiled and optimisers create their state
Metrics = dict[str, tuple[Tensor, int]]  # name -> sum, count
Result = TypeVar("Result")


def can_capture(device: torch.device) -> bool:
    """Return whether methods can be captured: on a GPU, in a run of one rank, which sends no messages in between."""
    return device.type == "cuda" and distributed.world_size() == 1


def capture_graph(function: Callable[[], Result], stream: torch.cuda.Stream) -> tuple[Result, Callable[[], None]]:
    """Capture a function; return its result, which every replay overwrites, and the function that replays it.

    The capture itself computes nothing.
    """
    graph = torch.cuda.CUDAGraph()
    # Other threads may use the device during the capture.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        result = function()
    return result, graph.replay


@contextmanager
def on_stream(stream: torch.cuda.Stream) -> Iterator[None]:
    """Run the block on the stream of the capture: gradients belong to the stream where they were first accumulated."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


class Captured:
    """Method `batch, *tensors -> tensor | None` of an algorithm, run as a CUDA graph from its fourth call on.

    Every call computes the method once: the first three run eagerly, the fourth captures the graph and replays it.

    Args:
        method: May step optimisers and `record` metrics; must not wait for the device. Arguments that are not tensors
            keep the values that they have at the capture.
        recorded: Returns the dict of metrics that the algorithm has recorded so far, to which the method adds.
        optimizers: Optimisers that the method may step.
        device: Device of the method's tensors.
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
        self.lrs: list[tuple[dict[str, Any], Tensor, float]] = []  # param group, tensor that the graph reads, its value
        self.result: Tensor | None = None
        self.metrics: Metrics = {}

    def __call__(self, batch: TensorDictBase, *others: Tensor | None) -> Tensor | None:
        """Run the method once.

        Raises:
            ValueError: A tensor has another shape than at the capture.
        """
        self.calls += 1
        if self.calls <= WARM_UP:
            with on_stream(self.stream):
                # With the strides of the captured batch: compiled losses are compiled again for other strides.
                return self.method(batch.clone(), *others)
        if self.replay is None:
            self._capture(batch, others)
        self._copy_inputs(batch, others)
        assert self.replay is not None
        self.replay()
        totals = self.recorded()
        for name, (value, count) in self.metrics.items():
            total, counted = totals.get(name, (0, 0))
            totals[name] = (total + value, counted + count)
        return None if self.result is None else self.result.clone()

    def _capture(self, batch: TensorDictBase, others: Sequence[Tensor | None]) -> None:
        static = batch.clone()
        arguments = [each.clone() if isinstance(each, Tensor) else each for each in others]
        self.inputs = all_tensors(static, arguments)  # before the call, as the method may add entries to its batch
        totals = self.recorded()
        before = dict(totals)
        totals.clear()
        with self._capturable():
            self.result, self.replay = capture_graph(lambda: self.method(static, *arguments), self.stream)
        self.metrics = dict(totals)
        totals.clear()
        totals.update(before)

    def _copy_inputs(self, batch: TensorDictBase, others: Sequence[Tensor | None]) -> None:
        inputs = all_tensors(batch, others)
        shapes = [each.shape for each in inputs]
        if shapes != [each.shape for each in self.inputs]:
            raise ValueError(
                f"a CUDA graph that was captured with tensors of other shapes is called with the shapes {shapes}"
            )
        torch._foreach_copy_(self.inputs, inputs)
        for index, (group, static, lr) in enumerate(self.lrs):
            if group["lr"] != lr:
                static.fill_(group["lr"])
                self.lrs[index] = (group, static, group["lr"])

    @contextmanager
    def _capturable(self) -> Iterator[None]:
        """Make the optimisers capturable in the block, then restore their param groups.

        Checkpoints therefore have the same param groups as those of an eager run.
        """
        groups = [(optimizer, group) for optimizer in self.optimizers for group in optimizer.param_groups]
        before = [dict(group) for _, group in groups]
        for optimizer, group in groups:
            device = group["params"][0].device
            static = torch.tensor(group["lr"], device=device, dtype=torch.float32)
            self.lrs.append((group, static, group["lr"]))
            group["lr"] = static
            if "capturable" in group:
                group["capturable"] = True
            if isinstance(optimizer, RMSprop):  # without foreach it waits for the device to read the learning rate
                group["foreach"] = True
            for state in optimizer.state.values():
                if "step" in state:
                    state["step"] = state["step"].to(device)
        yield
        for (_, group), old in zip(groups, before, strict=True):
            group.update(old)


def all_tensors(batch: TensorDictBase, others: Sequence[Tensor | None]) -> list[Tensor]:
    """Return all tensors of a call, in a fixed order."""
    entries = batch.items(include_nested=True, leaves_only=True, sort=True)
    return [value for _, value in entries] + [each for each in others if isinstance(each, Tensor)]
