"""Attention a tile at a time by torch's flash attention for CPUs.

Its kernel (aten/src/ATen/native/cpu/FlashAttentionKernel.cpp, torch 2.11 to 2.13) computes ``softmax(scale * q @ k.T +
mask)`` of whole rectangles: it skips the keys above a diagonal that starts at the top left, and nothing else. So it is
called for each tile of what the mask allows, on views. Found by trying, and relied on here:

    heads       H a multiple of Hk; head dims of any size, v's the same; Sq and Sk not 0 (SIGFPE)
    layout      any strides, but the last must be 1 (else NaN); out is laid out as [B, Sq, H, D], lse as [B, Sq, H]
    mask        of q's dtype or fp32, no bool; [1 or B, 1 or H, 1 or Sq, 1 or Sk]; may come on top of is_causal
    scale       must be positive with is_causal: -inf is multiplied by it
    no keys     rows whose mask is -inf give out 0 and lse 0; the backward gives NaN with lse -inf, 0 with lse inf
    a sink      the backward is right with the lse and out that have it
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from fxopt.ops.attention_call import Attention, length, part_of
from fxopt.ops.tiles import Tile, computed_pairs

MASK_BYTES = 4 * 2**20
"""Most bytes of a mask: a tile whose bias depends on q and k has its rows cut."""
CUT_KEYS = 1024
"""A causal tile of as many keys, or fewer, is cut too: what the kernel skips above the diagonal is blocks of 512 keys.
Time of the pieces over that of the whole tile (fp32, one core, 8 heads of 64): 0.80 at 256 and 512 keys, 0.81 at 1024,
0.96 at 2048, where two cores lose what one gains."""
CUT_ROWS = 64
"""Rows of the pieces, at least; one for 16 keys."""

LONG_ROWS = 1536
"""Rows from which on the kernel is as fast in bf16 as blocks of scores are."""

_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_differentiate = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def can_compute(call: Attention) -> bool:
    """Whether forward and backward (but for gradients by captures) can go by the kernel, and had better.

    Blocks of scores (`fxopt.ops.score_tiles`) take as long in fp32; 0.5 to 0.9 of the time in bf16, but for long tiles,
    which two cores compute in 0.9 of theirs; 0.1 to 0.2 in fp16; and 0.7 to 1.0 where v has other head dims than q and
    would be padded.
    """
    return may_compute(call) and (call.q.dtype == call.wide or _is_long(call))


def may_compute(call: Attention) -> bool:
    """`can_compute` for some intervals."""
    affine, q = call.spec.affine, call.q
    return (
        q.device.type in ("cpu", "meta")
        and q.dtype in (torch.float64, torch.float32, torch.bfloat16)
        and affine is not None
        and 0 < call.spec.scale * affine[0] < torch.inf
        and call.spec.dropout == 0
        and call.v.shape[-1] == q.shape[-1] > 0
        and call.key_heads > 0
    )


def _is_long(call: Attention) -> bool:
    """Whether most of the work is in tiles of many rows and no mask: with fewer, the kernel's products are small."""
    long = [tile for tile in call.tiles if tile.kind in ("full", "causal") and length(tile.q) >= LONG_ROWS]
    return 2 * computed_pairs(long) > computed_pairs(call.tiles)


def forward(call: Attention) -> tuple[Tensor, Tensor]:
    """(out [B, H, Sq, D] of any layout, lse [B, H, Sq]), without the sink; rows without keys get 0 and -inf."""
    parts = list(parts_of(call, call.tiles))
    if len(parts) == 1 and _has_all_rows(call, parts[0]):
        return _forward(call, parts[0])
    out, lse = call.new_out(), call.new_lse()
    if call.some_rows_empty:
        out.zero_()
        lse.fill_(-torch.inf)
    for part in parts:
        rows = (part.b, slice(None), part.q)
        out[rows], lse[rows] = _forward(call, part)
    return out, lse


