"""The two matrix products of attention: what they multiply, and how its axes lie."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from torch import Tensor, fx

from fxopt.compat import size_expression
from fxopt.fake import arguments, bound_arguments, value_of
from fxopt.score import calls
from fxopt.score.index import ZERO, Index, Unknown, is_one, same_size, size_term
from fxopt.score.reader import Reader
from fxopt.score.term import Term, constant, load, variable

B, H, Q, K = (variable(name) for name in "bhqk")
DEPTH, WIDTH = load("depth", (), "int"), load("width", (), "int")
"""Places along the head dimension of queries and keys, and along that of values."""

PRODUCTS = frozenset(("matmul", "bmm", "baddbmm", "einsum"))


@dataclasses.dataclass(frozen=True)
class Product:
    """An element of a matrix product: a sum over products of elements of `left` and `right`.

    left, right: the operands, each with the index of the element read there.
    factor:      what the sum is multiplied with; `added` is a node broadcast to the result and added, and its factor.
    """

    node: fx.Node
    left: tuple[fx.Node, Index]
    right: tuple[fx.Node, Index]
    factor: float = 1.0
    added: tuple[fx.Node, float] | None = None


def product_at(node: fx.Node, index: Index, summed: Term) -> Product:
    """The element of product `node` at `index`; `summed` stands for the axis that is summed over. Raises `Unknown`."""
    name = calls.name_of(node)
    if name == "einsum":
        return _einsum(node, index, summed)
    given = bound_arguments(node)
    if name == "baddbmm":
        alpha, beta = given["alpha"], given["beta"]
        left, right = given["batch1"], given["batch2"]
        if type(alpha) not in (int, float) or type(beta) not in (int, float):
            raise Unknown(f"{node.name} has factors known only at run time")
        found = _matmul(node, left, right, index, summed)
        return dataclasses.replace(found, factor=float(alpha), added=(given["self"], float(beta)) if beta else None)
    left, right = arguments(node)[:2]
    return _matmul(node, left, right, index, summed)


def _matmul(node: fx.Node, left: fx.Node, right: fx.Node, index: Index, summed: Term) -> Product:
    if min(value_of(left).dim(), value_of(right).dim()) < 2:
        raise Unknown(f"{node.name} ({node.target}) multiplies by a vector")
    *lead, row, column = index
    return Product(node, _operand(left, lead, (row, summed)), _operand(right, lead, (summed, column)))


def _operand(node: fx.Node, lead: list[Term], last: tuple[Term, Term]) -> tuple[fx.Node, Index]:
    sizes = value_of(node).shape[:-2]
    own = lead[len(lead) - len(sizes) :]
    return node, (*(ZERO if is_one(size) else term for term, size in zip(own, sizes, strict=True)), *last)


def _einsum(node: fx.Node, index: Index, summed: Term) -> Product:
    equation, tensors = arguments(node)[:2]
    letters = str(equation).replace(" ", "")
    if "->" not in letters or "." in letters or letters.count(",") != 1 or len(tensors) != 2:
        raise Unknown(f"{node.name} is an einsum of {equation!r}")
    sources, result = letters.split("->")
    places = dict(zip(result, index, strict=True))
    pair = sources.split(",")
    gone = {letter for source in pair for letter in source if letter not in result}
    if len(gone) != 1 or any(len(set(source)) != len(source) for source in pair):
        raise Unknown(f"{node.name} sums over {len(gone)} axes in {equation!r}")
    places[gone.pop()] = summed
    read = [(tensor, tuple(places[letter] for letter in source)) for tensor, source in zip(tensors, pair, strict=True)]
    return Product(node, read[0], read[1])


@dataclasses.dataclass(frozen=True)
class Operand:
    """A tensor with an axis for each of `axes`, each at most once: "b", "h", "row", "column"; "" for one of size 1.

    Heads may be two axes, "group" and "member". group: how many query heads share an entry of the "h" axis.
    """

    node: fx.Node
    axes: tuple[str, ...]
    group: int = 1

    def heads_of(self, heads: Any) -> Any:
        """How many heads it has where queries have `heads`."""
        if "member" in self.axes:
            return heads
        return heads // self.group if "h" in self.axes else 1

    def arrange(self, tensor: Tensor) -> Tensor:
        """`tensor`, the node's value, as [B or 1, heads or 1, rows, columns]."""
        for axis in reversed(range(len(self.axes))):
            if not self.axes[axis]:
                tensor = tensor.squeeze(axis)
        kept = [name for name in self.axes if name]
        order = [name for name in ("b", "h", "group", "member", "row", "column") if name in kept]
        if kept != order:
            tensor = tensor.permute([kept.index(name) for name in order])
        if "b" not in kept:
            tensor = tensor.unsqueeze(0)
        if "member" in kept:
            return tensor.flatten(1, 2)
        return tensor if "h" in kept else tensor.unsqueeze(1)


