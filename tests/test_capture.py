"""The canonical graph: ATen alone, cleaned up, bit-equal, and without the parts that must stay whole taken apart."""

import pytest
import torch
import torch.nn.functional as F
from graphs import captured, targets
from torch import fx
from torch.utils.checkpoint import checkpoint

from fxopt import compat, verify
from fxopt.capture import capture, trace
from fxopt.simplify import simplify


def replayed(fn, *args, dynamic=None):
    """Outputs and input gradients of `fn`, and of its canonical graph, each through the same AOTAutograd."""
    from torch._dynamo.backends.debugging import aot_eager

    def run(backend):
        torch.compiler.reset()
        torch.manual_seed(7)
        leaves = [
            a.detach().clone().requires_grad_(a.requires_grad) if isinstance(a, torch.Tensor) else a for a in args
        ]
        out = torch.compile(fn, backend=backend, dynamic=dynamic)(*leaves)
        outs = out if isinstance(out, tuple) else (out,)
        losses = [o.double().sum() for o in outs if o.requires_grad]
        if losses:
            torch.stack(losses).sum().backward()
        return [*outs, *(a.grad for a in leaves if isinstance(a, torch.Tensor))]

    return run(aot_eager), run(lambda gm, inputs: aot_eager(capture(gm).module, inputs))


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, g):
        return g * 3  # not the derivative: a trace that drops the function shows


def norm_and_mask(x, w):
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    mask = torch.ones(x.shape[0], x.shape[0], dtype=torch.bool).tril()
    return (w * h.to(x.dtype)).masked_fill(~mask[..., :1], 0.0)


def mutating(x, w):
    y = x * w
    y[:, 0] = 3.0
    y.add_(1).mul_(w)
    return y, torch.tensor(2.5) * y


def without_grad(x, w):
    with torch.no_grad():
        scale = x.abs().amax()
    return x / scale * w


def checkpointed(x, w):
    return checkpoint(lambda a: torch.tanh(a * w).square(), x, use_reentrant=False)


def custom(x, w):
    return Doubled.apply(x * w) + x


def with_autocast(x, w):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = F.linear(x, w.expand(5, x.shape[-1]))
        with torch.autocast("cpu", enabled=False):
            high = F.linear(x, w.expand(5, x.shape[-1]))
    return low.float() + high


def dropped(x, w):
    return F.dropout(x, 0.4, training=True) * w + F.dropout(x, 0.0, training=True)


FUNCTIONS = (norm_and_mask, mutating, without_grad, checkpointed, custom, with_autocast, dropped)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("fn", FUNCTIONS, ids=lambda fn: fn.__name__)
def test_replay_is_bit_equal(fn, dynamic):
    x, w = torch.randn(6, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    before, after = replayed(fn, x, w, dynamic=dynamic)
    for one, other in zip(before, after, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)
    assert any(isinstance(value, torch.Tensor) for value in before)


@pytest.mark.parametrize("fn", FUNCTIONS, ids=lambda fn: fn.__name__)
def test_is_canonical_and_idempotent(fn):
    found = captured(fn, torch.randn(6, 8, requires_grad=True), torch.randn(8, requires_grad=True))
    assert not found.kept
    verify.canonical(found.module)
    before = str(found.module.graph)
    simplify(found.module)
    assert str(found.module.graph) == before


def test_noise_is_gone_and_spelling_is_one():
    def fn(x, ids):
        y = F.dropout(x.to(torch.float32) * 1.0, 0.0, True).contiguous().view(4, 6)
        return y.type_as(ids.double()), ids + 0 + 1, y.half().to("cpu")

    module = captured(fn, torch.randn(4, 6), torch.arange(3)).module
    assert targets(module) == ["aten.to.dtype", "aten.add.Tensor", "aten.to.dtype"]
    assert [node.args[1] for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.to.dtype)] == [
        torch.float64, torch.float16,
    ]  # fmt: skip


def test_copies_stay_where_memory_is_shared_or_written():
    """`x * 1` is a copy: gone it would let a write, or the caller, reach x."""

    def fn(x):
        y = x * 1.0
        y.add_(1)
        return y, x * 1.0, x + 0.0

    assert targets(captured(fn, torch.randn(3)).module) == [
        "aten.mul.Tensor",
        "aten.add_.Tensor",
        "aten.mul.Tensor",
        "aten.add.Tensor",
    ]


