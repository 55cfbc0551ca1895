"""Computing a model in fp64 throughout, although it asks for less inside.

`model.double()` is not enough for a reference: norms, softmaxes, losses and RoPE tables of real models cast to
float32, whatever the parameters are, and the reference is then no better than what it is to judge.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_NARROW = (torch.float32, torch.float16, torch.bfloat16)
_NARROWING = (Tensor.float, Tensor.half, Tensor.bfloat16)


class Widen(TorchFunctionMode):
    """While active, every request for a floating dtype narrower than fp64 gives fp64.

    That covers `.float()`, `.half()`, `.bfloat16()`, `.to(dtype)` and any `dtype=` of a function of `torch`. Casts
    below Python (autocast, ops that return float32 by definition) are not seen. Ops without an fp64 kernel are
    computed from ops that have one (`grouped_mm`).
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _NARROWING:
            return args[0].double()
        if getattr(func, "__name__", "") == "_grouped_mm":
            return _grouped_mm(*args, **kwargs)
        return func(*map(_wide, args), **{key: _wide(value) for key, value in kwargs.items()})


def _wide(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in _NARROW else value


def _grouped_mm(rows: Tensor, weight: Tensor, *, offs: Tensor, bias: None = None, out_dtype: object = None) -> Tensor:
    """[n, k] x [groups, k, m] -> [n, m]: rows `offs[g-1]:offs[g]` meet `weight[g]`, rows past the last give 0.

    The kernel takes no fp64; bias is not supported by it either, and the output dtype is fp64 whatever was asked.
    """
    ends = offs.tolist()
    parts = [rows[a:b] @ w for a, b, w in zip([0, *ends], ends, weight, strict=False)]
    return torch.cat([*parts, rows.new_zeros(len(rows) - ends[-1], weight.shape[-1])])
