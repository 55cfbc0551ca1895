"""The tensor subclass behind `fxopt.deferred`: sizes and strides over values that may not exist yet.

It is a strided view, as every tensor is, of a `Source`. Autograd treats it as any other tensor; what reaches
`__torch_dispatch__` below it either needs only sizes and strides, and gives another such view, or needs values, and
runs on the plain tensor that the source computes. Views of one tensor share one source: writing to one shows in all.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fxopt.compat import OpOverload, disabled_torch_function, forbid_data_pointer

__all__ = ["DeferredTensor", "Geometry", "Source", "contiguous"]

aten = torch.ops.aten

Geometry = tuple[tuple[int, ...], tuple[int, ...], int]
"""Sizes, strides and storage offset of a view of a source's values."""


class Source(Protocol):
    """The values that a deferred tensor and its views share, computed when they are needed.

    value: all of them, or None while they do not exist. Once they do, it is what every view shows and writing changes.
    name:  what errors call them.
    """

    name: str
    value: Tensor | None

    @property
    def like(self) -> tuple[torch.Size, torch.dtype, torch.device]:
        """Shape, dtype and device of all the values, which are contiguous."""

    def shared(self, view: Geometry) -> Tensor:
        """The plain tensor at `view` of the values that all views share: computes everything."""

    def values(self, view: Geometry) -> Tensor:
        """The values at `view`, to be read and not written: may compute less than everything."""

    def cast(self, view: Geometry, dtype: torch.dtype) -> Source | None:
        """The values at `view` cast to `dtype`, as a source computed later; None where that cannot be."""

    def take(self, view: Geometry, choose: Callable[[Tensor], Tensor]) -> Source | None:
        """The values of the rows that `choose` copies, as a source computed later; None where that cannot be."""


def contiguous(shape: Sequence[int]) -> Geometry:
    """The geometry of a contiguous tensor of `shape`."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(shape), tuple(reversed(strides)), 0


class DeferredTensor(Tensor):
    """A view of a source's values. Make one with `fxopt.deferred.deferred`.

    Pickling, `copy.deepcopy` and `torch.save` give an ordinary tensor. Code compiled by Dynamo has a graph break where
    it uses one: as a traceable subclass (`__tensor_flatten__`), compiled code would not see which of its inputs share
    values, and would compute wrong results where it writes to one of them.
    """

    _source: Source
    __torch_function__ = disabled_torch_function

    @staticmethod
    def __new__(cls, source: Source, view: Geometry | None = None) -> DeferredTensor:
        """A tensor over `source` at `view`, by default all of it."""
        shape, dtype, device = source.like
        sizes, strides, offset = view if view is not None else contiguous(shape)
        self: DeferredTensor = Tensor._make_wrapper_subclass(
            cls, sizes, strides=strides, storage_offset=offset, dtype=dtype, device=device
        )
        forbid_data_pointer(self)
        self._source = source
        return self

    @property
    def is_computed(self) -> bool:
        """Whether all values exist; reading some rows does not make it so."""
        return self._source.value is not None

    @property
    @torch.compiler.disable
    def computed(self) -> Tensor:
        """The plain, detached tensor that shares these values: computes them."""
        return self._source.shared(_geometry(self))

    @torch.compiler.disable
    def ordinary(self) -> Tensor:
        """The same tensor to autograd and in memory, and no subclass: computes the values."""
        if self.is_leaf:
            return self.computed.detach().requires_grad_(self.requires_grad)
        self._source.shared(_geometry(self))
        with torch.enable_grad():
            return torch.ops.aten.alias.default(self)

    @classmethod
    @torch.compiler.disable
    def __torch_dispatch__(cls, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled():  # where composite operators arrive whole
            result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        this = args[0] if args else None
        if isinstance(this, DeferredTensor) and not this.is_computed:
            without_values = _WITHOUT_VALUES.get(func) or (_view if func.is_view else None)
            result = without_values(func, this, args[1:], kwargs) if without_values else None
            if result is not None:
                return result
        return _on_values(func, args, kwargs)

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        if self.is_computed:
            return self.ordinary().__repr__(**options)
        grad = ", requires_grad=True" if self.requires_grad else ""
        return f"tensor(deferred, size={tuple(self.shape)}, dtype={self.dtype}, device='{self.device}'{grad})"

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if self.dim() == 0 else super().__format__(spec)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.ordinary().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        memo[id(self)] = result = copy.deepcopy(self.ordinary(), memo)
        return result

    @torch.compiler.disable
    def tolist(self) -> Any:
        return self._source.values(_geometry(self)).tolist()

    @property
    def data(self) -> Tensor:
        return Tensor.data.__get__(self)  # type: ignore[attr-defined]

    @data.setter
    def data(self, value: Tensor) -> None:
        raise RuntimeError(f"{_ways_out(self)}: its .data cannot be replaced")

    # What hands out the memory itself, past the dispatcher: all of it is computed, for whoever holds it may write.

    def numpy(self, *, force: bool = False) -> Any:
        return self.ordinary().numpy(force=force)

    def data_ptr(self) -> int:
        return self.computed.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.computed.untyped_storage()

    def share_memory_(self) -> DeferredTensor:
        self.computed.share_memory_()
        return self

    def __dlpack__(self, **options: Any) -> Any:
        return self.ordinary().__dlpack__(**options)


def _in_place(name: str) -> Callable[[DeferredTensor, Any], Any]:
    operator = getattr(Tensor, name)

    @torch.compiler.disable
    def operate(self: DeferredTensor, other: Any) -> Any:
        return operator(self, other)

    return operate


# Dynamo (2.13) recurses without end where it finds an in-place operator of these on a class that only inherits it.
for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift"):
    setattr(DeferredTensor, f"__i{_name}__", _in_place(f"__i{_name}__"))


def _geometry(tensor: Tensor) -> Geometry:
    return tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset())


def _shape_of(this: DeferredTensor) -> Tensor:
    """A meta tensor with `this`'s sizes, strides and offset, to ask an operator for those of its result."""
    whole = torch.empty(this._source.like[0], dtype=this.dtype, device="meta")
    return whole.as_strided(*_geometry(this))