def test_attention_draws_only_with_dropout():
    def fn(q):
        F.scaled_dot_product_attention(q, q, q, dropout_p=0.3)
        F.scaled_dot_product_attention(q, q, q)
        torch.bernoulli(q, 0.0)  # draws whatever the probability
        return q.cos()

    assert targets(captured(fn, torch.randn(1, 2, 4, 8)).module) == [
        "aten.scaled_dot_product_attention.default",
        "aten.bernoulli.p",
        "aten.cos.default",
    ]


def test_dead_code_goes_and_effects_stay():
    def fn(x):
        x.cos()
        F.dropout(x, 0.5, True)
        x.mul_(2)
        return x.clone()

    assert targets(captured(fn, torch.randn(3)).module) == [
        "aten.dropout.default",
        "aten.mul_.Tensor",
        "aten.clone.default",
    ]


def test_the_source_graph_is_untouched():
    before, seen = {}, []

    def backend(gm: fx.GraphModule, inputs):
        before["code"] = gm.print_readable(print_output=False)
        capture(gm)
        seen.append(gm.print_readable(print_output=False) == before["code"])
        return gm.forward

    torch.compile(checkpointed, backend=backend)(torch.randn(6, 8, requires_grad=True), torch.randn(8))
    assert seen == [True]


@pytest.mark.fault("checkpoint and autograd.Function bodies")
def test_bodies_are_canonical_and_keep_their_provenance():
    module = captured(checkpointed, torch.randn(6, 8, requires_grad=True), torch.randn(8)).module
    (node,) = [node for node in module.graph.nodes if node.target is compat.tag_activation_checkpoint]
    body = getattr(module, node.args[0].target)
    assert targets(body)[:2] == ["aten.mul.Tensor", "aten.tanh.default"]
    assert (
        "test_capture.py"
        in next(iter(body.graph.find_nodes(op="call_function", target=torch.ops.aten.tanh.default))).meta["stack_trace"]
    )


def test_repeated_layers_meet_the_memo():
    layers = torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU()) for _ in range(12)))
    one = captured(layers[0], torch.randn(2, 8))
    twelve = captured(layers, torch.randn(2, 8))
    assert twelve.traced <= one.traced + 1, "the first layer's input needs no gradient, the others' do"


def test_values_carry_grad_mode_and_autocast():
    module = captured(with_autocast, torch.randn(6, 8, requires_grad=True), torch.randn(8, requires_grad=True)).module
    linears = module.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    assert [(node.meta["autocast"], node.meta["val"].dtype) for node in linears] == [
        (torch.bfloat16, torch.bfloat16), (None, torch.float32),
    ]  # fmt: skip
    module = captured(without_grad, torch.randn(6, 8, requires_grad=True), torch.randn(8)).module
    (amax,) = module.graph.find_nodes(op="call_function", target=torch.ops.aten.amax.default)
    assert amax.meta["grad"] is False
    assert torch.is_grad_enabled()


def test_functorch_transforms_are_left_whole():
    """A batched value run alone would leave a vmap level open, and Dynamo's guards would fail ever after."""

    def fn(x, w):
        return torch.func.vmap(lambda row: (row * w).sum())(x) + F.dropout(x, 0.0, True).contiguous()[:, 0]

    x, w = torch.randn(6, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    before, after = replayed(fn, x, w)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    found = captured(fn, x, w)
    assert not found.kept
    assert "aten.dropout.default" not in targets(found.module)
    assert torch.func.vmap(torch.sum)(x).shape == (6,)


def test_dynamic_sizes_stay_symbolic():
    module = captured(norm_and_mask, torch.randn(6, 8), torch.randn(8), dynamic=True).module
    output = next(iter(reversed(module.graph.nodes)))
    assert any(isinstance(size, torch.SymInt) for size in output.args[0][0].meta["val"].shape)


def test_trace_keeps_requires_grad():
    module = trace(lambda x, y: (x * y).sum(), {"x": torch.randn(3, requires_grad=True), "y": torch.randn(3)})
    assert [node.meta["val"].requires_grad for node in module.graph.nodes if node.op != "output"] == [
        True,
        False,
        True,
        True,
    ]
