"""Terms as people write them, for reports: ``20 * tanh(0.25 * s / 20)``."""

from __future__ import annotations

from typing import Any

from torch import fx

from fxopt.score.term import VARIABLES, Term

_SIGNS = {
    "or": ("|", 1), "and": ("&", 2), "eq": ("==", 3), "ne": ("!=", 3), "lt": ("<", 3), "le": ("<=", 3),
    "gt": (">", 3), "ge": (">=", 3), "add": ("+", 4), "sub": ("-", 4), "mul": ("*", 5), "div": ("/", 5),
    "floordiv": ("//", 5), "mod": ("%", 5), "pow": ("**", 7),
}  # fmt: skip
_PREFIX = {"neg": "-", "not": "~"}
_TIGHTEST = 8


def formula(term: Term) -> str:
    """`term` in infix notation, numbers to five digits, graph nodes by name; casts between numbers are left out."""
    return _written(term)[0]


def _written(term: Term) -> tuple[str, int]:
    """The text of `term`, and how tightly its outermost operator binds."""
    if term.op in VARIABLES:
        return term.op, _TIGHTEST
    if term.op == "const":
        return _number(term.value)
    if term.op == "load":
        name = term.args[0].name if isinstance(term.args[0], fx.Node) else str(term.args[0])
        return f"{name}[{', '.join(formula(item) for item in term.terms)}]", _TIGHTEST
    if term.op == "cast" and term.kind != "bool":
        return _written(term.args[0])
    if term.op in _SIGNS:
        sign, level = _SIGNS[term.op]
        left, right = (_enclosed(item, level + (side == 1)) for side, item in enumerate(term.args))
        return f"{left} {sign} {right}", level
    if term.op in _PREFIX:
        return _PREFIX[term.op] + _enclosed(term.args[0], 6), 6
    name = term.kind if term.op == "cast" else term.op
    return f"{name}({', '.join(formula(item) for item in term.terms)})", _TIGHTEST


def _enclosed(term: Term, level: int) -> str:
    text, own = _written(term)
    return text if own >= level else f"({text})"


def _number(value: Any) -> tuple[str, int]:
    text = f"{value:.5g}" if isinstance(value, float) else str(value)
    return text, 6 if text.startswith("-") else _TIGHTEST
