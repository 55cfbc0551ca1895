"""What a node does besides computing a value: writes, random draws, and which memory a value lies in."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxopt import compat
from fxopt.fake import bound_arguments, value_of

aten = torch.ops.aten

_DROPOUTS = frozenset(
    {
        aten.dropout.default, aten.dropout_.default,
        aten.alpha_dropout.default, aten.alpha_dropout_.default,
        aten.feature_dropout.default, aten.feature_dropout_.default,
        aten.feature_alpha_dropout.default, aten.feature_alpha_dropout_.default,
    }
)  # fmt: skip
"""Operators that return their input itself, untouched, at ``p=0`` and outside training."""


def is_pure(node: fx.Node) -> bool:
    """True for an ATen operator that neither mutates, nor draws random numbers, nor may raise on data alone."""
    if getattr(node.target, "_schema", None) is None or mutates(node) or is_random(node):
        return False
    return _is_tagged_random(node) or not node.is_impure()  # fx goes by the tag alone


def is_random(node: fx.Node) -> bool:
    """True if `node` draws from a random generator.

    Operators with a dropout inside (SDPA, LSTM) are tagged as if they drew whatever its probability; at a constant 0
    they do not. `bernoulli` and `native_dropout` draw even then.
    """
    if not _is_tagged_random(node):
        return False
    given = bound_arguments(node)
    rate = given.get("dropout_p", given.get("dropout"))
    return not (is_constant_zero(rate) or is_idle_dropout(node))


def _is_tagged_random(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def is_idle_dropout(node: fx.Node) -> bool:
    """True for a dropout that is a constant identity: ATen then returns the input itself."""
    if node.target not in _DROPOUTS:
        return False
    given = bound_arguments(node)
    return given["train"] is False or is_constant_zero(given["p"])


def is_constant_zero(value: Any) -> bool:
    """True for the number 0, as opposed to a node or a symbol that may be."""
    return type(value) in (int, float) and bool(value == 0)


def mutates(node: fx.Node) -> bool:
    """True if the schema of `node`'s operator writes to an argument, or it is a setitem."""
    schema = getattr(node.target, "_schema", None)
    return bool(schema is not None and schema.is_mutable) and not is_idle_dropout(node)


def mutated_arguments(node: fx.Node) -> list[fx.Node]:
    """The argument nodes that `node` writes to, by its schema."""
    target: Any = node.target
    if not mutates(node):
        return []
    given = bound_arguments(node)
    declared = target._schema.arguments
    written = compat.pytree.tree_leaves([given[argument.name] for argument in declared if argument.is_write])
    return [item for item in written if isinstance(item, fx.Node)]


def mutated_storages(graph: fx.Graph) -> set[Any]:
    """The storages that some node of `graph` writes to."""
    return {storage_of(value_of(argument)) for node in graph.nodes for argument in mutated_arguments(node)}


def storage_of(value: Any) -> Any:
    """An identity for the memory behind a fake tensor, equal for views of one another; None for what has none."""
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided or compat.is_batched(value):
        return None
    return value.untyped_storage()._cdata


def storages_of(value: Any) -> set[Any]:
    """The storages of the tensors in `value`, which may be a tuple of them (what `split` returns)."""
    return {storage_of(leaf) for leaf in compat.pytree.tree_leaves(value)} - {None}


def reaches_output(node: fx.Node) -> bool:
    """Whether an output may alias `node`: a caller sees which tensors share memory, so such nodes stay."""
    storage = storage_of(value_of(node))
    output = next(iter(reversed(node.graph.nodes)))
    return any(storage_of(value_of(value)) == storage for value in output.all_input_nodes)


def same_layout(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Static equality: comparing symbolic sizes by value would install guards."""

    def written(tensor: torch.Tensor) -> tuple[str, str, str, str]:
        return str(tuple(tensor.shape)), str(tensor.stride()), str(tensor.storage_offset()), str(tensor.device)

    return written(one) == written(other)
