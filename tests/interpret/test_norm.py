"""Generated kernels of norms, interpreted, against the formulas under autograd by the fp64 rule."""

from __future__ import annotations

import dataclasses
import gc
import itertools
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import harness
import models
import pytest
import torch
from allocations import allocated
from hypothesis import given, settings
from norm_cases import BF16, F16, F32, F64, NAMES, Tensors, check, draw, eager, interpreted, ours, plain, problems, step
from torch import fx

import fxopt
from fxopt import backend as pipeline
from fxopt.ops import norm_launch
from fxopt.ops.launch import launch
from fxopt.ops.norm import NormSpec
from fxopt.ops.norm_operator import BACKWARD, FORWARD
from fxopt.ops.registry import memory_of

SHORT, LONG = 24, 75
"""Widths of one tile (of 32) and of five (of 16), both ragged."""
NORMS_ALONE = {"kernels": "interpret", "rules": ["-attention", "-linear_cross_entropy"]}


@settings(max_examples=40)
@given(problems(widths=(8, 9, 32, 33, 75)))
def test_is_as_near_to_fp64_as_the_formulas_under_autograd(problem: tuple[Tensors, NormSpec]) -> None:
    tensors, spec = problem
    found = check(tensors, spec, interpreted)
    assert {name for name, one in found.gradients.items() if one is not None} == {
        name for name, one in tensors.items() if one.requires_grad
    }


def spec_of(name: str, dtype: torch.dtype) -> tuple[NormSpec, str]:
    """The norm N1 to N11 of what transformers write, and the tensors it has."""
    return {
        "weight after cast": (plain(dtype), "w"),
        "weight before cast": (plain(dtype, normalized=F32, affine=F32), "w"),
        "one plus weight": (plain(dtype, normalized=F32, affine=F32, offset=1.0), "w"),
        "without weight": (plain(dtype), ""),
        "promoted": (plain(dtype, normalized=F32, affine=F32, output=F32), ""),
        "rounded factor": (plain(dtype, rounded_rstd=True), "w"),
        "layer, affine after cast": (plain(dtype, "layer"), "wb"),
        "layer, wide": (plain(dtype, "layer", normalized=F32, affine=F32), "w"),
        "layer_norm": (plain(dtype, "layer", normalized=F32, affine=F32), "wb"),
        "rms_norm": (plain(dtype, eps=None, normalized=F32, affine=F32), "w"),
        "gated": (plain(dtype), "wg"),
        "eps outside": (plain(dtype, eps_at="root"), "w"),
        "eps as floor": (plain(dtype, "layer", eps_at="floor", eps=0.9), "w"),
    }[name]


SPELLINGS = (
    "weight after cast", "weight before cast", "one plus weight", "without weight", "promoted", "rounded factor",
    "layer, affine after cast", "layer, wide", "layer_norm", "rms_norm", "gated", "eps outside", "eps as floor",
)  # fmt: skip


@pytest.mark.parametrize("width", [SHORT, LONG])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_alone_and_with_the_add_before_it(name: str, dtype: torch.dtype, width: int) -> None:
    spec, parts = spec_of(name, dtype)
    for residual in ("", "r"):
        check(draw((7, width), dtype, parts + residual), spec, interpreted)


@pytest.mark.parametrize("width", [SHORT, LONG])
@pytest.mark.parametrize(("narrow", "wide"), [("x", "residual"), ("residual", "x")])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_a_sum_of_two_dtypes_has_the_wider(kind: str, narrow: str, wide: str, width: int) -> None:
    """Mixed precision: what a product gave in bf16, and an fp32 stream; each gets its gradient in its own dtype."""
    tensors, spec = draw((7, width), F32, "rwb"), plain(F32, kind, output=BF16)
    tensors[narrow] = tensors[narrow].detach().to(BF16).requires_grad_()
    check(tensors, spec, interpreted)
    check(tensors, spec, ours)
    found = step(interpreted, tensors, spec)
    assert (found.gradients[narrow].dtype, found.gradients[wide].dtype) == (BF16, F32)
    assert interpreted(tensors, spec)[1].dtype == F32


@pytest.mark.parametrize("width", [SHORT, LONG])
@pytest.mark.parametrize("rounded_rstd", [False, True])
@pytest.mark.parametrize(("normalized", "affine"), [(BF16, BF16), (BF16, F32), (F32, F32), (F32, BF16)])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_rounds_where_the_formulas_do(
    kind: str, normalized: torch.dtype, affine: torch.dtype, rounded_rstd: bool, width: int
) -> None:
    """To the bit, but where fp32 sums in another order fall on two sides of a bf16 boundary (2^-16 of all values)."""
    spec = plain(BF16, kind, normalized=normalized, affine=affine, rounded_rstd=rounded_rstd, offset=1.0)
    tensors = draw((16, width), BF16, "rwb")
    for mine, right in zip(interpreted(tensors, spec), eager(tensors, spec), strict=True):
        assert (mine != right).sum() <= 3


