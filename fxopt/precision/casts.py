"""Casts as nodes of a graph that is being built: one a tensor and dtype, none that is exact to leave out, each with its
reason, and each where the tensor is smallest.

Autograd sums the gradients of a cast's readers in 16 bits, and autocast, which casts activations anew for each reader,
in fp32. A cast of an activation therefore serves `READERS` of them at most.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxopt import compat
from fxopt.effects import storages_of
from fxopt.fake import arguments, bound_arguments, value_of
from fxopt.rule import Place, provenance_of

__all__ = ["MARK", "VIEWS", "Cast", "Casts", "casts_of", "dtype_name", "is_float", "is_made"]

aten = torch.ops.aten

MARK = "cast"
"""The key in a node's meta that says it is a cast of ours, with the reason."""

VIEWS = frozenset(
    {
        aten.alias.default, aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.flatten.using_ints,
        aten.unflatten.int, aten.transpose.int, aten.permute.default, aten.t.default, aten.mT.default,
        aten.expand.default, aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims,
        aten.movedim.int, aten.swapaxes.default,
    }
)  # fmt: skip
READERS = 3
"""Of one cast of an activation that requires grad: the three projections of an attention layer. The error of its
gradient would grow with their number (``bench/precision.py --part readers``)."""
_COPIES = frozenset({aten.contiguous.default, aten.clone.default, aten.reshape.default})
"""Movements that may copy: a cast goes above one only if nobody else reads it, or the copy would be made twice."""
_REPEATS = frozenset(
    {
        aten.repeat.default, aten.tile.default, aten.repeat_interleave.self_int, aten.index.Tensor,
        aten.index_select.default, aten.gather.default, aten.pad.default, aten.constant_pad_nd.default,
    }
)  # fmt: skip
"""Copies that may repeat numbers. Where gradients come back, a cast stays below: they are summed over the repeats."""


@dataclass(frozen=True)
class Cast:
    """One cast in the finished graph.

    node:   its name; source: the name of what is cast.
    before, after: the dtypes ("float32", "bfloat16").
    bytes:  of the result.
    reason: why it is there. readers: how many nodes read it.
    place:  where in the user's code what is cast was made; an input's is where it is first read.
    """

    node: str
    source: str
    before: str
    after: str
    bytes: int
    reason: str
    readers: int
    place: Place


def is_float(value: Any) -> bool:
    """Whether `value` is a tensor of fp32, bf16 or fp16: fp64, complex and integer tensors are left alone."""
    return isinstance(value, torch.Tensor) and value.dtype in (torch.float32, torch.bfloat16, torch.float16)


def is_exact(before: torch.dtype, after: torch.dtype) -> bool:
    """Whether every number of `before` is one of `after`."""
    return before == after or (before != torch.float32 and after == torch.float32)


