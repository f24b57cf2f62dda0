"""Save the state that an algorithm keeps in attributes of its own, such as a list, a deque or a random generator.

Parameters, buffers, optimisers and the replay buffer are saved anyway. Of every other attribute of the algorithm, of
its modules and of its replay buffer, this saves those that have changed since the run began, so constants such as a
discount are left out. What can't be saved is refused, with its name.

The values are pickled together, so two attributes that share an object still share it after a resume. An object that
the algorithm begins with keeps its identity: a resumed run has it at the same place, and its content is restored there.
The restricted unpickler makes only tensors, arrays, generators, containers, modules, and objects of the user's classes.
"""

import copyreg
import functools
import hashlib
import io
import pickle
import random
import sys
import types
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator
from datetime import date, datetime, timedelta
from enum import Enum
from pathlib import PosixPath, PurePath, PurePosixPath
from typing import Any

import numpy as np
import torch
from lightning import LightningModule, Trainer
from tensordict import TensorDict
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from levin.algorithms.base import Algorithm
from levin.core.errors import CheckpointError, ConfigError, RunError, one_line
from levin.runs import code

# Objects saved by reference: a resumed run uses those of its newly built algorithm.
CONSTANT = (types.FunctionType, types.BuiltinFunctionType, types.ModuleType, np.memmap)
# Immutable values: after a resume, an equal copy may stand in for the original object.
IMMUTABLE = (
    *(bool, int, float, complex, str, bytes, type(None), tuple, frozenset, Enum, type, range, slice),
    *(np.generic, np.dtype, torch.dtype, torch.device, types.MethodType, functools.partial, PurePath, date, timedelta),
)
CONTAINERS = (list, set, deque, dict, OrderedDict, defaultdict, Counter)
SAFE = {
    *(bool, int, float, complex, str, bytes, bytearray, list, tuple, dict, set, frozenset, object, range, slice),
    *(Counter, OrderedDict, defaultdict, deque, functools.partial, date, datetime, timedelta, PosixPath, PurePosixPath),
    *(torch.Size, torch.device, np.dtype, types.SimpleNamespace),
}
SAFE_BASES = (nn.Module, Optimizer, LRScheduler)  # classes of these packages are safe if they derive from one of these
SAFE_PACKAGES = ("torch", "torchmetrics", "levin")
GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
BIT_GENERATORS = ("PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64")


