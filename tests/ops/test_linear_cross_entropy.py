"""fxopt::linear_cross_entropy against `F.cross_entropy` of the logits, by the fp64 rule of `fxopt.testing.compare`."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from allocations import peak_bytes
from hypothesis import given
from hypothesis import strategies as st
from loss_cases import (
    DTYPES,
    NAMES,
    Loss,
    check,
    constants,
    eager,
    eager_with_lse,
    problem,
    problems,
    run,
    whole_numbers,
    with_argmax,
    with_lse,
)
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from fxopt.ops import chunked_loss, logit_blocks, products
from fxopt.ops.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_with
from fxopt.ops.loss_operator import BACKWARD, FORWARD
from fxopt.ops.registry import memory_of
from fxopt.testing.compare import compare


@contextlib.contextmanager
def small_chunks(kind: type[products.AtenProducts] | None = None) -> Iterator[None]:
    """Chunks of 32 rows, blocks of 5 and pieces of the least size, so that small inputs take every loop twice."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(chunked_loss, CHUNK_BYTES=1, LEAST_ROWS=1))
        stack.enter_context(mock.patch.object(logit_blocks, "block_rows", return_value=5))
        for products_kind in (products.AtenProducts, products.OneDnnProducts):
            stack.enter_context(mock.patch.object(products_kind, "PIECE_BYTES", 600))
        if kind is not None:
            stack.enter_context(mock.patch.object(products, "_kind", return_value=kind))
        yield


# --- values and gradients ----------------------------------------------------------------------------------------


@given(drawn=problems(), kind=st.sampled_from((products.AtenProducts, None)))
@pytest.mark.fault("misaligned storage offset")
def test_equals_cross_entropy_of_the_logits(drawn: Any, kind: Any) -> None:
    tensors, target, upstream, options = drawn
    with small_chunks(kind):
        check(tensors, target, upstream, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_equals_cross_entropy_in_chunks_of_real_size(dtype: torch.dtype, reduction: str) -> None:
    *tensors, target = problem(300, 130, 9000, dtype)
    assert chunked_loss.chunk_rows(300, 40_000_000, dtype) == 128
    check(tensors, target, torch.rand(300) if reduction == "none" else 0.3, reduction=reduction)


def test_onednn_and_aten_agree_with_the_rule_in_fp32() -> None:
    *tensors, target = problem(100, 130, 57)
    for kind in (products.OneDnnProducts, products.AtenProducts):
        with small_chunks(kind):
            check(tensors, target, 1.5)


def test_onednn_gets_no_strides_that_it_multiplies_by_its_reference_loop() -> None:
    """That loop is right, and 1,000 times slower."""
    weight = torch.randn(57, 24, 2)[..., 0]
    assert products.OneDnnProducts(weight, None, 8, True).weight.is_contiguous()
    for dense in (torch.randn(57, 24), torch.randn(24, 57).t()):
        assert products.OneDnnProducts(dense, None, 8, True).weight is dense


def test_gradcheck() -> None:
    hidden, weight, bias, target = problem(5, 3, 4, torch.float64)
    target[1] = -100
    for reduction in ("mean", "sum", "none"):
        torch.autograd.gradcheck(
            lambda *t, how=reduction: linear_cross_entropy(
                *t, target, reduction=how, scale=0.7, softcap=3.0, label_smoothing=0.1
            ),
            (hidden, weight, bias),
        )


def test_repeats_bit_for_bit() -> None:
    *tensors, target = problem(300, 64, 500)
    first, second = (run(linear_cross_entropy, tensors, target) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.named().values(), second.named().values(), strict=True))


