"""Save the state that an algorithm keeps in attributes of its own, such as a list, a deque or a random generator.

Parameters, buffers, optimisers and the replay buffer are saved anyway. Of every other attribute of the algorithm, of
its modules and of its replay buffer, this saves those that have changed since the run began, so constants such as a
discount are left out. What can't be saved is refused, with its name.
"""

import functools
import hashlib
import math
import pickle
import random
import re
import types
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer

from levin.algorithms.base import Algorithm
from levin.core.errors import CheckpointError, RunError

PLAIN = (bool, int, float, str, bytes, type(None))
# Values that stay as they are. A function is told from another by its name.
CONSTANT = (
    *(type, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType, functools.partial),
    *(Enum, PurePath, range, slice, re.Pattern, torch.device, torch.dtype),
)
SEQUENCES = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "deque": deque}
MAPPINGS = {"dict": dict, "OrderedDict": OrderedDict, "Counter": Counter, "defaultdict": defaultdict}
BIT_GENERATORS = ("PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64")
Node = Any  # encoded value: plain, a tensor, or a dict with the key "kind"


class ExtraState:
    """Attributes of an algorithm that no `state_dict` covers.

    Call this before the first iteration, in a process that continues a run before the checkpoint is restored.

    Args:
        algorithm: The algorithm.
        optimizers: Optimisers that the Trainer saves.
    """

    def __init__(self, algorithm: Algorithm, optimizers: list[Optimizer]) -> None:
        self.algorithm, self.optimizers = algorithm, optimizers
        self.initial: dict[str, Node] = {}
        self.saved_storages: set[int] = set()  # addresses of the parameters and buffers
        self.note_new()

    def note_new(self) -> None:
        """Note the value of each attribute that has appeared since the last call as its first value."""
        for path, value in self._attributes():
            if path not in self.initial:
                self.initial[path] = _fingerprint(self._encode(value))

    def save(self) -> dict[str, Node]:
        """Return the attributes that have changed, encoded as plain values and tensors.

        Raises:
            RunError: An attribute that has changed can't be restored by a resumed run.
        """
        changed = {}
        for path, value in self._attributes():
            node = self._encode(value)
            first = self.initial.get(path)
            if path in self.initial and _fingerprint(node) == first:
                continue
            if (reason := _find_lost(node, first)) is not None:
                where, _, name = path.rpartition(".")
                holder = type(self.algorithm).__name__ + (f".{where}" if where else "")
                raise RunError(
                    f"{holder} keeps {reason} in the attribute {name}, which a resumed run could not restore: keep "
                    "numbers, texts, tensors, arrays, lists, dicts, deques or random generators; or, if a resumed run "
                    f'does not need it, write not_saved = ("{name}",) in the class'
                )
            changed[path] = node
        return changed

    def restore(self, saved: dict[str, Node]) -> None:
        """Set the attributes to their saved values.

        Raises:
            CheckpointError: The algorithm has no such attribute holder, or an attribute of another kind.
        """
        holders = dict(self._holders())
        for path, node in saved.items():
            where, _, name = path.rpartition(".")
            try:
                holder = holders[where]
                if name in _left_out(holder):
                    raise ValueError("it is not one that is saved here")
                attributes = _attributes_of(holder, name)
                attributes[name] = _decode(node, attributes.get(name))
            except Exception as error:  # values of the wrong type raise errors of many types
                raise CheckpointError(
                    f"the attribute {path} can't be restored: {type(error).__name__}: {error}"
                ) from error

    def _holders(self) -> Iterator[tuple[str, Any]]:
        """Yield the algorithm, its modules and its replay buffer, with their names."""
        yield from self.algorithm.named_modules()
        if self.algorithm.buffer is not None:
            yield "buffer", self.algorithm.buffer

    def _attributes(self) -> Iterator[tuple[str, Any]]:
        saved = [*self.algorithm.parameters(), *self.algorithm.state_dict(keep_vars=True).values()]
        self.saved_storages = {
            each.untyped_storage().data_ptr() for each in saved if isinstance(each, Tensor) and each.numel()
        }
        for where, holder in self._holders():
            left_out = _left_out(holder)
            extra = sorted(holder._non_persistent_buffers_set) if isinstance(holder, nn.Module) else []
            for name in [*extra, *vars(holder)]:
                if name not in left_out:
                    yield f"{where}.{name}" if where else name, _attributes_of(holder, name)[name]

    def _encode(self, value: Any, outer: tuple[int, ...] = ()) -> Node:
        """Return the value as plain values and tensors; all else as dicts with their kind.

        Args:
            value: Value of an attribute, or a part of one.
            outer: Ids of the containers and objects that hold the value.
        """
        if type(value) in PLAIN:
            return value
        if isinstance(value, np.generic):
            return self._encode(value.item(), outer)
        if self._is_saved(value) or id(value) in outer:
            return {"kind": "constant", "name": "a reference"}
        if isinstance(value, Tensor):
            return value.detach()
        if isinstance(value, Optimizer):
            return {"kind": "optimizer", "state": value.state_dict()}
        return self._encode_compound(value, (*outer, id(value)))

    def _is_saved(self, value: Any) -> bool:
        """Return whether the value is a part of the algorithm that is saved elsewhere."""
        if isinstance(value, Tensor):
            return value.untyped_storage().data_ptr() in self.saved_storages
        parts = (self.algorithm.buffer, *self.algorithm.modules(), *self.optimizers)
        return value is not None and any(value is part for part in parts)

    def _encode_compound(self, value: Any, outer: tuple[int, ...]) -> Node:
        kind = type(value).__name__
        if type(value) in SEQUENCES.values():
            items = sorted(value, key=repr) if isinstance(value, set | frozenset) else value
            node = {"kind": kind, "items": [self._encode(each, outer) for each in items]}
            return node | ({"maxlen": value.maxlen} if isinstance(value, deque) else {})
        if type(value) in MAPPINGS.values():
            keys, values = ([self._encode(each, outer) for each in part] for part in (value.keys(), value.values()))
            return {"kind": kind, "keys": keys, "values": values}
        if isinstance(value, np.ndarray) and not value.dtype.hasobject:
            return {"kind": "array", "dtype": value.dtype.str, "shape": list(value.shape), "bytes": value.tobytes()}
        if (state := _generator_state(value)) is not None:
            return {"kind": kind, "state": self._encode(state, outer)}
        if isinstance(value, CONSTANT):
            return {"kind": "constant", "name": str(getattr(value, "__qualname__", value))}
        return self._encode_object(value, outer)

    def _encode_object(self, value: Any, outer: tuple[int, ...]) -> Node:
        kind = type(value)
        name = f"{kind.__module__}.{kind.__qualname__}"
        # With pickle's default protocol the state of an object is its attributes.
        default = kind.__reduce_ex__ is object.__reduce_ex__ and kind.__reduce__ is object.__reduce__
        default &= getattr(kind, "__getstate__", None) is getattr(object, "__getstate__", None)
        if isinstance(value, nn.Module) or (default and hasattr(value, "__dict__")):
            fields = {key: self._encode(each, outer) for key, each in vars(value).items()}
            return {"kind": "object", "name": name, "fields": fields}
        try:
            return {"kind": "constant", "name": name, "bytes": pickle.dumps(value)}
        except Exception:  # pickle raises errors of many types
            return {"kind": "unknown", "name": name}