class ExtraState:
    """Attributes of an algorithm that no `state_dict` covers.

    Args:
        algorithm: The algorithm as it is before its first iteration.
        trainer: Trainer of the run; None: the algorithm is only evaluated.
    """

    def __init__(self, algorithm: Algorithm, trainer: Trainer | None = None) -> None:
        self.algorithm, self.trainer = algorithm, trainer
        self.fingerprints: dict[tuple[str, str], bytes] = {}  # of the value that each attribute begins with
        # Objects that the algorithm begins with, by the attribute in which each is found first and its number there.
        self.originals: dict[tuple[str, str, int], Any] = {}
        self.keys: dict[int, tuple[str, str, int]] = {}  # id of an object -> its key in `originals`
        self.restored: set[tuple[str, str]] = set()  # attributes that a checkpoint has set
        self.parts: dict[int, tuple[str, Any]] = {}
        self.storages: dict[int, Tensor] = {}
        self.note_initial_values()

    def note_initial_values(self) -> None:
        """Take the current value of each attribute that is new since the last call as its initial value.

        Raises:
            ConfigError: A value has a state that can't be read, such as that of an iterator.
        """
        self._find_parts()
        for path, value in self._attributes():
            if path not in self.fingerprints:
                try:
                    Finder(self, path).dump(value)
                    self.fingerprints[path] = self._fingerprint(value)
                except Exception as error:  # pickle and the classes of a user raise errors of many types
                    raise ConfigError(self._refusal(path, error)) from error

    def save(self) -> dict[str, Any]:
        """Return the attributes that have changed as plain values and bytes; empty if none has.

        Raises:
            RunError: An attribute that has changed can't be restored by a resumed run.
        """
        self._find_parts()
        now = dict(self._attributes())
        deleted = [list(path) for path in self.fingerprints if path not in now]
        changed = {path: value for path, value in now.items() if self._has_changed(path, value)}
        if not changed and not deleted:
            return {}
        file = io.BytesIO()
        saver = Saver(self, file)
        for path, value in changed.items():
            try:
                saver.dump((path, value))
                while saver.waiting:
                    key = saver.waiting.pop()
                    saver.dump((key, _content(self.originals[key])))
            except Exception as error:  # pickle and the classes of a user raise errors of many types
                raise RunError(self._refusal(path, error)) from error
        data = torch.frombuffer(bytearray(file.getvalue() or b"\0"), dtype=torch.uint8)
        return {"saved": [list(path) for path in changed], "deleted": deleted, "data": data}

    def restore(self, saved: dict[str, Any]) -> None:
        """Set the attributes to their saved values.

        Raises:
            CheckpointError: The saved values do not fit the algorithm.
        """
        if not saved:
            return
        try:
            self._find_parts()
            holders, parts = dict(self._holders()), dict(self.parts.values())
            file = io.BytesIO(saved["data"].numpy().tobytes())
            loader, values = Loader(self, parts, file), {}
            while saved["saved"] and file.tell() < len(file.getbuffer()):
                target, value = loader.load()
                if len(target) == len(("holder", "attribute")):
                    values[target] = value
                else:
                    _fill(self.originals[target], value)
            for where, name in (tuple(path) for path in saved["deleted"]):
                _attributes_of(holders[where], name).pop(name, None)
            for (where, name), value in values.items():
                if name in _left_out(holders[where]):
                    raise ValueError(f"{name} is not saved here")
                _attributes_of(holders[where], name)[name] = value
            self.restored = set(values)
        except Exception as error:  # values of the wrong type raise errors of many types
            raise CheckpointError(f"the attributes of the algorithm can't be restored: {error}") from error

    def _find_parts(self) -> None:
        """Find what is saved elsewhere: name and object by id, and one tensor by the address of each storage."""
        algorithm, trainer = self.algorithm, self.trainer
        named = {"algorithm": algorithm, "replay": algorithm.buffer, "trainer": trainer}
        named |= {f"module {name}": module for name, module in algorithm.named_modules() if name}
        named |= {f"tensor {name}": each for name, each in algorithm.state_dict(keep_vars=True).items()}
        if trainer is not None:
            wrapped = trainer.strategy._lightning_optimizers
            named |= {f"optimizer {i}": each for i, each in enumerate(trainer.optimizers)}
            named |= {f"wrapped {i}": each for i, each in enumerate(wrapped)}
        self.parts = {id(each): (name, each) for name, each in named.items() if each is not None}
        self.storages = {_address(each): each for each in named.values() if isinstance(each, Tensor) and each.numel()}

    def _has_changed(self, path: tuple[str, str], value: Any) -> bool:
        if path in self.restored or path not in self.fingerprints:
            return True
        try:
            return self._fingerprint(value) != self.fingerprints[path]
        except Exception:  # it can't be pickled any more, and `save` says so
            return True

    def _fingerprint(self, value: Any) -> bytes:
        file = io.BytesIO()
        Fingerprinter(self, file).dump(value)
        return hashlib.sha256(file.getbuffer()).digest()

    def _refusal(self, path: tuple[str, str], error: Exception) -> str:
        where, name = path
        holder = type(self.algorithm).__name__ + (f".{where}" if where else "")
        return (
            f"{holder} keeps something in the attribute {name} that a resumed run could not restore "
            f"({one_line(error)}): keep numbers, texts, tensors, arrays, lists, dicts, deques, random "
            "generators or objects of your own classes; or, if a resumed run does not need it, write "
            f'not_saved = ("{name}",) in the class'
        )

    def _holders(self) -> Iterator[tuple[str, Any]]:
        """Yield the algorithm, its modules and its replay buffer, with their names."""
        yield from self.algorithm.named_modules()
        if self.algorithm.buffer is not None:
            yield "buffer", self.algorithm.buffer

    def _attributes(self) -> Iterator[tuple[tuple[str, str], Any]]:
        for where, holder in self._holders():
            left_out = _left_out(holder)
            extra = sorted(holder._non_persistent_buffers_set) if isinstance(holder, nn.Module) else []
            for name in [*extra, *vars(holder)]:
                if name not in left_out:
                    yield (where, name), _attributes_of(holder, name)[name]


