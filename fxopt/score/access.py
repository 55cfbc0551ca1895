"""Elements of captured tensors: read, and added to where gradients come back."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fxopt.score.term import Term
from fxopt.score.text import ProgramError

_POSITION = {"b": 0, "h": 1, "q": 2, "k": 3}


@dataclasses.dataclass(frozen=True)
class Access:
    """How one load reads its tensor.

    slot: which tensor. rank: its number of axes.
    axes: for each of its axes the variable (None for a constant) and what is added to it; None unless every index is of
          this form and no variable occurs twice: such a load is, on a block, a slice.
    """

    slot: int
    rank: int
    axes: tuple[tuple[str | None, int], ...] | None

    @classmethod
    def of(cls, load: Term) -> Access:
        """How `load` reads."""
        slot, *index = load.args
        axes = [_shifted(term) for term in index]
        names = [axis[0] for axis in axes if axis is not None and axis[0] is not None]
        plain = None not in axes and len(set(names)) == len(names)
        return cls(slot, len(index), tuple(axis for axis in axes if axis is not None) if plain else None)

    @property
    def is_block(self) -> bool:
        """Whether a block of scores reads a block of the tensor."""
        return self.axes is not None

    def block(self, captures: Sequence[Tensor], ranges: Mapping[str, slice]) -> Tensor:
        """What `ranges` (axis -> slice) of scores read: a view with four axes, those the load does not index of size 1.

        Raises `ProgramError` for a tensor of another rank, or one that is too small (a slice would just end early).
        """
        return self.view(self._tensor(captures), ranges)

    def view(self, tensor: Tensor, ranges: Mapping[str, slice]) -> Tensor:
        """`block` of the tensor itself."""
        assert self.axes is not None
        key: list[Any] = []
        done = 0
        for axis in self._order:
            name, offset = self.axes[axis]
            if name is None:
                key.append(offset)
                continue
            span = slice(ranges[name].start + offset, ranges[name].stop + offset)
            if not 0 <= span.start <= span.stop <= tensor.shape[axis]:
                raise self._error(tensor, f"from {span.start} to {span.stop} on axis {axis}")
            key += [None] * (_POSITION[name] - done)
            key.append(span)
            done = _POSITION[name] + 1
        return tensor.permute(self._order)[(*key, *[None] * (4 - done))]

    @functools.cached_property
    def _order(self) -> list[int]:
        """The tensor's axes as the scores have them, constants first."""
        return sorted(range(self.rank), key=lambda axis: _POSITION.get((self.axes or ())[axis][0] or "", -1))

    def elements(self, captures: Sequence[Tensor], index: Sequence[Any]) -> Tensor:
        """Elements at `index`, int64 tensors and numbers, in their broadcast shape. Raises `ProgramError` for
        a tensor of another rank."""
        return self._tensor(captures)[tuple(index)]

    def add(self, into: Tensor, values: Tensor, ranges: Mapping[str, slice]) -> None:
        """Add `values` [nb, nh, nq, nk], one a score, to what the scores in `ranges` read."""
        target = self.view(into, ranges)
        target += _summed_to(values, target.shape).to(into.dtype)

    def add_at(self, into: Tensor, values: Tensor, index: Sequence[Tensor]) -> None:
        """Add `values` [nb, nh, nq, nk] to the elements at `index`, int64 tensors; one may be read by many scores."""
        shape = torch.broadcast_shapes(*(item.shape for item in index))
        summed = _summed_to(values, shape).view(shape).to(into.dtype)
        into.index_put_(tuple(index), summed, accumulate=True)

    def _tensor(self, captures: Sequence[Tensor]) -> Tensor:
        tensor = captures[self.slot]
        if tensor.dim() != self.rank:
            raise self._error(tensor, f"with {self.rank} indices")
        return tensor

    def _error(self, tensor: Tensor, how: str) -> ProgramError:
        return ProgramError(f"slot {self.slot} is read {how}, its tensor is {list(tensor.shape)}")


def _shifted(term: Term) -> tuple[str | None, int] | None:
    """`term` as a variable, or none, and a constant added to it."""
    if term.op == "const":
        return None, term.value
    if term.op in _POSITION:
        return term.op, 0
    if term.op not in ("add", "sub"):
        return None
    one, other = term.args
    if term.op == "add" and one.op == "const":
        one, other = other, one
    if one.op not in _POSITION or other.op != "const":
        return None
    return one.op, other.value if term.op == "add" else -other.value


def _summed_to(values: Tensor, shape: Sequence[int]) -> Tensor:
    """`values` with four axes, summed over those that `shape` does not have or has with size 1."""
    shape = (1,) * (4 - len(shape)) + tuple(shape)
    extra = [axis for axis, (own, kept) in enumerate(zip(values.shape, shape, strict=True)) if own != 1 and kept == 1]
    return values.sum(extra, keepdim=True) if extra else values
