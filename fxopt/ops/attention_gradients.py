"""What a backward of attention adds up, in fp32 (fp64 for fp64), and the layout in which it is handed on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxopt.ops.attention_call import Attention
from fxopt.ops.products import accumulate_dtype

__all__ = ["Gradients", "Wanted", "laid_out"]


@dataclass(frozen=True)
class Wanted:
    """Which gradients to compute."""

    q: bool
    k: bool
    v: bool
    sink: bool
    captures: tuple[bool, ...]

    @classmethod
    def of(cls, flags: Sequence[bool]) -> Wanted:
        """From those of q, k, v, sink and each capture."""
        q, k, v, sink, *captures = flags
        return cls(q, k, v, sink, tuple(captures))


@dataclass
class Gradients:
    """What is found so far, of any layout; None for what is not wanted.

    q: of q's dtype. k, v: sums over tiles; captures: sums over what reads them.
    """

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    captures: list[Tensor | None]

    @classmethod
    def to_add_to(cls, call: Attention, wanted: Wanted) -> Gradients:
        """Zeros."""
        return cls(
            torch.zeros_like(call.q) if wanted.q else None,
            call.k.new_zeros(call.k.shape, dtype=call.wide) if wanted.k else None,
            call.v.new_zeros(call.v.shape, dtype=call.wide) if wanted.v else None,
            [
                torch.zeros_like(one, dtype=accumulate_dtype(one.dtype)) if want else None
                for one, want in zip(call.captures, wanted.captures, strict=True)
            ],
        )

    @property
    def by_captures(self) -> bool:
        """Whether any capture's gradient is wanted."""
        return any(one is not None for one in self.captures)

    @property
    def needs_scores(self) -> bool:
        """Whether any of them goes through the scores."""
        return self.q is not None or self.k is not None or self.by_captures


def laid_out(value: Tensor, like: Tensor) -> Tensor:
    """`value`, which is dense, with the dtype and strides of ``torch.empty_like(like)``; itself where it has them."""
    if value.dtype == like.dtype and value.stride() == like.stride():
        return value
    fresh = torch.empty_like(like)
    return value if value.dtype == fresh.dtype and value.stride() == fresh.stride() else fresh.copy_(value)
