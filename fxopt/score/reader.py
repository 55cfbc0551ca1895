"""Read a graph as a function of indices: what a tensor holds at (b, h, q, k), as far back as that can be said.

Index propagation, as compilers of loops do it: an element of `transpose(x)` is an element of x elsewhere, an element of
`a + b` the sum of an element of each, an element of `arange(n)` its index. Whatever cannot be read further (a graph
input, a linear layer, a tensor that is written in place) is a load of the node's own tensor.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fxopt.effects import mutated_storages, storage_of
from fxopt.fake import arguments, bound_arguments, value_of
from fxopt.score import calls
from fxopt.score.index import ONE, ZERO, Index, Indexer, Unknown, is_one, size_term
from fxopt.score.origins import Origins
from fxopt.score.term import Kind, Term, apply, cast_to, constant, load

__all__ = ["OUTSIDE", "Reader", "Unknown", "kind_of", "written_in"]

OUTSIDE = "outside"
"""Under this name the engine notes in a body's placeholder the node that its caller passes."""

_WRITTEN: weakref.WeakKeyDictionary[fx.Graph, tuple[int, frozenset[Any]]] = weakref.WeakKeyDictionary()


def written_in(graph: fx.Graph) -> frozenset[Any]:
    """The storages that some node of `graph` writes to; looked up once while its number of nodes stays."""
    count, found = _WRITTEN.get(graph, (-1, frozenset()))
    if count != len(graph.nodes):
        found = frozenset(mutated_storages(graph))
        _WRITTEN[graph] = len(graph.nodes), found
    return found


def kind_of(dtype: torch.dtype) -> Kind:
    """The type of a term that holds an element of `dtype`. Raises `Unknown` for complex and quantised dtypes."""
    if dtype == torch.bool:
        return "bool"
    if dtype.is_floating_point:
        return "float"
    if dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        return "int"
    raise Unknown(f"elements of {dtype} have no place in a score program")


class Reader:
    """Reads elements of the nodes of one graph.

    extents: variable -> size of its axis.
    mutated: storages that some node of the graph writes to (`written_in`): what reads them is not read through, since
             its value depends on when.
    opaque:  nodes that are not read through, besides those no handler knows.

    `origins` says of every term that was read, and of what its index became on the way, which node it is of.
    """

    def __init__(self, extents: Mapping[str, Any], mutated: Iterable[Any] = (), opaque: Iterable[fx.Node] = ()):
        self.indexer = Indexer(extents)
        self.mutated = frozenset(mutated) - {None}
        self.opaque = frozenset(opaque)
        self.origins = Origins[fx.Node]()
        self._memo: dict[tuple[fx.Node, Index], Term] = {}

    def at(self, node: Any, index: Index) -> Term:
        """The element of `node` at `index`, a term an axis; a number is itself. Raises `Unknown`."""
        if not isinstance(node, fx.Node):
            return _number(node)
        value = value_of(node)
        if not isinstance(value, Tensor):
            return _number(value)
        if (node, index) not in self._memo:
            self._memo[node, index] = term = self._read(node, index)
            if node.op == "call_function":  # a graph's input has no line of its own: that of who reads it says more
                self.origins.note(term, node)
        return self._memo[node, index]

    def broadcast(self, node: Any, index: Index) -> Term:
        """The element that `node`, broadcast to the rank of `index`, has there."""
        value = value_of(node)
        if not isinstance(value, Tensor):
            return _number(value)
        own = index[len(index) - value.dim() :]
        return self.at(node, tuple(ZERO if is_one(size) else term for size, term in zip(value.shape, own, strict=True)))

    def source(self, node: fx.Node, index: Index) -> tuple[fx.Node, Index] | None:
        """If `node` only rearranges another node's elements: that node, and where in it the element is."""
        handler = VIEWS.get(calls.name_of(node))
        if handler is None or self._stops(node):
            return None
        try:
            return handler(self, node, index)
        except Unknown:
            return None

    def _read(self, node: fx.Node, index: Index) -> Term:
        if node in self.opaque or self._stops(node):
            return _load(node, index)
        if node.op == "placeholder" and isinstance(node.meta.get(OUTSIDE), fx.Node):
            return self._read_outside(node, index)
        moved = self.source(node, index)
        if moved is not None:
            for place in moved[1]:
                self.origins.note(place, node)
            return self.at(*moved)
        handler = _VALUES.get(calls.name_of(node))
        if handler is None:
            return _load(node, index)
        try:
            return cast_to(kind_of(value_of(node).dtype), handler(self, node, index))
        except Unknown:
            return _load(node, index)

    def _read_outside(self, node: fx.Node, index: Index) -> Term:
        """An argument of a checkpointed body, read in the graph around it; only what needs no tensor from there."""
        outside = node.meta[OUTSIDE]
        found = Reader({}, written_in(outside.graph))
        found.indexer, found.origins = self.indexer, self.origins
        term = found.at(outside, index)
        return _load(node, index) if any(item.op == "load" for item in term.walk()) else term

    def _stops(self, node: fx.Node) -> bool:
        """Whether `node` must be read as it is: what it reads or is may be written to, or no gradient goes through."""
        inputs = [value for value in map(value_of, node.all_input_nodes) if isinstance(value, Tensor)]
        value = value_of(node)
        if any(storage_of(item) in self.mutated for item in (value, *inputs)):
            return True
        cut = isinstance(value, Tensor) and value.dtype.is_floating_point and not value.requires_grad
        return cut and any(item.requires_grad for item in inputs)