class Writer(pickle.Pickler):
    """Pickler of values that refers to parts of the algorithm by name and to constants by their number."""

    def __init__(self, state: ExtraState, file: io.BytesIO | None = None) -> None:
        super().__init__(io.BytesIO() if file is None else file, protocol=4)
        self.state, self.parts, self.storages = state, state.parts, state.storages

    def persistent_id(self, obj: Any) -> Any:
        if id(obj) in self.parts:
            return self.parts[id(obj)][0]
        if isinstance(obj, LightningModule | Trainer):
            return "algorithm" if isinstance(obj, LightningModule) else "trainer"
        return self.constant(obj) if _is_constant(obj) else None

    def constant(self, obj: Any) -> Any:
        """Return the reference to a constant.

        Raises:
            ValueError: The algorithm did not begin with it.
        """
        if id(obj) not in self.state.keys:
            raise ValueError(f"it holds the {type(obj).__name__} {getattr(obj, '__qualname__', '')}, made in training")
        return self.state.keys[id(obj)]

    def reducer_override(self, obj: Any) -> Any:
        reduced: Any = NotImplemented
        if isinstance(obj, Tensor):
            reduced = self.reduce_tensor(obj)
        elif type(obj) is np.ndarray and not obj.dtype.hasobject:
            content = self.reduce_bytes(np.ascontiguousarray(obj))
            reduced = _make_array, (_describe_dtype(obj.dtype), obj.shape, content)
        elif isinstance(obj, np.generic):
            reduced = _make_scalar, (_describe_dtype(obj.dtype), obj.tobytes())
        elif isinstance(obj, GENERATORS):
            reduced = _make_generator, (type(obj).__name__, _generator_state(obj), getattr(obj, "device", None))
        elif isinstance(obj, TensorDict):
            reduced = _make_tensordict, (dict(obj.items()), tuple(obj.batch_size))
        elif isinstance(obj, types.MethodType):
            reduced = _make_method, (obj.__self__, obj.__func__.__name__)
        return reduced

    def reduce_tensor(self, tensor: Tensor) -> Any:
        """Return how to make a tensor again: as a view of a parameter or buffer if it is one, else from its bytes."""
        if tensor.is_quantized:
            raise ValueError("it holds a quantized tensor")
        base = self.storages.get(_address(tensor)) if tensor.numel() else None
        if base is not None:
            return _make_view, (base, tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.storage_offset())
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        kind = type(tensor) is nn.Parameter, tensor.requires_grad and tensor.is_leaf, tensor.device
        return _make_tensor, (self.reduce_bytes(content), tensor.dtype, tuple(tensor.shape), kind)

    def reduce_bytes(self, array: np.ndarray) -> bytes:
        """Return the bytes of a contiguous array."""
        return array.tobytes()


class Finder(Writer):
    """Find the objects that an algorithm begins with, and number them in the order of their discovery."""

    def __init__(self, state: ExtraState, path: tuple[str, str]) -> None:
        super().__init__(state)
        self.path, self.count = path, 0

    def persistent_id(self, obj: Any) -> Any:
        new = id(obj) not in self.state.keys and id(obj) not in self.parts
        if new and (_is_constant(obj) or _is_fillable(obj)):
            key = self.state.keys[id(obj)] = (*self.path, self.count)
            self.state.originals[key] = obj
            self.count += 1
        return super().persistent_id(obj)

    def reduce_bytes(self, array: np.ndarray) -> bytes:
        return b""


class Fingerprinter(Writer):
    """Write values with the checksums of tensors and arrays in place of their contents."""

    def reduce_bytes(self, array: np.ndarray) -> bytes:
        return hashlib.sha256(array.reshape(-1).view(np.uint8).data if array.size else b"").digest()


class Saver(Writer):
    """Write values, and list the objects that the algorithm begins with whose contents must be written as well."""

    def __init__(self, state: ExtraState, file: io.BytesIO) -> None:
        super().__init__(state, file)
        self.waiting: list[tuple[str, str, int]] = []
        self.written: set[tuple[str, str, int]] = set()

    def persistent_id(self, obj: Any) -> Any:
        reference = super().persistent_id(obj)
        if reference is None and id(obj) in self.state.keys:
            reference = self.state.keys[id(obj)]
            if reference not in self.written:
                self.written.add(reference)
                self.waiting.append(reference)
        return reference

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, type) and not _is_safe(obj):
            raise ValueError(f"it holds a {obj.__module__}.{obj.__qualname__}")
        return super().reducer_override(obj)


