"""Who reads the logits besides the loss: the graph's outputs, which can be deferred, and argmaxes over the classes."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import fx

from fxopt.fake import arguments, bound_arguments, value_of
from fxopt.ops.products import accumulate_dtype
from fxopt.projection import (
    MOVES,
    POINTWISE,
    Move,
    Projection,
    check_moves,
    keeps_shape,
    moves_of,
    projection_of,
    reads_only,
)
from fxopt.rule import NoSite

aten = torch.ops.aten

_DETACH = frozenset({aten.detach.default})
"""Between logits and an argmax, which has no gradient, it does nothing."""


@dataclasses.dataclass(frozen=True)
class Argmax:
    """``logits.argmax(axis)``, or the indices of ``logits.max(axis)``.

    taken:  the node of the argmax or of the max.
    output: the node of the indices.
    """

    taken: fx.Node
    output: fx.Node

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """Its one or two nodes."""
        return tuple(dict.fromkeys((self.taken, self.output)))

    @property
    def keepdim(self) -> bool:
        """Whether the axis of the classes stays, with one element."""
        return bool(bound_arguments(self.taken)["keepdim"])

    @property
    def axis(self) -> int:
        """The axis it is taken along, counted from the front. Raises `NoSite` where it is taken of all elements."""
        dim = bound_arguments(self.taken)["dim"]
        if dim is None:
            raise NoSite(f"{self.taken.name} is the argmax of all logits together, not of each row's")
        return int(dim) % int(value_of(self.taken.args[0]).dim())

    def logits(self) -> Projection:
        """How what it is taken of comes from the linear layer. Raises `NoSite`."""
        source = self.taken.args[0]
        assert isinstance(source, fx.Node)
        return projection_of(source, _DETACH)

    def moves(self) -> tuple[Move, ...]:
        """From the linear layer's rows to those it gives the argmax of. Raises `NoSite`."""
        path = self.logits()
        moves, rank = moves_of(path.steps), value_of(path.linear).dim()
        check_moves(moves, rank, self.axis, self.taken.name)
        if not keeps_shape(moves, value_of(self.taken.args[0])):
            raise NoSite(f"{self.taken.name} reads logits in a shape whose sizes are known only at run time")
        return moves

    def check_values(self) -> None:
        """Check that what it is taken of is the linear layer's result, rounded no more than once. Raises `NoSite`.

        The larger of two numbers is the larger whatever they are scaled by, but an argmax is of the first of those that
        a rounding made equal. Steps in fp32 (fp64 for fp64) count as not rounding: they are computed in that by us.
        """
        path = self.logits()
        dtype = value_of(path.linear).dtype
        wide = accumulate_dtype(dtype)
        reason = f"which makes more of them equal: the first, which {self.taken.name} is to find, may be another"
        if path.added is not None and dtype != wide:
            raise NoSite(f"{path.added.name} adds the bias to logits in {dtype}, {reason}")
        for step in path.pointwise:
            result = value_of(step).dtype
            exact = torch.promote_types(dtype, result) == result if step.target is aten.to.dtype else result == wide
            if not exact:
                raise NoSite(f"{step.name} ({step.target}) rounds the logits to {result}, {reason}")
            dtype = result


def readers_of(found: Projection, inside: Collection[fx.Node]) -> tuple[list[fx.Node], list[Argmax]]:
    """Branches from `found` that end in graph outputs and argmaxes alone: all their nodes, and the argmaxes.

    inside: nodes of the loss, which are no branch.
    """
    nodes: dict[fx.Node, None] = {}
    argmaxes: dict[Argmax, None] = {}
    for node in found.nodes:
        for user in node.users:
            if user not in inside and user not in found.nodes and user.op != "output":
                branch, ends = _branch(node, user)
                nodes |= dict.fromkeys(branch)
                argmaxes |= dict.fromkeys(ends)
    return list(nodes), list(argmaxes)


def _branch(logits: fx.Node, node: fx.Node) -> tuple[list[fx.Node], list[Argmax]]:
    """`node`, which reads `logits`, and what follows from it, if all of it ends in outputs and argmaxes; else nothing.

    A detached output is not a branch: to defer it would be to differentiate it.
    """
    found, ends = list[fx.Node](), list[Argmax]()
    waiting = [(logits, node, False)]
    while waiting:
        source, step, detached = waiting.pop()
        if step.op == "output":
            if detached:
                return [], []
            continue
        end = _argmax(step)
        if end is not None:
            ends.append(end)
            found += end.nodes
            continue
        if step.target not in POINTWISE | MOVES | _DETACH or not reads_only(step, source) or not step.users:
            return [], []
        found.append(step)
        waiting += ((step, user, detached or step.target in _DETACH) for user in step.users)
    return found, ends


def _argmax(node: fx.Node) -> Argmax | None:
    """The argmax that `node` takes, if it takes one and nothing else."""
    if node.target is aten.argmax.default:
        return Argmax(node, node)
    if node.target is not aten.max.dim:
        return None
    items = [user for user in node.users if user.target is operator.getitem and arguments(user)[1] == 1]
    return Argmax(node, items[0]) if len(items) == len(node.users) == 1 else None


def is_deferrable(node: fx.Node) -> bool:
    """Whether the logits `node` are a graph output that can be computed from hidden states later, in its shape."""
    if not any(user.op == "output" for user in node.users):
        return False
    try:
        found = projection_of(node)
        check_moves(found.moves(), value_of(found.linear).dim(), -1)
    except NoSite:
        return False
    return keeps_shape(found.moves(), value_of(node))


def common_moves(ways: Collection[tuple[Move, ...]]) -> tuple[Move, ...]:
    """The moves with which all `ways` begin."""

    def shared() -> Iterator[Any]:
        for step in zip(*ways, strict=False):
            if len(set(step)) > 1:
                return
            yield step[0]

    return tuple(shared())
