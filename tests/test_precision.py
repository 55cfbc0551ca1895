"""Mixed precision by explicit casts: what the policy says, where casts stand, and errors against fp64 and autocast."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import models
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from mixed import (
    BF16,
    FP16,
    FP32,
    LOW,
    Stages,
    apply,
    autocast,
    calls,
    casts_to_bf16,
    dtypes_in,
    dtypes_of,
    relative,
    run,
)
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import fxopt
from fxopt import OptionError, Options, compat
from fxopt.capture import trace
from fxopt.fake import bound_arguments, value_of
from fxopt.passes import precision
from fxopt.precision import support
from fxopt.precision.calls import class_of_call
from fxopt.precision.casts import MARK
from fxopt.precision.policy import LOW_ARGUMENTS, Policy, matches, operator_name
from fxopt.report import Report
from fxopt.rewrite import submodules
from fxopt.testing import compare, step, truth

pytestmark = pytest.mark.filterwarnings("error::fxopt.FxoptWarning")
aten = torch.ops.aten


# --- models ------------------------------------------------------------------------------------------------------


def check_model(family: str, given: Any = "bf16", context: Any = None, **changes: Any) -> Stages:
    """One step must be as near to fp64 as eager's under autocast."""
    model, inputs = models.build(family, **changes)
    stages, how = Stages(given), {} if context is None else {"context": context}
    ours = step(torch.compile(model, backend=stages), inputs, parameters=model, **how)
    eager = step(model, inputs, context=autocast)
    compare(ours, eager, truth(model, inputs)).check()
    assert stages.report.casts
    return stages


ALWAYS = {"llama", "gemma2", "gpt2", "bert"}


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[] if name in ALWAYS else pytest.mark.slow) for name in models.FAMILIES]
)
def test_models_are_as_near_to_fp64_as_under_autocast(family: str) -> None:
    stages = check_model(family)
    for node in stages.nodes(aten.linear.default, aten.scaled_dot_product_attention.default):
        assert set(dtypes_in(node)[:2]) == {BF16}, node


def test_the_loss_is_fused_and_in_fp32() -> None:
    stages = check_model("llama")
    (node,) = stages.nodes(torch.ops.fxopt.linear_cross_entropy.default)
    assert dtypes_in(node)[:2] == [BF16, BF16]
    assert value_of(node)[0].dtype == FP32


def test_an_ambient_autocast_is_replaced() -> None:
    """The same model, the same casts, whether or not autocast is on; nothing is cast a second time."""
    plain, ambient = check_model("qwen2"), check_model("qwen2", context=autocast)
    assert [cast.bytes for cast in ambient.report.casts] == [cast.bytes for cast in plain.report.casts]
    assert not any("Autocast" in str(node.target) for node in ambient.nodes())


def test_checkpointed_layers_take_weights_that_are_cast_outside() -> None:
    model, inputs = models.build("llama")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    stages = Stages()
    ours = step(torch.compile(model, backend=stages), inputs, parameters=model)
    compare(ours, step(model, inputs, context=autocast), truth(model, inputs)).check()
    (graph,) = stages.graphs
    bodies = [body for body in submodules(graph) if body is not graph]
    assert len(bodies) == 2
    for body in bodies:
        linears = [node for node in body.graph.nodes if node.target is aten.linear.default]
        assert len(linears) == 7
        for node in linears:
            assert node.args[1].op == "placeholder"
            assert value_of(node.args[1]).dtype == BF16
    outside = [node for node in graph.graph.nodes if MARK in node.meta and node.args[0].op == "placeholder"]
    assert len(outside) == 2 * 7 + 1


def test_a_model_of_16_bits_is_cast_for_nothing_but_sums() -> None:
    model, inputs = models.build("llama", dtype=BF16)
    stages = Stages()
    ours = step(torch.compile(model, backend=stages), inputs, parameters=model)
    compare(ours, step(model, inputs), truth(model, inputs)).check()
    assert not [cast for cast in stages.report.casts if cast.after == "bfloat16" and "computes in 16" in cast.reason]
    for node in stages.nodes(aten.pow.Tensor_Scalar, aten.mean.dim, aten.rsqrt.default):
        assert dtypes_in(node) == [FP32]


