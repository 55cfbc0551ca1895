"""The rows of a loss that count, and those that are ignored."""

from __future__ import annotations

from torch import Tensor


class Rows:
    """The rows that count: their hidden states and targets.

    On a CPU ignored rows are dropped; elsewhere, where their number is not known without waiting for the device, they
    are kept and marked in `ignored`.
    """

    def __init__(self, hidden: Tensor, target: Tensor, ignore_index: int, vocabulary: int):
        self.hidden = hidden
        self.positions: Tensor | None = None
        self.ignored: Tensor | None = None
        ignored = target == ignore_index
        if hidden.device.type != "cpu":
            self.ignored, self.target = ignored, target.masked_fill(ignored, 0)
            self.count: int | Tensor = (~ignored).sum()
            return
        if ignored.any():
            self.positions = (~ignored).nonzero().squeeze(1)
            target = target[self.positions]
        self.target, self.count = target, target.shape[0]
        wrong = target[(target < 0) | (target >= vocabulary)]
        if wrong.numel():
            raise IndexError(f"Target {int(wrong[0])} is out of bounds.")

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
