"""The memory of compiled code, event by event: Inductor's wrapper is run on fake tensors, its kernels doing nothing.

Python itself says then when each buffer is let go, so reuse, early deletion and aliasing need no rules of ours. Against
the profiler's events on a CPU this is exact but for what libraries hold inside their calls.
"""

from __future__ import annotations

import collections
import itertools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fxopt import compat
from fxopt.memory.plan import Trace
from fxopt.ops.offload_operator import SEND
from fxopt.ops.registry import memory_of

__all__ = ["CALLS", "GRADIENTS", "KEPT", "OUTPUTS", "WORKING", "Ledger", "Replay", "replay"]


KEPT, OUTPUTS, GRADIENTS, WORKING = "kept for the backward", "outputs", "gradients", "working memory"
CALLS = "other calls of the graph"


@dataclass(frozen=True)
class Event:
    """Memory taken or let go, by which number. size: in bytes, negative when let go."""

    number: int
    size: int


@dataclass
class Ledger:
    """Every allocation and release, and the bytes held now.

    granularity: what the allocator rounds up to. device: the type of that whose memory counts; "": all.
    """

    granularity: int = 1
    device: str = ""
    now: int = 0
    events: list[Event] = field(default_factory=list)
    labels: dict[int, str] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    _numbers: dict[int, int] = field(default_factory=dict)

    def add(self, value: Any, on_host: bool = False) -> None:
        """Count the memory of the tensors in `value` until the last of them is gone; what is known counts once.

        on_host: it is memory of the host, whatever device this is.
        """
        for tensor in _tensors(value):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._numbers:
                elsewhere = on_host or self.device not in ("", tensor.device.type)
                size = 0 if elsewhere else -(-int(storage.nbytes()) // self.granularity) * self.granularity
                number = len(self.events)
                self._numbers[storage._cdata] = number
                weakref.finalize(storage, self._release, storage._cdata, number, size)
                self._move(number, size)

    def ignore(self, value: Any) -> None:
        """Never count the memory of `value`, which is the caller's and must live as long as this."""
        for storage in _storages(value):
            self._numbers.setdefault(storage._cdata, -1)

    def label(self, values: Sequence[Any], label: str, names: Sequence[str]) -> None:
        """What the tensors in `values` are for, where they have no label yet, and their names in the graph."""
        for value, name in zip(values, names, strict=True):
            for storage in _storages(value):
                number = self._numbers[storage._cdata]
                self.labels.setdefault(number, label)
                self.names.setdefault(number, name)

    def briefly(self, size: int) -> None:
        """`size` more bytes for a moment."""
        number = len(self.events)
        self._move(number, size)
        self._move(number, -size)

    def _release(self, key: int, number: int, size: int) -> None:
        del self._numbers[key]
        self._move(number, -size)

    def _move(self, number: int, size: int) -> None:
        self.now += size
        self.events.append(Event(number, size))


def _tensors(value: Any) -> list[torch.Tensor]:
    return [one for one in compat.pytree.tree_leaves(value) if isinstance(one, torch.Tensor)]


def _storages(value: Any) -> list[Any]:
    return [one.untyped_storage() for one in _tensors(value)]


@dataclass(frozen=True)
class Replay:
    """Bytes in one step, without parameters and inputs: held after each event, forward and backward.

    parts: bytes at the peak by what holds them. trace: the events themselves.
    """

    forward: list[int]
    backward: list[int]
    parts: dict[str, int]
    trace: Trace = field(default_factory=Trace)

    @classmethod
    def of(cls, ledger: Ledger, turn: int) -> Replay:
        """From `ledger`, where the backward begins with event `turn`."""
        held = list(itertools.accumulate(event.size for event in ledger.events))
        trace = _trace(ledger, turn)
        return cls(held[:turn], held[turn:], _parts(trace, held), trace)

    def repeated(self, calls: int) -> Replay:
        """Of a step that calls the graph `calls` times, forward after forward and then backward after backward.

        The last forward finds what the calls before it hold. The backward of one finds what those hold whose backward
        comes later, and the gradients of those whose backward is done: at most the larger of the two for each.
        """
        if calls == 1 or not self.forward:
            return self
        retained, left = self.forward[-1], self.backward[-1] if self.backward else 0
        forward = [size + (calls - 1) * retained for size in self.forward]
        backward = [size + (calls - 1) * max(retained, left) for size in self.backward]
        both, own = [*forward, *backward], [*self.forward, *self.backward]
        parts = _parts(self.trace, both) if self.trace.moves else self.parts
        top = max(range(len(both)), key=both.__getitem__)
        return Replay(forward, backward, {**parts, CALLS: both[top] - own[top]}, self.trace)

    def times(self, factor: float) -> Replay:
        """With `factor` times the bytes."""
        forward, backward = ([int(factor * size) for size in part] for part in (self.forward, self.backward))
        return Replay(forward, backward, {name: int(factor * size) for name, size in self.parts.items()})

    @property
    def peaks(self) -> tuple[int, int]:
        """The most in the forward and in the backward."""
        return max(self.forward, default=0), max(self.backward, default=0)

    @property
    def peak(self) -> int:
        """The most in the whole step."""
        return max(self.peaks)

    @property
    def names(self) -> list[str]:
        """The name in the graph of what each event takes or lets go."""
        return [self.trace.names[abs(move) - 1] for move in self.trace.moves]


def _parts(trace: Trace, held: Sequence[int]) -> dict[str, int]:
    """Bytes by what they are for, where the most is held."""
    top = max(range(len(held)), key=held.__getitem__, default=-1)
    parts: dict[str, int] = collections.defaultdict(int)
    for move in trace.moves[: top + 1]:
        parts[trace.kinds[abs(move) - 1]] += trace.sizes[abs(move) - 1] * (1 if move > 0 else -1)
    return {name: size for name, size in parts.items() if size}


def _trace(ledger: Ledger, turn: int) -> Trace:
    """The events of `ledger`, with blocks of memory numbered as they are taken."""
    taken = [event.number for at, event in enumerate(ledger.events) if event.number == at]
    blocks = {number: block for block, number in enumerate(taken, 1)}
    return Trace(
        names=tuple(ledger.names.get(number, "") for number in blocks),
        kinds=tuple(ledger.labels.get(number, WORKING) for number in blocks),
        sizes=tuple(ledger.events[number].size for number in blocks),
        moves=tuple(blocks[one.number] * (1 if one.number == at else -1) for at, one in enumerate(ledger.events)),
        turn=turn,
    )


def replay(
    forward: compat.Lowered, backward: compat.Lowered, outputs: int, granularity: int = 1, device: str = ""
) -> Replay:
    """Replay a step. outputs: how many of the forward's results the caller gets, and holds until the end.

    granularity: bytes to a multiple of which the allocator rounds. device: see `Ledger`. Raises what the code raises.
    """
    ledger = Ledger(granularity, device)
    with compat.FakeTensorMode(allow_non_fake_inputs=True):
        given = [_empty(item) for item in forward.inputs]
        ledger.ignore(given)
        results = _call(forward.code, list(given), ledger)
        kept = results[:outputs]
        ledger.label(kept, OUTPUTS, forward.output_names[:outputs])
        ledger.label(results, KEPT, forward.output_names)
        turn = len(ledger.events)
        saved = dict(zip(forward.input_names, given, strict=True))
        saved |= dict(zip(forward.output_names[outputs:], results[outputs:], strict=True))
        arguments = _arguments(backward, saved)
        del results, saved  # but not what was given: memory that it let go would be taken for its own
        ledger.add(arguments)
        gradients = _call(backward.code, arguments, ledger)
        ledger.label(gradients, GRADIENTS, backward.output_names)
        found = Replay.of(ledger, turn)
        del kept, gradients
    return found


def _arguments(backward: compat.Lowered, saved: dict[str, Any]) -> list[Any]:
    """What the backward is called with: what was saved, by its name, and new gradients of the outputs."""
    both = zip(backward.input_names, backward.inputs, strict=True)
    return [saved[name] if name in saved else _empty(value) for name, value in both]


def _empty(value: Any) -> Any:
    """A fake tensor like `value` under the mode that is on, or the number behind a symbolic one."""
    if not isinstance(value, torch.Tensor):
        return compat.size_hint(value)
    sizes, strides = ([compat.size_hint(one) for one in many] for many in (value.shape, value.stride()))
    return torch.empty_strided(sizes, strides, dtype=value.dtype, device=value.device)


def _call(code: str, arguments: list[Any], ledger: Ledger) -> Sequence[Any]:
    """Run the wrapper `code` on `arguments`, of which it empties the list."""
    found: Sequence[Any] = compat.load_wrapper(code, _Doubles(ledger).names())(arguments)
    return found


class _Doubles:
    """What stands in the wrapper for allocation, kernels and operators."""

    def __init__(self, ledger: Ledger):
        self.ledger = ledger

    def names(self) -> dict[str, Any]:
        """By the names that they have in the wrapper."""
        allocators = ("cpu", "cuda", "xpu", "mtia")
        return {
            **{f"empty_strided_{kind}": self._allocator(kind) for kind in allocators},
            "empty_strided_cpu_pinned": self._allocator("cpu"),
            "empty_strided": lambda *a, **k: self.counted(torch.empty_strided(*a, **k)),
            "reinterpret_tensor": lambda base, size, stride, offset=0: base.as_strided(size, stride, offset),
            "assert_size_stride": _nothing,
            "assert_alignment": _nothing,
            "async_compile": _Kernels(),
            "extern_kernels": _Extern(self),
            "torch": _Torch(self),
            "aten": _Operators(torch.ops.aten, self),
            "inductor_ops": _Operators(torch.ops.inductor, self),
        }

    def counted(self, value: Any) -> Any:
        """`value`, whose memory counts from now on."""
        self.ledger.add(value)
        return value

    def run(self, operator: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`operator`'s result; what it holds besides counts for a moment."""
        cost = memory_of(operator, *args, **kwargs)
        if cost is not None:
            self.ledger.briefly(cost.outputs + cost.workspace)
        found = operator(*args, **kwargs)
        self.ledger.add(found, on_host=operator is SEND)
        return found

    def _allocator(self, kind: str) -> Callable[..., torch.Tensor]:
        def allocate(size: Any, stride: Any, dtype: torch.dtype) -> torch.Tensor:
            return self.counted(torch.empty_strided(size, stride, dtype=dtype, device=kind))

        return allocate


def _nothing(*_: Any, **__: Any) -> None:
    """A kernel."""


class _Kernel:
    """A compiled kernel, which is called or run, on a grid or not."""

    run = staticmethod(_nothing)

    def __call__(self, *_: Any, **__: Any) -> None:
        """Do nothing."""

    def __getitem__(self, _: Any) -> _Kernel:
        return self


class _Kernels:
    """`async_compile`, of which every method makes a kernel."""

    def __getattr__(self, name: str) -> Callable[..., _Kernel]:
        return lambda *_, **__: _Kernel()


class _Extern:
    """`extern_kernels`: those that are told where to write do nothing, others allocate."""

    def __init__(self, doubles: _Doubles):
        self.doubles = doubles

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, out: Any = None, **kwargs: Any) -> Any:
            return out if out is not None else self.doubles.run(compat.extern_kernel(name), *args, **kwargs)

        return call


class _Operators:
    """``torch.ops`` and all in it, down to the overload, which counts what it returns."""

    def __init__(self, real: Any, doubles: _Doubles):
        self._real, self._doubles = real, doubles

    def __getattr__(self, name: str) -> Any:
        return _Operators(getattr(self._real, name), self._doubles)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._doubles.run(self._real, *args, **kwargs)


class _Torch:
    """The module torch, but for its operators."""

    def __init__(self, doubles: _Doubles):
        self.ops = _Operators(torch.ops, doubles)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)
