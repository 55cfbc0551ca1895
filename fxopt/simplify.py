"""Clean-up of a canonical graph: what changes no value and no gradient goes, and one spelling stays.

Every rewrite here is exact, bit for bit, forward and backward. (Left-over no-op casts let a matcher find 1 of 5
RMSNorms of a Llama; without them, 5 of 5.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fxopt import compat
from fxopt.fake import arguments, bound_arguments, value_of

aten = torch.ops.aten

_CASTS = (aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten.type_as.default, aten.to.prim_dtype)
_SAME_OBJECT = (*_CASTS, aten.contiguous.default)
_DROPOUTS = (aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default)
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
    mutated = mutated_storages(gm)
    for node in list(gm.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in _CASTS:
            _spell_cast(node)
        if _is_identity(node, mutated):
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)
    _erase_dead(gm.graph)


def _erase_dead(graph: fx.Graph) -> None:
    """Remove unused nodes that compute a value and do nothing else. Random operators stay: they move the generator."""
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users and is_pure(node):
            graph.erase_node(node)


def is_pure(node: fx.Node) -> bool:
    """True for an ATen operator that neither mutates, nor draws random numbers, nor may raise on data alone."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or node.is_impure() or mutates(node):
        return False
    return not is_random(node)


def is_random(node: fx.Node) -> bool:
    """True if `node`'s operator draws from a random generator, or is tagged as if (SDPA, even without dropout)."""
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def mutates(node: fx.Node) -> bool:
    """True if the schema of `node`'s operator writes to an argument, or it is a setitem."""
    schema = getattr(node.target, "_schema", None)
    return bool(schema is not None and schema.is_mutable)


def mutated_arguments(node: fx.Node) -> list[fx.Node]:
    """The argument nodes that `node` writes to, by its schema."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    given = bound_arguments(node)
    written = compat.pytree.tree_leaves([given[argument.name] for argument in schema.arguments if argument.is_write])
    return [item for item in written if isinstance(item, fx.Node)]


def storage_of(value: Any) -> Any:
    """An identity for the memory behind a fake tensor, equal for views of one another; None for what has none."""
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided or compat.is_batched(value):
        return None
    return value.untyped_storage()._cdata


def mutated_storages(gm: fx.GraphModule) -> set[Any]:
    """The storages that some node of `gm` writes to."""
    return {storage_of(value_of(argument)) for node in gm.graph.nodes for argument in mutated_arguments(node)}


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
    if node.target in _DROPOUTS:
        _, p, train = arguments(node)
        return train is False or (type(p) in (int, float) and bool(p == 0))  # ATen returns the input itself
    if _reaches_output(node) or not _same_layout(source, result):
        return False
    if node.target in _SAME_DATA:
        return True
    neutral = _NEUTRAL.get(node.target)
    unwritten = storage_of(source) not in mutated and storage_of(result) not in mutated
    return neutral is not None and unwritten and neutral(node, source)


def _same_layout(source: torch.Tensor, result: torch.Tensor) -> bool:
    """Static equality: comparing symbolic sizes by value would install guards."""

    def written(tensor: torch.Tensor) -> tuple[str, str, str, str]:
        return str(tuple(tensor.shape)), str(tensor.stride()), str(tensor.storage_offset()), str(tensor.device)

    return written(source) == written(result)


def _reaches_output(node: fx.Node) -> bool:
    """Whether an output may alias `node`: a caller sees which tensors share memory, so such nodes stay."""
    storage = storage_of(value_of(node))
    output = next(iter(reversed(node.graph.nodes)))
    return any(storage_of(value_of(value)) == storage for value in output.all_input_nodes)


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
