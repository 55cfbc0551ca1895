"""Random score programs with tensors to capture, as hypothesis strategies.

Tame programs are finite wherever they are evaluated, as are their derivatives, and jump only where integers do: fp32,
fp64 and kernels agree about them to rounding. Others take infinities and NaN in their stride; their jumps in floats
are at values that every correct evaluation rounds alike (sums, products, quotients, roots, but no exponentials).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from fxopt.score.program import Program
from fxopt.score.term import Kind, Term, apply, cast_to, constant, load, variable

Sizes = tuple[int, int, int, int]
"""How many batch rows, heads, queries and keys there are."""

NUMBERS = (0.0, 1.0, -1.0, 2.0, 0.5, -0.125, 3.0, 0.1, -2.75, 50.0)
WILD_NUMBERS = (float("inf"), float("-inf"), float("nan"), -0.0, -3.4028234663852886e38, 1e-30, 1e300)


@dataclasses.dataclass(frozen=True)
class Captured:
    """A tensor, and the load of it that is valid wherever there are `Sizes` of scores."""

    tensor: Tensor
    load: Term


@st.composite
def terms(draw: st.DrawFn, kind: Kind = "float", loads: Sequence[Term] = (), tame: bool = True, depth: int = 4) -> Term:
    """A term of type `kind`, at most `depth` operators deep (guards that keep it tame not counted)."""
    return _Writer(draw, loads, tame).term(kind, depth)


@st.composite
def captures(draw: st.DrawFn, sizes: Sizes, slot: int = 0, dtype: torch.dtype = torch.float32) -> Captured:
    """A float, int or bool tensor with up to three axes, each indexed by a variable or a constant, or a table.

    Float tensors are of `dtype`. A table has one axis, indexed by ``(k - q) % n`` or the like.
    """
    kind: Kind = draw(st.sampled_from(("float", "float", "int", "bool")))
    if draw(st.integers(0, 4)) == 0:
        size = draw(st.integers(1, 5))
        one, other = (variable(draw(st.sampled_from("bhqk"))) for _ in range(2))
        index, shape = [apply("mod", apply("sub", one, other), constant(size))], [size]
    else:
        axes = [draw(_axes(sizes)) for _ in range(draw(st.integers(0, 3)))]
        index, shape = [term for term, _ in axes], [size for _, size in axes]
    tensor = _values(kind, shape, draw(st.integers(0, 2**31 - 1)), dtype)
    return Captured(tensor, load(slot, tuple(index), kind))


@st.composite
def score_programs(
    draw: st.DrawFn,
    sizes: Sizes,
    kind: Kind = "float",
    tame: bool = True,
    dtype: torch.dtype = torch.float32,
    depth: int = 4,
) -> tuple[Program, list[Tensor]]:
    """A program, valid for `sizes` of scores, and the tensors that it reads, by slot."""
    known = [draw(captures(sizes, slot, dtype)) for slot in range(draw(st.integers(0, 3)))]
    term = draw(terms(kind, [item.load for item in known], tame, depth))
    program, sources = Program.of(term)
    return program, [known[source].tensor for source in sources]


@st.composite
def _axes(draw: st.DrawFn, sizes: Sizes) -> tuple[Term, int]:
    """An index, and the size that an axis must have for it."""
    choice = draw(st.sampled_from("bhqkbhqkc+"))
    if choice == "c":
        at = draw(st.integers(0, 2))
        return constant(at), at + draw(st.integers(1, 2))
    if choice == "+":
        return apply("add", variable("k"), constant(2)), sizes[3] + 2
    return variable(choice), sizes["bhqk".index(choice)]


def _values(kind: Kind, shape: Sequence[int], seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if kind == "float":
        return torch.randn(shape, generator=generator).to(dtype)
    whole = torch.randint(-3, 8, tuple(shape), generator=generator)
    return whole if kind == "int" else whole > 1


class _Writer:
    """Draws terms of every type. `exact`: made of operators that every correct evaluation rounds alike."""

    def __init__(self, draw: st.DrawFn, loads: Sequence[Term], tame: bool):
        self.draw, self.loads, self.tame = draw, loads, tame

    def term(self, kind: Kind, depth: int, exact: bool = False) -> Term:
        if depth <= 0 or self.one_of(range(6)) == 0:
            return self.leaf(kind)
        if kind == "float":
            return self.real(depth, exact)
        return self.whole(depth) if kind == "int" else self.truth(depth)

    def one_of(self, options: Sequence[Any]) -> Any:
        return self.draw(st.sampled_from(options))

    def leaf(self, kind: Kind) -> Term:
        known = [item for item in self.loads if item.kind == kind]
        if known and self.one_of((True, False)):
            return self.one_of(known)
        if kind == "bool":
            return apply(self.one_of(("le", "lt", "ne")), variable(self.one_of("qh")), variable(self.one_of("kb")))
        if kind == "int":
            return constant(self.one_of(range(-3, 6))) if self.one_of(range(4)) == 0 else variable(self.one_of("bhqk"))
        choice = self.one_of("sssni")
        if choice == "i":
            return cast_to("float", self.leaf("int"))
        return variable("s") if choice == "s" else constant(self.one_of(NUMBERS + WILD_NUMBERS * (not self.tame)))

    # --- floats ---

    def real(self, depth: int, exact: bool) -> Term:
        x, y = (lambda: self.term("float", depth - 1, exact) for _ in range(2))
        options: list[Callable[[], Term]] = [
            lambda: apply(self.one_of(("add", "sub", "mul", "min", "max")), x(), y()),
            lambda: apply(self.one_of(("neg", "abs")), x()),
            lambda: apply("where", self.term("bool", depth - 1), x(), y()),
            lambda: apply("div", x(), _positive(y())),
            lambda: apply("sqrt", _positive(x())),
            lambda: cast_to("float", self.term(self.one_of(("int", "bool")), depth - 1)),
            lambda: self.jump(depth),
        ]
        if not exact:
            options += [
                lambda: apply(self.one_of(("tanh", "sigmoid")), x()),
                lambda: apply("exp", apply("min", x(), constant(2.0))),
                lambda: apply(self.one_of(("log", "rsqrt")), _positive(x())),
                lambda: apply("pow", _positive(x()), apply("tanh", y())),
                lambda: apply("pow", apply("tanh", x()), constant(self.one_of((0.0, 1.0, 2.0, 3.0, 4.0)))),
            ]
        if not self.tame:
            options += [lambda: apply("div", x(), y()), lambda: apply("sqrt", x())]
        if not self.tame and not exact:
            options += [
                lambda: apply(self.one_of(("exp", "log", "rsqrt")), x()),
                lambda: apply("pow", x(), self.one_of((y, lambda: constant(self.one_of((-1.0, 0.5, -0.5, 1.5)))))()),
            ]
        return self.one_of(options)()

    def jump(self, depth: int) -> Term:
        """Floats that change by leaps: of integers if tame."""
        x, y = ((lambda: cast_to("float", self.term("int", depth - 1))) if self.tame
                else (lambda: self.term("float", depth - 1, exact=True)) for _ in range(2))  # fmt: skip
        if self.one_of((True, False)):
            return apply("floor", x())
        positive = constant(self.one_of((1.0, 2.0, 4.0))) if self.tame else y()
        return apply(self.one_of(("mod", "floordiv")), x(), positive)

    # --- ints and bools ---

    def whole(self, depth: int) -> Term:
        x, y = (lambda: self.term("int", depth - 1) for _ in range(2))
        options: list[Callable[[], Term]] = [
            lambda: apply(self.one_of(("add", "sub", "mul", "min", "max")), x(), y()),
            lambda: apply(self.one_of(("neg", "abs", "floor")), x()),
            lambda: apply(self.one_of(("mod", "floordiv")), x(), constant(self.one_of((-2, 1, 2, 3)))),
            lambda: apply("mod", x(), apply("add", apply("abs", y()), constant(1))),
            lambda: apply("pow", apply("mod", x(), constant(4)), constant(self.one_of((0, 1, 2, 3)))),
            lambda: apply("where", self.term("bool", depth - 1), x(), y()),
            lambda: cast_to("int", self.term("bool", depth - 1)),
        ]
        if not self.tame:
            options.append(lambda: self.cut(depth))
        return self.one_of(options)()

    def cut(self, depth: int) -> Term:
        """A float as an int, which is defined for those that are neither huge nor NaN."""
        x = self.term("float", depth - 1, exact=True)
        x = apply("min", apply("max", x, constant(-9.0)), constant(9.0))
        return cast_to("int", apply("where", apply("eq", x, x), x, constant(0.0)))

    def truth(self, depth: int) -> Term:
        kinds: tuple[Kind, ...] = ("int", "bool") if self.tame else ("int", "bool", "float")
        options: list[Callable[[], Term]] = [
            lambda: self.compared(self.one_of(kinds), depth - 1),
            lambda: apply(self.one_of(("and", "or")), self.term("bool", depth - 1), self.term("bool", depth - 1)),
            lambda: apply("not", self.term("bool", depth - 1)),
            lambda: cast_to("bool", self.term(self.one_of(kinds), depth - 1, exact=True)),
        ]
        return self.one_of(options)()

    def compared(self, kind: Kind, depth: int) -> Term:
        one, other = (self.term(kind, depth, exact=True) for _ in range(2))
        return apply(self.one_of(("lt", "le", "gt", "ge", "eq", "ne")), one, other)


def _positive(x: Term) -> Term:
    return apply("add", apply("abs", x), constant(0.5))