def _number(value: Any) -> Term:
    if isinstance(value, torch.SymInt):
        return size_term(value)
    if type(value) in (bool, int, float):
        return constant(value)
    raise Unknown(f"{value!r} is no number")


def _load(node: fx.Node, index: Index) -> Term:
    return load(node, index, kind_of(value_of(node).dtype))


# --- nodes that only rearrange: the node behind, and the index in it ---------------------------------------------


def _same(reader: Reader, node: fx.Node, index: Index) -> tuple[fx.Node, Index]:
    return arguments(node)[0], index


def _reshape(reader: Reader, node: fx.Node, index: Index) -> tuple[fx.Node, Index]:
    source = arguments(node)[0]
    return source, reader.indexer.reshaped(index, value_of(node).shape, value_of(source).shape)


def _permute(reader: Reader, node: fx.Node, index: Index) -> tuple[fx.Node, Index]:
    found = list(index)
    for term, axis in zip(index, calls.axes_of_permutation(node), strict=True):
        found[axis] = term
    return arguments(node)[0], tuple(found)


def _expand(reader: Reader, node: fx.Node, index: Index) -> tuple[fx.Node, Index]:
    source = arguments(node)[0]
    shape = value_of(source).shape
    own = index[len(index) - len(shape) :]
    return source, tuple(ZERO if is_one(size) else term for size, term in zip(shape, own, strict=True))


def _select(reader: Reader, node: fx.Node, index: Index) -> tuple[fx.Node, Index]:
    source, dim, at = arguments(node)
    shape = value_of(source).shape
    if type(at) is not int:
        raise Unknown(f"{node.name} selects what is known only at run time")
    term = constant(at) if at >= 0 else apply("add", size_term(shape[dim]), constant(at))
    dim %= len(shape)
    return source, (*index[:dim], term, *index[dim:])


def _slice(reader: Reader, node: fx.Node, index: Index) -> tuple[fx.Node, Index]:
    source, dim, start, _, step = (bound_arguments(node)[name] for name in ("self", "dim", "start", "end", "step"))
    return source, _shifted(node, index, dim, start or 0, step)


def _narrow(reader: Reader, node: fx.Node, index: Index) -> tuple[fx.Node, Index]:
    source, dim, start, _ = arguments(node)
    return source, _shifted(node, index, dim, start, 1)


def _shifted(node: fx.Node, index: Index, dim: int, start: Any, step: Any) -> Index:
    if type(start) is not int or type(step) is not int:
        raise Unknown(f"{node.name} has bounds known only at run time")
    size = value_of(node.args[0]).shape[dim]
    if start < 0 and type(size) is not int:
        raise Unknown(f"{node.name} counts from an end known only at run time")
    start = max(start + size, 0) if start < 0 else start
    dim %= len(index)
    return *index[:dim], apply("add", apply("mul", index[dim], constant(step)), constant(start)), *index[dim + 1 :]


def _piece(reader: Reader, node: fx.Node, index: Index) -> tuple[fx.Node, Index]:
    """An item of a chunk, split or unbind, or of a tuple that Dynamo built."""
    source, which = node.args
    if isinstance(source, list | tuple):
        return source[which], index  # type: ignore[index, return-value]
    name = calls.name_of(source)
    if not isinstance(source, fx.Node) or name not in ("chunk", "split", "split_with_sizes", "unbind"):
        raise Unknown(f"{node.name} takes an item of {source}")
    given = bound_arguments(source)
    tensor, dim = given["self"], given["dim"] % value_of(given["self"]).dim()
    if name == "unbind":
        return tensor, (*index[:dim], _number(which), *index[dim:])
    before = [value.shape[dim] for value in value_of(source)[:which]]
    if any(type(size) is not int for size in before):
        raise Unknown(f"{source.name} has pieces of sizes known only at run time")
    return tensor, (*index[:dim], apply("add", index[dim], constant(sum(before))), *index[dim + 1 :])


