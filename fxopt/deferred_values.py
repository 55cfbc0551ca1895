"""The values of a deferred tensor: what they are computed from, when, and how much of them.

What is computed is kept for as long as a tensor over it lives, as in eager mode: at most half of the rows piece by
piece, then everything at once, so that no way of reading costs more than 1.5 times the projection. Before that, only
the hidden states, the weight and the bias are kept alive.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.deferred_tensor import Geometry, contiguous

__all__ = ["EAGER", "Projection", "Recipe", "Values", "autocast", "project", "rows_behind"]

EAGER = 'options={"logits": "eager"}'
"""The way out that errors name."""


@dataclasses.dataclass(frozen=True)
class Projection:
    """How a deferred output is computed from hidden states: ``tail(linear(hidden, weight, bias))``.

    tail:     pointwise on the logits (scale, softcap, casts) and keeping their shape, or None.
    dtype:    of the result.
    autocast: the autocast dtype in force on the device when the model ran, None where autocast was off. It holds
              whenever the output is read, whatever is in force then.
    name:     what errors call the output, such as "logits (modeling_llama.py:468)".
    """

    tail: Callable[[Tensor], Tensor] | None
    dtype: torch.dtype
    autocast: torch.dtype | None
    name: str


def project(hidden: Tensor, weight: Tensor, bias: Tensor | None, projection: Projection) -> Tensor:
    """Compute a deferred output, [..., V], under the autocast state that the model ran in. All of it passes here."""
    with autocast(hidden.device.type, projection.autocast):
        logits = F.linear(hidden, weight, bias)
        if projection.tail is not None:
            logits = projection.tail(logits)
    return logits.to(projection.dtype)


def autocast(device: str, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
    """Autocast to `dtype` on `device`, or none if `dtype` is None, whatever is in force around it."""
    if not torch.amp.is_autocast_available(device):
        return contextlib.nullcontext()
    return torch.autocast(device, dtype=dtype, enabled=dtype is not None, cache_enabled=False)


class Values:
    """Values [..., V], contiguous, that a recipe computes when they are needed: of some rows, or of all.

    The methods are those of `fxopt.deferred_tensor.Source`.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.name = recipe.projection.name
        self.value: Tensor | None = None
        self._recipe = recipe
        self._vocabulary = recipe.weight.shape[0]
        self._pieces: dict[Geometry, Tensor] = {}
        self._lock = threading.RLock()

    @property
    def like(self) -> tuple[torch.Size, torch.dtype, torch.device]:
        """Shape, dtype and device."""
        return self._recipe.shape, self._recipe.dtype, self._recipe.hidden.device

    def shared(self, view: Geometry) -> Tensor:
        """The plain tensor at `view` of the values that all views share: computes everything."""
        with self._lock:
            if self.value is None:
                self.value = self._recipe.compute(self._recipe.hidden)
                self._pieces.clear()
            sizes, strides, offset = view
            return self.value.as_strided(sizes, strides, self.value.storage_offset() + offset)

    def values(self, view: Geometry) -> Tensor:
        """The values at `view`, to be read and not written: computes the rows that it touches only, if they are few."""
        with self._lock:
            found = None if self.value is not None else rows_behind(view, self._vocabulary)
            if found is None or (found[0] not in self._pieces and not self._few(found[0])):
                return self.shared(view)
            rows, within = found
            if rows not in self._pieces:
                self._pieces[rows] = self._recipe.compute(self._recipe.rows(rows))
            return self._pieces[rows].as_strided(*within)

    def cast(self, view: Geometry, dtype: torch.dtype) -> Values | None:
        """The values at `view`, of whole rows, cast to `dtype` when they are needed; None where that cannot wait."""
        rows = self._rows(view)
        if rows is None:
            return None
        return Values(dataclasses.replace(self._recipe, hidden=rows, casts=(*self._recipe.casts, dtype)))

    def take(self, view: Geometry, choose: Callable[[Tensor], Tensor]) -> Values | None:
        """The values of the rows that `choose` copies from `view`; None where that cannot wait."""
        rows = self._rows(view)
        if rows is None:
            return None
        self._recipe.check_unchanged()  # hidden states are copied here, so now is the time to notice
        stamps = tuple(stamp for stamp in self._recipe.stamps if stamp.role != _HIDDEN)
        return Values(dataclasses.replace(self._recipe, hidden=choose(rows), stamps=stamps))

    def _rows(self, view: Geometry) -> Tensor | None:
        """The hidden states behind `view`; None where it does not show whole rows, or the values exist already."""
        if self.value is not None:
            return None
        if view == contiguous(self._recipe.shape):
            return self._recipe.hidden
        found = rows_behind(view, self._vocabulary)
        if found is None or found[1] != contiguous((*found[0][0], self._vocabulary)):
            return None
        return self._recipe.rows(found[0])

    def _few(self, rows: Geometry) -> bool:
        """Whether `rows` and the pieces so far are at most half of all: more, and computing everything is cheaper."""
        wanted = sum(math.prod(sizes) for sizes, _, _ in (rows, *self._pieces))
        return 2 * wanted <= self._recipe.shape[:-1].numel()


_HIDDEN = "hidden states"


