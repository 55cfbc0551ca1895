"""What the nodes of a canonical graph say, for reading them element by element: operator, operands, axes."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import sympy
import torch
from torch import fx

from fxopt.fake import arguments, bound_arguments, value_of
from fxopt.score.index import Unknown
from fxopt.score.term import Term, apply, constant

_SAME = "add sub mul neg abs exp log tanh sqrt rsqrt sigmoid floor pow lt le gt ge eq ne"
ELEMENTWISE: dict[str, str] = {
    **{name: name for name in _SAME.split()},
    "div": "div",
    "true_divide": "div",
    "floor_divide": "floordiv",
    "remainder": "mod",
    "rsub": "sub",
    "minimum": "min",
    "min": "min",
    "maximum": "max",
    "max": "max",
    "square": "mul",
    "reciprocal": "div",
    "logical_and": "and",
    "logical_or": "or",
    "logical_not": "not",
    "logical_xor": "ne",
    "bitwise_and": "and",
    "bitwise_or": "or",
    "bitwise_not": "not",
    "bitwise_xor": "ne",
    "__and__": "and",
    "__or__": "or",
    "__xor__": "ne",
}
"""Names of ATen operators on elements, and the operators of terms that they are."""

RESHAPES = frozenset("view reshape _unsafe_view flatten unflatten squeeze unsqueeze view_as reshape_as".split())  # noqa: SIM905
"""Operators that keep the order of elements."""

FILLED = frozenset("zeros ones full zeros_like ones_like full_like new_zeros new_ones new_full scalar_tensor".split())  # noqa: SIM905
"""Operators whose result holds one number everywhere."""

_BITWISE = frozenset("bitwise_and bitwise_or bitwise_not bitwise_xor __and__ __or__ __xor__".split())  # noqa: SIM905


@dataclasses.dataclass(frozen=True)
class Times:
    """An operand that is multiplied first: the `alpha` of ``add`` and ``sub``."""

    node: fx.Node
    factor: int | float


def name_of(node: Any) -> str:
    """The operator that `node` calls, without namespace and overload; "" for what is no call."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return ""
    if node.target is operator.getitem:
        return "getitem"
    schema = getattr(node.target, "_schema", None)
    return schema.name.removeprefix("aten::") if schema is not None and schema.name.startswith("aten::") else ""


def elementwise(node: fx.Node) -> tuple[str, tuple[Any, ...]]:
    """The term operator of an element-wise node and its operands. Raises `Unknown` for overloads that reduce."""
    name, given = name_of(node), list(arguments(node))
    if name in ("min", "max") and (len(given) != 2 or not isinstance(given[1], fx.Node)):
        raise Unknown(f"{node.name} ({node.target}) reduces")
    if name in _BITWISE and value_of(node).dtype != torch.bool:
        raise Unknown(f"{node.name} works on bits")
    op = ELEMENTWISE[name]
    if name == "square":
        given *= 2
    elif name == "reciprocal":
        given = [1.0, *given]
    elif name in ("add", "sub", "rsub"):
        given = _with_alpha(node)
    elif name == "div":
        op = {None: "div", "floor": "floordiv"}.get(node.kwargs.get("rounding_mode"), "")  # type: ignore[arg-type]
    if op in ("floordiv", "mod") and value_of(node).dtype.is_floating_point:
        raise Unknown(f"{node.name} divides floats with rounding")
    if not op:
        raise Unknown(f"{node.name} rounds towards zero")
    return op, tuple(given)


def _with_alpha(node: fx.Node) -> list[Any]:
    """The operands of an addition or subtraction in the order of the formula."""
    given = bound_arguments(node)
    one, other, alpha = given["self"], given["other"], given.get("alpha", 1)
    if type(alpha) not in (int, float):
        raise Unknown(f"{node.name} has a factor known only at run time")
    if alpha != 1:
        other = Times(other, alpha) if isinstance(other, fx.Node) else other * alpha
    return [other, one] if name_of(node) == "rsub" else [one, other]


def axes_of_permutation(node: fx.Node) -> list[int]:
    """For each axis of the result, the axis of the source that it is."""
    args, rank = arguments(node), value_of(node).dim()
    name = name_of(node)
    if name == "permute":
        return [axis % rank for axis in args[1]]
    if name == "numpy_T":
        return list(range(rank))[::-1]
    if name == "movedim":
        return _moved(args[1], args[2], rank)
    order = list(range(rank))
    if rank > 1:
        one, other = (args[1], args[2]) if len(args) == 3 else (-1, -2)
        order[one % rank], order[other % rank] = order[other % rank], order[one % rank]
    return order


def _moved(source: Any, destination: Any, rank: int) -> list[int]:
    origins = [axis % rank for axis in ([source] if isinstance(source, int) else source)]
    targets = [axis % rank for axis in ([destination] if isinstance(destination, int) else destination)]
    rest = iter(axis for axis in range(rank) if axis not in origins)
    return [origins[targets.index(axis)] if axis in targets else next(rest) for axis in range(rank)]


def as_sympy(term: Term, atoms: dict[sympy.Symbol, Term]) -> sympy.Expr:
    """An integer term as sums and products; what is neither is a symbol, noted in `atoms`."""
    if term.op == "const":
        return sympy.Integer(int(term.value))
    if term.op in ("add", "sub", "mul", "neg"):
        parts = [as_sympy(item, atoms) for item in term.terms]
        if term.op == "neg":
            return -parts[0]
        return {"add": parts[0] + parts[1], "sub": parts[0] - parts[1], "mul": parts[0] * parts[1]}[term.op]
    if term.op == "load" and len(term.args) == 1 and isinstance(term.args[0], sympy.Expr):
        return term.args[0]
    symbol = sympy.Symbol(f"t{id(term)}", integer=True)
    atoms[symbol] = term
    return symbol


def difference(one: Term, other: Term) -> Term:
    """``one - other`` for integers; a constant where their dependence on everything else cancels."""
    found = sympy.expand(as_sympy(one, {}) - as_sympy(other, {}))
    return constant(int(found)) if found.is_Integer else apply("sub", one, other)
