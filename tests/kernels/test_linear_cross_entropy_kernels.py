"""What is generated for a linear layer's loss, how it is launched and chosen on which card; nothing is run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from fake_cuda import empty, launches, traced
from loss_cases import constants
from torch import Tensor
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from fxopt.compat import FakeTensorMode
from fxopt.kernels.cards import CARDS, TARGETS, Card
from fxopt.kernels.linear_cross_entropy import (
    LossKernelSpec,
    backward_kernel,
    forward_kernel,
    rows_kernel,
    shipped,
    tile_configs,
)
from fxopt.kernels.offline import Job, compile_offline
from fxopt.memory.rates import BY_ARCHITECTURE
from fxopt.ops import loss_costs
from fxopt.ops.loss_operator import BACKWARD, FORWARD
from fxopt.ops.loss_spec import Wanted
from fxopt.ops.registry import memory_of

BF16, FP32 = torch.bfloat16, torch.float32
PLAIN = LossKernelSpec("bf16")
EVERY = LossKernelSpec("fp32", 0.5, 30.0, 0.1, 1e-4, -1, True, True, False, True, True, True)
KERNELS = (forward_kernel, backward_kernel, rows_kernel)
GEMMA, LLAMA = (8192, 256_000, 2304), (8192, 128_256, 4096)
"""Tokens, classes, width."""


# --- source ------------------------------------------------------------------------------------------------------


def test_of_what_there_is_not_nothing_is_generated() -> None:
    for generate in KERNELS:
        source = generate(PLAIN).source
        assert not any(word in source for word in ("if ", "Bias", "Sum", "Best", "tanh", "ieee", "width)"))
    assert " * " not in rows_kernel(PLAIN).source.split("z = tl.load")[1].split("chosen")[0]  # no scale


@pytest.mark.parametrize("generate", KERNELS)
@pytest.mark.parametrize("spec", [PLAIN, replace(PLAIN, gradient=True), EVERY])
def test_constants_are_in_the_source_and_no_argument_is_a_float(
    generate: Callable[..., Any], spec: LossKernelSpec
) -> None:
    kernel = generate(spec)
    assert {kind for _, kind in kernel.signature if kind[0] != "*"} <= {"i32", "constexpr"}
    compile(kernel.source, kernel.name, "exec")
    assert max(map(len, kernel.source.splitlines())) <= 120


# --- configurations ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("card", TARGETS, ids=lambda card: card.name)
@pytest.mark.parametrize("spec", [PLAIN, replace(PLAIN, argmax=True), replace(PLAIN, transposed=True), EVERY])
def test_tiles_have_a_configuration_on_every_card(spec: LossKernelSpec, card: Card) -> None:
    for generate in (forward_kernel, backward_kernel):
        kernel = generate(spec)
        found = tile_configs(kernel, spec, card)
        assert len(found) >= 2
        for config in found:
            assert tuple(name for name, _ in config.tiles) == kernel.tiles
            assert 64 % dict(config.tiles)["BLOCK_K"] == 0  # what `whole` promises


def test_shipped_kernels_have_names_of_their_own() -> None:
    found = [one.name for one in shipped(CARDS[0])]
    assert len(found) == len(set(found))


@pytest.mark.parametrize("name", ["linear_cross_entropy_forward bf16 softcap", "cross_entropy_rows bf16 everything"])
def test_defaults_compile_for_a_consumer_card_and_spill_nothing(name: str) -> None:
    """All of them, for all cards, are `fxopt kernels`."""
    card = next(card for card in CARDS if card.name == "sm_86")
    one = next(one for one in shipped(card) if one.name == name)
    found = compile_offline(Job(one.kernel, one.configs[0], card, one.aligned))
    assert found.fits
    assert found.spill_bytes <= 64


# --- on CUDA, by fake tensors ------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of an H100."""
    monkeypatch.setattr(loss_costs, "card_of", lambda device: next(card for card in CARDS if card.arch == 90))


