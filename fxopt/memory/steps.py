"""Graphs of one step: where Dynamo cuts a model at a graph break, its pieces share a budget.

They are compiled in the order of the forward, so what the earlier ones hold is known, and what the later ones will need
is not. A piece that others follow plans with half of what is left.
"""

from __future__ import annotations

import contextvars
import dataclasses
from collections.abc import Mapping

from fxopt.memory.units import show_bytes

__all__ = ["ALONE", "EARLIER", "Piece", "Step", "earlier_pieces", "note_piece"]

SHARE = 0.5
EARLIER = "earlier graphs of the step"
"""What a plan calls the bytes that those hold while its own graph runs."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """A graph of the step that is compiled. resident, retained: bytes of its own, as its plan has them."""

    name: str
    resident: int
    retained: int


@dataclasses.dataclass(frozen=True)
class Step:
    """The pieces before the one that is planned now, and whether others follow it."""

    earlier: tuple[Piece, ...] = ()
    more: bool = False

    @property
    def held(self) -> int:
        """Bytes that the earlier pieces hold while this one runs."""
        return sum(piece.resident + piece.retained for piece in self.earlier)

    @property
    def share(self) -> float:
        """Of what is left, what this piece may take."""
        return SHARE if self.more else 1.0

    def resident(self, own: Mapping[str, int]) -> dict[str, int]:
        """Bytes by what holds them besides a graph: its own, and what is held of the pieces before it."""
        return {**own, EARLIER: self.held} if self.earlier else dict(own)

    def told(self) -> list[str]:
        """What the report says of it, a sentence each; nothing where the graph is all there is."""
        found = []
        if self.earlier:
            others = ", ".join(piece.name for piece in self.earlier)
            found.append(f"the budget is shared with {others} of this step, which hold {show_bytes(self.held)}")
        if self.more:
            found.append("others follow after a graph break: half of what is left is planned for this one")
        return found


ALONE = Step()


_EARLIER: contextvars.ContextVar[tuple[Piece, ...]] = contextvars.ContextVar("fxopt_pieces", default=())


def earlier_pieces() -> tuple[Piece, ...]:
    """The pieces of the step under way in this thread that are compiled."""
    return _EARLIER.get()


def note_piece(piece: Piece, more: bool) -> None:
    """`piece` is compiled; the step is over unless there are `more`."""
    _EARLIER.set((*_EARLIER.get(), piece) if more else ())
