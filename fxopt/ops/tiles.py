"""What a CPU attention computes: rectangles of query rows and keys, of which every row is in exactly one.

A sparse mask saves time on a CPU by not being multiplied with: torch's flash attention skips nothing that a mask tensor
forbids. So the rows are cut where their intervals of keys (`fxopt.ops.key_intervals`, or a static band) change shape:

    runs of equal intervals                  "full", however long
    runs that start at one key, growing by   "causal", however long: what torch's kernel calls is_causal, and computes
      one a row                              without a mask tensor
    runs of nothing                          "empty"
    what is left, and short runs, merged     "masked", of `rows` rows at most

Rows are looked at by numpy in one pass over all of the batch; Python loops over runs only.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fxopt.ops.row_runs import SQUARE, STRANGER, Group, Runs, groups

__all__ = ["Kind", "Tile", "allowed", "computed_pairs", "tiles_of"]

Kind = Literal["full", "causal", "masked", "empty"]


@dataclass(frozen=True)
class Tile:
    """Rows `q` of batch rows `b`, whose intervals are equal, and the keys `k` from the first to the last they may see.

    full:   every key of `k` is allowed for every row.
    causal: key ``k.start + j`` is allowed for row ``q.start + i`` iff ``j <= i``; as many rows as keys.
    masked: a mask says which; `rows` rows at most. A row may be allowed none of `k`.
    empty:  no key is allowed for any row, and `k` is an empty slice.
    exact:  the intervals say it all; else the predicate must be asked.
    """

    b: slice
    q: slice
    k: slice
    kind: Kind
    exact: bool


def tiles_of(
    intervals: Tensor | None,
    batch: int,
    queries: int,
    keys: int,
    lower: int | None,
    upper: int | None,
    predicate: bool,
    rows: int = 128,
) -> tuple[Tile, ...]:
    """Tiles that hold every batch row's every query once, ordered by batch row, then query.

    Args:
        intervals: int64 [1 or batch, queries, 3], (lo, hi, count) a row; None: the band lower <= k - q <= upper.
        lower, upper: the band, looked at only without intervals; None: unbounded.
        predicate: whether a predicate decides in rows where count is not hi - lo (without intervals: in all rows).
            Otherwise all keys of an interval are allowed.
        rows: the most rows of a masked tile.

    Raises:
        ValueError: if `intervals` has another shape, or rows < 1.
    """
    if rows < 1:
        raise ValueError(f"a masked tile has at least one row, not {rows}")
    if 0 in (batch, queries):
        return ()
    if intervals is None:
        return _tiles_of_band(batch, queries, keys, lower, upper, predicate, rows)
    if intervals.shape not in ((1, queries, 3), (batch, queries, 3)):
        raise ValueError(f"intervals must be {[batch, queries, 3]} or {[1, queries, 3]}: {list(intervals.shape)}")
    spans, values = _distinct(intervals.detach().cpu().numpy(), batch)
    lo, hi, count = (values[..., place].ravel() for place in range(3))
    exact = count == hi - lo if predicate else np.ones(lo.size, bool)
    return tuple(_tiles(Runs.of(lo, hi, exact, queries, rows), spans, queries, rows))


@functools.lru_cache(maxsize=256)  # every layer asks the same: 0.1 to 0.3 ms each, as long as a short attention
def _tiles_of_band(
    batch: int, queries: int, keys: int, lower: int | None, upper: int | None, predicate: bool, rows: int
) -> tuple[Tile, ...]:
    runs = Runs.of(*_band(slice(0, queries), keys, lower, upper), np.full(queries, not predicate), queries, rows)
    return tuple(_tiles(runs, [slice(0, batch)], queries, rows))


def _band(rows: slice, keys: int, lower: int | None, upper: int | None) -> tuple[Any, Any]:
    """The band's [lo, hi) of each of `rows`; bounds are cut to what matters first: q + 2^63 - 1 would overflow."""
    q = np.arange(rows.start, rows.stop)
    least, most = (-rows.stop if lower is None else lower), (keys if upper is None else upper)
    start, past = (max(-rows.stop, min(one, keys)) for one in (least, most + 1))
    return np.clip(q + start, 0, keys), np.clip(q + past, 0, keys)


def _distinct(values: Any, batch: int) -> tuple[list[slice], Any]:
    """Batch rows as slices of neighbours that are equal, and one of each: [slices, queries, 3]."""
    if len(values) == 1:
        return [slice(0, batch)], values
    starts = np.flatnonzero(np.append(True, (values[1:] != values[:-1]).any((1, 2))))
    spans = [slice(start, stop) for start, stop in zip(starts.tolist(), [*starts[1:].tolist(), batch], strict=True)]
    return spans, values[starts]


def _tiles(runs: Runs, spans: Sequence[slice], queries: int, rows: int) -> Iterator[Tile]:
    for group in groups(runs, queries, rows):
        row, start = divmod(group.start, queries)
        q = slice(start, start + group.stop - group.start)
        k = slice(group.lo, group.hi) if group.hi > group.lo else slice(0, 0)
        yield Tile(spans[row], q, k, _kind(group), bool(group.exact))


def _kind(group: Group) -> Kind:
    if group.hi <= group.lo:
        return "empty"
    if group.runs == 1 and (group.shape != STRANGER or (group.exact and group.stop - group.start == 1)):
        return "causal" if group.shape == SQUARE else "full"
    return "masked"


# --- what a tile computes ----------------------------------------------------------------------------------------


def allowed(tile: Tile, intervals: Tensor | None, lower: int | None, upper: int | None) -> Tensor:
    """bool [1, 1, rows, keys] of `tile`: whether intervals, or else the band, allow the pair; no predicate is asked.

    One batch row stands for all of ``tile.b``, since their intervals are equal. On the device of `intervals`, or the
    CPU.
    """
    if intervals is None:
        lo, hi = map(torch.from_numpy, _band(tile.q, tile.k.stop, lower, upper))
    else:
        lo, hi, _ = intervals[tile.b.start if len(intervals) > 1 else 0, tile.q].unbind(1)
    k = torch.arange(tile.k.start, tile.k.stop, device=lo.device)
    return ((k >= lo[:, None]) & (k < hi[:, None]))[None, None]


def computed_pairs(tiles: Iterable[Tile]) -> int:
    """Pairs of row and key, over the batch, that are multiplied for one head."""
    return sum(_pairs(tile) * (tile.b.stop - tile.b.start) for tile in tiles)


def _pairs(tile: Tile) -> int:
    """For causal tiles the blocks of torch's kernel that are not above the diagonal: all of them up to 512 keys.

    Blocks have 256 rows from 768 on, else 64 or 32, and 512 keys. Measured against the full square (fp32, one core, 4
    heads of 64): 0.99 of the time at 512 rows, 0.64 at 2048, 0.55 at 4096; this says 1.00, 0.62, 0.56.
    """
    rows, keys = tile.q.stop - tile.q.start, tile.k.stop - tile.k.start
    if tile.kind != "causal":
        return rows * keys
    block = 256 if rows >= 768 else 64 if rows >= 192 else 32
    stops = (min(start + block, rows) for start in range(0, rows, block))
    return sum((stop - (stop - 1) // block * block) * min(-(-stop // 512) * 512, keys) for stop in stops)