def test_a_frozen_base_with_lora_gets_gradients_of_the_parameters_dtype() -> None:
    class Lora(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(16, 16, bias=False).requires_grad_(False)
            self.down, self.up = nn.Linear(16, 4, bias=False), nn.Linear(4, 16, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return (self.base(x) + self.up(self.down(x)) * 2.0).square().mean()

    torch.manual_seed(0)
    model, x = Lora(), torch.randn(5, 16)
    loss, stages = run(model, x)
    loss.backward()
    assert loss.dtype == FP32
    assert model.base.weight.grad is None
    for weight in (model.down.weight, model.up.weight):
        assert weight.grad is not None
        assert weight.grad.dtype == FP32
    sources = [cast.source for cast in stages.report.casts if cast.after == "bfloat16"]
    assert len(sources) == len(set(sources)) == 4  # x once for two readers, and three weights


def test_tied_weights_are_cast_once() -> None:
    """The embedding reads the parameter, the head its one copy; the gradient is one, in fp32."""
    model, inputs = models.build("llama", tie_word_embeddings=True)
    stages = Stages()
    ours = step(torch.compile(model, backend=stages), inputs, parameters=model)
    compare(ours, step(model, inputs, context=autocast), truth(model, inputs)).check()
    (embedding,) = stages.nodes(aten.embedding.default)
    assert dtypes_in(embedding)[0] == FP32
    assert len([cast for cast in stages.report.casts if cast.source == embedding.args[0].name]) == 1


@pytest.mark.fault("NaN/Inf inputs and GradScaler")
def test_scaled_fp16_training_skips_an_overflow() -> None:
    """GradScaler sees the infinite gradient of a scale that is too large, skips, and the next steps train."""
    model, inputs = models.build("llama", num_hidden_layers=1)
    twin = copy.deepcopy(model)
    call = torch.compile(model, backend=Stages("fp16"))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-25, growth_interval=1_000)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(4):
        sgd.zero_grad()
        loss = call(**inputs).loss
        assert loss.dtype == FP32
        scaler.scale(loss).backward()
        scaler.step(sgd)
        scaler.update()
        losses.append(loss.item())
    assert losses[1] == losses[0]  # the first step was skipped
    assert losses[3] < losses[0] - 0.1
    assert scaler.get_scale() == 2.0**15
    expected = step(twin, inputs)
    assert abs(losses[0] - float(expected.loss)) < 2e-3 * losses[0]


def test_norms_of_fxopt_round_their_results_themselves() -> None:
    """As on a GPU: no cast is left between a norm and the products that read it."""
    model, inputs = models.build("llama")
    stages = Stages("bf16", force=["norm"])
    ours = step(torch.compile(model, backend=stages), inputs, parameters=model)
    compare(ours, step(model, inputs, context=autocast), truth(model, inputs)).check()
    norms = stages.nodes(torch.ops.fxopt.norm.default)
    assert [value_of(node)[0].dtype for node in norms] == [BF16] * 5
    assert {value_of(node)[1].dtype for node in norms} == {FP32}


def test_deferred_logits_keep_no_copy_of_the_head() -> None:
    """They are computed from the parameter itself, cast when they are, and are those that autocast would give."""
    model, inputs = models.build("llama")
    stages = Stages()
    found = torch.compile(model, backend=stages)(**inputs).logits
    (graph,) = stages.graphs
    returned = [value_of(node) for node in next(iter(reversed(graph.graph.nodes))).args[0]]
    assert not [value for value in returned if tuple(value.shape) == tuple(model.lm_head.weight.shape)]
    assert isinstance(found, fxopt.deferred.DeferredTensor)
    with torch.no_grad():
        exact = model(**inputs).logits
        with autocast():
            near = model(**inputs).logits
    assert found.dtype == exact.dtype
    assert float((found - exact).norm()) <= 2 * float((near - exact).norm())


@pytest.mark.parametrize("compute", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_compiled_by_inductor(compute: str) -> None:
    """Through the backend itself, two steps: gradients by the fp64 rule, reports, nothing fallen back."""
    fxopt.clear_reports()
    model, inputs = models.build("llama", num_hidden_layers=1)
    call = torch.compile(model, backend="fxopt", options={"precision": compute})
    low = {"bf16": BF16, "fp16": FP16}[compute]
    for _ in range(2):
        ours = step(call, inputs, parameters=model)
    eager = step(model, inputs, context=lambda: torch.autocast("cpu", low))
    compare(ours, eager, truth(model, inputs)).check()
    (report,) = fxopt.reports()
    assert {cast.after for cast in report.casts} == {str(low).removeprefix("torch.")}
    assert not any("left out" in note for note in report.notes)


def test_inference_graphs() -> None:
    model, inputs = models.build("qwen3")
    with torch.no_grad():
        logits = run(model.eval(), **inputs)[0].logits
        eager = model(**inputs).logits
        with autocast():
            near = model(**inputs).logits.float()
    assert logits.dtype == FP32
    assert float((logits - eager).norm()) <= 2 * float((near - eager).norm())


# --- the policy --------------------------------------------------------------------------------------------------


def test_modules_are_kept_by_path() -> None:
    """The head's products stay in fp32, also inside the fused loss; other modules are as before."""
    stages = check_model("llama", {"compute": "bf16", "keep_fp32": ["lm_head", "*.gate_proj"]})
    (loss,) = stages.nodes(torch.ops.fxopt.linear_cross_entropy.default)
    assert dtypes_in(loss)[:2] == [FP32, FP32]
    linears = stages.nodes(aten.linear.default)
    assert sorted(str(dtypes_in(node)[1]) for node in linears) == ["torch.bfloat16"] * 12 + ["torch.float32"] * 2
    assert any("keep_fp32 has 'lm_head'" in note for note in stages.report.notes)


def test_the_residual_stream_in_16_bits() -> None:
    wide, narrow = check_model("llama"), check_model("llama", {"compute": "bf16", "residual": "bf16"})

    def streams(stages: Stages) -> set[torch.dtype]:
        shape = (models.BATCH, models.SEQ, 64)
        sums = [node for node in stages.nodes(aten.add.Tensor) if tuple(value_of(node).shape) == shape]
        assert len(sums) == 4
        return {value_of(node).dtype for node in sums}

    assert streams(wide) == {FP32}
    assert streams(narrow) == {BF16}
    for node in narrow.nodes(aten.pow.Tensor_Scalar):
        assert dtypes_in(node) == [FP32]


def test_operators_are_overridden() -> None:
    stages = check_model("llama", {"compute": "bf16", "ops": {"aten.silu": "fp32", "linear": "fp32"}})
    for node in stages.nodes(aten.silu.default, aten.linear.default):
        assert set(dtypes_in(node)) == {FP32}
    (first, *_) = stages.nodes(torch.ops.fxopt.attention.default)
    assert dtypes_in(first)[:3] == [BF16] * 3


def test_a_power_is_taken_in_fp32_only_for_a_sum_or_in_fp16() -> None:
    def powers(x: Tensor) -> Tensor:
        y = x @ x
        return y.pow(3) * y + y.pow(2).mean(-1, keepdim=True)

    for compute, first in (("bf16", BF16), ("fp16", FP32)):
        nodes = [node for node in apply(powers, compute, x=torch.randn(3, 3)).module.graph.nodes if "pow" in node.name]
        assert [value_of(node).dtype for node in nodes] == [first, FP32]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("bf17", "compute='bf17' .did you mean 'bf16'.. is none of bf16, fp16"),
        ("fp32", "compute='fp32'"),
        ({"residual": "bf16"}, "says no 'compute'"),
        ({"compute": "bf16", "residual": "fp16"}, "residual='fp16'.* is none of fp32, bf16"),
        ({"compute": "bf16", "keep": []}, "has no 'keep'"),
        ({"compute": "bf16", "keep_fp32": "lm_head"}, r"must be a list of module paths, .*keep_fp32=\['lm_head'\]"),
        ({"compute": "bf16", "keep_fp32": [3]}, "holds 3, which is no module path"),
        ({"compute": "bf16", "ops": {"aten.siluu": "fp32"}}, "no operator aten.siluu .did you mean 'silu'"),
        ({"compute": "bf16", "ops": {"silu": "high"}}, "'silu' is 'high'.*, not low, fp32 or follow"),
        ({"compute": "bf16", "ops": ["silu"]}, "must be a dict from operator to class"),
    ],
)
def test_bad_precision_is_named(given: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Options.parse({"precision": given})


def test_a_pattern_that_matches_nothing_is_an_error_before_the_step() -> None:
    model, inputs = models.build("llama", num_hidden_layers=1)
    options = {"precision": {"compute": "bf16", "keep_fp32": ["lm_haed"]}}
    with pytest.raises(OptionError, match="keep_fp32='lm_haed' matches no module of the model, which has lm_head"):
        torch.compile(model, backend="fxopt", options=options)(**inputs)


def test_patterns_are_looked_for_in_every_graph_of_a_model() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            torch._dynamo.graph_break()
            return self.second(x)

    _, stages = run(Broken(), torch.randn(3, 8), given={"compute": "bf16", "keep_fp32": ["second"]})
    first, second = stages.nodes(aten.linear.default)
    assert dtypes_in(first)[1] == BF16
    assert dtypes_in(second)[1] == FP32


def test_patterns() -> None:
    assert matches("lm_head", "lm_head")
    assert matches("lm_head", "lm_head.inner")
    assert matches("*.router", "model.layers.0.mlp.router")
    assert not matches("*.router", "model.layers.0.mlp.router_norm")


# --- where casts stand -------------------------------------------------------------------------------------------


def test_a_cast_goes_above_what_repeats_a_tensor() -> None:
    def repeated(x: Tensor, w: Tensor) -> Tensor:
        return x[:, None].expand(-1, 4, -1).reshape(-1, 8) @ w

    found = apply(repeated, x=torch.randn(3, 8), w=torch.randn(8, 5))
    assert {cast.source: cast.bytes for cast in precision.casts_in(found.module) if cast.after == "bfloat16"} == {
        "arg0_1": 48,
        "arg1_1": 80,
    }


def test_a_cast_stays_below_what_takes_a_part() -> None:
    found = apply(lambda x, w: x[:, :2] @ w, x=torch.randn(3, 8), w=torch.randn(2, 5))
    assert sorted(cast.bytes for cast in casts_to_bf16(found)) == [12, 20]


def summed(residual: Tensor, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return residual + F.linear(x, w, b).view(3, 4)


def test_a_bias_is_added_in_fp32_where_a_sum_in_fp32_reads_it() -> None:
    """No cast of it, none of its gradient; the product alone is rounded."""
    torch.manual_seed(0)
    given = {"residual": torch.randn(3, 4), "x": torch.randn(3, 5), "w": torch.randn(4, 5), "b": torch.randn(4)}
    given = {name: one.requires_grad_() for name, one in given.items()}
    found, stages = run(summed, **given)
    (product,) = stages.nodes(aten.linear.default)
    assert len(product.args) == 2
    assert dtypes_in(product) == [BF16, BF16]
    assert {cast.bytes for cast in stages.report.casts} == {2 * 15, 2 * 20}
    upstream = torch.randn(3, 4)
    found.backward(upstream)
    assert given["b"].grad is not None
    assert torch.equal(given["b"].grad, upstream.sum(0))
    x, w = (given[name].detach().bfloat16() for name in "xw")
    assert torch.equal(found, given["residual"] + ((x @ w.t()).float() + given["b"]))
    assert "as autocast makes them, 3 would write" in stages.report.notes[-1]


@pytest.mark.parametrize(
    ("function", "given_policy"),
    [
        (lambda residual, x, w, b: residual + F.silu(F.linear(x, w, b)), "bf16"),  # not read as it is
        (lambda residual, x, w, b: F.linear(x, w, b), "bf16"),
        (lambda residual, x, w, b: residual[0] + F.linear(x, w, b), "bf16"),  # not of its size: no residual stream
        (lambda residual, x, w, b: residual + torch.addmm(b, x, w.t(), beta=0.5), "bf16"),
        (lambda residual, x, w, b: (y := F.linear(x, w, b)) + y, "bf16"),
        (lambda residual, x, w, b: F.linear(x, w) + F.linear(x, w, b), "bf16"),  # a sum in 16 bits
        (summed, {"compute": "bf16", "residual": "bf16"}),
    ],
)
def test_a_bias_of_other_products_stays_with_them(function: Callable[..., Tensor], given_policy: Any) -> None:
    shapes = {"residual": (3, 4), "x": (3, 5), "w": (4, 5), "b": (4,)}
    found = apply(function, given_policy, **{name: torch.randn(shape) for name, shape in shapes.items()})
    assert 8 in {cast.bytes for cast in casts_to_bf16(found)}  # four numbers of the bias


def test_gpt2_has_fewer_casts_than_one_a_use() -> None:
    """Two of four biases a layer, forward and backward; its addmm by way of a view, under dropout too."""
    stages = check_model("gpt2")
    biases = [cast for cast in stages.report.casts if cast.source.endswith("bias_")]
    sums = [node for node in stages.nodes(aten.mm.default) if value_of(node).dtype == BF16]
    assert len(sums) == len(biases) == 2 * 2
    dropped = run(lambda r, x, w, b: r + F.dropout(torch.addmm(b, x, w), 0.5), *(torch.randn(4, 4),) * 3, torch.ones(4))
    assert len(dropped[1].nodes(aten.mm.default)) == 1


@pytest.mark.fault("elided bf16 round trips")
def test_only_exact_pairs_of_casts_go() -> None:
    """bf16 -> fp32 -> bf16 is nothing; fp32 -> bf16 -> fp32 rounds, and stays."""

    def widened(x: Tensor, w: Tensor) -> Tensor:
        return x.float() @ w

    found = apply(widened, x=torch.randn(3, 8, dtype=BF16), w=torch.randn(8, 5, dtype=BF16).float())
    assert [cast.source for cast in casts_to_bf16(found)] == ["arg1_1"]
    rounded = apply(lambda x: x.bfloat16().float().sum(), x=torch.randn(3, 8))
    assert calls(rounded).count("aten.to.dtype") == 2
    assert not precision.casts_in(rounded.module)


def test_what_is_written_to_in_place_is_left_alone() -> None:
    def written(x: Tensor, w: Tensor, buffer: Tensor) -> Tensor:
        buffer.add_(x @ w)
        return buffer @ w

    x, w, buffer = torch.randn(3, 4), torch.randn(4, 4), torch.zeros(3, 4)
    ours, theirs = buffer.clone(), buffer.clone()
    found, _ = run(written, x, w, ours)
    with autocast():
        expected = written(x, w, theirs)
    assert ours.dtype == found.dtype == FP32
    torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=2**-7)
    torch.testing.assert_close(found, expected.float(), rtol=2**-6, atol=2**-6)


def test_positions_are_not_rounded() -> None:
    """A rotary table by a product, as older transformers make it: position 4095 is 4096 in bf16."""

    def table(inv_freq: Tensor, ids: Tensor) -> Tensor:
        return (inv_freq[None, :, None].expand(1, -1, 1) @ ids[:, None, :].float()).transpose(1, 2).cos()

    inv_freq, ids = torch.rand(4), torch.arange(4090, 4096)[None]
    found, stages = run(table, inv_freq, ids)
    assert torch.equal(found, table(inv_freq, ids))
    assert any("holds whole numbers" in note for note in stages.report.notes)


def test_a_constant_beyond_16_bits_is_met_in_fp32() -> None:
    """Scores from a product, masked by ``finfo.min`` of fp32: in 16 bits that is -inf, and a row of them NaN."""

    def masked(x: Tensor, keep: Tensor) -> Tensor:
        return (x @ x.mT).masked_fill(~keep, torch.finfo(FP32).min).softmax(-1)

    keep = torch.ones(4, 4, dtype=torch.bool).tril()
    keep[2] = False
    found, _ = run(masked, torch.randn(4, 8), keep)
    torch.testing.assert_close(found[2], torch.full((4,), 0.25))
    scalar = torch.tensor(torch.finfo(FP32).min)
    found, _ = run(lambda x, low: torch.where(keep, x @ x.mT, low).softmax(-1), torch.randn(4, 8), scalar)
    torch.testing.assert_close(found[2], torch.full((4,), 0.25))


@pytest.mark.fault("autocast regions")
def test_a_region_without_autocast_keeps_its_dtypes() -> None:
    def mixed(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        low = x @ w
        with torch.autocast("cpu", enabled=False):
            high = low.float() @ w
        return low @ w, high

    for ambient in (False, True):
        torch.compiler.reset()
        with torch.autocast("cpu", BF16, enabled=ambient):
            _, stages = run(mixed, torch.randn(3, 8), torch.randn(8, 8))
        assert [set(dtypes_in(node)) for node in stages.nodes(aten.matmul.default)] == [{BF16}, {FP32}, {BF16}]


def test_fp64_integer_and_complex_graphs_are_untouched() -> None:
    for x in (torch.randn(3, 3, dtype=torch.float64), torch.ones(3, 3, dtype=torch.int64), torch.randn(3, 3) * 1j):
        found = apply(lambda x: x @ x + 1, x=x)
        assert not precision.casts_in(found.module)
        assert calls(found) == ["aten.matmul.default", "aten.add.Tensor"]


def test_without_a_precision_there_is_no_stage() -> None:
    model, inputs = models.build("llama", num_hidden_layers=1)
    stages = Stages(None)
    torch.compile(model, backend=stages)(**inputs)
    assert "precision" not in stages.reports[0].timings
    assert not stages.report.casts
    assert {value_of(node).dtype for node in stages.nodes(aten.linear.default)} == {FP32}


def test_a_product_that_the_cpu_does_not_have_stays_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(make: Any) -> Tensor:
        raise RuntimeError('"bmm" not implemented for Half')

    monkeypatch.setitem(support._PRODUCTS, "aten::bmm", fails)
    support.lacks.cache_clear()
    found = apply(lambda x: x.bmm(x) + x @ x, "fp16", x=torch.randn(2, 3, 3))
    support.lacks.cache_clear()
    dtypes = {str(node.target): dtypes_in(node) for node in found.module.graph.nodes if len(node.all_input_nodes) > 0}
    assert set(dtypes["aten.bmm.default"]) == {FP32}
    assert set(dtypes["aten.matmul.default"]) == {FP16}
    assert "this CPU has no aten::bmm in float16" in found.kept[0][1]


@pytest.mark.parametrize("name", support._PRODUCTS)
def test_every_product_can_be_asked_for(name: str) -> None:
    """In fp32 every one works, so that what fails in 16 bits fails for its dtype."""
    assert not support.lacks(name, FP32)


def test_symbolic_sizes() -> None:
    layer = nn.Linear(8, 8)
    stages = Stages()
    call = torch.compile(layer, backend=stages, dynamic=True)
    for rows in (3, 5):
        assert call(torch.randn(rows, 8)).shape == (rows, 8)
    assert len(stages.graphs) == 1
    assert all(isinstance(cast.bytes, int) for cast in stages.report.casts)


def test_a_failure_leaves_the_graph_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise ZeroDivisionError("on purpose")

    monkeypatch.setattr(precision, "apply", broken)
    layer, x = nn.Linear(4, 4), torch.randn(2, 4)
    with pytest.warns(fxopt.FxoptWarning, match="stage precision"):
        found, _ = run(layer, x)
    assert torch.equal(found, layer(x))


# --- what a cast must not change ---------------------------------------------------------------------------------


class RoundedProducts(TorchFunctionMode):
    """Within, ``@`` is of bf16 matrices, and everything else is as it is: what the policy asks for, in eager mode."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__matmul__:
            return (args[0].bfloat16() @ args[1].bfloat16()).float()
        return func(*args, **(kwargs or {}))


def pair(seed: int = 0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return torch.randn(8, 8), torch.randn(8, 8)


@pytest.mark.parametrize(
    "copied", [lambda b: b.clone(), lambda b: b.t().contiguous(), lambda b: b.t().reshape(4, 16).reshape(8, 8)]
)
def test_a_copy_made_before_a_write_stays_before_it(copied: Callable[[Tensor], Tensor]) -> None:
    def snapshot(x: Tensor, w: Tensor, buffer: Tensor) -> Tensor:
        kept = copied(buffer)
        buffer.add_(10.0)
        return kept @ w

    x, w = pair()
    right = snapshot(x, w, x.clone())
    assert relative(run(snapshot, x, w, x.clone())[0], right) < 2**-6


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_what_no_grad_stops_stays_stopped(dtype: torch.dtype) -> None:
    def through_a_view(x: Tensor, w: Tensor) -> Tensor:
        with torch.no_grad():
            v = x.t()
        return v @ w

    def through_a_cast(x: Tensor, w: Tensor) -> Tensor:
        h = x @ w
        with torch.no_grad():
            t = h.bfloat16()
        return t.float() * x

    def through_a_widening(x: Tensor, w: Tensor) -> Tensor:
        with torch.no_grad():
            y = x.float()
        return y @ w.float()

    for function in (through_a_view, through_a_cast, through_a_widening):
        ours, theirs = ([one.to(dtype).requires_grad_() for one in pair()] for _ in range(2))
        torch.compiler.reset()
        run(function, *ours)[0].float().sum().backward()
        function(*theirs).float().sum().backward()
        for mine, right in zip(ours, theirs, strict=True):
            assert (mine.grad is None) == (right.grad is None), function.__name__
            if right.grad is not None and mine.grad is not None:
                assert relative(mine.grad, right.grad) < 2**-5


def test_a_checkpointed_body_that_writes_to_what_it_is_given() -> None:
    def layers(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        y = x @ w

        def body(a: Tensor) -> Tensor:
            a.mul_(2.0)
            return a @ w

        return torch.utils.checkpoint.checkpoint(body, y, use_reentrant=False), y * 1

    x, w = pair()
    for mine, right in zip(run(layers, x, w)[0], layers(x, w), strict=True):
        assert relative(mine, right) < 2**-5


def test_a_body_knows_what_it_is_given_and_its_caller_what_it_returns() -> None:
    """Whole numbers, and what is made of products: else positions would be rounded in a checkpoint."""

    def inside(x: Tensor, w: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(lambda a, b: a @ b, x, w, use_reentrant=False)

    def passed_in(w: Tensor) -> Tensor:
        return inside(torch.arange(600.0).view(75, 8), w)

    def passed_out(w: Tensor) -> Tensor:
        counted = torch.utils.checkpoint.checkpoint(
            lambda b: (torch.arange(600.0).view(75, 8) * 1, b.exp()), w, use_reentrant=False
        )
        return counted[0] @ w + counted[1].sum()

    def stream(x: Tensor, w: Tensor) -> Tensor:
        wide, narrow = (x @ w).softmax(-1), x @ w
        return torch.utils.checkpoint.checkpoint(torch.add, wide, narrow, use_reentrant=False)

    x, w = pair()
    assert dtypes_of(inside, aten.matmul.default, x, w) == [BF16]
    assert dtypes_of(passed_in, aten.matmul.default, w) == [FP32]
    assert dtypes_of(passed_out, aten.matmul.default, w) == [FP32]
    assert dtypes_of(stream, aten.add.Tensor, x, w) == [BF16]


def test_a_mask_is_no_part_of_the_residual_stream() -> None:
    x, _ = pair()
    mask = torch.zeros(8, 8)
    mask[2] = torch.finfo(FP32).min
    narrow = {"compute": "bf16", "residual": "bf16"}
    found, _ = run(lambda x, m: (x @ x.t() + m).softmax(-1), x, mask, given=narrow)
    torch.testing.assert_close(found[2], torch.full((8,), 1 / 8))


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: torch.linalg.svdvals((x @ w).float()),
        lambda x, w: torch.view_as_complex((x @ w).float().reshape(8, 4, 2)).abs(),
        lambda x, w: torch.fft.rfft(x @ w).abs(),
        lambda x, w: torch.linalg.slogdet(x @ w)[1],
        lambda x, w: torch.complex(x @ w, x).abs(),
        lambda x, w: torch.zeros_like(x).index_add(0, torch.tensor([0, 1, 1, 2, 3, 4, 5, 6]), x @ w),
        lambda x, w: torch.zeros_like(x).index_put((torch.tensor([1, 1]),), (x @ w)[:2], accumulate=True),
        lambda x, w: torch.zeros_like(x).scatter(0, torch.zeros(1, 8, dtype=torch.int64), x @ w),
        lambda x, w: torch.linalg.cross((x @ w)[:, :3], x[:, :3]),
        lambda x, w: torch.quantile(x @ w, 0.3),
        lambda x, w: (x @ w).cumsum(0).sort(0).values,
    ],
)
def test_operators_without_16_bits_are_computed_in_fp32(function: Callable[..., Tensor]) -> None:
    x, w = pair()
    found, stages = run(function, x, w)
    assert found.dtype == FP32
    with RoundedProducts():
        near = function(x, w)
    exact = function(x.double(), w.double())
    assert relative(found, exact) <= 2 * relative(near, exact) + 2 * torch.finfo(BF16).eps
    assert stages.report.casts


def test_bits_are_not_those_of_16() -> None:
    x, w = pair()
    found, _ = run(lambda x, w: (x @ w).view(torch.int32) >> 30, x, w)
    assert torch.equal(found, (x @ w).view(torch.int32) >> 30)


def test_float_asked_for_in_the_code_is_float() -> None:
    """``.float()`` says nothing in an fp32 graph, until what it is said of has 16 bits."""

    def asked(x: Tensor, w: Tensor) -> Tensor:
        return torch.sigmoid((x @ w).float()) * 1e4

    x, w = pair()
    found, stages = run(asked, x, w, given="fp16")
    assert torch.isfinite(found).all()
    (node,) = stages.nodes(aten.sigmoid.default)
    assert dtypes_in(node) == [FP32]
    assert any(cast.reason == "the code says .float()" for cast in stages.report.casts)
    _, stages = run(lambda x, w: torch.sigmoid(x @ w) * 1e4, x, w)
    (node,) = stages.nodes(aten.sigmoid.default)
    assert dtypes_in(node) == [BF16]


@pytest.mark.parametrize(
    "views",
    [
        lambda y: (y, y[:, 0]),
        lambda y: (y[:, 1:3],),
        lambda y: y.chunk(2, -1),
        lambda y: (y, y[0]),
        lambda y: (y, y.detach()),
        lambda y: (y.bfloat16(), y.bfloat16()),
        lambda y: (y, y.t(), y.log_softmax(-1)),
    ],
)
def test_outputs_that_are_views_of_one_another(views: Callable[[Tensor], Sequence[Tensor]]) -> None:
    """They keep dtypes, strides and shared memory, and the graph its casts."""
    x, w = pair()
    function = lambda x, w: tuple(views(x @ w))  # noqa: E731
    found, stages = run(function, x, w)
    right = function(x, w)
    assert dtypes_in(stages.nodes(aten.matmul.default)[0]) == [BF16, BF16]
    for mine, other in zip(found, right, strict=True):
        assert (mine.dtype, mine.stride()) == (other.dtype, other.stride())
        assert relative(mine, other) < 2**-5
    storages = [len({one.untyped_storage()._cdata for one in outputs}) for outputs in (found, right)]
    assert storages[0] == storages[1]


def test_sizes_that_depend_on_data() -> None:
    x, w = pair()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        found, stages = run(lambda x, w: (x @ w)[x[:, 0] > 0] * 2, x, w)
    assert relative(found, (x @ w)[x[:, 0] > 0] * 2) < 2**-6
    assert stages.report.casts


def test_bytes_are_no_positions() -> None:
    """A quantised weight, or an image: whole numbers that bf16 holds."""
    x, _ = pair()
    q = torch.randint(-127, 127, (8, 8), dtype=torch.int8)
    _, stages = run(lambda x, q: x @ (q.float() * 0.1), x, q)
    assert dtypes_in(stages.nodes(aten.matmul.default)[0]) == [BF16, BF16]


def test_a_constant_that_fp16_has_as_zero() -> None:
    x, w = pair()
    found, _ = run(lambda x, w: F.relu(x @ w) / (F.relu(x @ w) + 1e-8), x, w, given="fp16")
    assert not found.isnan().any()


# --- autocast around it ------------------------------------------------------------------------------------------


class Three(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.seq = nn.Sequential(nn.Linear(16, 16), nn.SiLU(), nn.Linear(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.seq(x)


@pytest.mark.parametrize("kept", ["seq", "seq.2"])
def test_modules_are_kept_in_fp32_under_ambient_autocast(kept: str) -> None:
    model, x = Three(), torch.randn(4, 16)
    right = model(x)
    with autocast():
        found, stages = run(model, x, given={"compute": "bf16", "keep_fp32": [kept]})
    linears = stages.nodes(aten.linear.default)
    assert [set(dtypes_in(node)) for node in linears] == [{FP32} if kept == "seq" else {BF16}, {FP32}]
    assert relative(found, right) < (2**-8 if kept == "seq" else 2**-6)  # the output is bf16, as autocast has it


def test_kept_logits_can_be_read_under_ambient_autocast() -> None:
    model, inputs = models.build("llama", num_hidden_layers=1)
    with autocast():
        logits = run(model, **inputs, given={"compute": "bf16", "keep_fp32": ["lm_head"]})[0].logits
    assert relative(logits + 0, model(**inputs).logits) < 2**-5


@pytest.mark.parametrize("backend", ["stages", "fxopt"])
def test_compiled_code_is_shielded_from_ambient_autocast(backend: str) -> None:
    """AOTAutograd switches autocast off at run time only if it was on while it compiled: else fp32 operators that no
    kernel of Inductor's replaces run in bf16, and write to memory of another size."""
    x, weight, bias = torch.randn(4, 2, 8), torch.randn(3, 8, 8), torch.randn(8)

    def region(x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return torch.conv_tbc(x, weight, bias, 1) + (x.float() @ weight[0])[:1, :1, :1]

    how: dict[str, Any] = {"backend": Stages()} if backend == "stages" else {
        "backend": "fxopt", "options": {"precision": "bf16"}
    }  # fmt: skip
    with autocast():
        found = torch.compile(region, **how)(x)
    assert found.dtype == FP32
    torch.testing.assert_close(found, region(x))


def test_a_region_of_another_device_says_nothing_of_this_one() -> None:
    def mixed(x: Tensor, w: Tensor) -> Tensor:
        with torch.autocast("cuda", enabled=False):
            return x @ w

    _, stages = run(mixed, *pair())
    assert dtypes_in(stages.nodes(aten.matmul.default)[0]) == [BF16, BF16]


def test_other_graphs_of_a_model_need_not_hold_every_kept_module() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor, flag: bool) -> Tensor:
            x = self.first(x)
            torch._dynamo.graph_break()
            return self.second(x) if flag else self.second(x) * 2

    call = torch.compile(Branches(), backend=Stages({"compute": "bf16", "keep_fp32": ["first"]}))
    for flag in (True, False):
        assert call(torch.randn(3, 8), flag).shape == (3, 8)


def test_a_script_that_reproduces_a_failure_says_the_precision_in_plain_values() -> None:
    policy = {"compute": "bf16", "residual": "bf16", "keep_fp32": ["lm_head"], "ops": {"aten.silu": "fp32"}}
    options = Options.parse({"precision": policy})
    assert options.precision is not None
    assert options.precision.as_option() == policy
    assert Options.parse({"precision": options.precision.as_option()}) == options


# --- the report --------------------------------------------------------------------------------------------------


def test_the_report_says_why_and_how_much() -> None:
    stages = check_model("llama")
    report = stages.report
    assert Report.from_json(report.to_json()).to_json() == report.to_json()
    head = next(cast for cast in report.casts if "lm_head" in cast.source)
    assert (head.before, head.after, head.bytes) == ("float32", "bfloat16", models.VOCAB * 64 * 2)
    assert head.reason == "aten::linear computes in 16 bits"
    query = next(cast for cast in report.casts if "q_proj" in cast.source)
    assert query.place.module == "model.layers.0.self_attn.q_proj"
    stream = next(cast for cast in report.casts if cast.readers == 3)
    assert stream.place.module == "model.layers.0.input_layernorm"
    text = str(report)
    assert "aten::linear computes in 16 bits" in text
    assert "casts write 0.2 MiB in the forward; one a use and one a parameter, as autocast makes them" in text


# --- laws --------------------------------------------------------------------------------------------------------

_FIRST, _ROWS = torch.zeros(2, dtype=torch.int64), torch.zeros(2, 5, 8, dtype=torch.int64)
_STEPS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "linear": lambda x, y, w: F.linear(x, w),
    "matmul": lambda x, y, w: x @ w.t(),
    "scores": lambda x, y, w: (x @ y.mT / 4).softmax(-1) @ y,
    "sdpa": lambda x, y, w: F.scaled_dot_product_attention(x[:, None], y[:, None], x[:, None])[:, 0],
    "baddbmm": lambda x, y, w: torch.baddbmm(x, x @ y.mT, y, alpha=0.1),
    "silu": lambda x, y, w: F.silu(x),
    "gelu": lambda x, y, w: F.gelu(x) * y,
    "add": lambda x, y, w: x + y,
    "scaled": lambda x, y, w: x * 0.5 + w[0],
    "rms": lambda x, y, w: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3) * w[1],
    "layer_norm": lambda x, y, w: F.layer_norm(x, x.shape[-1:], w[0], w[1]),
    "gelu_new": lambda x, y, w: 0.5 * x * (1.0 + torch.tanh(0.8 * (x + 0.04 * torch.pow(x, 3.0)))),
    "softmax": lambda x, y, w: x.softmax(-1) * y,
    "logs": lambda x, y, w: x.log_softmax(-1) / 8,
    "moved": lambda x, y, w: x.transpose(0, 1).contiguous().transpose(0, 1),
    "halves": lambda x, y, w: torch.cat([-x[..., 4:], x[..., :4]], -1) * y,
    "sum": lambda x, y, w: x - y.sum(-1, keepdim=True) / 8,
    "masked": lambda x, y, w: x.masked_fill(x > 1.0, -1e39 if x.dtype == torch.float64 else -3e38).clamp(min=-2.0),
    "where": lambda x, y, w: torch.where(x > 0, x, y * 0.1),
    "split": lambda x, y, w: torch.cat(x.split(4, -1)[::-1], -1),
    "half": lambda x, y, w: x.bfloat16().to(x.dtype),
    "written": lambda x, y, w: (x * 1).mul_(0.5).add_(y) + x.clone(),
    "float": lambda x, y, w: torch.sigmoid((x @ y.mT @ y / 8).to(torch.promote_types(x.dtype, torch.float32))).to(
        x.dtype
    ),
    "put": lambda x, y, w: x.index_put((_FIRST,), y.to(x.dtype), accumulate=True) / 2,
    "added": lambda x, y, w: x + torch.scatter(x.detach(), 1, _ROWS, y.detach().to(x.dtype), reduce="add") / 8,
    "unbound": lambda x, y, w: torch.stack(x.unbind(1), 1),
}