def tensors(size: tuple[Any, ...], dtype: torch.dtype = BF16) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, weight and target on CUDA; within a FakeTensorMode."""
    tokens, classes, width = size
    return empty(tokens, width, dtype=dtype), empty(classes, width, dtype=dtype), empty(tokens, dtype=torch.int64)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("trained", "recompute", "dtype", "tiles"),
    [
        (True, True, BF16, True),
        (True, False, BF16, False),
        (False, False, BF16, True),
        (True, True, torch.float64, False),
    ],
)
def test_the_forward_is_a_launch_unless_it_goes_by_chunks(
    trained: bool, recompute: bool, dtype: torch.dtype, tiles: bool
) -> None:
    values = constants("mean", trained, trained, False, argmax=True, recompute=recompute)
    with FakeTensorMode():
        graph = traced(lambda x, w, t: FORWARD(x, w, None, t, *values), *tensors((8192, 256_000, 64), dtype))
    assert launches(graph) == (["Best Chosen Largest Total"] if tiles else ["fxopt.linear_cross_entropy.default"])


@pytest.mark.usefixtures("hopper")
def test_the_backward_stays_an_operator() -> None:
    values = constants("mean", True, True, False, recompute=True)

    def gradients(hidden: Tensor, weight: Tensor, target: Tensor) -> Any:
        normalizer = hidden.new_empty((2, hidden.shape[0]), dtype=FP32)
        return BACKWARD(hidden.new_empty((), dtype=FP32), None, hidden, weight, None, target, normalizer, *values)

    with FakeTensorMode():
        assert launches(traced(gradients, *tensors(GEMMA))) == ["fxopt.linear_cross_entropy_backward.default"]


# --- costs -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("size", "trained", "dtype", "waits"),
    [
        (GEMMA, True, BF16, True),
        (LLAMA, True, BF16, True),
        ((32_768, *LLAMA[1:]), True, BF16, False),
        (LLAMA, False, BF16, False),
        ((8192, 128_256, 256), False, BF16, True),
        (LLAMA, True, FP32, False),
        (LLAMA, True, torch.float64, False),
    ],
)
def test_gradients_wait_where_a_sum_is_too_large_or_the_logits_too_slow_to_read(
    size: tuple[int, ...], trained: bool, dtype: torch.dtype, waits: bool
) -> None:
    with FakeTensorMode():
        hidden, weight, _ = tensors(size, dtype)
        assert loss_costs.recomputes(hidden, weight, size[0], Wanted(True, trained, False), "auto") == waits
        assert not loss_costs.recomputes(hidden, weight, size[0], Wanted(True, trained, False), "aten")


@pytest.mark.usefixtures("hopper")
def test_a_number_of_tokens_that_changes_is_compared_once() -> None:
    shapes = ShapeEnv()
    source = ConstantSource("tokens")
    tokens = shapes.create_symintnode(shapes.create_symbol(8192, source, DimDynamic.DYNAMIC), hint=8192, source=source)
    with FakeTensorMode():
        hidden, weight, _ = tensors(GEMMA)
        for number in (tokens, shapes.create_unbacked_symint()):
            assert loss_costs.recomputes(hidden, weight, number, Wanted(True, True, False), "auto")
    assert [str(guard.expr).split(" ", 1)[1] for guard in shapes.guards] == ["< 14401"]


@pytest.mark.parametrize("card", TARGETS, ids=lambda card: card.name)
def test_a_fourth_product_costs_time_and_a_sum_of_the_weight_memory(card: Card) -> None:
    rates = loss_costs.rates_of(card.arch)
    with FakeTensorMode():
        _, weight, _ = tensors(LLAMA)
        for wanted in (Wanted(True, True, False), Wanted(True, False, False)):
            assert loss_costs.chunk_seconds(weight, wanted, rates) < loss_costs.tile_seconds(weight, wanted, rates)
        assert loss_costs.tokens_for_chunks(weight, Wanted(True, False, False)) == 0
        least = loss_costs.tokens_for_chunks(weight, Wanted(True, True, False))
    assert 4 * LLAMA[1] * LLAMA[2] <= 0.64 * least * LLAMA[1] <= 4.001 * LLAMA[1] * LLAMA[2]


def test_rates_of_a_card_that_is_not_in_the_table_are_those_of_an_older_one() -> None:
    assert [loss_costs.rates_of(arch) for arch in (75, 87, 103, 121)] == [
        BY_ARCHITECTURE[arch] for arch in (80, 86, 100, 120)
    ]


@pytest.mark.parametrize(("size", "inductor"), [(GEMMA, 16_000), (LLAMA, 8_016)])
def test_tiles_take_a_twelfth_of_the_memory_that_inductor_takes(size: tuple[int, int, int], inductor: int) -> None:
    """Its MiB: of Cut Cross-Entropy's table 1, and 8 bytes a logit; here without the gradients at 128k, which both have
    and which are as much as a twelfth themselves."""
    with FakeTensorMode():
        hidden, weight, target = tensors(size)
        values = constants("mean", True, True, False, recompute=True)
        forward = memory_of(FORWARD, hidden, weight, None, target, *values)
        normalizer = torch.empty(2, size[0], device="cuda")
        upstream = torch.empty((), device="cuda")
        backward = memory_of(BACKWARD, upstream, None, hidden, weight, None, target, normalizer, *values)
    assert forward is not None
    assert backward is not None
    gradients = backward.outputs if size == GEMMA else 0
    assert forward.outputs == (2 * size[0] + 1) * 4
    assert max(forward.workspace, backward.workspace + gradients) <= 0.08 * inductor * 2**20
