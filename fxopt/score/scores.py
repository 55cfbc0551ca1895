"""What softmax is given, taken apart: a program of the score, and the conditions under which a key takes part."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from fxopt.score.term import Note, Term, apply, cast_to, constant, unnoted

LOW = -1e9
"""A number as low as this, put in a score's place or added to it, masks: its exponential is 0 beside any score that
a model produces. (-10000, of the first BERTs, stays a number: scores of 100 exist.)"""

_HALF_MIN = -65504.0
"""``torch.finfo(torch.float16).min``, by which fp16 models mask."""


@dataclasses.dataclass(frozen=True)
class Scores:
    """program: of s; conditions: all must hold for a key to take part; fills: how keys that do not are spelled.

    A fill says what a row without any key gives: "zero", "nan", "uniform", "uniform+" as `fxopt.ops.attention` has
    them, or "mixed" where that is none of these.
    """

    program: Term
    conditions: tuple[Term, ...] = ()
    fills: frozenset[str] = frozenset()

    @property
    def empty(self) -> str | None:
        """What a row without keys gives; None where two masks that are finite numbers overlap, which has no name."""
        finite = self.fills - {"nan", "zero"}
        if not self.fills:
            return "nan"
        if len(self.fills) == 1 and self.fills != {"mixed"} and (not finite or len(self.conditions) == 1):
            return next(iter(self.fills))
        return None


class _Peeled:
    def __init__(self, note: Note) -> None:
        self.conditions: list[Term] = []
        self.fills: set[str] = set()
        self.note = note

    def add(self, condition: Term, fill: Any, additive: bool | None, masked: Term) -> None:
        """masked: the term that the condition was taken off."""
        self.note(condition, masked)
        self.conditions.append(condition)
        finite = "uniform+" if additive else "mixed" if additive is None else "uniform"
        self.fills.add("nan" if fill == -math.inf else finite)


def separate(term: Term, note: Note = unnoted) -> Scores:
    """Take masks off `term`, softmax's input as a function of s: what is left is the program.

    note: told of what is made on the way, and what it was made of.
    """
    found = _Peeled(note)
    program = _peel(term, found, additive=False)
    return Scores(program, tuple(found.conditions), frozenset(found.fills))


def _peel(term: Term, found: _Peeled, additive: bool | None) -> Term:
    """`term` without masks. additive: whether it is a summand that does not hold s; None: a summand that does."""
    if term.op == "where":
        condition, one, other = term.args
        if is_low(other):
            found.add(condition, other.value, additive, term)
            return _peel(one, found, additive)
        if is_low(one):
            found.add(apply("not", condition), one.value, additive, term)
            return _peel(other, found, additive)
    if term.op == "max" and is_low(term.args[1]):
        return _peel(term.args[0], found, additive)
    if term.op in ("add", "sub") and term.kind == "float":
        one, other = term.args
        left = _peel(one, found, _inside_sum(one))
        right = other if term.op == "sub" else _peel(other, found, _inside_sum(other))
        total = _without_zero(term.op, left, right)
        found.note(total, term)
        return total
    if additive:
        return _peel_choice(term, found)
    return term


def _inside_sum(term: Term) -> bool | None:
    return None if "s" in term.reads else True


def _without_zero(op: str, left: Term, right: Term) -> Term:
    """Adding 0 changes no probability."""
    if right.value == 0:
        return left
    return right if op == "add" and left.value == 0 else apply(op, left, right)


def _peel_choice(term: Term, found: _Peeled) -> Term:
    """``(1 - mask) * -inf`` and the like: a summand that depends on one condition only, and is low or a number."""
    conditions = _conditions_in(term)
    if len(conditions) != 1:
        return term
    (condition,) = conditions
    values = [_number(term, condition, truth) for truth in (True, False)]
    if None in values or all(_low(value) for value in values):
        return term
    for kept, dropped, when in ((*values, condition), (*values[::-1], apply("not", condition))):
        if _low(dropped):
            found.add(when, dropped, True, term)
            return constant(kept)
    return term


def _conditions_in(term: Term) -> set[Term]:
    """The largest boolean terms in `term`."""
    found: set[Term] = set()
    waiting = [term]
    while waiting:
        item = waiting.pop()
        if item.kind == "bool":
            found.add(item)
        elif item.op == "load" or (not item.terms and item.op != "const"):
            return set()
        else:
            waiting += item.terms
    return found


def _number(term: Term, condition: Term, truth: bool) -> Any:
    """The value of `term`, made of constants and `condition`, where that is `truth`; None for what is not computed."""
    if term is condition:
        return truth
    if term.op == "const":
        return term.value
    if term.op == "where" and term.args[0] is condition:
        return _number(term.args[1 if truth else 2], condition, truth)
    values = [_number(item, condition, truth) for item in term.terms]
    if None in values:
        return None
    if term.op == "cast":
        return cast_to(term.kind, constant(values[0])).value
    if term.op not in _ARITHMETIC:
        return None
    return float(_ARITHMETIC[term.op](*values))


_ARITHMETIC: dict[str, Any] = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "neg": lambda x: -x,
}


def is_low(term: Term) -> bool:
    """Whether `term` is a number that masks."""
    return term.op == "const" and _low(term.value)


def _low(value: Any) -> bool:
    return type(value) in (int, float) and (value <= LOW or value == _HALF_MIN)
