"""How large a term can become: whether a score can be -inf where no mask says so.

Bounds are of absolute values and assume scores of at most `SCORE`. They are not tight, and an operator that can give an
infinity for some value of its arguments counts as if it did.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from fxopt.score.term import Term

__all__ = ["largest"]

SCORE = 2.0**64
"""More than a product of queries and keys is, short of overflow: entries of 1e8 in heads of 256 give 2^61."""
INTEGER = 2.0**63


def largest(term: Term) -> float:
    """A bound of ``abs(term)`` over all scores and positions; inf where there is none, as with captured floats."""
    found: dict[Term, float] = {}
    for part in term.walk():
        found[part] = _bound(part, [found[item] for item in part.terms])
    return found[term]


def _bound(term: Term, parts: list[float]) -> float:
    """Of a term whose arguments have the bounds `parts`."""
    if term.op == "const":
        return math.inf if math.isnan(term.value) else abs(float(term.value))
    if term.kind != "float":
        return 1.0 if term.kind == "bool" else INTEGER
    if term.op == "s":
        return SCORE
    if term.op == "where":
        return max(parts[1:])
    if term.op in ("div", "mod"):  # by a constant alone
        by = term.terms[1].value
        return math.inf if not by or math.isnan(by) else abs(by) if term.op == "mod" else parts[0] / abs(by)
    return _BOUNDS[term.op](*parts) if term.op in _BOUNDS else math.inf


_BOUNDS: dict[str, Callable[..., float]] = {
    "neg": lambda a: a,
    "abs": lambda a: a,
    "cast": lambda a: a,
    "floor": lambda a: a + 1,
    "tanh": lambda a: 1.0,
    "sigmoid": lambda a: 1.0,
    "sqrt": lambda a: max(a, 1.0),
    "exp": lambda a: math.exp(a) if a < 88 else math.inf,
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a + b,
    "mul": lambda a, b: 0.0 if 0.0 in (a, b) else a * b,
    "min": max,
    "max": max,
}
"""By operator; others, a logarithm, a reciprocal root and a power among them, have no bound."""
