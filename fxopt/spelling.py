"""One reading of nodes that are written in several ways, for matching: the graph itself is not changed.

`rsqrt(v)`, `v ** -0.5`, `1 / sqrt(v)` and the divisor of `x / sqrt(v)` are one expression here, as are `x * x`,
`x ** 2` and `square(x)`. They agree to rounding, not to the bit, which is why the canonical graph keeps them apart.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

from fxopt.fake import bound_arguments, value_of

aten = torch.ops.aten

COMMUTES = frozenset({"add", "mul"})
_NAMES = {
    aten.add.Tensor: "add",
    aten.add.Scalar: "add",
    aten.mul.Tensor: "mul",
    aten.mul.Scalar: "mul",
    aten.div.Tensor: "div",
    aten.div.Scalar: "div",
    aten.sub.Tensor: "sub",
    aten.sub.Scalar: "sub",
    aten.rsqrt.default: "rsqrt",
    aten.sqrt.default: "sqrt",
}
_POWERS = {2: ("pow", 2), -0.5: ("rsqrt",), 0.5: ("sqrt",)}


@dataclasses.dataclass(frozen=True)
class Expr:
    """A node as read: an operator, its arguments (nodes, expressions or constants), and the nodes it stands for."""

    op: Any
    args: tuple[Any, ...]
    covers: tuple[fx.Node, ...]


def read(node: Any) -> Expr | None:
    """`node` as an expression; None for what is no call of an operator (inputs, constants)."""
    if isinstance(node, Expr):
        return node
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return None
    args = _arguments(node)
    if node.target is aten.pow.Tensor_Scalar and args[1] in _POWERS:
        op, *rest = _POWERS[args[1]]
        return Expr(op, (args[0], *rest), (node,))
    if node.target is aten.square.default or (node.target is aten.mul.Tensor and args[0] is args[1]):
        return Expr("pow", (args[0], 2), (node,))
    if node.target is aten.reciprocal.default:
        return _inverse_root(args[0], node) or Expr(node.target, args, (node,))
    if node.target is aten.div.Tensor and len(args) == 2:
        inverse = _inverse_root(args[1])
        if inverse is not None:
            return _inverse_root(args[1], node) if args[0] == 1 else Expr("mul", (args[0], inverse), (node,))
    target: Any = node.target
    return Expr(_NAMES.get(target, target), args, (node,))


def _inverse_root(node: Any, *covers: fx.Node) -> Expr | None:
    """``1 / node`` if `node` is a square root."""
    root = read(node)
    return Expr("rsqrt", root.args, (*covers, *root.covers)) if root is not None and root.op == "sqrt" else None


def skip_casts(node: Any) -> Any:
    """The value behind any casts."""
    while isinstance(node, fx.Node) and node.op == "call_function" and node.target is aten.to.dtype:
        node = node.args[0]
    return node


def _arguments(node: fx.Node) -> tuple[Any, ...]:
    """All arguments in the schema's order, defaults filled in, axes counted from the front, trailing defaults cut."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return (*node.args, *node.kwargs.values())
    source = value_of(node.args[0]) if node.args else None
    rank = source.dim() if isinstance(source, torch.Tensor) else 0
    bound = bound_arguments(node)
    values = [_from_front(value, rank) if name in ("dim", "dims") and rank else value for name, value in bound.items()]
    defaults = [argument.default_value for argument in schema.arguments]
    while values and not isinstance(values[-1], fx.Node) and values[-1] == defaults[len(values) - 1]:
        values.pop()
    return tuple(values)


def _from_front(axes: Any, rank: int) -> Any:
    if isinstance(axes, list | tuple):
        return [_from_front(axis, rank) for axis in axes]
    return axes % rank if type(axes) is int else axes