@pytest.mark.parametrize("upstream", [1 / 3, 65536.0, -7.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_loss_scale_finds_gradients_that_have_not_vanished(dtype: torch.dtype, upstream: float) -> None:
    """1e-3 / 600 is what fp16 cannot hold, 65536 times that it can, and eager fp16 training is scaled by 65536."""
    hidden, weight, bias, target = problem(600, 16, 300, dtype)
    check([hidden.detach().mul_(1e-3), weight, bias.detach()], target, upstream)


def test_the_upstream_gradient_is_not_rounded_to_bf16() -> None:
    *tensors, target = problem(dtype=torch.bfloat16)
    whole, third = (run(linear_cross_entropy, tensors, target, upstream) for upstream in (1.0, 1 / 3))
    for name, gradient in whole.gradients.items():
        assert gradient is not None
        assert torch.equal(third.gradients[name], (gradient.float() * torch.tensor(1 / 3)).bfloat16())


@pytest.mark.parametrize("rows", [70, 700])
def test_gradients_in_bf16_are_rounded_once(rows: int) -> None:
    """A mean divides by the rows before what is multiplied is rounded: as near as rounding the exact products is."""
    hidden, weight, _, target = problem(rows, 24, 57, torch.bfloat16)
    found = run(linear_cross_entropy, (hidden, weight, None), target).gradients
    d = torch.softmax((hidden @ weight.t()).double(), -1) - F.one_hot(target, 57)
    d = d.bfloat16().double()  # as logits' gradients are, before they are multiplied
    exact = {"hidden": d @ weight.double() / rows, "weight": d.t() @ hidden.double() / rows}
    for name, right in exact.items():
        off, once = (float((one.double() - right).norm()) for one in (found[name], right.bfloat16()))
        assert off < 1.1 * once, name  # rounded twice: 1.4 times


def test_hidden_of_any_rank_and_targets_in_either_shape() -> None:
    hidden, weight, bias, target = problem(24)
    flat = linear_cross_entropy(hidden, weight, bias, target, reduction="none")
    deep = hidden.reshape(2, 3, 4, -1)
    assert flat.shape == (24,)
    for shape in ((2, 3, 4), (4, 6)):
        losses = linear_cross_entropy(deep, weight, bias, target.reshape(shape), reduction="none")
        assert torch.equal(losses, flat.reshape(shape))
    assert torch.equal(linear_cross_entropy(deep, weight, bias, target, reduction="none"), flat)
    assert linear_cross_entropy(hidden[0], weight, bias, target[0], reduction="none").shape == ()


@pytest.mark.parametrize("transposed", [False, True])
def test_the_gradient_has_the_layout_of_the_weight(transposed: bool) -> None:
    hidden, weight, _, target = problem()
    weight = (weight.detach().t().contiguous().t() if transposed else weight.detach()).requires_grad_()
    linear_cross_entropy(hidden, weight, None, target).backward()
    assert weight.grad is not None
    assert weight.grad.stride() == weight.stride()


# --- upstream gradients ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_twice_and_accumulation(reduction: str) -> None:
    hidden, weight, bias, target = problem()
    loss = linear_cross_entropy(hidden, weight, bias, target, reduction=reduction).sum()
    loss.backward(retain_graph=True)
    once = [t.grad.clone() for t in (hidden, weight, bias)]
    loss.backward(retain_graph=True)
    assert all(torch.equal(t.grad, 2 * g) for t, g in zip((hidden, weight, bias), once, strict=True))


@pytest.mark.parametrize("trained", [True, False])
def test_upstream_gradients_of_each_token(trained: bool) -> None:
    hidden, weight, bias, target = problem()
    target[3] = -100
    tensors = (hidden, weight.requires_grad_(trained), bias.requires_grad_(trained))
    check(tensors, target, torch.linspace(-1, 2, 70), reduction="none")
    check(tensors, target, 0.5, reduction="none")  # expanded, as `sum().backward()` has it


def test_two_losses_of_a_tied_weight_add_up() -> None:
    _, weight, _, target = problem()

    def tied(loss: Loss, w: Tensor) -> Tensor:
        hidden = F.embedding(target, w)
        return loss(hidden, w, None, target.roll(1)) + loss(hidden * 0.5, w, None, target.roll(2), reduction="sum")

    found = [torch.autograd.grad(tied(loss, weight.double()), weight)[0] for loss in (linear_cross_entropy, eager)]
    torch.testing.assert_close(found[0], found[1])


def test_differentiating_twice_raises() -> None:
    *tensors, target = problem()
    loss = linear_cross_entropy(*tensors, target)
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(loss, tensors[0], create_graph=True)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_gradient_that_was_not_announced_raises(reduction: str) -> None:
    hidden, weight, bias, target = problem()
    loss, *_ = FORWARD(hidden, weight, bias, target, *constants(reduction, True, False, True))
    with pytest.raises(RuntimeError, match="need_weight=False"):
        loss.sum().backward()


def test_computes_no_gradient_that_nobody_asks_for() -> None:
    hidden, weight, bias, target = problem()
    product = 2 * hidden.shape[0] * weight.numel()

    def flops(trained: tuple[bool, bool], reduction: str = "mean", training: bool = True, **options: Any) -> int:
        pair = [t.detach().requires_grad_(on) for t, on in zip((hidden, weight), trained, strict=True)]
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(training):
            loss = linear_cross_entropy(*pair, bias.detach(), target, reduction=reduction, **options).sum()
            if loss.requires_grad:
                loss.backward()
        return counter.get_total_flops() // product

    assert [flops((a, b)) for a, b in ((True, True), (True, False), (False, True), (False, False))] == [3, 2, 2, 1]
    assert flops((True, True), training=False) == 1
    assert [flops(trained, "none") for trained in ((True, True), (True, False))] == [4, 2]
    assert [flops(trained, recompute=True) for trained in ((True, True), (True, False))] == [4, 3]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_argmax_is_that_of_the_logits_and_changes_nothing_else(dtype: torch.dtype, softcap: float | None) -> None:
    hidden, weight, bias, target = problem(dtype=dtype)
    target[3] = -100
    with small_chunks():
        losses, best, _ = linear_cross_entropy_with(
            hidden, weight, bias, target.view(7, 10), argmax=True, softcap=softcap, reduction="none"
        )
        alone = linear_cross_entropy(hidden, weight, bias, target.view(7, 10), softcap=softcap, reduction="none")
    assert torch.equal(losses, alone)
    logits = (hidden.double() @ weight.double().t() + bias.double()).detach()
    if dtype in (torch.float64, torch.float32):
        assert torch.equal(best.flatten(), logits.argmax(-1))
    chosen = logits.gather(1, best.view(-1, 1)).squeeze(1)
    assert (chosen >= logits.amax(-1) - 2 * torch.finfo(dtype).eps * logits.abs().amax(-1)).all()
    assert best.shape == (7, 10)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ignored", [slice(0, 0), slice(1, None, 3), slice(None)], ids=["none", "some", "all"])
def test_argmax_is_of_ignored_rows_too_and_the_first_of_equal_logits(dtype: torch.dtype, ignored: slice) -> None:
    hidden, weight, bias, target = whole_numbers(dtype)
    target[ignored] = -100
    logits = F.linear(hidden, weight)
    assert (torch.sum(logits == logits.amax(-1, keepdim=True), -1) > 1).any()
    with small_chunks():
        found = [
            linear_cross_entropy_with(
                hidden.requires_grad_(trained), weight, bias, target, argmax=True, recompute=False
            ).argmax
            for trained in (True, False)
        ]
    assert all(torch.equal(best, logits.argmax(-1)) for best in found)


def test_argmax_of_ignored_rows_changes_no_gradient() -> None:
    *tensors, target = problem()
    target[::2] = -100
    with small_chunks():
        alone, beside = (run(loss, tensors, target) for loss in (linear_cross_entropy, with_argmax))
    assert all(torch.equal(a, b) for a, b in zip(alone.named().values(), beside.named().values(), strict=True))


def test_argmax_of_rows_that_are_no_numbers_is_torchs() -> None:
    hidden, weight, bias, target = (t.detach() for t in problem())
    bias[[5, 9]] = torch.tensor([math.inf, math.nan])
    hidden[3] = math.nan
    target[::4] = -100
    best = linear_cross_entropy_with(hidden, weight, bias, target, argmax=True).argmax
    assert torch.equal(best, F.linear(hidden, weight, bias).argmax(-1))


@given(drawn=problems(), kind=st.sampled_from((products.AtenProducts, None)))
def test_lse_and_its_gradients_are_those_of_the_logits(drawn: Any, kind: Any) -> None:
    tensors, target, upstream, options = drawn
    with small_chunks(kind):
        check(tensors, target, upstream, with_lse, eager_with_lse, **options)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_lse_has_a_gradient_where_the_loss_has_none(reduction: str) -> None:
    hidden, weight, bias, target = problem(7, dtype=torch.float64)
    target[:] = -100  # and a mean is NaN
    found = linear_cross_entropy_with(hidden, weight, bias, target, lse=True, reduction=reduction)
    expected = F.linear(hidden, weight, bias).logsumexp(-1)
    torch.testing.assert_close(found.lse, expected)
    ours, theirs = (torch.autograd.grad(lse.square().sum(), (hidden, weight, bias)) for lse in (found.lse, expected))
    for one, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, right)


def test_a_wrong_target_raises_beside_an_lse_too() -> None:
    *tensors, target = problem()
    target[3] = 57
    with pytest.raises(IndexError, match="Target 57 is out of bounds"):
        linear_cross_entropy_with(*tensors, target, lse=True)


# --- edges -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.fault("zero-size inputs and grid 0")
def test_no_row_counts(rows: int, reduction: str, label_smoothing: float) -> None:
    *tensors, target = problem(rows)
    options = {"reduction": reduction, "label_smoothing": label_smoothing}
    ignored = torch.full_like(target, -100)
    found = [run(loss, tensors, ignored, **options) for loss in (linear_cross_entropy, eager)]
    for ours, theirs in zip(found[0].named().values(), found[1].named().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    assert math.isnan(found[0].loss.sum()) == (reduction == "mean")


@pytest.mark.parametrize("wrong", [57, -1, 2**40])
@pytest.mark.fault("out-of-range targets")
def test_a_target_out_of_range_raises_as_torch_does(wrong: int) -> None:
    *tensors, target = problem()
    target[[2, 5]] = torch.tensor([-100, wrong])
    for loss in (eager, linear_cross_entropy):
        with pytest.raises(IndexError, match=f"Target {wrong} is out of bounds"):
            loss(*tensors, target)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["hidden", "bias"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.fault("NaN/Inf inputs and GradScaler")
def test_nan_and_infinity_go_where_torch_lets_them_go(where: str, value: float, reduction: str) -> None:
    hidden, weight, bias, target = (t.detach() for t in problem())
    target[target == 5] = 6
    {"hidden": hidden, "bias": bias}[where].view(-1)[5] = value
    tensors = tuple(t.requires_grad_() for t in (hidden, weight, bias))
    ours, theirs = (run(loss, tensors, target, reduction=reduction) for loss in (linear_cross_entropy, eager))
    for name, right in theirs.named().items():
        torch.testing.assert_close(ours.named()[name], right, equal_nan=True, msg=f"{name}: {ours} is not {theirs}")


def test_an_ignored_row_has_no_part_even_if_it_is_nan() -> None:
    hidden, weight, bias, target = problem()
    target[4] = -100
    poisoned = hidden.detach().clone()
    poisoned[4] = math.nan
    tensors = (poisoned.requires_grad_(), weight, bias)
    clean, ours = (run(linear_cross_entropy, t, target) for t in ((hidden, weight, bias), tensors))
    assert all(torch.equal(a, b) for a, b in zip(clean.named().values(), ours.named().values(), strict=True))


def test_a_small_probability_keeps_its_loss_and_a_large_one_its_gradient() -> None:
    """exp(-200) is 0 in fp32, and 1 - exp(-9) is 1 in bf16."""
    hidden, target = torch.tensor([[1.0], [1.0]]), torch.tensor([0, 1])
    for dtype in (torch.float32, torch.bfloat16):
        far = (hidden.to(dtype).requires_grad_(), torch.tensor([[-200.0], [0.0]], dtype=dtype).requires_grad_(), None)
        assert check(far, target, reduction="none").loss.tolist() == [200.0, 0.0]
        near = (hidden.to(dtype).requires_grad_(), torch.tensor([[0.0], [9.0]], dtype=dtype).requires_grad_(), None)
        assert check(near, target[1:].expand(2)).gradients["weight"].abs().min() > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", [None, products.AtenProducts])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_ambient_autocast_changes_nothing(dtype: torch.dtype, kind: Any, reduction: str) -> None:
    *tensors, target = problem(dtype=dtype)
    found = []
    for enabled in (False, True):
        with small_chunks(kind), torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            found.append(run(linear_cross_entropy, tensors, target, reduction=reduction))
    assert all(torch.equal(a, b) for a, b in zip(*(step.named().values() for step in found), strict=True))


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "share a floating dtype", {"weight": torch.zeros(57, 24, dtype=torch.float64)}),
        (TypeError, "int64", {"target": torch.zeros(70, dtype=torch.int32)}),
        (ValueError, "do not fit", {"weight": torch.zeros(57, 23)}),
        (ValueError, "69 targets", {"target": torch.zeros(69, dtype=torch.int64)}),
        (ValueError, r"\[57\]", {"bias": torch.zeros(58)}),
        (ValueError, "mean, sum, none", {"reduction": "max"}),
        (ValueError, "softcap", {"softcap": 0.0}),
        (ValueError, "label_smoothing", {"label_smoothing": 1.5}),
        (ValueError, "auto, aten, interpret", {"lowering": "triton"}),
    ],
)
def test_what_does_not_fit_is_named(error: type[Exception], message: str, change: dict[str, Any]) -> None:
    names = dict(zip((*NAMES, "target"), problem(), strict=True))
    with pytest.raises(error, match=message):
        linear_cross_entropy(**(names | change))


