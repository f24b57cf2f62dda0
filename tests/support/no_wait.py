"""Find operations for which the CPU would wait for a GPU, also where there is none."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class NoWait(TorchDispatchMode):
    """Raise where an operation would wait for the device to know a tensor's value."""

    WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in self.WAITS, f"{name} waits for the device"
        boolean = [
            arg for arg in torch.utils._pytree.tree_leaves(args) if torch.is_tensor(arg) and arg.dtype == torch.bool
        ]
        assert not (name.startswith("index") and boolean), "an index by a mask waits for the device"
        return func(*args, **(kwargs or {}))
