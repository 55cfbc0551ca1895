"""fxopt::norm against the same formulas under autograd, by the fp64 rule of `fxopt.testing.compare`."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from allocations import allocated
from hypothesis import given
from norm_cases import BF16, F16, F32, F64, NAMES, Tensors, check, draw, eager, ours, plain, problems, step
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fxopt.ops.norm import NormSpec, norm
from fxopt.ops.norm_operator import BACKWARD, FORWARD
from fxopt.ops.registry import memory_of


@given(problems())
def test_is_as_near_to_fp64_as_the_formulas_under_autograd(problem: tuple[Tensors, NormSpec]) -> None:
    tensors, spec = problem
    found = check(tensors, spec)
    assert {name for name, one in found.gradients.items() if one is not None} == {
        name for name, one in tensors.items() if one.requires_grad
    }


@pytest.mark.parametrize("eps_at", ["square", "root", "floor"])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_fp64_is_computed_in_fp64(kind: str, eps_at: str) -> None:
    spec = plain(F64, kind, eps_at=eps_at, eps=0.7, offset=1.0)  # 0.7: for "floor", some rows are below and some above
    tensors = draw((6, 3), F64, "rwbg")
    for mine, right in zip(ours(tensors, spec), eager(tensors, spec), strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-14, atol=1e-14)
    assert torch.autograd.gradcheck(
        lambda *values: ours(dict(zip(NAMES, values, strict=True)), spec), (*tensors.values(),)
    )


@pytest.mark.parametrize("eps_at", ["square", "root", "floor"])
def test_a_row_of_zeros(eps_at: str) -> None:
    tensors = draw((2, 4), F32, "w")
    tensors["x"].data[0] = 0
    found = check(tensors, plain(eps_at=eps_at, eps=0.25))
    gradient = found.gradients["x"]
    assert gradient is not None
    assert gradient.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (0,), (4, 0), (2, 1), (1,)])
@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.fault("zero-size inputs and grid 0")
def test_empty_and_one_element_rows(kind: str, shape: tuple[int, ...]) -> None:
    tensors, spec = draw(shape, F32, "rwb"), plain(kind=kind)
    mine, right = step(ours, tensors, spec), step(eager, tensors, spec)
    for name, value in right.named().items():
        torch.testing.assert_close(mine.named()[name], value, rtol=1e-5, atol=1e-4)  # 1e-7 / sqrt(eps)


@pytest.mark.parametrize("layout", ["contiguous", "first axes swapped", "strided"])
@pytest.mark.fault("non-unit last stride")
def test_results_have_the_strides_of_pointwise_operators(layout: str) -> None:
    tensors = draw((3, 4, 8), BF16, "rw", layout=layout)
    for mine, right in zip(ours(tensors, plain(BF16)), eager(tensors, plain(BF16)), strict=True):
        assert mine.stride() == right.stride()


def test_gradients_have_the_strides_of_what_they_are_of() -> None:
    """Inductor asserts what the fake says, whatever layout the upstream gradient comes in."""
    tensors = draw((3, 4, 8), F32, "g")
    (out,) = ours(tensors, plain())
    upstream = torch.randn(8, 4, 3).permute(2, 1, 0)
    for one in torch.autograd.grad(out, list(tensors.values()), upstream):
        assert one.is_contiguous()


@pytest.mark.parametrize("rounded_rstd", [False, True])
@pytest.mark.parametrize(("normalized", "affine"), [(BF16, BF16), (BF16, F32), (F32, F32)])
@pytest.mark.fault("elided bf16 round trips")
def test_rounds_where_the_formulas_do(normalized: torch.dtype, affine: torch.dtype, rounded_rstd: bool) -> None:
    spec = plain(BF16, normalized=normalized, affine=affine, rounded_rstd=rounded_rstd)
    tensors = draw((64, 32), BF16, "rwb")
    mine, right = ours(tensors, spec), eager(tensors, spec)
    for one, other in zip(mine, right, strict=True):
        assert torch.equal(one, other)
    upstream = torch.randn(64, 32).to(BF16)
    unscaled = draw((64, 32), BF16, "r")  # the same x and residual: the weight meets what is normalised, rounded
    (rows,) = eager(unscaled, dataclasses.replace(spec, output=F32))[:1]
    by_weight = (upstream.float() * rows.detach()).sum(0).to(BF16)
    assert torch.equal(torch.autograd.grad(mine[0], tensors["weight"], upstream)[0], by_weight)


@pytest.mark.fault("expanded grad_output")
def test_expanded_upstream_gradients() -> None:
    tensors = draw((5, 16), F32, "rwb")
    results = ours(tensors, plain())
    expanded = torch.autograd.grad([one.sum() for one in results], list(tensors.values()), retain_graph=True)
    dense = torch.autograd.grad(results, list(tensors.values()), [torch.ones_like(one) for one in results])
    for one, other in zip(expanded, dense, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("read", [0, 1])
def test_only_one_result_is_differentiated(read: int) -> None:
    tensors = draw((5, 16), F64, "rw")
    chosen = [tensors["x"], tensors["residual"]]
    mine, right = (torch.autograd.grad(function(tensors, plain(F64))[read].sum(), chosen) for function in (ours, eager))
    for one, other in zip(mine, right, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


def test_squares_that_overflow_half_precision() -> None:
    x = (300 + torch.arange(8.0)).to(F16)
    out, _ = norm(x, spec=plain(F16))
    torch.testing.assert_close(out, torch.ones_like(out), rtol=0.02, atol=0)


@pytest.mark.fault("NaN/Inf inputs and GradScaler")
def test_nan_stays_in_its_row() -> None:
    tensors = draw((3, 8), F32)
    tensors["x"].data[1, 2] = float("nan")
    (out,) = ours(tensors, plain())
    out.sum().backward()
    assert out.isnan().all(-1).tolist() == [False, True, False]
    assert tensors["x"].grad is not None
    assert tensors["x"].grad.isnan().all(-1).tolist() == [False, True, False]


def test_weight_gradients_are_summed_in_fp32() -> None:
    x, weight, bias = torch.ones(4096, 2, dtype=BF16), torch.ones(2, dtype=BF16), torch.zeros(2, dtype=BF16)
    out, _ = norm(x, weight.requires_grad_(), bias.requires_grad_(), spec=plain(BF16))
    out.sum().backward()
    assert weight.grad is not None
    assert bias.grad is not None
    assert weight.grad.tolist() == bias.grad.tolist() == [4096.0, 4096.0]  # bf16 sums stop at 256


def test_ambient_autocast_changes_nothing() -> None:
    tensors, spec = draw((4, 16), F32, "rwbg"), plain(kind="layer")
    with torch.autocast("cpu", BF16):
        inside = step(ours, tensors, spec)
    for name, value in step(ours, tensors, spec).named().items():
        assert value is not None
        assert torch.equal(inside.named()[name], value), name  # type: ignore[arg-type]


def test_second_derivative_is_refused() -> None:
    tensors = draw((4, 16), F32, "w")
    (out,) = ours(tensors, plain())
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(out.sum(), tensors["x"], create_graph=True)


@pytest.mark.parametrize(("parts", "kept"), [("", "x rstd"), ("rw", "s w rstd"), ("rwbg", "s w b g rstd")])
def test_keeps_the_input_or_the_stream_and_statistics(parts: str, kept: str) -> None:
    rows, width = 6, 16
    sizes = {"x": rows * width, "s": rows * width, "w": width, "b": width, "g": rows * width, "rstd": rows}
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: saved.append(one) or one, lambda one: one):
        ours(draw((rows, width), F32, parts), plain())
    assert sum(one.numel() for one in saved) == sum(sizes[name] for name in kept.split())


def test_only_wanted_gradients_are_computed() -> None:
    s, vector, rstd = torch.ones(4, 8), torch.ones(8), torch.ones(4, 1)
    constants = (*dataclasses.astuple(plain()), "auto")
    for wanted in itertools.product((False, True), repeat=4):
        found = BACKWARD(s, None, s, vector, vector, s, rstd, rstd.new_empty(0), *constants, *wanted)
        assert tuple(one.numel() > 0 for one in found) == wanted


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("parts", ["", "w", "rwb", "rwbg"])
@pytest.mark.parametrize("layout", ["contiguous", "first axes swapped"])
def test_registration(kind: str, parts: str, layout: str) -> None:
    """Schema, fake values with static and symbolic shapes, autograd below AOTAutograd."""
    spec = plain(BF16, kind, normalized=F32, affine=F32)
    tensors = draw((3, 4, 16), BF16, parts, layout=layout)
    arguments = (*map(tensors.get, NAMES), *dataclasses.astuple(spec), "auto")
    torch.library.opcheck(FORWARD, arguments, atol=0.05, rtol=0.05)


def test_meta_tensors() -> None:
    out, stream = norm(
        torch.empty(3, 8, device="meta"), residual=torch.empty(3, 8, device="meta"), spec=plain(output=BF16)
    )
    assert stream is not None
    assert (out.shape, out.dtype, stream.dtype) == ((3, 8), BF16, F32)


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("parts", ["", "w", "rwb", "rwbg"])
def test_memory_formula_bounds_what_is_allocated(kind: str, dtype: torch.dtype, parts: str) -> None:
    spec = plain(dtype, kind, normalized=F32, affine=F32)
    tensors = draw((256, 512), dtype, parts)
    values, constants = [tensors.get(name) for name in NAMES], (*dataclasses.astuple(spec), "auto")
    s, vectors = tensors["x"].detach(), [None if one is None else one.detach() for one in values[2:]]
    rstd = torch.ones(256, 1)
    backward = (s, None, s, *vectors, rstd, rstd, *constants, True, *(one is not None for one in vectors))
    for op, arguments in ((FORWARD, (*values, *constants)), (BACKWARD, backward)):
        with torch.no_grad():
            op(*arguments)
            most, end = allocated(lambda op=op, arguments=arguments: op(*arguments))
        formula = memory_of(op, *arguments)
        assert formula is not None
        few = 2**14  # statistics, and what is [H]
        assert abs(formula.outputs - end) <= few
        assert most - end - few <= formula.workspace <= 2 * (most - end) + few, (op, most - end, formula.workspace)


def test_flops_are_counted() -> None:
    with FlopCounterMode(display=False) as counter:
        ours(draw((4, 16), F32, "rw"), plain())[0].sum().backward()
    by_op = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    assert by_op["fxopt.norm"] == 5 * 64  # residual, square, sum, scale, weight
    assert by_op["fxopt.norm_backward"] > by_op["fxopt.norm"]


@pytest.mark.parametrize(
    ("error", "words", "change"),
    [
        (ValueError, r"weight must be \[8\], not \[7\]", {"weight": torch.ones(7)}),
        (ValueError, r"bias must be \[8\], not \[1, 8\]", {"bias": torch.ones(1, 8)}),
        (ValueError, r"residual must be \[3, 8\] like x", {"residual": torch.ones(8)}),
        (TypeError, "floating dtypes only, not torch.int64", {"residual": torch.ones(3, 8, dtype=torch.int64)}),
        (TypeError, "floating dtypes only, not torch.int64", {"gate": torch.ones(3, 8, dtype=torch.int64)}),
        (ValueError, "x is a scalar", {"x": torch.ones(())}),
        (ValueError, "lowering is 'cuda': it must be one of auto, aten, interpret", {"lowering": "cuda"}),
        (ValueError, "not 'group', 'square'", {"spec": plain(kind="group")}),
        (ValueError, "float32 or float64, not torch.bfloat16", {"spec": plain(compute=BF16)}),
        (TypeError, "floating dtypes only, not torch.int32", {"spec": plain(output=torch.int32)}),
    ],
)
def test_what_does_not_fit_raises(error: type[Exception], words: str, change: dict[str, Any]) -> None:
    with pytest.raises(error, match=words):
        norm(**{"x": torch.ones(3, 8), "spec": plain(), **change})
