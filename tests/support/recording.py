"""Simulation of CUDA graphs on the CPU: record operations with the memory they use, and replay them on that memory.

As with CUDA graphs, a recording has no lasting effect, a replay runs no Python, and operations that wait for the device
are errors.
"""

from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from levin.nn import cuda_graphs

aten = torch.ops.aten
WAITS = {aten._local_scalar_dense.default, aten.is_nonzero.default, aten.nonzero.default, aten.equal.default}


class Recording(TorchDispatchMode):
    """Records operations with their arguments and results, and the previous values of tensors that they overwrite."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []
        self.overwritten: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert function not in WAITS, f"{function} waits for the device"
        for argument, value in zip(function._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for each in tree_leaves(value):
                    if isinstance(each, Tensor) and id(each) not in self.overwritten:
                        self.overwritten[id(each)] = (each, each.clone())
        result = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, result))
        return result

    def undo(self) -> None:
        for tensor, before in reversed(self.overwritten.values()):
            tensor.copy_(before)

    def replay(self) -> None:
        with torch.no_grad():
            for function, args, kwargs, result in self.operations:
                new = function(*args, **kwargs)
                for old, value in zip(tree_leaves(result), tree_leaves(new), strict=True):
                    if isinstance(old, Tensor) and old is not value:
                        old.copy_(value)


def capture_graph(function: Callable[[], Any], _: Any) -> tuple[Any, Callable[[], None]]:
    """Record a function like `cuda_graphs.capture_graph`; return its result and a function that replays it."""
    rng_state = torch.get_rng_state()
    with Recording() as recording:
        result = function()
    torch.set_rng_state(rng_state)
    with torch.no_grad():
        recording.undo()
    return result, recording.replay


@contextmanager
def simulate_cuda_graphs():
    """Simulate CUDA graphs within a context; yield the list of the captures made in it."""
    recorded = []

    def capture_and_list(*args: Any) -> Any:
        recorded.append(args)
        return capture_graph(*args)

    with (
        patch.object(cuda_graphs, "can_capture", lambda _: True),
        patch.object(cuda_graphs, "on_stream", nullcontext),
        patch.object(cuda_graphs, "capture_graph", capture_and_list),
        patch.object(torch.cuda, "Stream", lambda _: None),
        patch("torch.optim.rmsprop._get_capturable_supported_devices", lambda *_, **__: ["cpu"]),
    ):
        yield recorded