def backward(call: Attention, upstream: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by q, k and v, of any layout; those by k and v are fp32 or wider where they are sums over tiles."""
    lse = torch.where(lse == -torch.inf, torch.inf, lse)
    parts = list(parts_of(call, call.tiles))
    if len(parts) == 1 and _is_all(parts[0].k, call.keys) and _has_all_rows(call, parts[0]):
        return _backward(call, parts[0], upstream, out, lse)
    by_q = (torch.zeros_like if call.some_rows_empty else torch.empty_like)(call.q)
    by_k, by_v = (torch.zeros_like(one, dtype=call.wide) for one in (call.k, call.v))
    for part in parts:
        columns = (part.b, slice(None), part.k)
        by_q[part.b, :, part.q], k, v = _backward(call, part, upstream, out, lse)
        by_k[columns] += k
        by_v[columns] += v
    return by_q, by_k, by_v


def _has_all_rows(call: Attention, part: Tile) -> bool:
    return _is_all(part.b, call.batch) and _is_all(part.q, call.queries)


def _is_all(part: slice, size: int) -> bool:
    return part.start == 0 and part.stop == size


def parts_of(call: Attention, tiles: Iterable[Tile]) -> Iterator[Tile]:
    """`tiles`, but for the empty ones, with their rows cut where masks would be too large, or keys go to waste."""
    for tile in tiles:
        if tile.kind == "empty":
            continue
        rows, keys = length(tile.q), length(tile.k)
        step = max(MASK_BYTES // max(mask_row_bytes(call, tile), 1), 1)
        if tile.kind == "causal" and keys <= CUT_KEYS and call.q.dtype == call.wide:
            step = min(step, max(keys // 16, CUT_ROWS))
        for start in range(0, rows, step):
            yield part_of(tile, start, min(start + step, rows))


def mask_row_bytes(call: Attention, tile: Tile) -> int:
    """Bytes of a row of the mask of a tile, 0 if there is one row for all queries or no mask."""
    reads: set[str] = {"q", "k"} if tile.kind == "masked" else set()
    for program in (call.bias, None if tile.exact else call.spec.condition):
        reads |= set() if program is None else program.reads
    if "q" not in reads:
        return 0
    sizes = {"b": length(tile.b), "h": call.heads, "k": length(tile.k)}
    return call.wide.itemsize * math.prod(size for name, size in sizes.items() if name in reads)


def _forward(call: Attention, part: Tile) -> tuple[Tensor, Tensor]:
    mask, causal = _mask(call, part)
    out, lse = _attend(*_operands(call, part), 0.0, causal, attn_mask=mask, scale=call.factor)
    if mask is not None:
        lse.masked_fill_(_without_keys(mask, causal), -torch.inf)
    return out, lse


def _without_keys(mask: Tensor, causal: bool) -> Tensor:
    """Which rows have no key, [1 or nb, 1 or nh, 1 or nq], from what is added to their scores. (The kernel's lse of
    such a row is 0, which others may have.)"""
    hidden = mask == -torch.inf
    if not causal or hidden.shape[-1] == 1:
        return hidden.all(-1)
    if hidden.shape[-2] == 1:  # row i has keys 0 to i
        return (~hidden).cumsum(-1)[..., 0, :] == 0
    return (hidden | torch.ones_like(hidden).triu_(1)).all(-1)


def _backward(call: Attention, part: Tile, upstream: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mask, causal = _mask(call, part)
    by_out, out, lse = (one[part.b, :, part.q] for one in (upstream, out, lse))
    q, k, v = _operands(call, part)
    found = _differentiate(by_out, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=call.factor)
    return found[0], found[1], found[2]


def _operands(call: Attention, part: Tile) -> tuple[Tensor, Tensor, Tensor]:
    """The part's q, k and v, views unless their last stride is not 1."""
    q, k, v = call.q[part.b, :, part.q], call.k[part.b, :, part.k], call.v[part.b, :, part.k]
    return _dense(q), _dense(k), _dense(v)


def _mask(call: Attention, part: Tile) -> tuple[Tensor | None, bool]:
    """(what is added to the part's scores, with as few axes as will do, or None; is_causal)."""
    causal = part.kind == "causal" and length(part.q) == length(part.k)
    mask, first = (None, 0) if causal else call.mask(part, slice(0, call.heads))
    if mask is not None and first:
        mask = torch.nn.functional.pad(mask, (first, 0))
    if call.bias is not None:
        bias = call.without_s(call.bias, part, slice(0, call.heads))
        mask = bias if mask is None else mask + bias
    if mask is None:
        return None, causal
    return _dense(mask.reshape((1,) * (4 - mask.dim()) + mask.shape)), causal


def _dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()