def dtype_name(dtype: torch.dtype) -> str:
    """ "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def size_of(value: torch.Tensor, dtype: torch.dtype) -> int:
    """Bytes of `value` in `dtype`: symbolic sizes by their hints, 0 where a size depends on data and has none."""
    return math.prod(compat.size_hint(size) or 0 for size in value.shape) * dtype.itemsize


class Casts:
    """Makes the casts of one `graph`, to which nodes are appended in order.

    written: storages that some node writes to; what lies there is cast anew at each use, where it is used.
    once:    nodes of `graph` that have one reader; leaves: parameters, whose gradients autocast too sums in 16 bits,
             for it casts them once. Whoever builds it adds to both.
    """

    def __init__(self, graph: fx.Graph, written: Collection[Any]):
        self.graph, self.written = graph, written
        self.once: set[fx.Node] = set()
        self.leaves: set[fx.Node] = set()
        self.made: dict[Any, fx.Node] = {}
        self.asked: list[tuple[fx.Node, torch.dtype]] = []
        self.moves: dict[fx.Node, fx.Node] = {}
        self.readers = Counter[fx.Node]()

    def to(self, node: fx.Node, dtype: torch.dtype, reason: str, reader: fx.Node) -> fx.Node:
        """`node` in `dtype`, for `reader`, a node of the graph as it was."""
        if value_of(node).dtype == dtype:
            return node
        source = self.before_widening(node, dtype)
        if source is not None:
            self.readers[node] += 1
            return source
        self.asked.append((node, dtype))
        found = self.placed(node, dtype, reason, reader)
        self.readers[self.moves.get(found, found)] += 1
        return found

    def is_full(self, made: fx.Node) -> bool:
        """Whether `made`, a cast or a movement of one, has as many readers as may have their gradients summed there."""
        cast = self.moves.get(made, made)
        if self.readers[cast] < READERS or arguments(cast)[0] in self.leaves:
            return False
        return bool(value_of(cast).requires_grad)

    def spare(self, node: fx.Node, dtype: torch.dtype) -> None:
        """Count a cast that autocast would make of `node`, and this graph does without."""
        self.asked.append((node, dtype))

    def before_widening(self, node: fx.Node, dtype: torch.dtype) -> fx.Node | None:
        """What `node` widened, if that has `dtype`: the pair of casts changes nothing, nor does its derivative."""
        if node.target is not aten.to.dtype or len(node.args) != 2 or node.kwargs or self.is_full(node):
            return None
        source: Any = node.args[0]
        before = value_of(source).dtype
        exact = before == dtype and is_exact(before, value_of(node).dtype)
        return source if exact and self.is_same(source, node) else None

    def is_same(self, source: fx.Node, node: fx.Node) -> bool:
        """Whether a reader of `node` may read what `source` is made into: nothing writes to it in between, and
        gradients that would be stopped on the way (`no_grad`) are not let through."""
        written = not (storages_of(value_of(source)) | storages_of(value_of(node))).isdisjoint(self.written)
        stopped = value_of(source).requires_grad and not _grad_mode(node)  # a view of it says that it requires grad
        return not written and not stopped and value_of(source).requires_grad == value_of(node).requires_grad

    def placed(self, node: fx.Node, dtype: torch.dtype, reason: str, reader: fx.Node) -> fx.Node:
        """A cast of `node`, or the movement `node` of a cast of what it moves."""
        if value_of(node).dtype == dtype:
            return node
        key = node, dtype, _grad_mode(reader)
        if not storages_of(value_of(node)).isdisjoint(self.written):
            return self.cast(node, dtype, reason, reader)
        if key not in self.made or self.is_full(self.made[key]):
            if self.goes_above(node):
                moved: Any = node.args[0]
                before = self.before_widening(moved, dtype)
                source = before or self.placed(moved, dtype, reason, reader)
                made = self.made[key] = self.moved(node, source)
                self.moves[made] = moved if before else self.moves.get(source, source)
            else:
                self.made[key] = self.cast(node, dtype, reason, reader)
        return self.made[key]

    def goes_above(self, node: fx.Node) -> bool:
        """Whether `node` moves a tensor that is no larger, so that casting that costs no more and may serve others."""
        copies = node.target in _COPIES or self.repeats(node)
        if (not copies and node.target not in VIEWS) or (copies and node not in self.once):
            return False
        source, result = value_of(node.args[0]), value_of(node)
        if not is_float(source) or source.dtype != result.dtype or not self.is_same(arguments(node)[0], node):
            return False
        return size_of(source, source.dtype) <= size_of(result, source.dtype)

    def repeats(self, node: fx.Node) -> bool:
        """Whether `node` copies numbers of a tensor that gets no gradient, and puts none but zeros among them."""
        if node.target not in _REPEATS or value_of(node).requires_grad:
            return False
        given = bound_arguments(node)
        indices = [value_of(one) for one in given.get("indices") or () if one is not None]
        sized = all(one.dtype not in (torch.bool, torch.uint8) for one in indices)  # a mask's result is sized by data
        return sized and not given.get("value") and given.get("mode", "constant") == "constant"

    def cast(self, node: fx.Node, dtype: torch.dtype, reason: str, reader: fx.Node) -> fx.Node:
        name = f"{node.name}_{dtype_name(dtype)}"
        made = self.graph.create_node("call_function", aten.to.dtype, (node, dtype), name=name)
        # Where the value was made, as the report says of everything; inputs and weights were not made in the graph.
        place = provenance_of(reader if node.op in ("placeholder", "get_attr") else node)
        with torch.set_grad_enabled(_grad_mode(reader)):
            value = value_of(node).to(dtype)
        made.meta.update(place, grad=_grad_mode(reader), val=value, **{MARK: reason})
        return made

    def moved(self, node: fx.Node, source: fx.Node) -> fx.Node:
        made = self.graph.node_copy(node, lambda one: source if one is node.args[0] else one)
        with torch.set_grad_enabled(node.meta.get("grad", True)):
            made.meta["val"] = value_of(node).to(value_of(source).dtype)
        return made

    def bytes_one_by_one(self) -> tuple[int, int]:
        """Number and bytes of the casts asked for or spared, if each use had its own, but a parameter one for all.

        That is what autocast does (its cache holds casts of leaves that want gradients) to a graph of these dtypes.
        """
        cached: set[tuple[fx.Node, torch.dtype]] = set()
        count = total = 0
        for node, dtype in self.asked:
            if node in self.leaves:
                if (node, dtype) in cached:
                    continue
                cached.add((node, dtype))
            count, total = count + 1, total + size_of(value_of(node), dtype)
        return count, total


def _grad_mode(reader: fx.Node) -> bool:
    """The grad mode in which `reader` is computed; the output node, which computes nothing, has none of its own."""
    return bool(reader.meta.get("grad", True))


def is_made(node: fx.Node) -> bool:
    """Whether `node` is a cast of ours, that is of ``options={"precision": ...}``."""
    return MARK in node.meta


def casts_of(graph: fx.Graph) -> Iterator[Cast]:
    """The casts of ours that a finished, propagated graph holds."""
    for node in graph.nodes:
        if is_made(node):
            source: Any = node.args[0]
            before, after = value_of(source), value_of(node)
            yield Cast(
                node.name, source.name, dtype_name(before.dtype), dtype_name(after.dtype), size_of(after, after.dtype),
                node.meta[MARK], len(node.users), Place.of(node),
            )  # fmt: skip