@functools.cache
def _names_of_every(kind: type[nn.Module]) -> set[str]:
    """Return the names of the attributes that every instance of a class of modules has."""
    return set(vars(kind()))


def _left_out(holder: Any) -> set[str]:
    """Return the names of the attributes that are saved elsewhere or not at all."""
    names = {name for kind in type(holder).__mro__ for name in vars(kind).get("not_saved", ())}
    if isinstance(holder, Algorithm):
        names |= {*holder.captured}  # replaced by CUDA graphs
    if isinstance(holder, nn.Module):
        names |= _names_of_every(LightningModule if isinstance(holder, LightningModule) else nn.Module)
    return names


def _attributes_of(holder: Any, name: str) -> dict[str, Any]:
    """Return the dict of a holder that has the attribute, or will have it."""
    return holder._buffers if isinstance(holder, nn.Module) and name in holder._buffers else vars(holder)


def _generator_state(value: Any) -> Any:
    """Return the state of a random generator; None: it is none."""
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, np.random.Generator):
        return value.bit_generator.state
    if isinstance(value, np.random.RandomState):
        return value.get_state(legacy=False)
    return value.getstate() if type(value) is random.Random else None


def _fingerprint(node: Node) -> Node:
    """Return the node with tensors and long texts replaced by their checksums, for comparison with `==`."""
    if isinstance(node, Tensor):
        content = node.cpu().reshape(-1).view(torch.uint8).numpy().data
        return ("tensor", str(node.dtype), tuple(node.shape), hashlib.sha256(content).hexdigest())
    if isinstance(node, bytes):
        return ("bytes", hashlib.sha256(node).hexdigest())
    if isinstance(node, float) and math.isnan(node):
        return "nan"
    if isinstance(node, dict):
        return {key: _fingerprint(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [_fingerprint(value) for value in node]
    return (type(node).__name__, node)  # 1, 1.0 and True differ


def _find_lost(node: Node, first: Node) -> str | None:
    """Return what of a value a resumed run could not restore, such as `a lambda`; None: it restores everything.

    Args:
        node: Encoded value.
        first: Fingerprint of the value that the algorithm begins with, which a resumed run has at this place.
    """
    if not isinstance(node, dict):
        return None
    kind = node.get("kind")
    before = first if isinstance(first, dict) else {}
    if kind in ("constant", "unknown"):
        return None if kind == "constant" and _fingerprint(node) == first else f"a {node['name']}"
    if kind in ("object", "optimizer"):
        if before.get("kind") != _fingerprint(kind) or before.get("name") != _fingerprint(node.get("name")):
            return f"a new {node.get('name', kind)}"
        fields = node.get("fields", {})
        return next(filter(None, (_find_lost(fields[key], before["fields"].get(key)) for key in fields)), None)
    for part in ("items", "values"):
        old = before.get(part) or []
        for index, each in enumerate(node.get(part, [])):
            if (reason := _find_lost(each, old[index] if index < len(old) else None)) is not None:
                return reason
    return None


def _decode(node: Node, current: Any) -> Any:
    """Return the value of a node. What can be changed in place is changed in place, so other references stay valid."""
    if isinstance(node, Tensor):
        return _decode_tensor(node, current)
    return DECODERS[node["kind"]](node, current) if isinstance(node, dict) else node


def _decode_tensor(node: Tensor, current: Any) -> Tensor:
    if not isinstance(current, Tensor):
        return node
    if (current.shape, current.dtype) != (node.shape, node.dtype):
        return node.to(current.device)
    with torch.no_grad():
        return current.copy_(node)


def _decode_optimizer(node: Node, current: Any) -> Any:
    current.load_state_dict(node["state"])
    return current


def _decode_object(node: Node, current: Any) -> Any:
    for name, field in node["fields"].items():
        vars(current)[name] = _decode(field, vars(current).get(name))
    return current


def _decode_array(node: Node, _: Any) -> np.ndarray:
    return np.frombuffer(node["bytes"], dtype=node["dtype"]).reshape(node["shape"]).copy()


def _decode_generator(node: Node, current: Any) -> Any:
    state = _decode(node["state"], None)
    if current is None:
        current = _new_generator(node["kind"], state)
    if isinstance(current, torch.Generator):
        current.set_state(state)
    elif isinstance(current, np.random.Generator):
        current.bit_generator.state = state
    elif isinstance(current, np.random.RandomState):
        current.set_state(state)
    else:
        current.setstate(state)
    return current


def _new_generator(kind: str, state: Any) -> Any:
    if isinstance(state, Tensor):
        return torch.Generator()
    if kind != "Generator":
        return np.random.RandomState() if kind == "RandomState" else random.Random()
    if state["bit_generator"] not in BIT_GENERATORS:
        raise ValueError(f"{state['bit_generator']} is no bit generator of NumPy")
    return np.random.Generator(getattr(np.random, state["bit_generator"])())


def _decode_mapping(node: Node, current: Any) -> Any:
    kind, same = node["kind"], type(current).__name__ == node["kind"]
    keys = [_decode(key, None) for key in node["keys"]]
    old = dict(current) if same else {}
    items = {key: _decode(value, old.get(key)) for key, value in zip(keys, node["values"], strict=True)}
    if not same:
        return defaultdict(None, items) if kind == "defaultdict" else MAPPINGS[kind](items)
    current.clear()
    current.update(items)
    return current


def _decode_sequence(node: Node, current: Any) -> Any:
    kind, same = node["kind"], type(current).__name__ == node["kind"]
    old = dict(enumerate(current)) if same and "set" not in kind else {}
    values = [_decode(item, old.get(index)) for index, item in enumerate(node["items"])]
    if not same or kind in ("tuple", "frozenset"):
        return deque(values, node["maxlen"]) if kind == "deque" else SEQUENCES[kind](values)
    current.clear()
    current.update(values) if kind == "set" else current.extend(values)
    return current


DECODERS: dict[str, Callable[[Node, Any], Any]] = {
    "constant": lambda _, current: current,
    "optimizer": _decode_optimizer,
    "object": _decode_object,
    "array": _decode_array,
    **dict.fromkeys(("Generator", "RandomState", "Random"), _decode_generator),
    **dict.fromkeys(MAPPINGS, _decode_mapping),
    **dict.fromkeys(SEQUENCES, _decode_sequence),
}