@pytest.mark.parametrize("width", [SHORT, LONG])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_only_wanted_gradients_are_computed(kind: str, width: int) -> None:
    spec, tensors = plain(kind=kind), draw((5, width), F32, "wbg")
    x, weight, bias, gate = (tensors[name].detach() for name in ("x", "weight", "bias", "gate"))
    _, _, rstd, mean = FORWARD(x, None, weight, bias, gate, *dataclasses.astuple(spec), "aten")
    saved, every = (x, weight, bias, gate, rstd, mean), None
    for wanted in itertools.product((True, False), repeat=4):
        found = BACKWARD(x, None, *saved, *dataclasses.astuple(spec), "interpret", *wanted)
        every = every or found
        for one, whole, want in zip(found, every, wanted, strict=True):
            assert torch.equal(one, whole) if want else one.numel() == 0


@pytest.mark.parametrize("shape", [(0, 24), (3, 0, 8), (0,), (4, 0), (2, 1), (1,)])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_empty_and_one_element_rows(kind: str, shape: tuple[int, ...]) -> None:
    tensors, spec = draw(shape, F32, "rwb"), plain(kind=kind)
    mine, right = step(interpreted, tensors, spec), step(eager, tensors, spec)
    for name, value in right.named().items():
        torch.testing.assert_close(mine.named()[name], value, rtol=1e-5, atol=1e-4)  # 1e-7 / sqrt(eps)


@pytest.mark.parametrize(
    ("order", "width"),
    [*((order, SHORT) for order in itertools.permutations(range(4))), ((1, 0, 2, 3), LONG), ((3, 0, 2, 1), LONG)],
)
def test_every_order_of_axes_in_memory(order: tuple[int, ...], width: int) -> None:
    """Values, strides and rstd of an x [2, 3, 4, H] whose axes lie in any order; the others are dense."""
    tensors, spec = draw((2, 3, 4, width), F32, "rwg"), plain(kind="layer")
    inverse = sorted(range(4), key=order.__getitem__)
    tensors["x"] = tensors["x"].detach().permute(order).contiguous().permute(inverse).requires_grad_()
    check(tensors, spec, interpreted)
    arguments = (*(tensors.get(name) for name in NAMES), *dataclasses.astuple(spec))
    for mine, right in zip(FORWARD(*arguments, "interpret"), FORWARD(*arguments, "aten"), strict=True):
        assert mine.stride() == right.stride()
        torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["expanded", "row of a wider tensor", "every second row", "every second value"])
def test_layouts_that_are_read_in_place_or_copied(layout: str) -> None:
    wide = torch.randn(6, 48, generator=torch.Generator().manual_seed(0))
    made = {
        "expanded": wide[:1, :24].expand(6, 24),
        "row of a wider tensor": wide[:, 5:29],
        "every second row": torch.cat([wide, wide])[::2, :24],
        "every second value": wide[:, ::2],
    }[layout]
    tensors = {**draw((6, 24), F32, "w"), "x": made.requires_grad_(), "residual": made}
    leaves = [tensors["x"], tensors["weight"]]
    for lowering in ("interpret", "aten"):
        results = ours(tensors, plain(), lowering)
        # `sum` expands its gradient: a row that is all of one value
        gradients = torch.autograd.grad(results[0].sum() + results[1].sum(), leaves)
        if lowering == "interpret":
            mine = (*results, *gradients)
    for one, right in zip(mine, (*results, *gradients), strict=True):
        assert one.stride() == right.stride()
        torch.testing.assert_close(one, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [SHORT, LONG])
def test_nan_stays_in_its_row(width: int) -> None:
    tensors = draw((3, width), F32)
    tensors["x"].data[1, 2] = float("nan")
    for eps_at in ("square", "root", "floor"):
        (out,) = interpreted(tensors, plain(eps_at=eps_at))
        (gradient,) = torch.autograd.grad(out.sum(), tensors["x"])
        assert out.isnan().all(-1).tolist() == gradient.isnan().all(-1).tolist() == [False, True, False]


@pytest.mark.parametrize("width", [SHORT, LONG])
@pytest.mark.parametrize("eps_at", ["square", "root", "floor"])
def test_a_row_of_zeros(eps_at: str, width: int) -> None:
    tensors = draw((2, width), F32, "w")
    tensors["x"].data[0] = 0
    gradient = check(tensors, plain(eps_at=eps_at, eps=0.25), interpreted).gradients["x"]
    assert gradient is not None
    assert gradient.isfinite().all()


@pytest.mark.parametrize("width", [SHORT, LONG])
def test_variance_of_rows_far_from_zero(width: int) -> None:
    """Where the mean of squares less the square of the mean would be off by one, which is what the variance is."""
    x, spec = 4096 + torch.randn(4, width, generator=torch.Generator().manual_seed(0)), plain(kind="layer")
    _, _, rstd, mean = FORWARD(x, None, None, None, None, *dataclasses.astuple(spec), "interpret")
    variance, right = torch.var_mean(x.double(), -1, correction=0, keepdim=True)
    torch.testing.assert_close(rstd.double(), variance.add(spec.eps).rsqrt(), rtol=1e-6, atol=0)
    torch.testing.assert_close(mean.double(), right, rtol=2e-7, atol=0)


