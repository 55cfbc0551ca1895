"""The norm rule: what it finds in functions and models, what it leaves alone and why.

That each spelling obeys the laws is `test_laws.py`'s; here are other ways to write them, and what only looks like one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import harness
import models
import pytest
import torch
import torch.nn.functional as F
from graphs import captured, targets
from torch import Tensor, fx, nn

import fxopt
from fxopt import backend as pipeline
from fxopt.differential import same_function
from fxopt.ops.norm_operator import FORWARD
from fxopt.passes.norm import RULE
from fxopt.rewrite import Outcome, apply_rule

BF16, F32 = torch.bfloat16, torch.float32
WIDTH, EPS = 16, 1e-6
NORM = "fxopt.norm.default"


def tensors(*names: str, dtype: torch.dtype = F32) -> list[Tensor]:
    """x, residual and gate [2, 3, 16], weight and bias [16]."""
    generator = torch.Generator().manual_seed(0)
    shapes = {name: (WIDTH,) if name in ("weight", "bias") else (2, 3, WIDTH) for name in names}
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes.values()]


def rewritten(fn: Callable[..., Any], *args: Tensor) -> Outcome:
    """The rule applied by force to the graph of `fn`; where it fires, the function stays the same, gradients too."""
    graph = captured(fn, *args).module
    outcome = apply_rule(RULE, graph, force=True)
    if outcome.rewrites:
        same_function(graph, outcome.module, graph.meta["inputs"])
    return outcome


def details(outcome: Outcome) -> list[str]:
    """Which spellings were found, in graph order."""
    return [item.detail.split("; ")[0] for item in outcome.rewrites]


def reasons(outcome: Outcome) -> list[str]:
    """Why sites were left alone."""
    return [reason for item in outcome.refusals for reason in item.reasons]


def rest(outcome: Outcome) -> list[str]:
    """The operators left beside the norms."""
    return [name for name in targets(outcome.module) if name != NORM and "getitem" not in name]


def rms(x: Tensor, weight: Tensor, eps: float = EPS) -> Tensor:
    """Llama's."""
    wide = x.to(F32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


# --- other ways to write them ------------------------------------------------------------------------------------

VARIANTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "product and square root": lambda x, w, b: w * (x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS)),
    "power and reciprocal": lambda x, w, b: x * (1 / (x.pow(2).mean(2, keepdim=True) + EPS) ** 0.5) * w,
    "eps first, square": lambda x, w, b: x * torch.pow(EPS + x.square().mean(dim=-1, keepdim=True), -0.5) * w,
    "sum over width": lambda x, w, b: x * torch.rsqrt((x**2).sum(-1, True) / WIDTH + EPS) * w,
    "reciprocal of the root": lambda x, w, b: w * x.mul(x.square().mean(-1, True).add(EPS).sqrt().reciprocal()),
    "vector norm": lambda x, w, b: w * (x / (torch.linalg.vector_norm(x, dim=-1, keepdim=True) * WIDTH**-0.5 + EPS)),
    "unit rows": lambda x, w, b: F.normalize(x, dim=-1, eps=4.0) * math.sqrt(WIDTH) * (w + 1),
    "variance": lambda x, w, b: (x - x.mean(-1, True)) / (x.var(-1, unbiased=False, keepdim=True) + EPS).sqrt() * w + b,
    "corrected variance": lambda x, w, b: (
        b + w * ((x - x.mean(-1, True)) / torch.sqrt(torch.var(x, -1, correction=0, keepdim=True) + EPS))
    ),
    "standard deviation": lambda x, w, b: (x - x.mean(-1, True)) / (x.std(-1, False, True) + EPS) * w + b,
    "centred once": lambda x, w, b: (lambda d: d * torch.rsqrt((d * d).mean(-1, True) + EPS))(x - x.mean(-1, True)),
    "F.layer_norm": lambda x, w, b: F.layer_norm(x, [WIDTH], w, b, 1e-12),
    "F.layer_norm, keywords": lambda x, w, b: F.layer_norm(x, (WIDTH,), bias=b, weight=w),
    "F.rms_norm": lambda x, w, b: F.rms_norm(x, (WIDTH,), w),
    "torch.rms_norm": lambda x, w, b: torch.rms_norm(x, (WIDTH,), w, 0.5),
}


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("name", VARIANTS)
def test_other_ways_to_write_a_norm(name: str, dtype: torch.dtype) -> None:
    outcome = rewritten(VARIANTS[name], *tensors("x", "weight", "bias", dtype=dtype))
    assert targets(outcome.module).count(NORM) == 1
    assert set(rest(outcome)) <= {"aten.add.Tensor"}  # weight + 1
    assert not apply_rule(RULE, outcome.module, force=True).rewrites


