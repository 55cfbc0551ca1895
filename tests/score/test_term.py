"""Terms: one object for equal ones, types, and folding that changes no value."""

from __future__ import annotations

import concurrent.futures
import math
import operator
import threading
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxopt.score.term import (
    BINARY,
    COMPARISONS,
    REAL,
    UNARY,
    Term,
    apply,
    cast_to,
    constant,
    load,
    substitute,
    variable,
)

DTYPES = {"float": torch.float64, "int": torch.int64, "bool": torch.bool}
VALUES = (0, 1, -1, 2, 3, -7, 0.0, -0.0, 1.0, -1.0, 2.0, 0.5, -2.5, math.inf, -math.inf, math.nan, True, False)

PLAIN: dict[str, Any] = {
    **{name: getattr(torch, name) for name in UNARY - {"not"}},
    **{name: getattr(operator, name) for name in ("add", "sub", "mul", "lt", "le", "gt", "ge", "eq", "ne")},
    "not": torch.logical_not,
    "div": torch.div,
    "floordiv": torch.floor_divide,
    "mod": torch.remainder,
    "pow": torch.pow,
    "min": torch.minimum,
    "max": torch.maximum,
    "and": torch.logical_and,
    "or": torch.logical_or,
    "where": torch.where,
}


def value_of(term: Term) -> Tensor:
    """What a term of constants is, with nothing folded in it."""
    if term.op == "const":
        return torch.tensor(term.value, dtype=DTYPES[term.kind])
    if term.op == "cast":
        return value_of(term.args[0]).to(DTYPES[term.kind])
    return PLAIN[term.op](*map(value_of, term.args))


def applied(op: str, values: list[Any]) -> Tensor:
    """`op` of Python values by PyTorch's rules of promotion, floats being fp64."""
    tensors = [torch.tensor(value, dtype=DTYPES[type(value).__name__]) for value in values]
    if op in REAL:
        tensors = [item.double() for item in tensors]
    if op in ("neg", "abs", "floor", "add", "sub", "mul", "floordiv", "mod", "pow", "min", "max"):
        tensors = [item.long() if item.dtype == torch.bool else item for item in tensors]
    return PLAIN[op](*tensors)


def test_equal_terms_are_one_object() -> None:
    make = lambda: apply("mul", apply("sub", variable("k"), variable("q")), load("slope", (variable("h"),), "float"))  # noqa: E731
    assert make() is make()
    assert constant(1) is not constant(1.0)
    assert constant(1) is not constant(True)
    assert constant(0.0) is not constant(-0.0)
    assert constant(math.nan) is constant(math.nan)


@pytest.mark.parametrize("op", sorted(UNARY | BINARY | {"where"}))
def test_types_and_values_are_those_of_pytorch(op: str) -> None:
    count = 1 if op in UNARY else 3 if op == "where" else 2

    @given(st.lists(st.sampled_from(VALUES), min_size=count, max_size=count))
    def holds(values: list[Any]) -> None:
        if op == "where":
            values = [bool(values[0]), *values[1:]]
        try:
            expected = applied(op, values)
        except (RuntimeError, ZeroDivisionError):
            return  # integers divided by 0 or to a negative power
        found = apply(op, *map(constant, values))
        assert DTYPES[found.kind] == expected.dtype
        assert torch.equal(value_of(found).nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0))
        zeros = expected.dtype == torch.float64 and expected == 0
        assert not zeros or math.copysign(1, value_of(found)) == math.copysign(1, expected)

    holds()


@pytest.mark.parametrize("kind", ["float", "int", "bool"])
def test_casts_fold_where_they_are_defined(kind: Any) -> None:
    for value in VALUES:
        found = cast_to(kind, constant(value))
        assert found.kind == kind
        if kind == "int" and not math.isfinite(value):
            assert found.op == "cast"
        else:
            assert found.value == {"float": float, "int": int, "bool": bool}[kind](value) or math.isnan(value)


def test_float_quotients_round_down_also_by_one() -> None:
    s = variable("s")
    assert apply("floordiv", s, constant(1.0)).op == "floordiv"
    assert apply("floordiv", variable("q"), constant(1)) is variable("q")
    assert apply("div", s, constant(1)) is s
    assert apply("add", s, constant(0.0)).op == "add"


def test_operators_and_their_arguments_are_checked() -> None:
    for op, count in (("frobnicate", 1), ("neg", 2), ("add", 1), ("where", 2), ("load", 1)):
        with pytest.raises(ValueError, match="no operator of a score program"):
            apply(op, *[variable("s")] * count)


def test_walk_yields_operands_first_and_once() -> None:
    term = variable("s")
    for _ in range(40):  # a tree of 2**40 nodes, as a graph one of 41
        term = apply("add", term, term)
    order = list(term.walk())
    assert len(order) == 41
    assert all(order.index(arg) < order.index(item) for item in order for arg in item.terms)
    assert term.reads == {"s"}


def test_comparing_an_integer_with_itself_folds() -> None:
    q, s = variable("q"), variable("s")
    for op in COMPARISONS:
        assert apply(op, q, q).value is (op in ("le", "ge", "eq"))
        assert apply(op, s, s).op == op  # NaN


def test_substitution_folds_again() -> None:
    term = apply("where", apply("le", variable("k"), variable("q")), variable("s"), constant(-math.inf))
    assert substitute(term, {variable("k"): variable("q")}) is variable("s")
    assert substitute(term, {}) is term


@pytest.mark.fault("concurrent compiles")
def test_equal_terms_are_one_object_on_every_thread() -> None:
    def make(_: int) -> list[Term]:
        ready.wait()
        return [simple for number in range(300) if (simple := apply("add", variable("s"), constant(number / 7)))]

    ready = threading.Barrier(4)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        first, *others = pool.map(make, range(4))
    assert all(one is other for made in others for one, other in zip(first, made, strict=True))
