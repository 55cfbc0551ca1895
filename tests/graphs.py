"""Small functions and the canonical graphs Dynamo gives for them."""

from __future__ import annotations

from fxopt.draw import SeededDraw
from fxopt.testing.graphs import captured, targets

__all__ = ["LargestDraw", "captured", "targets"]


class LargestDraw(SeededDraw):
    """Sizes at their largest, so that no window is wider than the sequence."""

    def size(self, low: int, high: int) -> int:
        return high