# module, class, what is found in fp32 and in bf16
IN_TRANSFORMERS = [
    ("llama", "LlamaRMSNorm", "rms weight after cast", "rms weight after cast"),
    ("olmo2", "Olmo2RMSNorm", "rms weight after cast", "rms weight before cast"),
    ("gemma2", "Gemma2RMSNorm", "rms one plus weight", "rms one plus weight"),
    ("gemma4", "Gemma4RMSNorm", "rms weight after cast", "rms float weight"),
    ("t5", "T5LayerNorm", "rms weight after cast", "rms promoted"),
    ("nanochat", "NanoChatRMSNorm", "rms without weight", "rms without weight"),
    ("llama4", "Llama4TextRMSNorm", "rms weight after cast", "rms weight after cast"),
    ("deepseek_v4", "DeepseekV4UnweightedRMSNorm", "rms without weight", "rms rounded factor"),
    ("imagegpt", "ImageGPTLayerNorm", "rms weight after cast", "rms weight"),
    ("qwen3_next", "Qwen3NextRMSNormGated", "rms then gate", "rms then gate"),
    ("cohere", "CohereLayerNorm", "layer wide", "layer wide"),
    ("deberta", "DebertaLayerNorm", "layer affine after cast", "layer affine after cast"),
    ("pocket_tts", "PocketTTSFlowLayerNorm", "layer by unbiased weight bias", "layer by unbiased weight bias"),
    ("nemotron", "NemotronLayerNorm1P", "layer norm one plus weight", "layer norm one plus weight"),
]


@pytest.mark.parametrize(("module", "name", "in_f32", "in_bf16"), IN_TRANSFORMERS)
def test_norms_of_transformers(module: str, name: str, in_f32: str, in_bf16: str) -> None:
    built = getattr(import_module(f"transformers.models.{module}.modeling_{module}"), name)
    made = built(eps=EPS) if "without" in in_f32 and "Llama" not in name else built(WIDTH, eps=EPS)
    models.unsettle(made)
    inputs = ("x", "gate") if name.endswith("Gated") else ("x",)
    for dtype, expected in ((F32, in_f32), (BF16, in_bf16)):
        outcome = rewritten(made.to(dtype), *tensors(*inputs, dtype=dtype))
        assert details(outcome) == [expected]
        assert set(rest(outcome)) <= {"aten.add.Tensor"}


def test_default_eps_of_rms_norm_is_that_of_fp32() -> None:
    """Documented as that of x's dtype; the kernels take fp32's for narrow dtypes too."""
    x = torch.full((2, WIDTH), 1e-4, dtype=BF16)
    outcome = rewritten(lambda x: F.rms_norm(x, (WIDTH,)), x)
    (norm,) = (node for node in outcome.module.graph.nodes if str(node.target) == NORM)
    assert norm.args[6] is None
    (result,) = outcome.module(x)
    torch.testing.assert_close(result, F.rms_norm(x, (WIDTH,)), rtol=0, atol=0)


def test_a_weight_of_another_shape_stays_outside() -> None:
    """A scale a batch element, as diffusion transformers have: the norm is found, its scale is not a weight."""
    scale = torch.randn(2, 1, WIDTH)
    outcome = rewritten(lambda x, s: s * (x * torch.rsqrt(x.pow(2).mean(-1, True) + EPS)), *tensors("x"), scale)
    assert rest(outcome) == ["aten.mul.Tensor"]
    assert len(outcome.rewrites) == 1


