"""Computing a model in fp64 throughout, although it asks for less inside.

`model.double()` is not enough for a reference: norms, softmaxes, losses and RoPE tables of real models cast to
float32, whatever the parameters are, and the reference is then no better than what it is to judge.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fxopt.compat import TorchDispatchMode

_NARROW = (torch.float32, torch.float16, torch.bfloat16)


class Widen(TorchDispatchMode):
    """While active, every op that is asked for a floating dtype narrower than fp64 gives fp64.

    It works below autograd, so it sees the casts of Python, of autocast and of composite ops alike, in forward,
    backward and what a checkpoint recomputes; the default dtype is fp64 too, for the numbers that models turn into
    tensors (`finfo(x.dtype).min` overflows float32 where x is fp64). It cannot be active while anything is compiled.
    """

    def __enter__(self) -> Widen:
        self._default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.set_default_dtype(self._default)
        super().__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        wide_args = tuple(map(_wide, args))
        wide_kwargs = {key: _wide(value) for key, value in (kwargs or {}).items()}
        return _IN_FP64.get(func, func)(*wide_args, **wide_kwargs)


def _wide(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in _NARROW else value


def _grouped_mm(a: Tensor, b: Tensor, offs: Tensor, bias: None = None, out_dtype: object = None) -> Tensor:
    """`aten._grouped_mm`, whose kernels take no fp64, for the layouts of mixtures of experts.

    a [n, k], b [groups, k, m] -> [n, m]: rows `offs[g-1]:offs[g]` of `a` meet `b[g]`; rows past the last give 0.
    a [k, n], b [n, m] -> [groups, k, m]: the weight's gradient, with the same ranges of n.
    """
    ends = offs.tolist()
    ranges = list(zip([0, *ends], ends, strict=False))
    if b.dim() == 2:
        return torch.stack([a[:, start:end] @ b[start:end] for start, end in ranges])
    parts = [a[start:end] @ weight for (start, end), weight in zip(ranges, b, strict=True)]
    return torch.cat([*parts, a.new_zeros(len(a) - ends[-1], b.shape[-1])])


_IN_FP64: dict[Any, Callable[..., Any]] = {torch.ops.aten._grouped_mm.default: _grouped_mm}
