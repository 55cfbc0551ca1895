"""Tensors of every layout, and the code that makes them again: what rules' inputs and random modules are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.contiguous(),
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
    "first axes swapped": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1) if t.dim() > 1 else t,
    "strided": lambda t: torch.stack((t, t), -1)[..., 0],
    "offset": lambda t: torch.cat((t, t), -1)[..., t.shape[-1] :] if t.dim() else t,
    "misaligned": lambda t: torch.cat((t.new_zeros(1), t.reshape(-1)))[1:].view(t.shape),
}
"""Other tensors of the same values: non-unit strides, offsets, a storage that begins before them.

Expanded tensors are not among them: values are given, and need not repeat. See `fxopt.testing.random_modules.laid_out`.
"""


def made(
    *shape: int, dtype: torch.dtype, seed: int = 0, layout: str = "contiguous", requires_grad: bool = False
) -> Tensor:
    """Normal values of `seed`, a leaf. layout: a key of `LAYOUTS`. `requires_grad` counts for floating dtypes."""
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return LAYOUTS[layout](drawn).requires_grad_(requires_grad and dtype.is_floating_point)


def literal(values: list[Any], like: tuple[Any, ...], dtype: torch.dtype, requires_grad: bool = False) -> Tensor:
    """The tensor of `values`, flat, with `like` = (shape, strides)."""
    shape, strides = like
    tensor = torch.empty_strided(shape, strides, dtype=dtype)
    tensor.copy_(torch.tensor(values, dtype=dtype).reshape(shape))
    return tensor.requires_grad_(requires_grad)


def code_of(value: Any) -> str:
    """An expression for `value`, a tensor with all its numbers or anything whose repr is its code.

    Names that it needs: ``inf``, ``nan``, ``torch`` and ``literal``. A tensor that overlaps itself comes back dense.
    """
    if not isinstance(value, Tensor):
        return repr(value)
    overlaps = value.numel() and 0 in value.stride() and any(n > 1 for n in value.shape)
    like = tuple(value.shape), tuple(value.contiguous().stride() if overlaps else value.stride())
    numbers = value.detach().reshape(-1).tolist()
    return f"literal({numbers}, {like}, {value.dtype}, requires_grad={value.requires_grad})"
