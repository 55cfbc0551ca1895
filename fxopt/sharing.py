"""Equal nodes that a rule made are computed once: what depends on the batch alone serves every layer.

Rules put in each site all that it needs, such as the document bounds of a mask, without looking at other sites. A
replacement stands where its site's first output was, so the first of equal nodes comes before the readers of them all.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Iterator
from typing import Any

from torch import fx

from fxopt import compat
from fxopt.effects import is_pure, mutated_arguments, mutated_storages, mutates, reaches_output, storages_of
from fxopt.fake import value_of


def share(gm: fx.GraphModule, rule: str) -> dict[str, str]:
    """Merge equal nodes of `gm` that `rule` made (``meta["rule"]``). The nodes of `gm` carry fresh values.

    Two are equal if operator, arguments and ambient state are, the operator is pure, nothing writes in between to
    memory it reads or ever to its result, and no output can alias the result. Returns the names of the nodes that went,
    each with the name of the one in its place; the caller propagates and recompiles if there are any.
    """
    written = mutated_storages(gm.graph)
    first: dict[Hashable, fx.Node] = {}
    merged: dict[str, str] = {}
    for node in list(gm.graph.nodes):
        if clobbered := _clobbered(node):
            first = {key: other for key, other in first.items() if clobbered.isdisjoint(_read(other))}
        if node.meta.get("rule") != rule or not _may_merge(node, written):
            continue
        same = first.setdefault(_key(node), node)
        if same is not node:
            same.meta["sites"] = (*same.meta.get("sites", ()), *node.meta.get("sites", ()))
            node.replace_all_uses_with(same)
            gm.graph.erase_node(node)
            merged[node.name] = same.name
    return merged


def _may_merge(node: fx.Node, written: set[Any]) -> bool:
    pure = node.op == "call_function" and (node.target is operator.getitem or is_pure(node))
    return pure and storages_of(value_of(node)).isdisjoint(written) and not reaches_output(node)


def _key(node: fx.Node) -> Hashable:
    """What two equal nodes have in common. Constants by their text, since 1 == 1.0 == True and 0.0 == -0.0."""
    leaves, spec = compat.pytree.tree_flatten((node.args, node.kwargs))
    written = tuple(leaf if isinstance(leaf, fx.Node) else (type(leaf), repr(leaf)) for leaf in leaves)
    return node.target, str(spec), written, node.meta.get("grad"), node.meta.get("autocast")


def _read(node: fx.Node) -> set[Any]:
    return {storage for argument in node.all_input_nodes for storage in storages_of(value_of(argument))}


def _clobbered(node: fx.Node) -> set[Any]:
    """The storages that `node` may write to; a body that writes may write to whatever it is given."""
    if any(mutates(inner) for body in _bodies(node) for inner in body.graph.nodes):
        return _read(node)
    return {storage for argument in mutated_arguments(node) for storage in storages_of(value_of(argument))}


def _bodies(node: fx.Node) -> Iterator[fx.GraphModule]:
    """The graphs that a higher-order operator is given, and those inside them."""
    for argument in node.all_input_nodes:
        body = getattr(node.graph.owning_module, str(argument.target), None) if argument.op == "get_attr" else None
        if isinstance(body, fx.GraphModule):
            yield from (module for module in body.modules() if isinstance(module, fx.GraphModule))
