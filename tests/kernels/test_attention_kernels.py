"""What is generated for attention, how it is launched on which card, what of it AOTAutograd sees; nothing is run."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from attention_cases import PROGRAMS
from fake_cuda import empty, launches, traced
from torch import Tensor
from torch._functorch.compile_utils import fx_graph_cse

from fxopt.compat import FakeTensorMode, make_fx
from fxopt.kernels.attention import backward_kv_kernel, backward_q_kernel, forward_kernel
from fxopt.kernels.attention_configs import GRAIN, configs, row_config
from fxopt.kernels.attention_shipped import shipped
from fxopt.kernels.attention_spec import AttentionKernelSpec, parts_of, unsupported
from fxopt.kernels.cards import CARDS, Card
from fxopt.kernels.configs import Config
from fxopt.ops.attention_operator import BACKWARD, FORWARD
from fxopt.ops.launch import launch, uninitialized
from fxopt.score.program import Program
from fxopt.score.term import apply, load, variable

BF16, FP32 = torch.bfloat16, torch.float32
CAUSAL = AttentionKernelSpec("bf16", 128, 128, 0.125, upper=0)
SHAPE = (2, 8, 512, 128)


# --- source ------------------------------------------------------------------------------------------------------


def test_of_what_there_is_not_nothing_is_generated() -> None:
    plain = dataclasses.replace(CAUSAL, upper=None)
    for kernel in (forward_kernel(plain), backward_q_kernel(plain, True), backward_kv_kernel(plain, True, True)):
        assert not any(
            word in kernel.source for word in ("if ", "Sink", "Intervals", "kept", "ieee", "exact", "spread")
        )
        compile(kernel.source, kernel.name, "exec")
        assert {kind for _, kind in kernel.signature if kind[0] != "*"} <= {"i32", "constexpr"}


def test_tiles_that_no_mask_cuts_are_loops_without_a_mask() -> None:
    for kernel in (forward_kernel(CAUSAL), backward_q_kernel(CAUSAL, True), backward_kv_kernel(CAUSAL, True, True)):
        full, masked = kernel.source.split("in range(full_blocks)")[1].split("in range(masked_blocks)")
        assert "inside" not in full
        assert "inside" in masked


@pytest.mark.parametrize(
    ("size", "lengths"), [(3, [16]), (64, [64]), (72, [64, 16]), (80, [64, 16]), (112, [128]), (192, [128, 64])]
)
def test_heads_are_tiles_of_powers_of_two(size: int, lengths: list[int]) -> None:
    assert [length for _, length, _ in parts_of(size)] == lengths


def test_a_power_by_a_tensor_is_refused_with_a_sentence() -> None:
    term = apply("pow", apply("abs", variable("s")), load(0, (variable("h"),), "float"))
    assert unsupported(str(Program(term)), "") == "Triton has no exact pow of floats by a tensor"
    assert not any(unsupported(str(Program(one)), "") for one, _, _ in PROGRAMS.values())


# --- configurations ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_every_head_has_a_configuration_on_every_card(dtype: str, card: Card) -> None:
    for size in (32, 64, 80, 96, 128, 192, 256):
        spec = AttentionKernelSpec(dtype, size, size, 1.0)
        for kernel in (
            "attention_forward",
            "attention_backward_q",
            "attention_backward_kv",
            "attention_backward_pairs",
        ):
            found = configs(kernel, spec, card)
            assert found
            assert len(set(found)) == len(found)
            assert all(GRAIN % size == 0 for config in found for _, size in config.tiles)


@pytest.mark.parametrize(("width", "rows"), [(16, 128), (64, 64), (80, 32), (128, 32), (192, 16), (256, 16)])
def test_a_pass_over_rows_holds_no_more_of_wider_ones(width: int, rows: int) -> None:
    assert row_config(width, CARDS[0]).tile("BLOCK_Q") == rows


def test_shipped_kernels_have_names_of_their_own_and_every_kernel_is_among_them() -> None:
    found = [one.name for one in shipped(CARDS[0])]
    assert len(found) == len(set(found))
    assert {one.split()[0] for one in found} == {
        "attention_forward", "attention_delta", "attention_query_tiles",
        *(f"attention_backward_{which}" for which in ("q", "kv", "pairs")),
    }  # fmt: skip


# --- launching ---------------------------------------------------------------------------------------------------


def test_a_process_that_compiles_interprets_nothing() -> None:
    values = dict.fromkeys(forward_kernel(CAUSAL).arguments, torch.ones(1))
    with pytest.raises(RuntimeError, match="needs TRITON_INTERPRET=1"):
        launch(forward_kernel(CAUSAL), 1, values, Config((("BLOCK_Q", 16), ("BLOCK_K", 16))))


def test_two_tensors_to_write_to_are_never_taken_for_one() -> None:
    def function(x: Tensor) -> list[Tensor]:
        return [uninitialized(x.shape, x.dtype, x).fill_(value) for value in (1, 2)]

    graph = make_fx(function)(torch.ones(3)).graph
    made = [node for node in fx_graph_cse(graph).nodes if "empty" in str(node.target)]
    assert len(made) == 2


def constants(program: Any = "", **changes: Any) -> list[Any]:
    """The operator's, of causal attention."""
    values = {"program": program, "predicate": "", "scale": 0.125, "lower": None, "upper": 0, "dropout": 0.0}
    return [*(values | {"empty": "zero", "heads_last": True, "lowering": "auto"} | changes).values()]


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("lowering", "dtype", "found"),
    [
        ("auto", BF16, ["Lse Out"]),
        ("aten", BF16, ["fxopt.attention.default"]),
        ("auto", torch.float64, ["fxopt.attention.default"]),
    ],
)
def test_the_forward_is_a_launch(lowering: str, dtype: torch.dtype, found: list[str]) -> None:
    with FakeTensorMode():
        graph = traced(
            lambda q, k, v: FORWARD(q, k, v, None, None, None, None, [], *constants(lowering=lowering)),
            *(empty(*SHAPE, dtype=dtype) for _ in "qkv"),
        )
    assert launches(graph) == found


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("program", ["identity", "softcap"])
def test_the_backward_is_three_launches(program: str, documents: bool) -> None:
    """Those by captured tensors are added up by indexing, which CUDA tensors without CUDA cannot do."""
    values = constants(str(Program(PROGRAMS[program][0])) if program != "identity" else "")

    def gradients(upstream: Tensor, q: Tensor, k: Tensor, v: Tensor, intervals: Tensor) -> Any:
        lse, given = q.new_empty(q.shape[:3], dtype=FP32), intervals if documents else None
        wanted = [True, True, True, False]
        return BACKWARD(upstream, q, k, v, None, given, None, None, [], *values, q, lse, wanted)[:4]

    with FakeTensorMode():
        graph = traced(gradients, *(empty(*SHAPE) for _ in "uqkv"), empty(2, 512, 3, dtype=torch.int64))
    assert launches(graph) == ["Delta", "ByQ", *(["Tiles"] if documents else []), "ByK ByV"]