def test_rows_shared_by_programs_are_summed_the_same_way_each_time() -> None:
    tensors, spec = draw((37, LONG), BF16, "rwb"), plain(BF16, "layer")
    first, second = (step(interpreted, tensors, spec).gradients for _ in range(2))
    for name, one in first.items():
        assert one is not None
        assert torch.equal(one, second[name])  # type: ignore[arg-type]


def launch_and_let_go(*arguments: Any) -> None:
    """The interpreter leaves what it was given in reference cycles."""
    launch(*arguments)
    gc.collect()


@pytest.mark.parametrize("layout", ["dense", "every second value", "expanded upstream"])
@pytest.mark.parametrize("width", [pytest.param(32, marks=pytest.mark.slow), 96])
@pytest.mark.parametrize(
    ("kind", "dtype", "parts"), [("rms", BF16, "w"), ("layer", F32, "rwb"), ("layer", BF16, "rwbg")]
)
def test_memory_formula_is_what_is_allocated(
    kind: str, dtype: torch.dtype, parts: str, width: int, layout: str
) -> None:
    """Rows of one tile and long ones; what ATen holds at a time (two tensors as large as x) is none of it."""
    spec = plain(dtype, kind, normalized=F32, affine=F32)
    tensors = {name: one.detach() for name, one in draw((32, width), dtype, parts).items()}
    if layout == "every second value":
        tensors["x"] = torch.cat([tensors["x"]] * 2, 1)[:, ::2]
    values, constants = [tensors.get(name) for name in NAMES], (*dataclasses.astuple(spec), "interpret")
    s, vectors, rstd = tensors["x"], values[2:], torch.ones(32, 1)
    upstream = torch.ones(32, 1, dtype=dtype).expand(32, width) if layout == "expanded upstream" else s.contiguous()
    stream = s if "r" in parts else None
    backward = (upstream, stream, s, *vectors, rstd, rstd, *constants, True, *(one is not None for one in vectors))
    for op, arguments in ((FORWARD, (*values, *constants)), (BACKWARD, backward)):
        with mock.patch.object(norm_launch, "launch", launch_and_let_go):
            op(*arguments)
            most, end = allocated(lambda op=op, arguments=arguments: op(*arguments))
        formula = memory_of(op, *arguments)
        assert formula is not None
        few = 4 * (32 * 2 + width * 4)  # statistics, and what is [H]
        assert abs(formula.outputs - end) <= few
        assert most - end - few <= formula.workspace <= 1.5 * (most - end) + few, (op, most - end, formula.workspace)


def test_fp64_is_left_to_aten() -> None:
    tensors, spec = draw((3, 8), F64, "w"), plain(F64)
    assert torch.equal(interpreted(tensors, spec)[0], ours(tensors, spec, "aten")[0])


def norms_alone(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """fxopt with interpreted norms and nothing else, and AOTAutograd's eager compiler: no C++ to compile."""
    report, call = pipeline.run(gm, inputs, fxopt.Options.parse(NORMS_ALONE), harness.original)
    pipeline.record(fxopt.Report([report]))
    return call


@pytest.mark.parametrize(
    ("family", "dtype", "norms"), [("llama", F32, 5), pytest.param("bert", F32, 6, marks=pytest.mark.slow)]
)
def test_a_training_step_of_a_model(family: str, dtype: torch.dtype, norms: int) -> None:
    fxopt.clear_reports()
    model, inputs = models.build(family, dtype=dtype)
    harness.check(model, torch.compile(model, backend=norms_alone), inputs)
    assert_norms_rewritten(norms)


@pytest.mark.slow
def test_a_training_step_under_inductor() -> None:
    fxopt.clear_reports()
    model, inputs = models.build("llama", dtype=BF16)
    harness.check(model, torch.compile(model, backend="fxopt", options=NORMS_ALONE), inputs)
    assert_norms_rewritten(5)


def assert_norms_rewritten(count: int) -> None:
    """By cost as well as by right: nobody forced the rule."""
    (report,) = fxopt.reports()
    assert [item.rule for item in report.rewrites] == ["norm"] * count
    assert not report.refusals


@pytest.mark.fault("offsets past 2^31")
def test_rows_more_than_2_to_31_values_apart() -> None:
    """4 GiB of addresses, of which a few pages are ever touched."""
    far = torch.empty(2**31 + SHORT, dtype=BF16).as_strided((2, SHORT), (2**31, 1))
    tensors = draw((2, SHORT), BF16, "w")
    near = tensors["x"].detach()
    far.copy_(near)
    expected = ours({**tensors, "x": near}, plain(BF16))
    for one, other in zip(interpreted({**tensors, "x": far}, plain(BF16)), expected, strict=True):
        torch.testing.assert_close(one, other)