@dataclasses.dataclass(frozen=True, eq=False)
class Recipe:
    """What is projected and how. hidden: [..., H], weight: [V, H], bias: [V] or None, detached.

    casts:  applied after the projection, in order.
    stamps: the state of the tensors that must not change before the values are computed.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    projection: Projection
    casts: tuple[torch.dtype, ...]
    stamps: tuple[_Stamp, ...]

    @classmethod
    def of(cls, hidden: Tensor, weight: Tensor, bias: Tensor | None, projection: Projection) -> Recipe:
        """Note the state that the tensors are in now. `detach` shares their version counters."""
        hidden, weight = hidden.detach(), weight.detach()
        bias = None if bias is None else bias.detach()
        stamps = [_Stamp.of(_HIDDEN, hidden, None), _Stamp.of("weight", weight, _sample(weight))]
        if bias is not None:
            stamps.append(_Stamp.of("bias", bias, _sample(bias)))
        return cls(hidden, weight, bias, projection, (), tuple(stamps))

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.hidden.shape[:-1], self.weight.shape[0]))

    @property
    def dtype(self) -> torch.dtype:
        return self.casts[-1] if self.casts else self.projection.dtype

    def rows(self, rows: Geometry) -> Tensor:
        """The hidden states [*sizes, H] at the geometry `rows`, counted in rows."""
        sizes, strides, offset = rows
        width = self.hidden.shape[-1]
        hidden = self.hidden.contiguous()
        steps = [stride * width for stride in strides]
        return hidden.as_strided((*sizes, width), (*steps, 1), hidden.storage_offset() + offset * width)

    def compute(self, rows: Tensor) -> Tensor:
        """Project `rows` [..., H] to contiguous [..., V]. Raises `RuntimeError` if an input was changed since."""
        self.check_unchanged()
        # Not an inference tensor even when read in inference mode: it may be used and changed after that.
        with torch.inference_mode(False), torch.no_grad():
            values = project(rows, self.weight, self.bias, self.projection)
            for dtype in self.casts:
                values = values.to(dtype)
            return values.contiguous()

    def check_unchanged(self) -> None:
        """Raise `RuntimeError` if hidden states, weight or bias are not what they were in the forward."""
        for stamp in self.stamps:
            if stamp.is_broken():
                raise RuntimeError(
                    f"{self.projection.name} is computed when it is first read, but its {stamp.role} had been updated "
                    "in place since the forward (optimizer.step() does that). Read it before optimizer.step(), or "
                    f"compile with {EAGER} to have it computed in the forward."
                )


def rows_behind(view: Geometry, vocabulary: int) -> tuple[Geometry, Geometry] | None:
    """The rows that a view of contiguous [..., V] values touches, and the view within [*rows, V]. None if it straddles.

    An axis whose stride is a multiple of V goes from row to row; the others must stay within one. The first geometry
    counts in rows, the second in values. This sees through any chain of views: slices, reshapes, transposes.
    """
    if not vocabulary or not math.prod(view[0]):
        return None
    rows: list[tuple[int, int, int]] = []
    columns: list[tuple[int, int, int]] = []
    for axis, (size, stride) in enumerate(zip(view[0], view[1], strict=True)):
        (rows if size == 1 or stride % vocabulary == 0 else columns).append((axis, size, stride))
    if view[2] % vocabulary + sum((size - 1) * stride for _, size, stride in columns) >= vocabulary:
        return None
    sizes = tuple(size for _, size, _ in rows)
    strides = tuple(stride // vocabulary if size > 1 else 0 for _, size, stride in rows)
    steps = contiguous((*sizes, vocabulary))[1]
    within = {axis: step for (axis, _, _), step in zip(rows, steps, strict=False)}
    within |= {axis: stride for axis, _, stride in columns}
    order = tuple(within[axis] for axis in range(len(view[0])))
    return (sizes, strides, view[2] // vocabulary), (view[0], order, view[2] % vocabulary)


@dataclasses.dataclass(frozen=True, eq=False)
class _Stamp:
    """The state of a tensor at some time.

    version: autograd's count of changes in place; None for inference tensors, which have none.
    pointer: its memory, which is gone after a storage was resized (as FSDP does).
    sample:  some values, since the count misses what fused optimizers write, and what is written through `.data`.
    """

    role: str
    tensor: Tensor
    version: int | None
    pointer: int
    sample: Tensor | None

    @classmethod
    def of(cls, role: str, tensor: Tensor, sample: Tensor | None) -> _Stamp:
        return cls(role, tensor, _version(tensor), tensor.data_ptr(), sample)

    def is_broken(self) -> bool:
        if _version(self.tensor) != self.version or self.tensor.data_ptr() != self.pointer:
            return True
        if self.sample is None:
            return False
        now, then = _sample(self.tensor).view(torch.uint8), self.sample.view(torch.uint8)  # for NaN is not equal to NaN
        return not torch.equal(now, then)


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _sample(tensor: Tensor) -> Tensor:
    """A copy of up to 256 values, evenly spread over every axis: one small kernel, and no synchronisation."""
    count = min(256, *tensor.shape)
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    stride = sum(size // max(count, 1) * stride for size, stride in steps)
    return tensor.as_strided((count,), (stride,), tensor.storage_offset()).clone()