@pytest.mark.parametrize("layout", ["transposed", "sliced"])
@pytest.mark.parametrize("norm", [rms, lambda x, w: F.layer_norm(x, (WIDTH,), w)])
@pytest.mark.fault("non-unit last stride")
def test_layouts(norm: Callable[..., Tensor], layout: str) -> None:
    x, weight = tensors("x", "weight")
    x = x.detach().transpose(0, 1) if layout == "transposed" else torch.stack([x.detach(), x.detach()], -1)[..., 0]
    assert len(rewritten(norm, x.requires_grad_(), weight).rewrites) == 1


# --- the residual add --------------------------------------------------------------------------------------------


def test_residual_add_is_taken_in_and_the_sum_is_returned() -> None:
    def block(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return rms(total, weight).sin(), total.cos()

    outcome = rewritten(block, *tensors("x", "residual", "weight", dtype=BF16))
    assert details(outcome) == ["rms weight after cast, with the add before it"]
    assert rest(outcome) == ["aten.sin.default", "aten.cos.default"]


def test_sum_that_is_an_output_itself_and_of_one_tensor_twice() -> None:
    def block(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = x + x
        return rms(total, weight), total

    assert rest(rewritten(block, *tensors("x", "weight"))) == []


def test_chain_of_residual_adds() -> None:
    def chain(x: Tensor, weight: Tensor) -> Tensor:
        for _ in range(3):
            x = x + rms(x, weight).tanh()
        return rms(x, weight)

    outcome = rewritten(chain, *tensors("x", "weight"))
    assert details(outcome) == ["rms weight after cast"] + ["rms weight after cast, with the add before it"] * 3
    assert rest(outcome) == ["aten.tanh.default"] * 3


def test_two_norms_of_one_sum_share_it() -> None:
    """GPT-NeoX: the first takes in the add, the second reads the sum."""

    def parallel(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return F.layer_norm(total, (WIDTH,), weight, bias), F.layer_norm(total, (WIDTH,), bias, weight)

    outcome = rewritten(parallel, *tensors("x", "residual", "weight", "bias"))
    found = "layer norm weight bias default"
    assert details(outcome) == [f"{found}, with the add before it", found]


def test_the_add_of_a_product_in_16_bits_to_an_fp32_stream_is_taken_in() -> None:
    """What mixed precision makes of a layer; under autocast as by explicit casts."""

    def layer(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = x.bfloat16() + residual
        return rms(total, weight).bfloat16(), total

    outcome = rewritten(layer, *tensors("x", "residual", "weight"))
    assert [item.endswith("with the add before it") for item in details(outcome)] == [True]
    assert "aten.add.Tensor" not in rest(outcome)
    (node,) = (node for node in outcome.module.graph.nodes if node.target is torch.ops.fxopt.norm.default)
    assert [value.dtype for value in node.meta["val"][:2]] == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize(
    "total",
    [
        lambda x, residual: x + residual[0],  # broadcast
        lambda x, residual: torch.add(x, residual, alpha=2),
        lambda x, residual: x + residual.double(),  # promotion
        lambda x, residual: x + 1.0,
    ],
)
def test_other_adds_stay_outside(total: Callable[..., Tensor]) -> None:
    outcome = rewritten(lambda x, r, w: rms(total(x, r).float(), w), *tensors("x", "residual", "weight"))
    assert len(outcome.rewrites) == 1
    assert "aten.add.Tensor" in rest(outcome)


@pytest.mark.parametrize("early", [False, True])
def test_norm_is_found_where_the_add_cannot_be_taken_in(early: bool) -> None:
    """Both results would have to be where the sum is, if it is read before the norm is there: the gate comes later."""

    def gated(x: Tensor, residual: Tensor, weight: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        wide = total.to(F32)
        wide = weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(total.dtype)
        gate = (total * gate if early else gate).tanh()
        return (wide * F.silu(gate.to(F32))).to(total.dtype), total

    outcome = rewritten(gated, *tensors("x", "residual", "weight", "gate"))
    assert details(outcome) == ["rms then gate" if early else "rms then gate, with the add before it"]
    assert sorted(rest(outcome)) == (["aten.add.Tensor", "aten.mul.Tensor"] if early else []) + ["aten.tanh.default"]


# --- what only looks like a norm ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + EPS),
        lambda x: x * torch.rsqrt(x.pow(2).mean((1, 2), keepdim=True) + EPS),
        lambda x: x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True) + EPS),
        lambda x: x * torch.sqrt(x.pow(2).mean(-1, keepdim=True) + EPS),
        lambda x: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) / 15 + EPS),
        lambda x: x / (x.norm(1, dim=-1, keepdim=True) * WIDTH**-0.5 + EPS),
        lambda x: F.layer_norm(x, (3, WIDTH)),
        lambda x: F.rms_norm(x, (3, WIDTH)),
        lambda x: (x - x.mean(-1, True)) * torch.rsqrt(x.var(-1, keepdim=True) + EPS),  # divides by 15
        lambda x: (x - x.mean(-1, True)) / (x.std(-1, keepdim=True) + EPS),
        lambda x: (x - x.amax(-1, True)) * torch.rsqrt((x - x.mean(-1, True)).pow(2).mean(-1, True) + EPS),
        lambda x: (x - x.amax(-1, True)).exp() / (x - x.amax(-1, True)).exp().sum(-1, True),
        lambda x: x * torch.rsqrt(x.transpose(0, 0).sin().pow(2).mean(-1, keepdim=True) + EPS),
        lambda x: F.group_norm(x, 3),
    ],
)
@pytest.mark.fault("wildcarded constants")
def test_near_misses_are_left_alone(fn: Callable[[Tensor], Tensor]) -> None:
    assert details(rewritten(fn, *tensors("x"))) == []