def program(names: Sequence[str]) -> Callable[..., tuple[Tensor, Tensor]]:
    """The steps one after the other; each second value is that of two steps ago."""

    def computed(x: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        before = x
        for at, name in enumerate(names):
            before, x = x, _STEPS[name](x, before, w if at % 2 else v)
        return x, x.square().mean()

    return computed


def inputs(seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    x, w, v = torch.randn(2, 5, 8), torch.randn(8, 8) / 3, torch.randn(8, 8) / 3
    return {name: one.to(dtype).requires_grad_() for name, one in {"x": x, "w": w, "v": v}.items()}


programs = st.lists(st.sampled_from(sorted(_STEPS)), min_size=1, max_size=7)
policies = st.sampled_from(
    ["bf16", "fp16", {"compute": "bf16", "residual": "bf16"}, {"compute": "bf16", "ops": {"silu": "fp32"}}]
)


@settings(max_examples=60)
@given(names=programs, given_policy=policies, dtype=st.sampled_from([FP32, FP32, BF16]))
def test_law_of_dtypes(names: list[str], given_policy: Any, dtype: torch.dtype) -> None:
    """Outputs keep their dtype; products get 16 bits and sums fp32; 16 bits come from products, casts or 16 bits;
    a second pass changes nothing."""
    policy = Policy.parse(given_policy)
    assert policy is not None
    graph = trace(program(names), inputs(0, dtype))
    found = precision.apply(graph, policy)
    kept = {name for name, _ in found.kept}
    for node in found.module.graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, compat.OpOverload) or node.name in kept:
            continue
        chosen, floats = class_of_call(policy, node), [one for one in dtypes_in(node) if one.is_floating_point]
        if chosen == "fp32" and not (node.target is aten.pow.Tensor_Scalar and node.args[1] == 3):
            assert not set(floats) & set(LOW), (node.target, floats)
        elif chosen == "low":
            named = LOW_ARGUMENTS.get(operator_name(node.target))
            operands = [value_of(one) for name, one in bound_arguments(node).items() if named is None or name in named]
            assert {one.dtype for one in operands if isinstance(one, Tensor)} <= set(LOW), node.target
        elif any(
            value.dtype in LOW for value in compat.pytree.tree_leaves(value_of(node)) if isinstance(value, Tensor)
        ):
            assert node.target is aten.to.dtype or set(floats) & set(LOW), node.target
    again = precision.apply(found.module, policy)
    assert calls(again) == calls(found)
    values = inputs(0, dtype)
    for ours, theirs in zip(found.module(*values.values()), program(names)(**values), strict=True):
        assert (ours.dtype, ours.shape, ours.stride()) == (theirs.dtype, theirs.shape, theirs.stride())


@settings(max_examples=40)
@given(names=programs, seed=st.integers(0, 99))
def test_law_of_errors(names: list[str], seed: int) -> None:
    """Values and gradients are as near to fp64 as autocast's, by the rule of `fxopt.testing`."""
    function = program(names)
    found = precision.apply(trace(function, inputs(seed, FP32)), Policy(BF16)).module

    def done(call: Callable[..., Any], dtype: torch.dtype, context: Any = None) -> Mapping[str, Tensor]:
        values = inputs(seed, dtype)
        with context or torch.autocast("cpu", enabled=False):
            result, loss = call(*values.values())
        loss.backward()
        grads = {f"grad {name}": one.grad for name, one in values.items() if one.grad is not None}
        return {"result": result.detach(), "loss": loss.detach(), **grads}

    ours, near, exact = done(found, FP32), done(function, FP32, autocast()), done(function, torch.float64)
    assert ours.keys() == near.keys() == exact.keys()
    for name, right in exact.items():
        assert ours[name].dtype == FP32
        size = float(right.norm()) + 1e-3 * right.numel() ** 0.5
        off, theirs = (float((one[name].double() - right).norm()) / size for one in (ours, near))
        assert off <= 2 * theirs + 8 * 2**-8, f"{name} of {names}: {off:.2e}, autocast {theirs:.2e}"
