"""The rows of a loss that count, and those that are ignored."""

from __future__ import annotations

from torch import Tensor


class Rows:
    """The rows that count: their hidden states and targets.

    drops: whether ignored rows are left out, which waits for the device to count them; those left out, if any, are
    `dropped`: their positions. Else all rows are kept, and those that are ignored are marked in `ignored`.
    checks: whether targets that are no class raise IndexError, which waits for the device too.
    """

    def __init__(self, hidden: Tensor, target: Tensor, ignore_index: int, vocabulary: int, drops: bool, checks: bool):
        self.hidden, self.target = hidden, target
        self.positions: Tensor | None = None
        self.dropped: Tensor | None = None
        self.ignored: Tensor | None = None
        ignored = target == ignore_index
        if checks:
            wrong = target[~ignored & ((target < 0) | (target >= vocabulary))]
            if wrong.numel():
                raise IndexError(f"Target {int(wrong[0])} is out of bounds.")
        if not drops:
            self.ignored = ignored
            self.count: int | Tensor = (~ignored).sum()
            return
        if ignored.any():
            self.positions, self.dropped = (~ignored).nonzero().squeeze(1), ignored.nonzero().squeeze(1)
            self.target = target[self.positions]
        self.count = self.target.shape[0]

    def __len__(self) -> int:
        return self.target.shape[0]

    def take(self, values: Tensor, chunk: slice) -> Tensor:
        """The chunk's rows of `values` [N, ...], contiguous."""
        return values[chunk].contiguous() if self.positions is None else values[self.positions[chunk]]

    def put(self, values: Tensor, chunk: slice, result: Tensor) -> None:
        """Write the chunk's rows of `result` [N, ...]."""
        if self.positions is None:
            result[chunk] = values
        else:
            result[self.positions[chunk]] = values