# --- as an operator in graphs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False)])
@pytest.mark.parametrize("transposed", [False, True])
def test_fake_and_autograd_registrations_are_true(reduction: str, needs: tuple[bool, ...], transposed: bool) -> None:
    hidden, weight, bias, target = problem()
    weight = weight.detach().t().contiguous().t() if transposed else weight.detach()
    tensors = [t.detach().requires_grad_(need) for t, need in zip((hidden, weight, bias), needs, strict=True)]
    for lse in (False, True):
        values = constants(reduction, *needs, argmax=transposed, lse=lse)
        torch.library.opcheck(FORWARD, (*tensors, target, *values))
        found = [output.requires_grad for output in FORWARD(*tensors, target, *values)]
        assert found == [True, *[False] * 5, lse]
    if reduction == "none":
        saved = (*(t.detach() for t in tensors), target, torch.empty(0))
        for by_lse in (None, torch.rand(70)):
            torch.library.opcheck(BACKWARD, (torch.rand(70), by_lse, *saved, *values))


def test_stays_whole_in_a_pre_autograd_trace() -> None:
    *tensors, target = problem()
    graph = make_fx(lambda *t: linear_cross_entropy(*t, reduction="sum") / 7, pre_dispatch=True)(*tensors, target).graph
    calls = [node for node in graph.nodes if node.target is FORWARD]
    assert [call.args[-5:-2] for call in calls] == [(True, True, True)]
    with torch.no_grad():
        graph = make_fx(lambda *t: linear_cross_entropy(*t, scale=1.0), pre_dispatch=True)(*tensors, target).graph
    assert [node.args[-5:-2] for node in graph.nodes if node.target is FORWARD] == [(False, False, False)]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_with_changing_sizes(backend: str, reduction: str) -> None:
    """Values and gradients through torch.compile; sizes that became symbols, then 1 and 0."""

    def loss(function: Loss, hidden: Tensor, *rest: Tensor) -> Tensor:
        losses = function(torch.tanh(hidden), *rest, reduction=reduction, softcap=4.0)
        return (losses * 0.3).sum()

    compiled = torch.compile(partial(loss, linear_cross_entropy), backend=backend, dynamic=True, fullgraph=True)
    for rows in (40, 7, 1, 0):
        *tensors, target = problem(rows)
        ours, theirs = (run(function, tensors, target) for function in (compiled, partial(loss, eager)))
        if rows or reduction == "none":
            compare(ours, theirs, run(partial(loss, eager), tensors, target, dtype=torch.float64)).check()
        else:
            assert math.isnan(ours.loss)


