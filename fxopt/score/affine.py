"""Programs of the form factor * s + bias: their scores need no derivative, and the factor goes into the product."""

from __future__ import annotations

import math

from fxopt.score.term import Term, apply, constant

Affine = tuple[float, Term | None] | None
"""Factor and bias (None: 0), which does not read s; None where it is not so."""


def affine(term: Term) -> Affine:
    """(factor, bias) where `term` is factor * s + bias (None: 0) and bias does not read s; None where it is not so."""
    if term.op == "s":
        return 1.0, None
    if "s" not in term.reads:
        return 0.0, None if term.value == 0 else term
    if term.op in ("add", "sub"):
        return _affine_sum(term.op, affine(term.args[0]), affine(term.args[1]))
    if term.op == "neg":
        return _affine_scaled("mul", affine(term.args[0]), constant(-1.0))
    if term.op in ("mul", "div"):
        one, other = term.args
        if term.op == "mul" and one.op == "const":
            one, other = other, one
        return _affine_scaled(term.op, affine(one), other)
    if term.op == "where" and "s" not in term.args[0].reads:
        return _affine_choice(term.args[0], affine(term.args[1]), affine(term.args[2]))
    return None


def _affine_sum(op: str, one: Affine, other: Affine) -> Affine:
    if one is None or other is None:
        return None
    factor = one[0] + other[0] if op == "add" else one[0] - other[0]
    if other[1] is None:
        return factor, one[1]
    if one[1] is None:
        return factor, other[1] if op == "add" else apply("neg", other[1])
    return factor, apply(op, one[1], other[1])


def _affine_scaled(op: str, inner: Affine, by: Term) -> Affine:
    if inner is None or by.op != "const" or not math.isfinite(by.value) or (op == "div" and by.value == 0):
        return None
    factor = inner[0] * by.value if op == "mul" else inner[0] / by.value
    return factor, None if inner[1] is None else apply(op, inner[1], by)


def _affine_choice(condition: Term, one: Affine, other: Affine) -> Affine:
    if one is None or other is None or one[0] != other[0]:
        return None
    zero = constant(0.0)
    return one[0], apply("where", condition, zero if one[1] is None else one[1], zero if other[1] is None else other[1])