def test_wrong_axis_is_told() -> None:
    outcome = rewritten(lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean(1, True) + EPS)), *tensors("x", "weight"))
    assert any("expected the constant 2, found the constant 1" in reason for reason in reasons(outcome))


def escaping(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    variance = x.pow(2).mean(-1, keepdim=True)
    return weight * (x * torch.rsqrt(variance + EPS)), variance


def written_between(x: Tensor, weight: Tensor) -> Tensor:
    x = x.clone()
    factor = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
    x.view(-1).mul_(2)  # through a view; of x itself it would be seen as 2 * x
    return weight * (x * factor)


def written_later(x: Tensor, weight: Tensor) -> Tensor:
    x = x.clone()
    result = rms(x, weight)
    x.view(-1).mul_(2)
    return result + x


def switched(x: Tensor, weight: Tensor) -> Tensor:
    with torch.no_grad():
        factor = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * (x * factor)


def of_integers(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.to(torch.int64).to(F32)
    return (weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS))).to(F32)


@pytest.mark.parametrize(
    ("fn", "sentence"),
    [
        (escaping, "(aten.mean.dim) is also a graph output"),
        (written_between, "(aten.mul_.Tensor) writes in place to memory of the region"),
        (written_later, "(aten.mul_.Tensor) writes in place to what the op would keep for the backward"),
        (switched, "switches grad mode or autocast inside the region"),
    ],
)
def test_refusals_name_the_node(fn: Callable[..., Any], sentence: str) -> None:
    outcome = rewritten(fn, *tensors("x", "weight", dtype=BF16))
    assert not outcome.rewrites
    assert any(sentence in reason for reason in reasons(outcome)), reasons(outcome)
    assert not any(item.cost for item in outcome.refusals)


def test_norm_of_integers_in_float_is_one_of_floats() -> None:
    outcome = rewritten(of_integers, *tensors("x", "weight"))
    assert rest(outcome) == ["aten.to.dtype", "aten.to.dtype"]


def test_eps_that_is_an_input_of_the_graph() -> None:
    """Under dynamic=True, numbers that modules hold are."""
    outcome = apply_rule(RULE, captured(_Llama(WIDTH), *tensors("x"), dynamic=True).module, force=True)
    assert any("a value of the graph, not a number" in reason for reason in reasons(outcome))


class _Llama(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), EPS

    def forward(self, x: Tensor) -> Tensor:
        return rms(x, self.weight, self.eps)


# --- cost --------------------------------------------------------------------------------------------------------


