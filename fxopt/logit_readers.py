"""Who reads the logits besides the loss: the graph's outputs, which can be deferred, and values of each row.

The latter are the argmax and the logsumexp over the classes, which one pass gives together with the loss.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Collection, Iterator
from typing import Any, ClassVar

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
"""Between logits and a value of each row it changes nothing but that the value has no gradient."""


@dataclasses.dataclass(frozen=True)
class Reader:
    """A value of each row of logits besides the loss.

    taken:  the node that reads the logits, and reduces the axis of the classes.
    output: the node of the value.
    """

    taken: fx.Node
    output: fx.Node
    name: ClassVar[str] = ""

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
        """The axis that is reduced, counted from the front. Raises `NoSite` where it is not one."""
        raise NotImplementedError

    def logits(self) -> Projection:
        """How what it is taken of comes from the linear layer. Raises `NoSite`."""
        source = self.taken.args[0]
        assert isinstance(source, fx.Node)
        return projection_of(source, _DETACH)

    @property
    def detached(self) -> bool:
        """Whether no gradient goes from it to the logits."""
        return any(step.target in _DETACH for step in self.logits().steps)

    def moves(self) -> tuple[Move, ...]:
        """From the linear layer's rows to those it gives the value of. Raises `NoSite`."""
        path = self.logits()
        moves, rank = moves_of(path.steps), value_of(path.linear).dim()
        check_moves(moves, rank, self.axis, self.taken.name)
        if not keeps_shape(moves, value_of(self.taken.args[0])):
            raise NoSite(f"{self.taken.name} reads logits in a shape whose sizes are known only at run time")
        return moves


class LogSumExp(Reader):
    """``logits.logsumexp(axis)``, of which a z-loss is made."""

    name = "logsumexp"

    @property
    def axis(self) -> int:
        """As `Reader.axis`."""
        dims = bound_arguments(self.taken)["dim"]
        if len(dims) != 1:
            raise NoSite(f"{self.taken.name} sums over {len(dims)} axes, not over each row's classes")
        return int(dims[0]) % int(value_of(self.taken.args[0]).dim())


class Argmax(Reader):
    """``logits.argmax(axis)``, or the indices of ``logits.max(axis)``."""

    name = "argmax"

    @property
    def axis(self) -> int:
        """As `Reader.axis`."""
        dim = bound_arguments(self.taken)["dim"]
        if dim is None:
            raise NoSite(f"{self.taken.name} is the argmax of all logits together, not of each row's")
        return int(dim) % int(value_of(self.taken.args[0]).dim())

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


def readers_of(found: Projection, inside: Collection[fx.Node]) -> tuple[list[fx.Node], list[Reader]]:
    """Branches from `found` that end in graph outputs and values of rows alone: all their nodes, and the values.

    inside: nodes of the loss, which are no branch.
    """
    nodes: dict[fx.Node, None] = {}
    readers: dict[Reader, None] = {}
    for node in found.nodes:
        for user in node.users:
            if user not in inside and user not in found.nodes and user.op != "output":
                branch, ends = _branch(node, user)
                nodes |= dict.fromkeys(branch)
                readers |= dict.fromkeys(ends)
    return list(nodes), list(readers)


def _branch(logits: fx.Node, node: fx.Node) -> tuple[list[fx.Node], list[Reader]]:
    """`node`, which reads `logits`, and what follows from it, if all of it ends in outputs and `Reader`s; else nothing.

    A detached output is not a branch: to defer it would be to differentiate it.
    """
    found, ends = list[fx.Node](), list[Reader]()
    waiting = [(logits, node, False)]
    while waiting:
        source, step, detached = waiting.pop()
        if step.op == "output":
            if detached:
                return [], []
            continue
        end = _reader(step)
        if end is not None:
            ends.append(end)
            found += end.nodes
            continue
        if step.target not in POINTWISE | MOVES | _DETACH or not reads_only(step, source) or not step.users:
            return [], []
        found.append(step)
        waiting += ((step, user, detached or step.target in _DETACH) for user in step.users)
    return found, ends


def _reader(node: fx.Node) -> Reader | None:
    """The value that `node` takes of each row, if it takes one and nothing else."""
    if node.target is aten.argmax.default:
        return Argmax(node, node)
    if node.target is aten.logsumexp.default:
        return LogSumExp(node, node)
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
