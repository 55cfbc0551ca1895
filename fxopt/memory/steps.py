"""Graphs that share a budget: pieces of a model that Dynamo cuts at graph breaks, and modules compiled one by one.

They are compiled in the order of the forward, so what the earlier ones hold is known, and what the later ones will need
is not: a graph that others follow plans with half of what is left. The graph of a layer serves all layers like it, and
is planned for as many calls as there are of them.
"""

from __future__ import annotations

import collections
import contextvars
import dataclasses
import weakref
from collections.abc import Iterator, Mapping

from torch import nn

from fxopt.compat import Frame
from fxopt.memory.resident import alive
from fxopt.memory.units import show_bytes

__all__ = [
    "ALONE", "EARLIER", "Family", "Piece", "Step", "above", "family_of", "note_piece", "parents", "piece_of", "step_of",
]  # fmt: skip

SHARE = 0.5
EARLIER = "earlier graphs of the step"
"""What a plan calls the bytes that those hold while its own graph runs."""


@dataclasses.dataclass(frozen=True)
class Family:
    """The module whose frame is compiled, among those that it belongs with.

    members: of the largest module that holds it. calls: how many of them are of its class and compiled one by one.
    kinds: the classes of those that are trained and compiled one by one. inner: whether its frame is compiled because
    one that calls it breaks. code: where that of the frame is, "" where there is none.
    """

    module: nn.Module | None = None
    members: frozenset[nn.Module] = frozenset()
    calls: int = 1
    kinds: frozenset[type] = frozenset()
    inner: bool = False
    code: str = ""


def family_of(frame: Frame) -> Family:
    """Of ``for layer in model.layers: layer.compile(...)``, or ``layers[i] = torch.compile(...)``.

    Where the model is compiled and breaks between its layers, Dynamo compiles all of a class.
    """
    module = frame.module
    if module is None:
        return Family(inner=frame.inner, code=frame.code)
    holders = parents()
    members = max((frozenset(one.modules()) for one in (module, *above(module, holders))), key=len)
    wrapped = {getattr(one, "_orig_mod", None) for one in members}
    compiled = {one for one in members if one._compiled_call_impl is not None or one in wrapped}
    # One that lies in another that is compiled is part of the graph of that.
    apart = [one for one in compiled if not any(up in compiled for up in above(one, holders))]
    like = sum(type(one) is type(module) for one in apart)
    if module not in apart:
        like = sum(type(one) is type(module) for one in members)
    kinds = frozenset(type(one) for one in apart if any(part.requires_grad for part in one.parameters()))
    return Family(module, members, like, kinds, frame.inner, frame.code)


def parents() -> Mapping[nn.Module, list[nn.Module]]:
    """Of each module in the process those that hold it."""
    found = collections.defaultdict[nn.Module, list[nn.Module]](list)
    for one in alive(nn.Module):
        for part in one.__dict__.get("_modules", {}).values():  # none where a module is half made
            if part is not None:
                found[part].append(one)
    return found


def above(module: nn.Module, parents: Mapping[nn.Module, list[nn.Module]]) -> Iterator[nn.Module]:
    """All modules that hold `module`, at any depth, but wrappers of itself; each once."""
    seen, waiting = {module}, [module]
    while waiting:
        for up in parents.get(waiting.pop(), ()):
            if up not in seen:
                seen.add(up)
                waiting.append(up)
                if getattr(up, "_orig_mod", None) is not module:
                    yield up


@dataclasses.dataclass(frozen=True)
class Piece:
    """A graph of the step that is compiled. resident, retained: bytes of its own, as its plan has them.

    code, module, kind: of the frame, see `Family`, and the module's class. for_all: whether it is planned for all calls
    of the class.
    """

    name: str
    resident: int
    retained: int
    code: str = dataclasses.field(default="", repr=False)
    module: weakref.ref[nn.Module] | None = dataclasses.field(default=None, repr=False)
    kind: type | None = dataclasses.field(default=None, repr=False)
    for_all: bool = dataclasses.field(default=False, repr=False)


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
            found.append("other graphs of the step follow: half of what is left is planned for this one")
        if self.calls > 1:
            found.append(
                f"{self.calls} modules like this one are compiled one by one: the budget is for a call of each, and "
                "what runs besides is not counted"
            )
        return found


ALONE = Step()


_EARLIER: contextvars.ContextVar[tuple[Piece, ...]] = contextvars.ContextVar("fxopt_pieces", default=())


def step_of(family: Family, breaks: bool) -> Step:
    """The step under way in this thread as a graph of `family` finds it.

    breaks: whether Dynamo cut the graph at a break. Pieces of other models are left out, and so are all where one of
    them is of the same frame: the step has begun anew.
    """
    pieces = [one for one in _EARLIER.get() if _together(one, family)]
    if any(one.code == family.code != "" and not one.for_all for one in pieces):
        pieces = []
    # A second graph for the same calls, as of the layer whose input wants no gradient, is in the place of the first.
    pieces = [one for one in pieces if not (one.for_all and one.kind is type(family.module))]
    _EARLIER.set(tuple(pieces))
    waiting = family.kinds - {one.kind for one in pieces} - {type(family.module)}
    return Step(tuple(pieces), breaks or family.inner or bool(waiting), family.calls)


def _together(piece: Piece, family: Family) -> bool:
    """Whether one model holds both; functions may belong to any."""
    if piece.module is None or family.module is None:
        return True
    return piece.module() in family.members


def piece_of(name: str, family: Family, resident: int, retained: int) -> Piece:
    """A graph of `family` that is compiled; see `Piece`."""
    held = None if family.module is None else weakref.ref(family.module)
    kind = None if family.module is None else type(family.module)
    return Piece(name, resident, retained, family.code, held, kind, family.calls > 1)


def note_piece(piece: Piece | None, family: Family, more: bool) -> None:
    """A graph of `family` is compiled, None: without a plan. The step is over unless there are `more`.

    Where several classes are compiled one by one, there is no last graph: each may be compiled again for other inputs.
    """
    pieces = (*_EARLIER.get(), *([] if piece is None else [piece]))
    _EARLIER.set(pieces if more or len(family.kinds) > 1 else ())
