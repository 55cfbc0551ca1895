"""Scalar expressions of (s, b, h, q, k): what lies between ``q @ k.T`` and softmax, and what its masks say.

A term is a node of a typed expression graph. Equal terms are one object, so that graphs in which a value is read twice
stay small and comparing two is free. Three types do: `float` is the dtype in which scores are computed (fp32, fp64 for
fp64 inputs), `int` is int64, `bool` is bool.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, Literal, cast

Kind = Literal["float", "int", "bool"]

VARIABLES: dict[str, Kind] = {"s": "float", "b": "int", "h": "int", "q": "int", "k": "int"}
"""The score, and where it stands: batch, query head, query position and key position, all counted from 0."""

UNARY = frozenset("neg abs exp log tanh sqrt rsqrt sigmoid floor not".split())  # noqa: SIM905
BINARY = frozenset("add sub mul div floordiv mod pow min max and or lt le gt ge eq ne".split())  # noqa: SIM905
COMPARISONS = frozenset("lt le gt ge eq ne".split())  # noqa: SIM905
LOGICAL = frozenset(("and", "or", "not"))
REAL = frozenset("div exp log tanh sqrt rsqrt sigmoid".split())  # noqa: SIM905
"""Operators whose result is a float whatever they are given."""

Note = Callable[["Term", "Term"], object]
"""Called with (made, old) for each term that rewriting put in the place of another: `fxopt.score.origins` remembers."""

_INTERNED: weakref.WeakValueDictionary[tuple[Any, ...], Term] = weakref.WeakValueDictionary()
"""Weak, since a load holds a node and with it a whole graph."""

_INTERNING = threading.RLock()  # graphs may be compiled on several threads, and equal terms must stay one object


class Term:
    """One value: `op` of `args`, of type `kind`. Made by `variable`, `constant`, `load` and `apply`, never directly.

    op:   a name in `VARIABLES` (no args); "const" (the Python value); "load" (what is loaded: a node, or a slot number
          in a program; then an index term an axis); "cast" (to `kind`); "where" (condition, value, value); or a name
          in `UNARY` or `BINARY`, with terms as args.
    """

    __slots__ = ("__weakref__", "args", "kind", "op")

    op: str
    args: tuple[Any, ...]
    kind: Kind

    def __repr__(self) -> str:
        if self.op in VARIABLES:
            return self.op
        if self.op == "const":
            return repr(self.args[0])
        if self.op == "load":
            return f"{self.args[0]}[{', '.join(map(repr, self.args[1:]))}]"
        name = self.kind if self.op == "cast" else self.op
        return f"{name}({', '.join(map(repr, self.args))})"

    @property
    def terms(self) -> tuple[Term, ...]:
        """The arguments that are terms."""
        return tuple(item for item in self.args if isinstance(item, Term))

    def walk(self) -> Iterator[Term]:
        """Every term in this one, once each, arguments before what reads them."""
        seen: set[Term] = set()
        waiting: list[tuple[Term, bool]] = [(self, False)]
        while waiting:
            term, ready = waiting.pop()
            if ready:
                yield term
            elif term not in seen:
                seen.add(term)
                waiting.append((term, True))
                waiting += [(item, False) for item in reversed(term.terms)]

    @property
    def reads(self) -> frozenset[str]:
        """The variables this term depends on."""
        return frozenset(term.op for term in self.walk() if term.op in VARIABLES)

    @property
    def value(self) -> Any:
        """The Python value of a constant, None for any other term."""
        return self.args[0] if self.op == "const" else None


def _interned(op: str, args: tuple[Any, ...], kind: Kind) -> Term:
    key = (op, kind, *((type(item), str(item)) if isinstance(item, int | float) else item for item in args))
    with _INTERNING:
        found = _INTERNED.get(key)
        if found is None:
            found = object.__new__(Term)
            found.op, found.args, found.kind = op, args, kind
            _INTERNED[key] = found
        return found


def variable(name: str) -> Term:
    """One of `VARIABLES`."""
    return _interned(name, (), VARIABLES[name])


def constant(value: bool | int | float) -> Term:
    """A constant of the type that `value` has."""
    return _interned("const", (value,), cast(Kind, type(value).__name__))


def load(source: Hashable, index: tuple[Term, ...], kind: Kind) -> Term:
    """An element of a captured tensor, of floating (`float`), integer (`int`) or boolean (`bool`) dtype."""
    return _interned("load", (source, *index), kind)


def cast_to(kind: Kind, term: Term) -> Term:
    """`term` as another type; a number is True where it is not zero, and a float is cut to an int towards zero."""
    if term.kind == kind:
        return term
    if term.op == "const" and not (kind == "int" and not abs(term.value) < 2**63):  # NaN and infinities are no ints
        return constant({"float": float, "int": int, "bool": bool}[kind](term.value))
    return _interned("cast", (term,), kind)


def apply(op: str, *args: Term) -> Term:
    """`op` of `args`, with operands brought to a common type as PyTorch does and constants folded where that is exact.

    Raises ValueError for an operator that is none, or one that is given the wrong number of arguments.
    """
    expected = 1 if op in UNARY else 2 if op in BINARY else 3 if op == "where" else 0
    if not expected or len(args) != expected:
        raise ValueError(f"{op!r} with {len(args)} arguments is no operator of a score program")
    args, kind = _typed(op, args)
    return _folded(op, args) or _interned(op, args, kind)


def rebuilt(term: Term, args: Sequence[Any]) -> Term:
    """`term` with other arguments, folded again."""
    if term.op == "load":
        return load(args[0], tuple(args[1:]), term.kind)
    if term.op == "cast":
        return cast_to(term.kind, args[0])
    return apply(term.op, *args)


def unnoted(made: Term, old: Term) -> None:
    """The `Note` of who does not ask."""


def substitute(term: Term, found: Mapping[Term, Term], note: Note = unnoted) -> Term:
    """`term` with every term among the keys of `found` replaced by its value."""
    made: dict[Term, Term] = {}
    for item in term.walk():
        if item in found:
            made[item] = found[item]
        elif item.terms:
            args = [made[arg] if isinstance(arg, Term) else arg for arg in item.args]
            made[item] = (
                item if all(new is old for new, old in zip(args, item.args, strict=True)) else rebuilt(item, args)
            )
        else:
            made[item] = item
        note(made[item], item)
    return made[term]


def _typed(op: str, args: tuple[Term, ...]) -> tuple[tuple[Term, ...], Kind]:
    if op in LOGICAL:
        return tuple(cast_to("bool", item) for item in args), "bool"
    values = args[1:] if op == "where" else args
    ranks: list[Kind] = ["bool", "int", "float"]
    common = max((item.kind for item in values), key=ranks.index)
    if op in REAL:
        common = "float"
    elif common == "bool" and op not in COMPARISONS and op != "where":
        common = "int"
    values = tuple(cast_to(common, item) for item in values)
    if op == "where":
        return (cast_to("bool", args[0]), *values), common
    return values, "bool" if op in COMPARISONS else common


def _folded(op: str, args: tuple[Term, ...]) -> Term | None:
    """What `op` of `args` is where that can be said exactly, in any float dtype and for NaN and infinities too."""
    if op in ("and", "or"):
        return _folded_logical(op, args)
    if op == "not":
        inner = args[0]
        return constant(not inner.value) if inner.op == "const" else inner.args[0] if inner.op == "not" else None
    if op == "where":
        condition, one, other = args
        return (one if condition.value else other) if condition.op == "const" else one if one is other else None
    if all(item.op == "const" and item.kind == "int" for item in args) and op in _INTEGER:
        values = [item.value for item in args]
        return None if op in ("floordiv", "mod") and values[1] == 0 else constant(_INTEGER[op](*values))
    if op == "mul" and args[0].kind == "int" and any(item.op == "const" and item.value == 0 for item in args):
        return constant(0)
    if op in COMPARISONS and args[0] is args[1] and args[0].kind != "float":
        return constant(op in ("le", "ge", "eq"))
    return _neutral(op, args)


def _folded_logical(op: str, args: tuple[Term, ...]) -> Term | None:
    absorbing = op == "or"
    for one, other in (args, args[::-1]):
        if one.op == "const":
            return one if one.value is absorbing else other
    return args[0] if args[0] is args[1] else None


def _neutral(op: str, args: tuple[Term, ...]) -> Term | None:
    """x * 1, x / 1, and for integers x + 0, x - 0 and x // 1. (A float x + 0 turns -0.0 into +0.0.)"""
    if len(args) != 2 or args[1].op != "const":
        if op in ("add", "mul") and len(args) == 2 and args[0].op == "const":
            return _neutral(op, args[::-1])
        return None
    whole = args[0].kind == "int"
    if args[1].value == 1 and (op in ("mul", "div") or (op == "floordiv" and whole)):
        return args[0]
    return args[0] if args[1].value == 0 and op in ("add", "sub") and whole else None


_INTEGER: dict[str, Any] = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "floordiv": lambda x, y: x // y,
    "mod": lambda x, y: x % y,
    "min": min,
    "max": max,
    "neg": lambda x: -x,
    "abs": abs,
    "lt": lambda x, y: x < y,
    "le": lambda x, y: x <= y,
    "gt": lambda x, y: x > y,
    "ge": lambda x, y: x >= y,
    "eq": lambda x, y: x == y,
    "ne": lambda x, y: x != y,
}
