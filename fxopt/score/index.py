"""Where an element of a rearranged tensor comes from: index arithmetic on terms, sizes constant or symbolic."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import sympy

from fxopt import compat
from fxopt.score.term import Term, apply, constant, load

Index = tuple[Term, ...]
Sizes = Sequence[Any]

ZERO, ONE = constant(0), constant(1)


class Unknown(Exception):
    """The place of an element cannot be said in terms of sizes and indices."""


def size_term(size: Any) -> Term:
    """A size as a term: a constant, or the load of a symbolic expression (which no program holds)."""
    known = compat.size_expression(size)
    return constant(known) if isinstance(known, int) else load(known, (), "int")


def same_size(one: Any, other: Any) -> bool:
    """Whether two sizes are equal for every value of their symbols; installs no guard."""
    return bool(sympy.expand(compat.size_expression(one) - compat.size_expression(other)) == 0)


def is_one(size: Any) -> bool:
    """Whether a size is the constant 1."""
    return type(size) is int and size == 1


class Indexer:
    """Index arithmetic where the variables are known to lie below `extents` (name of a variable -> size)."""

    def __init__(self, extents: Mapping[str, Any]):
        self.extents = {name: size_term(size) for name, size in extents.items()}

    def below(self, term: Term, bound: Term) -> bool:
        """Whether 0 <= `term` < `bound` is certain."""
        if term.op == "const":
            return bound.op == "const" and 0 <= term.value < bound.value
        limit = self.extents.get(term.op) or (term.args[1] if term.op == "mod" else None)
        if limit is None:
            return False
        return limit is bound or (limit.op == bound.op == "const" and limit.value <= bound.value)

    def join(self, index: Index, sizes: Sequence[Term]) -> Term:
        """The place of `index` in its axes' one long axis."""
        result = index[0]
        for term, size in zip(index[1:], sizes[1:], strict=True):
            if result.op == "floordiv" and term.op == "mod" and result.args == term.args and term.args[1] is size:
                result = result.args[0]
            else:
                result = apply("add", apply("mul", result, size), term)
        return result

    def split(self, place: Term, sizes: Sequence[Term]) -> Index:
        """The index of `place` along an axis that is cut into axes of `sizes`."""
        found: list[Term] = []
        for size in reversed(sizes[1:]):
            place, rest = self.divmod(place, size)
            found.append(rest)
        return (place, *reversed(found))

    def divmod(self, place: Term, size: Term) -> tuple[Term, Term]:
        """`place // size` and `place % size`, without the division where it can be seen through."""
        if self.below(place, size):
            return ZERO, place
        if size is ONE:
            return place, ZERO
        if place.op == "add":
            product, rest = place.args
            if product.op == "mul" and product.args[1] is size and self.below(rest, size):
                return product.args[0], rest
        if place.op == "mul" and place.args[1] is size:
            return place.args[0], ZERO
        return apply("floordiv", place, size), apply("mod", place, size)

    def reshaped(self, index: Index, result: Sizes, source: Sizes) -> Index:
        """The index in a tensor of shape `source` of what its reshape to `result` has at `index`.

        Raises `Unknown` where the two shapes cannot be matched axis by axis (symbolic sizes, or none at all).
        """
        wanted = [(term, size) for term, size in zip(index, result, strict=True) if not is_one(size)]
        kept = [size for size in source if not is_one(size)]
        found: list[Term] = []
        while wanted or kept:
            outer, inner = _group([size for _, size in wanted], kept)
            place = self.join(
                tuple(term for term, _ in wanted[:outer]), [size_term(size) for _, size in wanted[:outer]]
            )
            found += self.split(place, [size_term(size) for size in kept[:inner]])
            wanted, kept = wanted[outer:], kept[inner:]
        rest = iter(found)
        return tuple(ZERO if is_one(size) else next(rest) for size in source)


def _group(one: list[Any], other: list[Any]) -> tuple[int, int]:
    """How many leading axes of each side hold the same number of elements; as few as possible."""
    for total in range(2, len(one) + len(other) + 1):
        for first in range(max(1, total - len(other)), min(len(one), total - 1) + 1):
            if same_size(_product(one[:first]), _product(other[: total - first])):
                return first, total - first
    raise Unknown(f"shapes {one} and {other} do not match axis by axis")


def _product(sizes: list[Any]) -> Any:
    return reduce(operator.mul, map(compat.size_expression, sizes), 1)