def _repeat_interleave(reader: Reader, node: fx.Node, index: Index) -> tuple[fx.Node, Index]:
    given = bound_arguments(node)
    if given.get("dim") is None or type(given["repeats"]) is not int:
        raise Unknown(f"{node.name} repeats all axes, or how often is known only at run time")
    dim = given["dim"] % len(index)
    place, _ = reader.indexer.divmod(index[dim], constant(given["repeats"]))
    return given["self"], (*index[:dim], place, *index[dim + 1 :])


def _repeat(reader: Reader, node: fx.Node, index: Index) -> tuple[fx.Node, Index]:
    source = arguments(node)[0]
    shape = value_of(source).shape
    own = zip(index[len(index) - len(shape) :], shape, strict=True)
    return source, tuple(
        ZERO if is_one(size) else reader.indexer.divmod(term, size_term(size))[1] for term, size in own
    )


def _cat(reader: Reader, node: fx.Node, index: Index) -> tuple[fx.Node, Index]:
    """The piece in which the index lies, where that is certain."""
    tensors, dim = bound_arguments(node)["tensors"], bound_arguments(node)["dim"] % len(index)
    place = index[dim]
    for tensor in tensors:
        if value_of(tensor).dim() != len(index):
            continue  # torch.cat passes over an empty tensor of one axis
        size = size_term(value_of(tensor).shape[dim])
        if reader.indexer.below(place, size):
            return tensor, (*index[:dim], place, *index[dim + 1 :])
        if place is not size and not (place.op == size.op == "const" and place.value >= size.value):
            break
        place = ZERO if place is size else apply("sub", place, size)
    raise Unknown(f"{node.name} joins tensors, and which one is read depends on the index")


VIEWS: dict[str, Callable[[Reader, fx.Node, Index], tuple[fx.Node, Index]]] = {
    **dict.fromkeys(("alias", "contiguous", "clone", "detach", "lift_fresh_copy"), _same),
    **dict.fromkeys(calls.RESHAPES, _reshape),
    **dict.fromkeys(("transpose", "permute", "t", "mT", "numpy_T", "movedim", "swapaxes", "swapdims"), _permute),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), _expand),
    "select": _select,
    "slice": _slice,
    "narrow": _narrow,
    "getitem": _piece,
    "repeat_interleave": _repeat_interleave,
    "repeat": _repeat,
    "cat": _cat,
}
"""Operators that rearrange elements, or copy them."""


# --- nodes that compute an element from elements, or from the index ----------------------------------------------


def _arange(reader: Reader, node: fx.Node, index: Index) -> Term:
    given = bound_arguments(node)
    start, step = _number(value_of(given.get("start", 0))), _number(value_of(given.get("step", 1)))
    return apply("add", apply("mul", index[0], step), start)


def _filled(reader: Reader, node: fx.Node, index: Index) -> Term:
    name = calls.name_of(node)
    if "full" in name or name == "scalar_tensor":
        given = bound_arguments(node)
        return _number(value_of(given.get("fill_value", given.get("s"))))
    return ONE if "ones" in name else ZERO


def _triangle(reader: Reader, node: fx.Node, index: Index) -> Term:
    source, diagonal = bound_arguments(node)["self"], bound_arguments(node)["diagonal"]
    limit = apply("add", index[-2], _number(value_of(diagonal)))
    kept = apply("le" if calls.name_of(node) == "tril" else "ge", index[-1], limit)
    inside = reader.at(source, index)
    return apply("where", kept, inside, cast_to(inside.kind, ZERO))


def _where(reader: Reader, node: fx.Node, index: Index) -> Term:
    return apply("where", *(reader.broadcast(item, index) for item in node.args))


def _masked_fill(reader: Reader, node: fx.Node, index: Index) -> Term:
    source, mask, value = (reader.broadcast(item, index) for item in node.args)
    return apply("where", mask, cast_to(source.kind, value), source)


def _cast(reader: Reader, node: fx.Node, index: Index) -> Term:
    """A cast between floats is none: a program computes in one float dtype, at least as wide."""
    return cast_to(kind_of(value_of(node).dtype), reader.at(arguments(node)[0], index))