def test_left_to_inductor_on_a_cpu_unless_forced() -> None:
    outcome = apply_rule(RULE, captured(rms, *tensors("x", "weight")).module)
    (refusal,) = outcome.refusals
    assert refusal.cost
    assert "Inductor fuses this norm as well on a CPU" in refusal.reasons[0]


def test_rewritten_unforced_where_a_kernel_is_generated() -> None:
    outcome = apply_rule(RULE, captured(rms, *tensors("x", "weight")).module, lowering="interpret")
    assert not outcome.refusals
    (node,) = outcome.module.graph.find_nodes(op="call_function", target=FORWARD)
    assert node.args[-1] == "interpret"


def test_there_is_no_kernel_for_float64() -> None:
    graph = captured(F.rms_norm, torch.ones(2, 3, WIDTH, dtype=torch.float64), [WIDTH]).module
    (refusal,) = apply_rule(RULE, graph, lowering="interpret").refusals
    assert refusal.cost


# --- models ------------------------------------------------------------------------------------------------------


def forced(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """fxopt with the rule forced, and AOTAutograd's eager compiler: no C++ to compile."""
    report, call = pipeline.run(gm, inputs, fxopt.Options.parse({"force": ["norm"]}), harness.original)
    pipeline.record(fxopt.Report([report]))
    return call


def norms_rewritten() -> list[fxopt.Rewrite]:
    """The norms rewritten in this process since the reports were cleared."""
    found = [item for report in fxopt.reports() for item in (*report.rewrites, *report.refusals) if item.rule == "norm"]
    assert all(isinstance(item, fxopt.Rewrite) for item in found if "silu" not in str(item)), found
    return [item for item in found if isinstance(item, fxopt.Rewrite)]


# family, dtype, norms, norms that take in the add before them
MODELS = [
    ("llama", BF16, 5, 4),
    ("gemma2", F32, 9, 4),
    ("t5", BF16, 12, 10),
    ("bert", F32, 6, 4),
    *(
        pytest.param(*one, marks=pytest.mark.slow)
        for one in (
            ("llama", F32, 5, 4),
            ("gemma2", BF16, 9, 4),
            ("t5", F32, 12, 10),
            ("gpt2", F32, 5, 4),
            ("gpt_neox", F32, 5, 2),
            ("qwen3", F32, 9, 4),
        )
    ),
]


@pytest.mark.parametrize(("family", "dtype", "norms", "adds"), MODELS)
def test_every_norm_of_a_model(family: str, dtype: torch.dtype, norms: int, adds: int) -> None:
    fxopt.clear_reports()
    model, inputs = models.build(family, dtype=dtype)
    harness.check(model, torch.compile(model, backend=forced), inputs)
    found = norms_rewritten()
    assert len(found) == norms
    assert sum("with the add" in item.detail for item in found) == adds
    assert all(item.place.source for item in found)


def test_under_inductor() -> None:
    fxopt.clear_reports()
    model, inputs = models.build("llama")
    harness.check(model, torch.compile(model, backend="fxopt", options={"force": ["norm"]}), inputs)
    assert len(norms_rewritten()) == 5


@pytest.mark.fault("checkpoint and autograd.Function bodies")
def test_inside_checkpointed_layers() -> None:
    fxopt.clear_reports()
    model, inputs = models.build("llama")
    model.gradient_checkpointing_enable()
    harness.check(model, torch.compile(model, backend=forced), inputs)
    assert len(norms_rewritten()) == 5


def test_under_autocast() -> None:
    fxopt.clear_reports()
    model, inputs = models.build("llama")
    call = torch.compile(model, backend=forced)
    harness.check(model, call, inputs, context=lambda: torch.autocast("cpu", BF16))
    assert len(norms_rewritten()) == 5


@pytest.mark.fault("the recompile limit")
def test_sizes_that_change_need_two_graphs_as_without_us() -> None:
    fxopt.clear_reports()
    model, _ = models.build("llama")
    call = torch.compile(model, backend=forced)
    for length in (27, 19, 33):
        harness.check(model, call, models.inputs_for("llama", model, seq=length))
    assert len(norms_rewritten()) == 10
