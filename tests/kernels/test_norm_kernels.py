"""What is generated for a norm, how it is launched on which card, and what of it AOTAutograd sees; nothing is run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fake_cuda import empty, launches, traced
from norm_cases import BF16, F32, F64, plain
from torch import Tensor

from fxopt.compat import FakeTensorMode
from fxopt.kernels.cards import CARDS, Card
from fxopt.kernels.norm import (
    NormKernelSpec,
    backward_kernel,
    configs,
    fitted,
    forward_kernel,
    most_programs,
    shipped,
    sums_kernel,
)
from fxopt.ops.norm_operator import BACKWARD, FORWARD

LLAMA = NormKernelSpec(2048, False, "rms", 1e-5, "square", "bf16", False, 0.0, "bf16", "bf16", "bf16", "bf16")
GATED = dataclasses.replace(LLAMA, kind="layer", bias="fp32", gate="bf16", residual=True, offset=1.0)
WIDTHS = (1, 3, 64, 100, 768, 2048, 4096, 5120, 8192, 12288, 16384, 50000, 65536, 262144)


def backward(spec: NormKernelSpec) -> NormKernelSpec:
    """`spec` with every gradient there can be."""
    wanted = {f"by_{name}": bool(getattr(spec, name)) for name in ("x", "weight", "bias", "gate")}
    return dataclasses.replace(spec, **wanted)


# --- source ------------------------------------------------------------------------------------------------------


def test_of_what_there_is_not_nothing_is_generated() -> None:
    plainest = dataclasses.replace(LLAMA, weight="")
    source = forward_kernel(plainest).source
    assert [name for name, _ in forward_kernel(plainest).signature] == [
        "X", "Out", "Rstd", "rows", "x_stride", "ROWS", "COLUMNS",
    ]  # fmt: skip
    assert not any(word in source for word in ("if ", "held", "Mean", "gate", "float32) * w"))
    assert "held = column < 2047" in forward_kernel(dataclasses.replace(plainest, width=2047)).source


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("spec", [LLAMA, GATED])
def test_constants_are_in_the_source_and_no_argument_is_a_float(spec: NormKernelSpec, long: bool) -> None:
    spec = dataclasses.replace(backward(spec), long=long)
    for kernel in (forward_kernel(spec), backward_kernel(spec), sums_kernel(spec)):
        assert {kind for _, kind in kernel.signature if kind[0] != "*"} <= {"i32", "constexpr"}
        compile(kernel.source, kernel.name, "exec")


# --- configurations ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("card", CARDS, ids=str)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("spec", [LLAMA, backward(LLAMA), GATED, backward(GATED)])
def test_every_width_can_be_launched_on_every_card(spec: NormKernelSpec, dtype: str, card: Card) -> None:
    for width in WIDTHS:
        one = fitted(dataclasses.replace(spec, width=width, x=dtype), card)
        kernel = backward_kernel(one) if one.backward else forward_kernel(one)
        for config in configs(kernel, one, card):
            tiles = dict(config.tiles)
            assert tiles.keys() == set(kernel.tiles)
            assert width <= tiles["COLUMNS"] < 2 * width or one.long
            threads = 32 * config.num_warps
            assert tiles["ROWS"] * tiles["COLUMNS"] % threads == 0
            if one.backward:
                assert 1 <= most_programs(one, config, card) <= 2048 // threads
        assert configs(kernel, one, card)


@pytest.mark.parametrize("card", CARDS, ids=str)
@pytest.mark.parametrize(
    ("spec", "widest"), [(LLAMA, 16384), (GATED, 16384), (backward(LLAMA), 8192), (backward(GATED), 4096)]
)
def test_how_wide_rows_are_that_fit_a_tile(spec: NormKernelSpec, widest: int, card: Card) -> None:
    """On every card alike: registers decide, of which all have 64 Ki."""
    assert not fitted(dataclasses.replace(spec, width=widest), card).long
    assert fitted(dataclasses.replace(spec, width=widest + 1), card).long


def test_shipped_kernels_have_names_of_their_own() -> None:
    found = [one.name for one in shipped(CARDS[0])]
    assert len(found) == len(set(found))
    assert {one.split()[0] for one in found} == {
        "norm_forward", "norm_forward_long", "norm_backward", "norm_backward_sums",
    }  # fmt: skip


# --- on CUDA, by fake tensors ------------------------------------------------------------------------------------


ROWS = (4, 512, 2048)


def forward_of(lowering: str, dtype: torch.dtype) -> Callable[..., Any]:
    """The forward of x, residual and weight."""
    constants = (*dataclasses.astuple(plain(dtype)), lowering)
    return lambda x, residual, weight: FORWARD(x, residual, weight, None, None, *constants)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("lowering", "dtype", "found"),
    [
        ("auto", BF16, ["Out Rstd Stream"]),
        ("aten", BF16, ["fxopt.norm.default"]),
        ("auto", F64, ["fxopt.norm.default"]),
    ],
)
def test_the_forward_is_a_launch_or_what_aten_computes(lowering: str, dtype: torch.dtype, found: list[str]) -> None:
    with FakeTensorMode():
        tensors = [empty(*shape, dtype=dtype) for shape in (ROWS, ROWS, (2048,))]
        assert launches(traced(forward_of(lowering, dtype), *tensors)) == found


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(("width", "found"), [(2048, ["By_weight By_x"]), (65536, ["Along", "By_weight By_x"])])
def test_the_backward_is_a_launch_or_for_long_rows_two(width: int, found: list[str]) -> None:
    constants = (*dataclasses.astuple(plain(BF16)), "auto")

    def gradients(upstream: Tensor, s: Tensor, weight: Tensor) -> Any:
        rstd = s.new_empty((*s.shape[:-1], 1), dtype=F32)
        wanted = (True, True, False, False)
        return BACKWARD(upstream, None, s, weight, None, None, rstd, s.new_empty(0), *constants, *wanted)

    rows = (4, 512, width)
    with FakeTensorMode():
        assert launches(traced(gradients, empty(*rows), empty(*rows), empty(width))) == found