class Loader(pickle.Unpickler):
    """Read values; makes only objects of safe classes."""

    def __init__(self, state: ExtraState, parts: dict[str, Any], file: io.BytesIO) -> None:
        super().__init__(file)
        self.state, self.parts = state, parts

    def persistent_load(self, pid: Any) -> Any:
        return self.parts[pid] if isinstance(pid, str) else self.state.originals[pid]

    def make_device(self, kind: str, *_: int) -> torch.device:
        """Return the CPU, or the algorithm's device in place of a GPU: a run may be resumed where there is no other."""
        return torch.device("cpu") if kind == "cpu" else self.state.algorithm.device

    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) == ("torch", "device"):
            return self.make_device
        if (module_name, global_name) in NAMES:
            return NAMES[module_name, global_name]
        if module_name == "torch" and isinstance(dtype := getattr(torch, global_name, None), torch.dtype):
            return dtype
        found: Any = None
        if module_name in sys.modules:  # never import what a checkpoint names
            found = super().find_class(module_name, global_name)
        if isinstance(found, type) and found.__module__ == module_name and _is_safe(found):
            return found
        raise ValueError(f"it names {module_name}.{global_name}, which is not accepted")


def _is_safe(kind: type) -> bool:
    """Return whether a checkpoint may hold objects of a class: of the user's own code, or known to be harmless."""
    if kind in SAFE or issubclass(kind, torch.dtype):
        return True
    package = kind.__module__.partition(".")[0]
    if package in SAFE_PACKAGES:
        return issubclass(kind, SAFE_BASES)
    return code.is_local(sys.modules.get(kind.__module__))


def _left_out(holder: Any) -> set[str]:
    """Return the names of the attributes that are saved elsewhere or not at all."""
    names: set[str] = set()
    for kind in type(holder).__mro__:
        own = vars(kind).get("not_saved", ())
        names |= {own} if isinstance(own, str) else {*own}
    if isinstance(holder, Algorithm):
        names |= {*holder.captured}  # replaced by CUDA graphs
    if isinstance(holder, nn.Module):
        names |= _names_of_every(LightningModule if isinstance(holder, LightningModule) else nn.Module)
    return names


@functools.cache
def _names_of_every(kind: type[nn.Module]) -> frozenset[str]:
    """Return the names of the attributes that every instance of a class of modules has."""
    return frozenset(vars(kind()))


def _attributes_of(holder: Any, name: str) -> dict[str, Any]:
    """Return the dict of a holder that has the attribute, or will have it."""
    return holder._buffers if isinstance(holder, nn.Module) and name in holder._buffers else vars(holder)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else 0


def _describe_dtype(dtype: np.dtype) -> Any:
    return dtype.str if dtype.names is None else [tuple(each) for each in dtype.descr]


def _generator_state(value: Any) -> Any:
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, np.random.Generator):
        return value.bit_generator.state
    return value.get_state(legacy=False) if isinstance(value, np.random.RandomState) else value.getstate()