def _view(func: OpOverload, this: DeferredTensor, args: Any, kwargs: Any) -> Any:
    found = func(_shape_of(this), *args, **kwargs)
    views: Sequence[Tensor] = found if isinstance(found, (list, tuple)) else [found]
    if any(view.dtype != this.dtype or view.is_neg() for view in views):
        return None
    made = [DeferredTensor(this._source, _geometry(view)) for view in views]
    return made if isinstance(found, (list, tuple)) else made[0]


def _to_copy(func: OpOverload, this: DeferredTensor, args: Any, kwargs: Any) -> Tensor | None:
    device = kwargs.get("device")
    shape: Tensor = func(_shape_of(this), **{**kwargs, "device": "meta", "pin_memory": None})
    if device is not None and torch.device(device).type == "meta":
        return shape
    elsewhere = device is not None and torch.device(device) != this.device
    if elsewhere or kwargs.get("pin_memory") or shape.layout != torch.strided or not shape.is_contiguous():
        return None
    return _over(this._source.cast(_geometry(this), shape.dtype))


def _index(func: OpOverload, this: DeferredTensor, args: Any, kwargs: Any) -> Tensor | None:
    """``logits[mask]``, ``logits[:, positions]``: rows chosen by tensors, as long as the vocabulary is left alone."""
    indices = args[0]
    masks = (torch.bool, torch.uint8)
    indexed = sum(index.dim() if index is not None and index.dtype in masks else 1 for index in indices)
    return _take(func, this, args) if indexed < this.dim() else None


def _index_select(func: OpOverload, this: DeferredTensor, args: Any, kwargs: Any) -> Tensor | None:
    return _take(func, this, (args[0] % this.dim(), args[1])) if args[0] not in (-1, this.dim() - 1) else None


def _take(func: OpOverload, this: DeferredTensor, args: Any) -> Tensor | None:
    return _over(this._source.take(_geometry(this), lambda hidden: func(hidden, *args)))


def _over(source: Source | None) -> Tensor | None:
    return None if source is None else DeferredTensor(source)


def _new(func: OpOverload, this: DeferredTensor, args: Any, kwargs: Any) -> Tensor:
    """``zeros_like(logits)`` and other new tensors that have nothing of it but sizes, dtype and device."""
    options = {**kwargs, "device": kwargs.get("device") or this.device}
    return func(_shape_of(this), *args, **options)


_NEW = (
    aten.empty_like.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.rand_like.default,
    aten.randn_like.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
)
_WITHOUT_VALUES: dict[OpOverload, Callable[[OpOverload, DeferredTensor, Any, Any], Any]] = {
    aten._to_copy.default: _to_copy,
    aten.index.Tensor: _index,
    aten.index_select.default: _index_select,
    **dict.fromkeys(_NEW, _new),
}
"""Operators besides views that need no values; each gives None where it needs them after all."""


class _Use(NamedTuple):
    """A deferred tensor that an operator got, the plain one that stood in for it, and whether that was written to."""

    plain: Tensor
    deferred: DeferredTensor
    is_written: bool


def _on_values(func: OpOverload, args: Any, kwargs: Any) -> Any:
    """Run `func` on plain tensors. Where it writes to or aliases an argument, that one is the shared values."""
    _refuse_new_shape(func, args)
    parameters = func._schema.arguments
    named = {parameter.name: parameter for parameter in parameters}
    uses: list[_Use] = []
    result = func(
        *(_plain(parameter, value, uses) for parameter, value in zip(parameters, args, strict=False)),
        **{name: _plain(named[name], value, uses) for name, value in kwargs.items()},
    )
    for use in uses:
        if use.is_written:
            _after_write(func, use)
    return _owned(result, uses)


def _plain(parameter: Any, value: Any, uses: list[_Use]) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(parameter, item, uses) for item in value]
    if not isinstance(value, DeferredTensor):
        return value
    alias = parameter.alias_info
    tensor = value.computed if alias is not None else value._source.values(_geometry(value))
    uses.append(_Use(tensor, value, alias is not None and alias.is_write))
    return tensor


def _owned(result: Any, uses: list[_Use]) -> Any:
    """`result` with the deferred tensors in place of the plain ones that an operator in place returned."""
    if isinstance(result, (list, tuple)):
        return type(result)(_owned(item, uses) for item in result)
    return next((use.deferred for use in uses if use.plain is result), result)


def _refuse_new_shape(func: OpOverload, args: Any) -> None:
    if torch.Tag.inplace_view in func.tags and isinstance(args[0], DeferredTensor):
        raise RuntimeError(f"{_ways_out(args[0])}: {func} would change its shape, strides or memory in place")


def _after_write(func: OpOverload, use: _Use) -> None:
    value = use.deferred
    if use.plain.shape != value.shape:
        raise RuntimeError(f"{_ways_out(value)}: {func} resized it from {list(value.shape)} to {list(use.plain.shape)}")
    # Most operators count a write to what they were given; `_foreach_mul_` and its like leave that to their kernels,
    # which see the plain tensor only. Uncounted, older views would keep the gradients of what they showed before.
    if not value.is_inference():
        torch.autograd.graph.increment_version(value)


def _ways_out(value: DeferredTensor) -> str:
    return f'{value._source.name} is computed when it is read; use its clone(), or options={{"logits": "eager"}}'
