"""Graphs that share a budget: pieces of a model that Dynamo cuts at a graph break, and layers compiled one by one.

Pieces are compiled in the order of the forward, so what the earlier ones hold is known, and what the later ones will
need is not. A piece that others follow plans with half of what is left. A layer's graph serves all layers like it, and
is planned for as many calls as there are of them.
"""

from __future__ import annotations

import contextvars
import dataclasses
import gc
from collections.abc import Iterator, Mapping

from torch import nn

from fxopt.memory.units import show_bytes

__all__ = ["ALONE", "EARLIER", "Piece", "Step", "alike", "earlier_pieces", "note_piece"]

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
    """The pieces before the one that is planned now, whether others follow it, and how often a step calls it."""

    earlier: tuple[Piece, ...] = ()
    more: bool = False
    calls: int = 1

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
        if self.calls > 1:
            found.append(
                f"{self.calls} modules like this one are compiled one by one: the budget is for a call of each, and "
                "what runs besides is not counted"
            )
        return found


ALONE = Step()


def alike(module: nn.Module | None) -> int:
    """How many modules of the class of `module` are compiled one by one in the list that holds it; 1 without one.

    Of ``for layer in model.layers: layer.compile(...)``, or ``layers[i] = torch.compile(...)``, or of a model that
    breaks between its layers, of which Dynamo then compiles all.
    """
    for held in _lists() if module is not None else ():
        own = [getattr(child, "_orig_mod", child) for child in held.children()]
        if any(one is module for one in own):
            like = [(one, child) for one, child in zip(own, held.children(), strict=True) if type(one) is type(module)]
            asked_for = sum(child is not one or one._compiled_call_impl is not None for one, child in like)
            return asked_for or len(like)
    return 1


def _lists() -> Iterator[nn.Module]:
    # By type, as in `resident`: isinstance asks objects that warn or raise.
    kinds = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
    return (one for one in gc.get_objects() if issubclass(type(one), kinds))


_EARLIER: contextvars.ContextVar[tuple[Piece, ...]] = contextvars.ContextVar("fxopt_pieces", default=())


def earlier_pieces() -> tuple[Piece, ...]:
    """The pieces of the step under way in this thread that are compiled."""
    return _EARLIER.get()


def note_piece(piece: Piece, more: bool) -> None:
    """`piece` is compiled; the step is over unless there are `more`."""
    _EARLIER.set((*_EARLIER.get(), piece) if more else ())