def _is_constant(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.layout != torch.strided  # such as the sparse matrix of a graph
    return isinstance(value, CONSTANT) and not any(value is helper for helper in HELPERS)


def _is_fillable(value: Any) -> bool:
    """Return whether `_fill` can write another content into an object, so that it stays the same object."""
    if isinstance(value, IMMUTABLE) or _is_constant(value):
        return False
    if isinstance(value, (Tensor, TensorDict, *GENERATORS)) or type(value) in (*CONTAINERS, np.ndarray):
        return True
    try:
        reduced = value.__reduce_ex__(2)
    except Exception:  # of any type: it can't be pickled, and the pickler says so
        return False
    return isinstance(reduced, tuple) and reduced[:2] == (copyreg.__newobj__, (type(value),))  # type: ignore[attr-defined]


def _content(value: Any) -> Any:
    """Return the content of an object that the algorithm begins with, which `_fill` writes into the object."""
    if isinstance(value, Tensor):
        content: Any = value.detach().clone()
    elif type(value) is np.ndarray:
        content = value.copy()
    elif isinstance(value, GENERATORS):
        content = _generator_state(value)
    elif isinstance(value, TensorDict) or type(value) in (dict, OrderedDict, defaultdict, Counter):
        content = dict(value.items())
    elif type(value) in CONTAINERS:
        content = list(value)
    else:
        _, _, state, items, pairs, *_ = (*value.__reduce_ex__(2), None, None, None)
        state = dict(state) if isinstance(state, dict) else state  # a copy, as the object's own dict has its identity
        content = state, None if items is None else list(items), None if pairs is None else dict(pairs)
    return content


def _fill(value: Any, content: Any) -> None:
    """Write the content into an object."""
    if isinstance(value, Tensor):
        with torch.no_grad():
            value.data = content.to(value.device, value.dtype) if value.shape != content.shape else value.copy_(content)
    elif type(value) is np.ndarray:
        value[...] = content
    elif isinstance(value, GENERATORS):
        _set_generator_state(value, content)
    elif isinstance(value, TensorDict):
        for name, each in content.items():
            value.set(name, each)
    elif type(value) in CONTAINERS:
        value.clear()
        value.extend(content) if isinstance(value, list | deque) else value.update(content)
    else:
        _fill_object(value, *content)


def _fill_object(value: Any, state: Any, items: list[Any] | None, pairs: dict[Any, Any] | None) -> None:
    if items is not None:
        value.clear()
        value.extend(items)
    if pairs is not None:
        value.clear()
        value.update(pairs)
    if hasattr(type(value), "__setstate__"):
        value.__setstate__(state)
        return
    attributes, slots = state if isinstance(state, tuple) else (state, None)
    if hasattr(value, "__dict__"):
        vars(value).clear()
        vars(value).update(attributes or {})
    for name, each in (slots or {}).items():
        setattr(value, name, each)


def _set_generator_state(value: Any, state: Any) -> None:
    if isinstance(value, torch.Generator):
        if value.get_state().shape == state.shape:  # else from a GPU to the CPU or back, where no stream can continue
            value.set_state(state)
    elif isinstance(value, np.random.RandomState):
        value.set_state(state)
    elif isinstance(value, np.random.Generator):
        value.bit_generator.state = state
    else:
        value.setstate(state)


def _make_generator(kind: str, state: Any, device: torch.device | None = None) -> Any:
    if isinstance(state, Tensor):
        generator: Any = torch.Generator(device or "cpu")
    elif kind == "Generator":
        if state["bit_generator"] not in BIT_GENERATORS:
            raise ValueError(f"{state['bit_generator']} is no bit generator of NumPy")
        generator = np.random.Generator(getattr(np.random, state["bit_generator"])())
    else:
        generator = np.random.RandomState() if kind == "RandomState" else random.Random()
    _set_generator_state(generator, state)
    return generator


def _make_tensor(
    content: bytes, dtype: torch.dtype, shape: tuple[int, ...], kind: tuple[bool, bool, torch.device | str]
) -> Tensor:
    is_parameter, needs_grad, device = kind
    flat = torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)
    tensor = flat.view(dtype).reshape(shape).to(device)
    return nn.Parameter(tensor, requires_grad=needs_grad) if is_parameter else tensor.requires_grad_(needs_grad)


def _make_view(
    base: Tensor, dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...], offset: int
) -> Tensor:
    return base.detach().view(dtype).as_strided(shape, stride, offset)


def _make_tensordict(content: dict[Any, Any], batch_size: tuple[int, ...]) -> TensorDict:
    return TensorDict(content, batch_size=batch_size)


def _make_array(dtype: Any, shape: tuple[int, ...], content: bytes) -> np.ndarray:
    return np.frombuffer(content, dtype=np.dtype(dtype)).reshape(shape).copy()


def _make_scalar(dtype: Any, content: bytes) -> Any:
    return np.frombuffer(content, dtype=np.dtype(dtype))[0]


def _make_method(value: Any, name: str) -> Any:
    function = getattr(type(value), name, None)
    if not isinstance(function, types.FunctionType):
        raise ValueError(f"{type(value).__name__} has no method {name}")
    return types.MethodType(function, value)


HELPERS = (_make_generator, _make_tensor, _make_view, _make_tensordict, _make_array, _make_scalar, _make_method)
# What a checkpoint may name, besides dtypes and the classes that `_is_safe` accepts.
NAMES = {(each.__module__, each.__qualname__): each for each in (*HELPERS, *SAFE)}