def test_trains_a_tied_model_through_inductor() -> None:
    """Embedding, a layer and the loss compiled together; three steps follow eager's."""

    class Model(torch.nn.Module):
        def __init__(self, function: Loss) -> None:
            super().__init__()
            self.embedding, self.layer, self.function = torch.nn.Embedding(57, 24), torch.nn.Linear(24, 24), function

        def forward(self, tokens: Tensor) -> Tensor:
            hidden = torch.relu(self.layer(self.embedding(tokens)))[:, :-1]
            return self.function(hidden, self.embedding.weight, None, tokens[:, 1:])

    losses = []
    for function in (linear_cross_entropy, eager):
        torch.manual_seed(0)
        model = Model(function).double()
        forward = torch.compile(model, backend="inductor") if function is linear_cross_entropy else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for step in range(3):
            optimizer.zero_grad()
            loss = forward(torch.arange(40).reshape(4, 10) + step)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[:3] == pytest.approx(losses[3:], rel=1e-12)
    assert losses[2] < losses[0]


# --- memory ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("needs", [(True, True, False), (True, False, False), (False, False, False)])
def test_the_memory_formula_is_what_the_allocator_sees(
    dtype: torch.dtype, softcap: float, needs: tuple[bool, ...]
) -> None:
    hidden, weight, _, target = problem(512, 128, 32_000, dtype)
    arguments = (hidden, weight, None, target, *constants("mean", *needs, softcap=softcap))
    with torch.no_grad():
        FORWARD(*arguments)
        peak = peak_bytes(lambda: FORWARD(*arguments))
    formula = memory_of(FORWARD, *arguments)
    assert formula is not None
    assert formula.outputs + formula.workspace == pytest.approx(peak, rel=0.1)
    assert peak < 512 * 32_000 * 4 + weight.nbytes  # a single fp32 copy of the logits and a gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_memory_formula_of_the_backward_is_what_the_allocator_sees(dtype: torch.dtype) -> None:
    *tensors, target = (t.detach() for t in problem(512, 128, 32_000, dtype))
    tensors[2] = None
    arguments = (
        torch.ones(()),
        None,
        *tensors,
        target,
        torch.empty(0),
        *constants("mean", True, True, False, recompute=True),
    )
    BACKWARD(*arguments)
    peak = peak_bytes(lambda: BACKWARD(*arguments))
    formula = memory_of(BACKWARD, *arguments)
    assert formula is not None
    assert formula.outputs + formula.workspace == pytest.approx(peak, rel=0.1)


def test_memory_of_other_operators_is_unknown() -> None:
    assert memory_of(torch.ops.aten.mm.default, torch.ones(1, 1), torch.ones(1, 1)) is None
    *tensors, target = problem()
    saved = (*tensors, target, torch.empty(0))
    backward = memory_of(BACKWARD, torch.rand(70), None, *saved, *constants("none", True, True, True))
    assert backward is not None
    assert backward.outputs == sum(t.nbytes for t in tensors)