def operand(reader: Reader, node: fx.Node, index: Index, row: Term, column: Term) -> Operand:
    """Where the elements of a product's operand come from, as far back as its axes are axes of attention.

    Repeated heads and transposes are seen through. Raises `Unknown` where the operand itself has other axes.
    """
    found = None
    sizes = {**reader.indexer.extents, **_sizes(node, index, (row, column))}
    for source, place in _sources(reader, node, index):
        axes = _axes(source, place, row, column)
        if axes is not None and _has_sizes(axes, sizes, row, column):
            found = axes
    if found is None:
        raise Unknown(f"{node.name} is read at {list(index)}: its axes are not batch, head, position and depth")
    return found


def _sizes(node: fx.Node, index: Index, terms: tuple[Term, Term]) -> dict[Any, Term]:
    """Along which size each of `terms` runs in the operand itself."""
    shape = value_of(node).shape
    return {term: size_term(size) for term, size in zip(index, shape, strict=True) if term in terms}


def _has_sizes(found: Operand, sizes: dict[Any, Term], row: Term, column: Term) -> bool:
    """Whether every axis is as long as what runs along it: a slice from the start has the same index and is not."""
    heads = sizes["h"]
    if found.group > 1:
        heads = constant(heads.value // found.group) if type(heads.value) is int else heads
    wanted = {"b": sizes["b"], "h": heads, "group": heads, "row": sizes.get(row), "column": sizes.get(column)}
    wanted["member"] = constant(found.group)
    return all(
        not name or wanted[name] is size_term(size)
        for name, size in zip(found.axes, value_of(found.node).shape, strict=True)
    )


def _sources(reader: Reader, node: fx.Node, index: Index) -> Iterator[tuple[fx.Node, Index]]:
    """`node`, and the nodes whose elements it rearranges, one behind the other."""
    step: tuple[fx.Node, Index] | None = (node, index)
    while step is not None:
        yield step
        step = reader.source(*step)


def _axes(node: fx.Node, index: Index, row: Term, column: Term) -> Operand | None:
    names: list[str] = []
    group = 1
    for term, size in zip(index, value_of(node).shape, strict=True):
        if term is ZERO and is_one(size):
            names.append("")
        elif term in (B, row, column, H):
            names.append({B: "b", row: "row", column: "column", H: "h"}[term])
        elif term.op in ("floordiv", "mod") and term.args[0] is H and type(term.args[1].value) is int:
            names.append("group" if term.op == "floordiv" else "member")
            group = term.args[1].value
        else:
            return None
    if "member" not in names:
        names = ["h" if name == "group" else name for name in names]
    present = [name for name in names if name]
    alone = "member" in names and "group" not in names
    if alone or len(set(present)) != len(present) or not {"row", "column"} <= set(present):
        return None
    return Operand(node, tuple(names), group)


def heads_of_flat(nodes: list[fx.Node], size: Any) -> tuple[Any, Any]:
    """Batch and head sizes of tensors [B * H, rows, columns], from a reshape that made or unmakes one of `nodes`.

    (size, 1) where nothing says that the first axis was ever two.
    """
    for node in nodes:
        for other in (*_back(node), *node.users):
            if calls.name_of(other) not in calls.RESHAPES:
                continue
            for tensor in (other.args[0], other):
                shape = value_of(tensor).shape
                leading = [size_expression(item) for item in shape[:2]]
                if len(shape) == 4 and same_size(leading[0] * leading[1], size):
                    return shape[0], shape[1]
    return size, 1


def _back(node: fx.Node) -> Iterator[fx.Node]:
    """`node` and up to 4 nodes behind it, each the first argument of the one before."""
    for _ in range(5):
        yield node
        first = node.args[0] if node.args else None
        if not isinstance(first, fx.Node):
            return
        node = first
