"""Clean-up of a canonical graph: what changes no value and no gradient goes, and one spelling stays.

Every rewrite here is exact, bit for bit, forward and backward. (Left-over no-op casts let a matcher find 1 of 5
RMSNorms of a Llama; without them, 5 of 5.)
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fxopt.effects import (
    is_idle_dropout,
    is_pure,
    mutated_storages,
    reaches_output,
    same_layout,
    storage_of,
)
from fxopt.fake import arguments, bound_arguments, value_of
from fxopt.inplace import functionalize

__all__ = ["simplify"]

aten = torch.ops.aten

_CASTS = (aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten.type_as.default, aten.to.prim_dtype)
WIDE = "wide"
"""The key in a node's meta under which are those of its inputs that the code casts to fp32, which they have already:
``x.float()`` says nothing in an fp32 graph, and something once `fxopt.passes.precision` has narrowed x."""

_SAME_OBJECT = (*_CASTS, aten.contiguous.default)
_SAME_DATA = (
    aten.alias.default,
    aten.view.default,
    aten.reshape.default,
    aten.expand.default,
    aten.slice.Tensor,
    aten.view_as.default,
    aten.expand_as.default,
    aten.flatten.using_ints,
)


def simplify(gm: fx.GraphModule) -> None:
    """Clean `gm`, whose nodes carry fresh values (see `fake.propagate`), in place. The caller recompiles."""
    _tidy(gm)
    while functionalize(gm):  # without the write, more is dead or an identity, and then more writes are unseen
        _tidy(gm)


def _tidy(gm: fx.GraphModule) -> None:
    mutated = mutated_storages(gm.graph)
    for node in list(gm.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in _CASTS:
            _spell_cast(node)
        same = node.args[0] if _is_identity(node, mutated) else _item_of_items(node)
        if same is not None:
            _note_wide(node, same)
            node.replace_all_uses_with(same)
            gm.graph.erase_node(node)
    _erase_dead(gm.graph)


def _note_wide(node: fx.Node, same: Any) -> None:
    """Before `node`, which is `same`, goes: its readers remember that the code asked for it in fp32 (`WIDE`)."""
    asked = node.target is aten.to.dtype and value_of(node).dtype == torch.float32
    if asked or same in node.meta.get(WIDE, ()):
        for user in node.users:
            user.meta[WIDE] = {*user.meta.get(WIDE, ()), same}


def _erase_dead(graph: fx.Graph) -> None:
    """Remove unused nodes that compute a value and do nothing else. Random operators stay: they move the generator."""
    for node in reversed(list(graph.nodes)):
        item = node.target is operator.getitem
        if node.op == "call_function" and not node.users and (item or is_pure(node)):
            graph.erase_node(node)


def _spell_cast(node: fx.Node) -> None:
    """Every cast that only changes the dtype becomes ``aten.to.dtype(x, dtype)``."""
    source, result = value_of(node.args[0]), value_of(node)
    if not isinstance(source, torch.Tensor) or not isinstance(result, torch.Tensor):
        return
    given = bound_arguments(node)
    if given.get("copy") or given.get("memory_format") is not None or given.get("pin_memory"):
        return
    if source.device == result.device and source.layout == result.layout:
        node.target, node.args, node.kwargs = aten.to.dtype, (node.args[0], result.dtype), {}


def _is_identity(node: fx.Node, mutated: set[Any]) -> bool:
    if not isinstance(node.args[0] if node.args else None, fx.Node):
        return False
    source, result = value_of(node.args[0]), value_of(node)
    if not isinstance(source, torch.Tensor) or not isinstance(result, torch.Tensor):
        return False
    if source.dtype != result.dtype or source.requires_grad != result.requires_grad:
        return False
    if node.target in _SAME_OBJECT:
        return source is result
    if is_idle_dropout(node):
        return True
    if node.target is aten.detach_.default:  # `torch.tensor(2.5)` is a copy of a constant that is then detached
        return arguments(node)[0].target is aten.lift_fresh_copy.default
    if reaches_output(node) or not same_layout(source, result):
        return False
    if node.target in _SAME_DATA:
        return True
    neutral = _NEUTRAL.get(node.target)
    unwritten = storage_of(source) not in mutated and storage_of(result) not in mutated
    return neutral is not None and unwritten and neutral(node, source)


def _item_of_items(node: fx.Node) -> fx.Node | None:
    """The node that ``(a, b)[1]`` is: what capturing leaves of ``x.max(-1).indices``."""
    if node.target is not operator.getitem or not isinstance(node.args[0], tuple | list):
        return None
    item = node.args[0][node.args[1]] if type(node.args[1]) is int else None
    return item if isinstance(item, fx.Node) else None


def _multiplies_by_one(node: fx.Node, source: torch.Tensor) -> bool:
    factor = arguments(node)[1]
    return type(factor) in (int, float) and bool(factor == 1) and not node.kwargs


def _adds_zero(node: fx.Node, source: torch.Tensor) -> bool:
    """Integers only: -0.0 + 0 is +0.0."""
    exact = not source.dtype.is_floating_point and not source.dtype.is_complex
    return exact and type(node.args[1]) is int and node.args[1] == 0


_NEUTRAL: dict[Any, Callable[[fx.Node, torch.Tensor], bool]] = {
    aten.mul.Tensor: _multiplies_by_one,
    aten.mul.Scalar: _multiplies_by_one,
    aten.div.Tensor: _multiplies_by_one,
    aten.div.Scalar: _multiplies_by_one,
    aten.add.Tensor: _adds_zero,
    aten.sub.Tensor: _adds_zero,
}
