"""Rows of an attention that are next to each other and have intervals of keys of one shape: what tiles are made of.

`Runs.of`    all rows, cut where the shape changes: numpy over rows, no loop
`groups`     runs, the short ones merged: a Python loop over runs
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["FLAT", "SQUARE", "STRANGER", "Group", "Runs", "groups"]

_SHORT = 32
"""Runs of fewer rows may be merged: torch's kernels compute blocks of 32 rows, in bf16 whether there are 32 or not."""
_SPARE = 32 * 32
"""Pairs of row and key that cost what a tile costs besides its pairs, about 50 us: 8 heads of 64 on one core."""
STRANGER, SQUARE, FLAT = range(3)
"""Shapes: FLAT rows have one interval (or none has any key), SQUARE ones start at one key and end at their own."""


@dataclass(frozen=True)
class Runs:
    """Runs of rows that are alike, of all batch rows, one after the other: arrays with an element a run.

    start, stop: rows, counted through. shape: FLAT, SQUARE or STRANGER. lo, hi: the keys of all its rows; where there
    are none, lo is 2^62 and hi 0, so that other runs' decide. exact: whether all rows are.
    """

    start: Any
    stop: Any
    shape: Any
    lo: Any
    hi: Any
    exact: Any

    @classmethod
    def of(cls, lo: Any, hi: Any, exact: Any, queries: int, rows: int) -> Runs:
        """Runs of rows [lo, hi), `queries` to a batch row, with those that need a mask cut to at most `rows`."""
        nothing = hi <= lo
        lo, hi, exact = np.where(nothing, 0, lo), np.where(nothing, 0, hi), exact | nothing
        shapes, start = _shapes(lo, hi, exact, queries)
        start = _cut(start, shapes, lo, hi, rows)
        return cls(
            start,
            np.append(start[1:], lo.size),
            shapes[start],
            np.where(nothing[start], 2**62, np.minimum.reduceat(lo, start)),
            np.maximum.reduceat(hi, start),
            np.minimum.reduceat(exact, start),
        )


def _shapes(lo: Any, hi: Any, exact: Any, queries: int) -> tuple[Any, Any]:
    """(shape of each row, where runs start). Row i belongs to the run of row i - 1 where they are `linked`."""
    inside = np.arange(1, lo.size) % queries != 0  # both rows are of one batch row
    first, last = np.diff(lo), np.diff(hi)
    both = inside & exact[1:] & exact[:-1]
    same, grows = both & (first == 0) & (last == 0), both & (first == 0) & (last == 1) & (hi[:-1] > lo[:-1])
    square = _in_runs(grows, exact & (hi - lo == 1))
    flat = _in_runs(same, exact) & ~square | (hi <= lo)
    shape = np.where(square, SQUARE, np.where(flat, FLAT, STRANGER))
    near = inside & (abs(first) <= 1) & (abs(last) <= 1)
    linked = (shape[1:] == shape[:-1]) & np.choose(shape[1:], (near, grows, same))
    return shape, _starts(linked)


def _starts(linked: Any) -> Any:
    return np.flatnonzero(np.append(True, ~linked))


def _in_runs(linked: Any, may_start: Any) -> Any:
    """Which rows are in a run of two or more whose first row `may_start` one."""
    start = _starts(linked)
    length = np.diff(start, append=len(may_start))
    return np.repeat(may_start[start] & (length > 1), length)


def _cut(start: Any, shapes: Any, lo: Any, hi: Any, rows: int) -> Any:
    """Starts, with those of the pieces of long runs that need a mask.

    A piece of n rows of a band of w keys computes n + w - 1 keys a row: with n = w / 4, a quarter too many. Measured
    for a window of 256 at 4096, 8 heads of 64, fp32, one core: 54 ms forward and 112 backward in pieces of 64 rows, 58
    and 137 of 128, 55 and 109 of 32.
    """
    stop, widest = np.append(start[1:], len(lo)), np.maximum.reduceat(hi - lo, start)
    size = np.clip(widest // 4 // _SHORT * _SHORT, min(_SHORT, rows), rows)
    long = (shapes[start] == STRANGER) & (stop - start > size)
    pieces = [np.arange(*one) for one in zip((start + size)[long], stop[long], size[long], strict=True)]
    return np.sort(np.concatenate([start, *pieces])) if pieces else start


# --- runs, merged -------------------------------------------------------------------------------------------------


@dataclass
class Group:
    """Runs that become one tile: rows [start, stop), keys [lo, hi), and the pairs that the runs are alone."""

    start: int
    stop: int
    shape: int
    lo: int
    hi: int
    exact: bool
    runs: int = 1

    def __post_init__(self) -> None:
        self.pairs = (self.stop - self.start) * max(self.hi - self.lo, 0)

    def take(self, run: Group, rows: int) -> bool:
        """Whether `run`, which comes next, was merged in.

        It is while the rectangle around all has not half as many pairs again as the runs alone, and a tile's worth
        more. For documents of L rows that is up to about 32 / L of them, which is where the sum of pairs and tiles is
        least: m documents a tile cost m L^2 + 32^2 / m each. The half is for runs of many keys: 128 rows under a
        diagonal waste 128^2 / 2 pairs, however many keys they share.
        """
        lo, hi, pairs = min(self.lo, run.lo), max(self.hi, run.hi), self.pairs + run.pairs
        count = run.stop - self.start
        if count > rows or 2 * count * (hi - lo) > 3 * pairs + 2 * _SPARE:
            return False
        self.stop, self.lo, self.hi, self.exact, self.pairs = run.stop, lo, hi, self.exact & run.exact, pairs
        self.runs += 1
        return True


def groups(runs: Runs, queries: int, rows: int) -> Iterator[Group]:
    """Groups in order: greedily, short runs go with what is before them unless that is long and needs no mask."""
    least = min(_SHORT, rows)
    group, more = None, False
    columns = (runs.start, runs.stop, runs.shape, runs.lo, runs.hi, runs.exact)
    for run in map(Group, *(one.tolist() for one in columns)):
        short = run.stop - run.start < least
        if group is not None:
            if short and more and run.start % queries and group.take(run, rows):
                continue
            yield group
        group, more = run, short or run.shape == STRANGER
    if group is not None:
        yield group
