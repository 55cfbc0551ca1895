"""Simpler terms of the same value, bit for bit in any float dtype.

What can be seen from an operator and its operands alone is folded in `term.apply` already. Here: two casts that are
one, negations that cancel, divisions and powers that are products, choices that are made twice. Gradients are the same
to rounding (that of x * x is x + x), but one through a branch that is never taken is gone, where it was 0 or NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any

from fxopt.score.term import COMPARISONS, Note, Term, apply, cast_to, constant, rebuilt, unnoted

_MIRRORED = {"add": "add", "mul": "mul", "min": "min", "max": "max", "eq": "eq", "ne": "ne",
             "lt": "gt", "gt": "lt", "le": "ge", "ge": "le"}  # fmt: skip
_OPPOSITE = {"eq": "ne", "ne": "eq", "lt": "ge", "ge": "lt", "gt": "le", "le": "gt"}

Rule = Callable[..., Term | None]


def simplified(term: Term, kept: Collection[Term] = ()) -> Term:
    """An equal term, smaller or cheaper where there is one; simplifying it again changes nothing.

    kept: terms that stay as they are, with all that is in them, since they are computed in any case.
    """
    before = None
    while term is not before:
        before, term = term, bottom_up(term, lambda item: item if item in kept else _improved(item))
    return term


def bottom_up(term: Term, change: Callable[[Term], Term], note: Note = unnoted) -> Term:
    """`term` with `change` applied to every term in it, operands first."""
    made: dict[Term, Term] = {}
    for item in term.walk():
        args = [made[arg] if isinstance(arg, Term) else arg for arg in item.args]
        same = all(new is old for new, old in zip(args, item.args, strict=True))
        made[item] = change(item if same else rebuilt(item, args))
        note(made[item], item)
    return made[term]


# --- the rules of `simplified`: given the operands of an operator, a better term or None -------------------------


def _improved(term: Term) -> Term:
    if term.op == "cast":
        return _cast(term.kind, term.args[0]) or term
    found = _folded(term) or _ordered(term)
    if found is None and term.op in _RULES:
        found = _RULES[term.op](*term.args)
    return term if found is None else found


def _folded(term: Term) -> Term | None:
    """The value of an operator on float constants, where the result has so few digits that it is exact in any dtype."""
    function = _ARITHMETIC.get(term.op)
    if function is None or term.kind != "float" or any(not _is_short(item.value) for item in term.args):
        return None
    values = [item.value for item in term.args]
    if term.op == "div" and values[1] == 0:
        return None
    result = float(function(*values))
    return constant(result) if _is_short(result) else None


_ARITHMETIC: dict[str, Any] = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "div": lambda x, y: x / y,
    "min": min,
    "max": max,
    "abs": abs,
    "floor": math.floor,
}


def _is_short(value: Any) -> bool:
    """Whether a float has at most 8 binary digits, as bf16 has, and is neither huge nor tiny for fp16."""
    if type(value) is not float or not math.isfinite(value):
        return False
    digits, exponent = math.frexp(value)
    return (digits * 256).is_integer() and -13 <= exponent <= 15 and str(value) != "-0.0"


def _ordered(term: Term) -> Term | None:
    """Constants second."""
    if term.op not in _MIRRORED or term.args[0].op != "const" or term.args[1].op == "const":
        return None
    return apply(_MIRRORED[term.op], term.args[1], term.args[0])


def _cast(kind: Any, inner: Term) -> Term | None:
    if inner.op != "cast":
        return None
    source = inner.args[0]
    if source.kind == "bool" or (kind == "bool" and inner.kind == "float"):  # a whole number rounds to no zero
        return cast_to(kind, source)
    return None


def _not(x: Term) -> Term | None:
    swaps = x.op in ("eq", "ne") or (x.op in COMPARISONS and x.args[0].kind != "float")  # NaN is neither lt nor ge
    return apply(_OPPOSITE[x.op], *x.args) if swaps else None


def _neg(x: Term) -> Term | None:
    if x.op == "neg":
        return x.args[0]
    if x.op == "const":
        return constant(-x.value)
    if x.op == "mul" and x.args[1].op == "const" and x.kind == "float":
        return apply("mul", x.args[0], constant(-x.args[1].value))
    return None


def _add(x: Term, y: Term) -> Term | None:
    if y.op == "neg":
        return apply("sub", x, y.args[0])
    if x.op == "neg":
        return apply("sub", y, x.args[0])
    return x if _is_zero(y, "-0.0") else _offset("add", x, y)


def _sub(x: Term, y: Term) -> Term | None:
    if y.op == "neg":
        return apply("add", x, y.args[0])
    if _is_zero(y, "0.0"):
        return x
    if x is y and x.kind == "int":
        return constant(0)
    return _offset("sub", x, y)


def _is_zero(term: Term, *spelled: str) -> bool:
    """Whether `term` is one of these zeros: x + -0.0 and x - 0.0 are x, but -0.0 + 0.0 is not -0.0."""
    return term.op == "const" and str(term.value) in spelled


def _offset(op: str, x: Term, y: Term) -> Term | None:
    """Of whole numbers, (x + c) + d as x + (c + d)."""
    if x.kind != "int" or y.op != "const" or x.op not in ("add", "sub") or x.args[1].op != "const":
        return None
    total = sum(item if sign == "add" else -item for sign, item in ((op, y.value), (x.op, x.args[1].value)))
    return apply("add", x.args[0], constant(total))


def _mul(x: Term, y: Term) -> Term | None:
    if y.value == -1:
        return apply("neg", x)
    if x.op == "neg" and y.op == "neg":
        return apply("mul", x.args[0], y.args[0])
    if x.op == "neg" and y.op == "const":
        return apply("mul", x.args[0], constant(-y.value))
    return None


def _div(x: Term, y: Term) -> Term | None:
    """By a power of two: the product with its inverse, which has the same rounding."""
    if not _is_short(y.value) or abs(math.frexp(y.value)[0]) != 0.5:
        return None
    return apply("mul", x, constant(1 / y.value)) if _is_short(1 / y.value) else None


def _pow(x: Term, y: Term) -> Term | None:
    """As PyTorch computes these powers."""
    if y.op != "const":
        return None
    if y.value == 0:
        return cast_to(x.kind, constant(1))
    if y.value in (1, 2, 3):
        square = apply("mul", x, x)
        return x if y.value == 1 else square if y.value == 2 else apply("mul", square, x)
    return apply("div", constant(1.0), x) if y.value == -1 and x.kind == "float" else None


def _same(x: Term, y: Term) -> Term | None:
    return x if x is y else None


def _equal(op: str, x: Term, y: Term) -> Term | None:
    if x.kind != "bool" or y.op != "const":
        return None
    return x if y.value is (op == "eq") else apply("not", x)


def _where(condition: Term, x: Term, y: Term) -> Term | None:
    if condition.op == "not":
        return apply("where", condition.args[0], y, x)
    if x.op == "where" and x.args[0] is condition:
        return apply("where", condition, x.args[1], y)
    if y.op == "where" and y.args[0] is condition:
        return apply("where", condition, x, y.args[2])
    if x.value == 1 and _is_zero(y, "0.0", "0", "False"):
        return cast_to(x.kind, condition)
    if y.value == 1 and _is_zero(x, "0.0", "0", "False"):
        return cast_to(x.kind, apply("not", condition))
    return None


def _abs(x: Term) -> Term | None:
    return x if x.op == "abs" else apply("abs", x.args[0]) if x.op == "neg" else None


def _floor(x: Term) -> Term | None:
    whole = x.kind == "int" or x.op == "floor" or (x.op == "cast" and x.args[0].kind != "float")
    return x if whole else None


_RULES: dict[str, Rule] = {
    "not": _not,
    "neg": _neg,
    "add": _add,
    "sub": _sub,
    "mul": _mul,
    "div": _div,
    "pow": _pow,
    "min": _same,
    "max": _same,
    "eq": lambda x, y: _equal("eq", x, y),
    "ne": lambda x, y: _equal("ne", x, y),
    "where": _where,
    "abs": _abs,
    "floor": _floor,
}
