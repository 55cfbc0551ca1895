"""Where a score program is evaluated: its score, its indices, its captured tensors, and what it computes in."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fxopt.score.term import Kind
from fxopt.score.text import ProgramError

AXES = "bhqk"
"""The axes of a score, in the order of its dimensions."""


@dataclasses.dataclass
class Place:
    """Where a program is evaluated.

    s: float tensor or None. captures: by slot. dtype: of floats. indices: axis -> int64 tensor, [1, 1, nq, 1] for "q";
    those that are missing are made when read, from `ranges`: axis -> slice with start and stop.
    """

    s: Tensor | None
    captures: Sequence[Tensor]
    dtype: torch.dtype
    device: torch.device
    indices: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    ranges: Mapping[str, slice] = dataclasses.field(default_factory=dict)

    @property
    def is_differentiated(self) -> bool:
        """Whether autograd records what is computed here."""
        return torch.is_grad_enabled() and any(
            item.requires_grad for item in (self.s, *self.captures) if item is not None
        )

    def variable(self, name: str) -> Tensor:
        """The value of a variable. Raises `ProgramError` for s where there is none."""
        if name == "s":
            if self.s is None:
                raise ProgramError("the program reads s, and s is None")
            return self.s
        if name not in self.indices:
            span, shape = self.ranges[name], [1] * len(AXES)
            shape[AXES.index(name)] = -1
            self.indices[name] = torch.arange(span.start, span.stop, device=self.device).view(shape)
        return self.indices[name]

    def of_kind(self, value: Tensor, kind: Kind) -> Tensor:
        """`value` in the dtype of `kind`."""
        return value.to(self.dtype if kind == "float" else torch.int64 if kind == "int" else torch.bool)

    def number(self, value: float) -> float:
        """`value` as a number of `dtype`: what is too large is infinite (PyTorch raises for it in some operators)."""
        largest = torch.finfo(self.dtype).max
        return value if -largest <= value <= largest else value * float("inf")

    def filled(self, value: bool | int | float) -> Tensor:
        """A constant as a tensor without axes."""
        if type(value) is not float:
            return torch.full((), value, device=self.device)
        return torch.full((), self.number(value), dtype=self.dtype, device=self.device)


def block_of(
    s: Tensor | None,
    spans: Sequence[slice],
    captures: Sequence[Tensor],
    dtype: torch.dtype,
    device: torch.device | str | None,
) -> Place:
    """The place of a block of scores, `spans` being those of b, h, q and k."""
    if device is None:
        device = s.device if s is not None else captures[0].device if captures else "cpu"
    ranges = dict(zip(AXES, spans, strict=True))
    return Place(s, captures, dtype if s is None else s.dtype, torch.device(device), ranges=ranges)


def with_four_axes(*values: Tensor) -> list[Tensor]:
    """`values` with axes of size 1 put before, up to four."""
    return [value if value.dim() >= 4 else value[(None,) * (4 - value.dim())] for value in values]