def _index(reader: Reader, node: fx.Node, index: Index) -> Term:
    """``x[i, j]`` with index tensors on leading axes: an element of x at the elements of the index tensors."""
    source, given = arguments(node)
    indices = list(given)
    if any(item is None for item in indices[: max(i for i, item in enumerate(indices) if item is not None)]):
        raise Unknown(f"{node.name} indexes axes that are not the first ones")
    chosen = [item for item in indices if item is not None]
    if any(value_of(item).dtype == torch.bool for item in chosen):
        raise Unknown(f"{node.name} indexes by a mask")
    rank = len(index) - (value_of(source).dim() - len(chosen))
    places = [reader.broadcast(item, index[:rank]) for item in chosen]
    sizes = value_of(source).shape[: len(chosen)]
    for place, size in zip(places, sizes, strict=True):
        _must_lie_inside(reader, node, place, size)
    return reader.at(source, (*places, *index[rank:]))


def _must_lie_inside(reader: Reader, node: fx.Node, place: Term, size: Any) -> None:
    """A negative index counts from the end, and one that is too large raises: neither may happen unseen."""
    if is_one(size) and place is ZERO:
        return
    if not reader.indexer.below(place, size_term(size)):
        raise Unknown(f"{node.name} indexes an axis of {size} by {place}, which may lie outside")


def _cumsum(reader: Reader, node: fx.Node, index: Index) -> Term:
    """Of a constant c: c times how many were summed."""
    source, dim = bound_arguments(node)["self"], bound_arguments(node)["dim"]
    summed = cast_to("int", reader.at(source, index))
    if summed.op != "const" or value_of(node).dtype.is_floating_point:
        raise Unknown(f"{node.name} sums what depends on the index")
    return apply("mul", apply("add", index[dim], ONE), summed)


def _diff(reader: Reader, node: fx.Node, index: Index) -> Term:
    """First difference with one element put before: constant where the input is a line that the element continues."""
    given = bound_arguments(node)
    source, before = given["self"], given["prepend"]
    dim = given["dim"] % len(index)
    plain = given["n"] == 1 and given["append"] is None and isinstance(before, fx.Node)
    if not plain or not is_one(value_of(before).shape[dim]):
        raise Unknown(f"{node.name} is no first difference with one element before")

    def along(term: Term) -> Index:
        return *index[:dim], term, *index[dim + 1 :]

    slope = calls.difference(reader.at(source, index), reader.at(source, along(apply("sub", index[dim], ONE))))
    first = calls.difference(reader.at(source, along(ZERO)), reader.at(before, along(ZERO)))
    if slope.op != "const" or slope is not first:
        raise Unknown(f"{node.name} has differences that depend on the index")
    return slope


def _pad(reader: Reader, node: fx.Node, index: Index) -> Term:
    """Nothing is read through a pad that adds elements; one that adds none is the source."""
    if all(type(width) is int and width == 0 for width in arguments(node)[1]):
        return reader.at(arguments(node)[0], index)
    raise Unknown(f"{node.name} pads")


def _elementwise(reader: Reader, node: fx.Node, index: Index) -> Term:
    """An operator on elements, alpha of add and sub included."""
    op, operands = calls.elementwise(node)
    return apply(op, *(reader.broadcast(item, index) if isinstance(item, fx.Node) else _scaled(reader, item, index)
                       for item in operands))  # fmt: skip


def _scaled(reader: Reader, item: Any, index: Index) -> Term:
    if isinstance(item, calls.Times):
        return apply("mul", reader.broadcast(item.node, index), constant(item.factor))
    return _number(item)


def _clamp(reader: Reader, node: fx.Node, index: Index) -> Term:
    given = bound_arguments(node)
    result = reader.at(given["self"], index)
    for op, name in (("max", "min"), ("min", "max")):
        if given.get(name) is not None:
            result = apply(op, result, reader.broadcast(given[name], index))
    return result


_VALUES: dict[str, Callable[[Reader, fx.Node, Index], Term]] = {
    "arange": _arange,
    **dict.fromkeys(calls.FILLED, _filled),
    **dict.fromkeys(("tril", "triu"), _triangle),
    "where": _where,
    "masked_fill": _masked_fill,
    **dict.fromkeys(("to", "type_as", "_to_copy"), _cast),
    "index": _index,
    "cumsum": _cumsum,
    "diff": _diff,
    **dict.fromkeys(("pad", "constant_pad_nd"), _pad),
    **dict.fromkeys(("clamp", "clamp_min", "clamp_max"), _clamp),
    **dict.fromkeys(calls.ELEMENTWISE, _elementwise),
}
