"""What the attention operators cost: products of the band, and bytes held at a time.

Both follow from shapes, dtypes and constants alone. What intervals say is not known then: they are taken to allow the
band, which is the most that they can.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fxopt.ops import flash_tiles
from fxopt.ops.attention_call import Attention, length
from fxopt.ops.attention_gradients import Wanted
from fxopt.ops.score_tiles import block_shape
from fxopt.ops.tiles import Tile
from fxopt.score.program import Program

__all__ = ["allowed_pairs", "backward_flops", "backward_workspace", "forward_flops", "forward_workspace"]


def forward_flops(q: Sequence[int], k: Sequence[int], v: Sequence[int], constants: Sequence[Any]) -> int:
    """Two products, of scores and of values."""
    return 2 * _pairs(q, k, constants) * (q[3] + v[3])


def backward_flops(
    q: Sequence[int], k: Sequence[int], v: Sequence[int], constants: Sequence[Any], wanted: Wanted
) -> int:
    """Scores again; dp, unless only v's gradient is wanted; one product for each of the gradients by q, k and v."""
    by_scores = wanted.q or wanted.k or any(wanted.captures)
    width = q[3] * (1 + wanted.q + wanted.k) + v[3] * (by_scores + wanted.v)
    return 2 * _pairs(q, k, constants) * width


def _pairs(q: Sequence[int], k: Sequence[int], constants: Sequence[Any]) -> int:
    lower, upper = constants[3:5]
    return q[0] * q[1] * allowed_pairs(q[2], k[2], lower, upper)


def allowed_pairs(queries: int, keys: int, lower: int | None, upper: int | None) -> int:
    """Pairs of query and key in the band."""
    least, most = (-queries if lower is None else lower), (keys if upper is None else upper)
    return sum(max(min(q + most + 1, keys) - max(q + least, 0), 0) for q in range(queries))


# --- bytes -------------------------------------------------------------------------------------------------------


def forward_workspace(call: Attention) -> int:
    """Most bytes held besides inputs and results."""
    row_values = call.batch * call.heads * call.queries * call.wide.itemsize
    if flash_tiles.can_compute(call):
        return row_values + _kernel(call, 1) + _largest_part(call, gradients=False)
    blocks = 1 + _narrow(call) + 2 * (call.spec.dropout > 0) + _temporaries(call.spec.score)
    return _operands(call) + row_values + _scores(call, blocks)


def backward_workspace(call: Attention, wanted: Wanted) -> int:
    """Most bytes held besides inputs, what the forward saved, and results."""
    row_values = call.batch * call.heads * call.queries * call.wide.itemsize
    if flash_tiles.can_compute(call) and not any(wanted.captures):
        # of another layout until the last: what the kernel is given by upstream, and what it gives
        copies = call.q.nbytes + sum(one.nbytes for one in (call.q, call.k, call.v))
        return copies + row_values + _kernel(call, 2) + _largest_part(call, gradients=True)
    blocks = 2 + _narrow(call) + 2 * (call.spec.dropout > 0) + _temporaries(call.spec.score)
    blocks += (call.spec.affine is None) + any(wanted.captures)
    sums = sum(one.numel() for one, want in ((call.k, wanted.k), (call.v, wanted.v)) if want) * call.wide.itemsize
    loads = sum(one.numel() * 8 for one, want in zip(call.captures, wanted.captures, strict=True) if want)
    return _operands(call) + sums + loads + 2 * row_values + _scores(call, blocks)


def _narrow(call: Attention) -> float:
    """Blocks of probabilities rounded to bf16 or fp16 (widened again to be multiplied on a CPU)."""
    return 0 if call.q.dtype == call.wide else 1


def _kernel(call: Attention, blocks: int) -> int:
    """What torch's kernel takes for each thread."""
    rows, keys = min(call.queries, 256), min(call.keys, 512)
    return torch.get_num_threads() * call.wide.itemsize * rows * (blocks * keys + call.q.shape[-1] + 2)


def _bounds(call: Attention) -> tuple[Tile, ...]:
    """Tiles of the band; with intervals one of everything, which holds whatever they cut."""
    if call.intervals is None:
        return call.tiles
    return (Tile(slice(0, call.batch), slice(0, call.queries), slice(0, call.keys), "masked", False),)


def _largest_part(call: Attention, gradients: bool) -> int:
    """A part's mask and results, before they are written to where they belong."""
    found = 0
    for part in flash_tiles.parts_of(call, _bounds(call)):
        rows, keys = call.heads * length(part.q), call.key_heads * length(part.k)
        width = call.q.shape[-1]
        results = rows * (width + 1) + 2 * keys * width * gradients
        mask = min(flash_tiles.mask_row_bytes(call, part) * length(part.q), flash_tiles.MASK_BYTES)
        found = max(found, length(part.b) * results * call.wide.itemsize + 4 * mask)
    return found


def _operands(call: Attention) -> int:
    """Copies of k and v, and one more of k where scores are computed of fp32 operands."""
    wide = call.wide.itemsize if call.q.dtype != call.wide else 0
    return 2 * max(call.k.nbytes, call.v.nbytes) + call.k.numel() * 2 * wide + call.v.numel() * wide


def _scores(call: Attention, blocks: float) -> int:
    """That many blocks of scores, the block's rows of q, out and their like, and a mask."""
    found = 0
    for tile in _bounds(call):
        if tile.kind == "empty":
            continue
        rows, keys = length(tile.q), length(tile.k)
        batch, heads, step = block_shape(call, rows, keys, tile.kind == "causal")
        width = 2 * (call.q.shape[-1] + call.v.shape[-1])
        mask = step * keys * (1 if call.spec.condition is None else 4 * batch * heads * call.group)
        of_heads = batch * heads * call.group * step * (blocks * keys + width)
        found = max(found, int(of_heads + 2 * mask) * call.wide.itemsize)
    return found


def _temporaries(program: Program) -> int:
    """Blocks that evaluating a program holds besides its result: int64 is two, and casts are copies."""
    if program.is_identity:
        return 0
    by_pair = [term.kind for term in program.result.walk() if {"q", "k"} <= term.reads]
    return 5 if "int" in by_pair else 2
