"""What values of a graph hold that 16 bits may not: whole numbers, constants, and what is the caller's."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from fxopt.effects import mutated_arguments, storages_of
from fxopt.fake import arguments, bound_arguments, value_of
from fxopt.precision.casts import VIEWS

__all__ = ["beyond", "counts", "is_given", "returned_views", "written_in_bodies"]

aten = torch.ops.aten


def beyond(node: fx.Node, dtype: torch.dtype) -> bool:
    """Whether a number among the arguments of `node` is finite and not 0, but infinite or 0 in `dtype`."""
    target: Any = node.target
    limits = torch.finfo(dtype)
    numbers = [
        abs(value)
        for argument, value in zip(target._schema.arguments, bound_arguments(node).values(), strict=True)
        if str(argument.type).removeprefix("Optional[").removesuffix("]") in ("number", "float", "Tensor")
        and type(value) in (int, float)
    ]
    return any(limits.max < one < math.inf or 0 < one < limits.smallest_normal for one in numbers)


def counts(node: fx.Node) -> bool:
    """Whether `node` holds integers that may be large: no truth values, bytes or one-hot code."""
    node = _behind_views(node)
    value = value_of(node)
    if not isinstance(value, Tensor) or value.dtype.is_floating_point or value.dtype.is_complex:
        return False
    return value.dtype.itemsize > 1 and node.target is not aten.one_hot.default


def is_given(node: fx.Node) -> bool:
    """Whether `node` is an input or a constant of the graph, or a view of one."""
    return _behind_views(node).op in ("placeholder", "get_attr")


def _behind_views(node: fx.Node) -> fx.Node:
    while node.target in VIEWS and isinstance(arguments(node)[0], fx.Node):
        node = arguments(node)[0]
    return node


def returned_views(gm: fx.GraphModule) -> dict[Any, fx.Node]:
    """The storages that outputs of `gm` share or are views of, each with the node that made it."""
    made: dict[Any, fx.Node] = {}
    for node in gm.graph.nodes:
        for storage in storages_of(value_of(node)) if node.op != "output" else ():
            made.setdefault(storage, node)
    output = next(iter(reversed(gm.graph.nodes)))
    seen: dict[Any, set[fx.Node]] = {}
    for node in output.all_input_nodes:
        for storage in storages_of(value_of(node)):
            seen.setdefault(storage, set()).add(node)
    return {storage: made[storage] for storage, nodes in seen.items() if nodes != {made[storage]}}


def written_in_bodies(gm: fx.GraphModule) -> set[Any]:
    """The storages of all that is passed to bodies of `gm` that write to what they are given."""
    found: set[Any] = set()
    for node in gm.graph.nodes:
        bodies = [getattr(gm, str(one.target), None) for one in node.all_input_nodes if one.op == "get_attr"]
        if any(_writes_to_inputs(body) for body in bodies if isinstance(body, fx.GraphModule)):
            found |= {storage for one in node.all_input_nodes for storage in storages_of(value_of(one))}
    return found


def _writes_to_inputs(body: fx.GraphModule) -> bool:
    given = {storage for one in body.graph.find_nodes(op="placeholder") for storage in storages_of(value_of(one))}
    written = {
        storage
        for node in body.graph.nodes
        for one in mutated_arguments(node)
        for storage in storages_of(value_of(one))
    }
    return not given.isdisjoint(written | written_in_bodies(body))
