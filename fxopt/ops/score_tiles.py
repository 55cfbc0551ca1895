"""Attention a block of scores at a time: for every score program, dropout, and gradients of captured tensors.

Scores of a block of rows, against all keys of their tile, are multiplied out, put through the program, masked, turned
into probabilities and multiplied with v; the backward computes them again (Dao et al. 2022, arXiv:2205.14135; rows are
whole here, so nothing is rescaled). Heads that share keys are rows of one product, so keys are never repeated.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fxopt.ops.attention_call import Attention, length, part_of
from fxopt.ops.attention_gradients import Gradients
from fxopt.ops.score_block import Block, Buffers
from fxopt.ops.tiles import Tile

__all__ = ["backward", "block_shape", "blocks_of", "forward"]

BLOCK_BYTES = 2 * 2**20
"""Bytes of a block's scores for each thread: half a dozen tensors as large are alive at a time, and a core's caches
hold some of them. Of 1, 2, 4 and 8 MiB, 2 were best on one core, 4 on two."""
LEAST_ROWS = 256
"""Rows of a folded block, at least: products of fewer are slower. The heads are split before they get fewer."""
MOST_BYTES = 16 * 2**20
"""Bytes of a block's scores whatever its shape and however many threads, down to a row of heads that share keys."""


def block_shape(call: Attention, tile: Tile) -> tuple[int, int, int]:
    """(batch rows, key heads, rows) of the blocks of a tile."""
    rows, keys = length(tile.q), length(tile.k)
    row = call.group * keys * call.wide.itemsize  # bytes of a row of scores, for the heads of one key head
    if tile.kind == "causal":  # so that little is computed above the diagonal
        rows = min(rows, max(keys // 4, 64))
    least = min(-(-LEAST_ROWS // call.group), rows, max(MOST_BYTES // row, 1))
    block = min(BLOCK_BYTES * torch.get_num_threads(), MOST_BYTES)
    heads = min(max(block // (row * least), 1), call.key_heads)
    fitting = block // (row * heads)
    return min(max(fitting // rows, 1), length(tile.b)), heads, min(max(fitting // 8 * 8, least), rows)


def forward(call: Attention) -> tuple[Tensor, Tensor]:
    """(out [B, H, Sq, Dv], lse [B, H, Sq]), with the sink; rows without keys get 0 and -inf, the sink apart."""
    out, lse = call.new_out(), call.new_lse()
    if call.some_rows_empty:
        out.zero_()
        lse.copy_(torch.full((), -torch.inf) if call.sink is None else call.sink[:, None])
    for block in blocks_of(call):
        block.forward(out, lse)
    return out, lse


def backward(call: Attention, upstream: Tensor, lse: Tensor, gradients: Gradients) -> None:
    """Add to the gradients what rows with keys have in them."""
    some_empty = bool((lse == -torch.inf).any())
    for block in blocks_of(call):
        block.backward(upstream, lse, gradients, some_empty)


def blocks_of(call: Attention) -> Iterator[Block]:
    """Blocks that hold every row of every tile, but the empty ones, for every head once."""
    memory = Buffers(call.q.device)
    for tile in call.tiles:
        if tile.kind == "empty" or not call.heads:
            continue
        rows = length(tile.q)
        batch, heads, step = block_shape(call, tile)
        for b in range(tile.b.start, tile.b.stop, batch):
            for head in range(0, call.key_heads, heads):
                for start in range(0, rows, step):
                    part = part_of(tile, start, min(start + step, rows), slice(b, min(b + batch, tile.b.stop)))
                    yield Block(call, part, slice(head, min(head + heads, call.key_heads)), memory)
