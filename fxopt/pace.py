"""How long steps take: the seconds from one call of a compiled graph to the next, for its report."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

__all__ = ["paced", "usual"]

KEPT = 32
"""The newest intervals that are kept."""

ENOUGH = 3
"""The first interval has the compilation of the backward in it, so a median of fewer says nothing."""


def paced(run: Callable[..., Any], intervals: list[float]) -> Callable[..., Any]:
    """`run`, which notes in `intervals` the seconds since its last call."""
    last: float | None = None

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal last
        now = time.perf_counter()
        if last is not None:
            intervals.append(now - last)
            del intervals[:-KEPT]
        last = now
        return run(*args, **kwargs)

    return call


def usual(intervals: list[float]) -> float | None:
    """Median seconds; None for fewer than `ENOUGH`."""
    return statistics.median(intervals) if len(intervals) >= ENOUGH else None
