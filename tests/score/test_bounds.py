"""Bounds of terms hold of all values that are drawn, and no term with a bound is infinite."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxopt.score.bounds import SCORE, largest
from fxopt.score.program import Program
from fxopt.score.term import Term, apply, cast_to, constant, load, variable

S, Q, K = (variable(name) for name in "sqk")
NUMBERS = st.sampled_from((-3.4e38, -1e30, -50.0, -1.0, -0.3, 0.0, 0.5, 1.0, 30.0, 1e25, 3.4e38, math.inf, math.nan))


def grown(inner: st.SearchStrategy[Term]) -> st.SearchStrategy[Term]:
    unary = st.builds(apply, st.sampled_from("neg abs exp log tanh sqrt rsqrt sigmoid floor".split()), inner)  # noqa: SIM905
    binary = st.builds(apply, st.sampled_from("add sub mul div pow min max mod".split()), inner, inner)  # noqa: SIM905
    chosen = st.builds(lambda a, b: apply("where", apply("lt", a, b), a, b), inner, inner)
    return unary | binary | chosen


LEAVES = st.sampled_from((S, cast_to("float", Q), cast_to("float", apply("sub", K, Q)))) | NUMBERS.map(constant)
TERMS = st.recursive(LEAVES, grown, max_leaves=6)


@given(TERMS)
def test_no_value_is_larger(term: Term) -> None:
    s = torch.tensor([-SCORE, -1e9, -3.0, -1e-30, 0.0, 1e-30, 2.0, 88.0, 1e9, SCORE], dtype=torch.float64)
    one, ten = slice(0, 1), slice(0, 10)
    found = Program(term).on_block(s.expand(1, 1, 10, 10), one, one, ten, ten, dtype=torch.float64)
    if largest(term) < 3e38:
        there = found[~found.isnan()]  # the root of a negative number, as eager has it
        assert there.numel() == 0 or float(there.abs().max()) <= largest(term) * (1 + 1e-12), term


@pytest.mark.parametrize(
    ("term", "bound"),
    [
        (S, SCORE),
        (apply("mul", apply("tanh", apply("div", S, constant(50.0))), constant(50.0)), 50.0),
        (apply("add", apply("mul", S, constant(0.5)), constant(-3.0)), SCORE / 2 + 3),
        (apply("add", S, load(0, (Q, K), "float")), math.inf),
        (apply("div", S, apply("abs", S)), math.inf),
        (constant(math.nan), math.inf),
    ],
)
def test_bounds(term: Term, bound: float) -> None:
    assert largest(term) == bound
