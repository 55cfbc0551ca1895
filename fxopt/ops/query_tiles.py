"""Which queries see a square of keys, found once a step: what a backward by tiles of keys visits, and where unmasked.

    fxopt::query_tiles (intervals [B or 1, Sq, 3], keys, grain, spreads) -> int32 [B or 1, cdiv(Sk, grain), 4]

Of each `grain` keys: (first, stop, full_first, full_stop): all queries that see one of them are in [first, stop), and
those of [full_first, full_stop), the longest run of whole squares, see all of them. Only the Triton kernels ask.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxopt.kernels.attention import query_tiles_kernel
from fxopt.kernels.attention_configs import tiles_config
from fxopt.ops.launch import count_blocks, launch, operator, runs_triton, uninitialized
from fxopt.ops.registry import OpMemory

__all__ = ["MEMORY", "query_tiles"]


@operator(
    "fxopt::query_tiles",
    "(Tensor intervals, SymInt keys, int grain, bool spreads) -> Tensor",
    launches=lambda intervals, *_: True,
    traced=lambda intervals, *_: runs_triton(intervals, "auto"),
)
def query_tiles(intervals: Tensor, keys: int, grain: int, spreads: bool) -> Tensor:
    """The operator (module docstring); intervals are int64 and contiguous. spreads: rows without keys see all."""
    rows, queries = intervals.shape[:2]
    tiles = uninitialized((rows, count_blocks(keys, grain), 4), torch.int32, intervals)
    arguments = {"Intervals": intervals, "Tiles": tiles, "queries": queries, "keys": keys}
    launch(query_tiles_kernel(spreads), rows * tiles.shape[1], arguments, tiles_config(grain))
    return tiles


@query_tiles.register_fake
def _fake(intervals: Tensor, keys: int, grain: int, spreads: bool) -> Tensor:
    return intervals.new_empty(intervals.shape[0], count_blocks(keys, grain), 4, dtype=torch.int32)


def _memory(intervals: Tensor, keys: int, grain: int, spreads: bool) -> OpMemory:
    return OpMemory(_fake(intervals, keys, grain, spreads).nbytes, 0)


MEMORY = {torch.ops.fxopt.query_tiles.default: _memory}
