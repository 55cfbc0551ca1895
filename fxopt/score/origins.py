"""Where terms come from: beside them, never in them. Equal terms of different lines are one object, and one kernel.

A term's origin is noted where the term is made, and what rewriting makes of a term has the origin of that term.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar

from fxopt.score.term import VARIABLES, Term

__all__ = ["Origins", "is_statement"]

T = TypeVar("T")


def is_statement(term: Term) -> bool:
    """Whether `term` is computed or loaded: variables and constants are written where they are read."""
    return term.op not in VARIABLES and term.op != "const"


class Origins(Generic[T]):
    """term -> what it was made from: a node of a graph, or a place in the user's code. Of equal terms, the first's."""

    def __init__(self) -> None:
        self._known: dict[Term, T] = {}

    def note(self, term: Term, origin: T) -> None:
        """`term` was made from `origin`, and so was whatever in it has no origin yet."""
        waiting = [term]
        while waiting:
            item = waiting.pop()
            if is_statement(item) and item not in self._known:
                self._known[item] = origin
                waiting += item.terms

    def set(self, term: Term, origin: T) -> None:
        """`term` alone was made from `origin`."""
        self._known[term] = origin

    def inherit(self, made: Term, old: Term) -> None:
        """Note of `made`, which stands for `old`, where that came from."""
        origin = self.of(old)
        if origin is not None:
            self.note(made, origin)

    def of(self, term: Term) -> T | None:
        """The origin of `term`, or of the nearest term in it that has one; None where none has."""
        return next((self._known[item] for item in _breadth_first(term) if item in self._known), None)

    def knows(self, term: Term) -> bool:
        """Whether `term` itself has an origin."""
        return term in self._known


def _breadth_first(term: Term) -> Iterator[Term]:
    """Every term in `term`, itself first, then its operands, then theirs."""
    level, seen = [term], {term}
    while level:
        yield from level
        below = dict.fromkeys(item for one in level for item in one.terms if item not in seen)
        seen.update(below)
        level = list(below)
