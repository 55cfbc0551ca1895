"""What the attention operators cost: products of the band, and bytes held at a time.

Both follow from shapes, dtypes and constants alone. What intervals say is not known then: they are taken to allow the
band, which is the most that they can.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fxopt.ops import flash_tiles
from fxopt.ops.attention_call import Attention, length
from fxopt.ops.attention_gradients import Wanted
from fxopt.ops.score_tiles import block_shape
from fxopt.ops.tiles import Tile
from fxopt.score.term import Term

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


# --- bytes: upper bounds, 1.0 to 2 times what the allocator sees ---------------------------------------------------


def forward_workspace(call: Attention) -> int:
    """Most bytes held besides inputs and results."""
    by_kernel = _row_values(call) + _kernel(call, 1) + _largest_part(call, gradients=False)
    by_blocks = _row_values(call) + _operands(call) + _largest_block(call, None)
    return _of_paths(call, by_kernel, by_blocks)


def backward_workspace(call: Attention, wanted: Wanted) -> int:
    """Most bytes held besides inputs, what the forward saved, and results."""
    copies = call.q.nbytes + call.k.nbytes + call.v.nbytes  # of another layout, upstream or a result at a time
    by_kernel = copies + _row_values(call) + _kernel(call, 2) + _largest_part(call, gradients=True)
    sums = sum(one.numel() for one, want in ((call.k, wanted.k), (call.v, wanted.v)) if want) * call.wide.itemsize
    loads = sum(one.numel() * 8 for one, want in zip(call.captures, wanted.captures, strict=True) if want)
    by_blocks = _row_values(call) + _operands(call) + sums + loads + _largest_block(call, wanted)
    return by_blocks if any(wanted.captures) else _of_paths(call, by_kernel, by_blocks)


def _of_paths(call: Attention, by_kernel: int, by_blocks: int) -> int:
    """That of the path which is taken, or the larger where intervals decide."""
    if not flash_tiles.may_compute(call):
        return by_blocks
    if call.q.dtype != call.wide and call.intervals is not None:
        return max(by_kernel, by_blocks)
    return by_kernel if flash_tiles.can_compute(call) else by_blocks


def _row_values(call: Attention) -> int:
    """A number a row."""
    return call.batch * call.heads * call.queries * call.wide.itemsize


def _bounds(call: Attention) -> tuple[Tile, ...]:
    """Tiles of the band; with intervals one of everything, which holds whatever they cut."""
    if call.intervals is None:
        return tuple(tile for tile in call.tiles if tile.kind != "empty")
    return (Tile(slice(0, call.batch), slice(0, call.queries), slice(0, call.keys), "masked", False),)


# --- by torch's kernel ---


def _kernel(call: Attention, blocks: int) -> int:
    """What torch's kernel takes for each thread."""
    rows, keys = min(call.queries, 256), min(call.keys, 512)
    return torch.get_num_threads() * call.wide.itemsize * rows * (blocks * keys + call.q.shape[-1] + 2)


def _largest_part(call: Attention, gradients: bool) -> int:
    """A part's mask and results, before they are written to where they belong."""
    if not flash_tiles.may_compute(call):
        return 0
    found, width = 0, call.q.shape[-1]
    for part in flash_tiles.parts_of(call, _bounds(call)):
        rows, keys = call.heads * length(part.q), call.key_heads * length(part.k)
        results = rows * (width + 1) + 2 * keys * width * gradients
        mask = flash_tiles.mask_row_bytes(call, part) * length(part.q)
        if part.kind == "causal" and length(part.q) < length(part.k):
            mask = max(mask, length(part.q) * length(part.k) * call.wide.itemsize)
        # the mask, what it is made of, and which of it is -inf
        found = max(found, length(part.b) * results * call.wide.itemsize + int(2.5 * mask))
    return found


# --- by blocks of scores ---


def _operands(call: Attention) -> int:
    """Copies of k and v of another dtype, or for batch rows that are not folded in place; and one more of k where
    scores are computed of fp32 operands."""
    itemsize = call.operand_dtype.itemsize
    folded = any(block_shape(call, tile)[0] > 1 for tile in _bounds(call))
    operands = (call.k, call.v)
    copied = [one for one in operands if one.dtype != call.operand_dtype or (folded and not one.is_contiguous())]
    widened = call.q.dtype != call.wide and call.spec.affine is not None
    return sum(one.numel() for one in copied) * itemsize + widened * call.k.numel() * call.wide.itemsize


def _largest_block(call: Attention, wanted: Wanted | None) -> int:
    """Of what blocks hold at a time: buffers, program and mask, forward, or backward where gradients are `wanted`."""
    score = call.spec.score
    results = [score.result]
    if wanted is not None and (call.spec.affine is None or any(wanted.captures)):
        derivative = score.derivative()
        results += [one.result for one in (derivative.by_s, *derivative.by_load.values()) if one is not None]
    found = 0
    for tile in _bounds(call):
        batch, heads, rows = block_shape(call, tile)
        sizes = {"b": batch, "h": heads * call.group, "q": rows, "k": length(tile.k)}
        count, itemsize = math.prod(sizes.values()), call.wide.itemsize
        buffers = count * itemsize * (1 if wanted is None else 3)
        buffers += count * call.operand_dtype.itemsize * (call.operand_dtype != call.wide)
        operands = 2 * count // length(tile.k) * (call.q.shape[-1] + call.v.shape[-1]) * itemsize
        most, kept = (one - count * itemsize for one in _evaluated(results, sizes, call.wide))  # less s, in a buffer
        later = max(2 * count * 4 * (call.spec.dropout > 0), _mask(call, tile, sizes))
        if wanted is not None and any(wanted.captures):
            later = max(later, count * itemsize + count * 4 * (call.spec.dropout > 0))
        found = max(found, buffers + operands + max(most, max(kept, 0) + later))
    return found


def _mask(call: Attention, tile: Tile, sizes: Mapping[str, int]) -> int:
    """Of a block's mask, and of asking the predicate."""
    if tile.kind == "full":
        return 0
    mask = sizes["q"] * sizes["k"] * (call.wide.itemsize + 2)
    if call.spec.condition is None:
        return mask
    decided = _evaluated([call.spec.condition.result], sizes, call.wide)[0]
    return decided + math.prod(sizes.values()) * (call.wide.itemsize + 2)


def _evaluated(results: Sequence[Term], sizes: Mapping[str, int], wide: torch.dtype) -> tuple[int, int]:
    """(most bytes held while these terms are evaluated on a block, bytes of their values), s among them."""
    order = list(dict.fromkeys(term for result in results for term in result.walk()))
    last = {item: at for at, term in enumerate(order) for item in term.terms} | {one: len(order) for one in results}

    def size(term: Term) -> int:
        axes = sizes if "s" in term.reads else term.reads
        item = {"float": wide.itemsize, "int": 8, "bool": 1}[term.kind]
        return item * math.prod(sizes[axis] for axis in axes) if term.op != "const" else 0

    held, most = 0, 0
    for at, term in enumerate(order):
        held += size(term)
        most = max(most, held)
        held -= sum(size(item) for item in {*term.terms} if last[item] == at)
    return most, max(held, 0)
