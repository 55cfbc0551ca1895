"""Attention by one of torch's own kernels: `scaled_dot_product_attention`, or one of its backends by name.

`torch.nn.attention.sdpa_kernel` chooses a backend for all calls while it is active, which here would be while the whole
graph is traced. The operators behind it have derivatives of their own, so that a graph can name one at each site.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["backends_for", "sdpa"]

aten = torch.ops.aten

_NARROW = (torch.float16, torch.bfloat16)
_ALIGNED = 8
"""Entries of a head that the flash kernel reads at once."""


def backends_for(dtype: torch.dtype) -> tuple[str, ...]:
    """The backends that have a kernel for `dtype` on CUDA; whether one takes a shape, only a call can tell."""
    return ("flash", "cudnn", "efficient") if dtype in _NARROW else ("efficient",) if dtype == torch.float32 else ()


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool = False, dropout: float = 0.0, backend: str = ""
) -> Tensor:
    """softmax(scale * q k^T) v: q [B, H, Sq, D], k [B, Hk, Sk, D], v [B, Hk, Sk, Dv] -> [B, H, Sq, Dv], any strides.

    H is a multiple of Hk. causal: position i attends to 0 .. i. backend: "flash", "cudnn" or "efficient", for training
    on CUDA without dropout; empty: what torch chooses when the graph is compiled.
    Raises KeyError for another name; what a backend does not take it refuses with RuntimeError when it runs.
    """
    if not backend:
        return F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=True
        )  # fmt: skip
    return _BACKENDS[backend](q, k, v, causal, scale)


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    width = v.shape[-1]
    q, k, v = (F.pad(x, (0, -x.shape[-1] % _ALIGNED)) if x.shape[-1] % _ALIGNED else x for x in (q, k, v))
    out = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)[0]
    return out[..., :width] if width % _ALIGNED else out


def _cudnn(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    return aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)[0]


def _efficient(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    """This kernel knows nothing of heads that share keys: they are repeated."""
    group = q.shape[1] // k.shape[1]
    k, v = (x if group == 1 else x.repeat_interleave(group, 1) for x in (k, v))
    return aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal, scale=scale)[0]


_BACKENDS = {"flash": _flash, "cudnn": _cudnn, "efficient": _efficient}
