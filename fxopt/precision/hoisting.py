"""Casts of weights in the body of a checkpoint, made outside of it: once, and not again when the body is recomputed."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import fx, nn

from fxopt.effects import storages_of
from fxopt.fake import arguments, value_of
from fxopt.precision.casts import MARK, VIEWS, Casts, is_made
from fxopt.rule import provenance_of

__all__ = ["hoist"]

aten = torch.ops.aten

_MOVES = VIEWS | {aten.slice.Tensor, aten.select.int, aten.narrow.default}


def hoist(casts: Casts, body: fx.Graph, given: Sequence[Any], call: fx.Node, written: Collection[Any]) -> list[Any]:
    """What to give `body`, which was given `given`, in place of the casts of weights that it then needs no more.

    casts: of the graph around it, which has `call`, a node of the graph as it was. written: storages that the body
    writes to. Where a cast is all that reads an input, it takes its place; else it is one more.
    """
    outer = dict(zip(body.find_nodes(op="placeholder"), given, strict=True))
    for cast in [node for node in body.nodes if is_made(node)]:
        inner, moves = _moved(arguments(cast)[0])
        source = outer.get(inner)
        if not isinstance(source, fx.Node) or not storages_of(value_of(inner)).isdisjoint({*written, *casts.written}):
            continue
        alone = not moves and len(inner.users) == 1
        if not (alone and source.op == "placeholder") and not is_weight(source, casts.leaves):
            continue
        if value_of(inner).requires_grad and not all(move.meta.get("grad", True) for move in moves):
            continue  # a part taken under `no_grad`, which gets no gradient
        taken = inner if alone else _placeholder(body, cast, list(outer)[-1])
        outer[taken] = _outside(casts, source, moves, cast, call)
        taken.meta["val"] = value_of(cast)
        cast.replace_all_uses_with(taken)
        for one in (cast, *reversed(moves)):
            if not one.users:
                body.erase_node(one)
    return list(outer.values())


def is_weight(node: fx.Node, leaves: Collection[fx.Node]) -> bool:
    """Whether `node` is a parameter, or a part or view of one."""
    node, _ = _moved(node)
    return node in leaves or isinstance(value_of(node), nn.Parameter)


def _moved(node: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """Of what `node` is a part or view, and the movements that make it, first to last."""
    moves: list[fx.Node] = []
    while node.target in _MOVES and node.all_input_nodes == [node.args[0]]:
        moves.insert(0, node)
        node = arguments(node)[0]
    return node, moves


def _placeholder(body: fx.Graph, cast: fx.Node, last: fx.Node) -> fx.Node:
    """One more input of `body`, for `cast`."""
    with body.inserting_after(last):
        made = body.placeholder(cast.name)
    made.meta.update(provenance_of(cast))
    return made


def _outside(casts: Casts, source: fx.Node, moves: Sequence[fx.Node], cast: fx.Node, call: fx.Node) -> fx.Node:
    """`cast` of the `moves` of `source`, in the graph around the body."""
    for move in moves:
        source = _copied(casts.graph, move, source)
    return casts.placed(source, value_of(cast).dtype, cast.meta[MARK], call)


def _copied(graph: fx.Graph, move: fx.Node, source: fx.Node) -> fx.Node:
    """`move` of `source` in `graph`."""
    made = graph.node_copy(move, lambda _: source)
    target: Any = move.target
    made.meta["val"] = target(value_of(source), *arguments(move)[1:], **move.kwargs)
    return made
