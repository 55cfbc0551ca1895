"""Generated kernels of a linear layer's cross-entropy, interpreted, against the logits by the fp64 rule."""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import harness
import models
import pytest
import torch
import torch.nn.functional as F
from allocations import peak_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import (
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
)  # fmt: skip
from torch import Tensor, fx

import fxopt
from fxopt import backend as pipeline
from fxopt.ops import chunked_loss, loss_launch
from fxopt.ops.launch import launch
from fxopt.ops.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_with
from fxopt.ops.loss_operator import BACKWARD, FORWARD
from fxopt.ops.registry import memory_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PATHS = pytest.mark.parametrize("recompute", [True, False], ids=["tiles", "chunks"])


@contextlib.contextmanager
def small_pieces() -> Iterator[None]:
    """Gradients of 40 classes, which the tiles' 16 does not divide, and chunks of 32 rows at a time."""
    with (
        mock.patch.multiple(loss_launch, PIECE_BYTES=1, LEAST_CLASSES=40),
        mock.patch.multiple(chunked_loss, CHUNK_BYTES=1, LEAST_ROWS=1),
    ):
        yield


@settings(max_examples=30)
@given(drawn=problems(DTYPES), lowering=st.just("interpret"))
def test_equals_cross_entropy_of_the_logits(drawn: Any, lowering: str) -> None:
    tensors, target, upstream, options = drawn
    with small_pieces():
        check(tensors, target, upstream, lowering=lowering, **options)


@settings(max_examples=12)
@given(drawn=problems(DTYPES), lowering=st.just("interpret"))
def test_lse_and_its_gradients_are_those_of_the_logits(drawn: Any, lowering: str) -> None:
    tensors, target, upstream, options = drawn
    with small_pieces():
        check(tensors, target, upstream, with_lse, eager_with_lse, lowering=lowering, **options)


@PATHS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_everything_at_a_time(dtype: torch.dtype, reduction: str, recompute: bool) -> None:
    """57 classes, 70 tokens and a width of 24 are multiples of no tile, and 24 of no BLOCK_K."""
    hidden, weight, bias, target = problem(dtype=dtype)
    target[::5] = -1
    tensors = (
        torch.stack((hidden, hidden), 1).detach()[:, 0].requires_grad_(),
        weight.detach().t().contiguous().t().requires_grad_(),
        bias,
    )
    upstream = torch.linspace(-1, 2, 70) if reduction == "none" else 0.3
    options = {"scale": 0.7, "softcap": 5.0, "label_smoothing": 0.1, "z_loss": 0.05, "ignore_index": -1}
    with small_pieces():
        check(tensors, target, upstream, reduction=reduction, lowering="interpret", recompute=recompute, **options)


@PATHS
def test_repeats_bit_for_bit(recompute: bool) -> None:
    *tensors, target = problem(70, 64, 57, torch.bfloat16)
    first, second = (run(interpreted, tensors, target, recompute=recompute) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.named().values(), second.named().values(), strict=True))


def interpreted(*tensors: Any, **options: Any) -> Tensor:
    return linear_cross_entropy(*tensors, lowering="interpret", **options)


@PATHS
@pytest.mark.parametrize("trained", [(True, False, False), (False, True, False), (False, False, True), (False,) * 3])
def test_computes_no_gradient_that_nobody_asks_for(trained: tuple[bool, ...], recompute: bool) -> None:
    *tensors, target = problem()
    for one, on in zip(tensors, trained, strict=True):
        one.requires_grad_(on)
    found = check(tensors, target, lowering="interpret", recompute=recompute)
    assert tuple(gradient is not None for gradient in found.gradients.values()) == trained
    wanted = FORWARD(*tensors, target, *constants("mean", *trained, recompute=recompute, lowering="interpret"))
    computed = (*trained, False) if not recompute else (*(False,) * 3, any(trained))
    assert tuple(bool(one.numel()) for one in wanted[1:5]) == computed


@PATHS
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows", [0, 3])
def test_no_row_counts(rows: int, reduction: str, label_smoothing: float, recompute: bool) -> None:
    *tensors, target = problem(rows)
    options = {"reduction": reduction, "label_smoothing": label_smoothing, "recompute": recompute}
    ignored = torch.full_like(target, -100)
    found = [run(loss, tensors, ignored, **options) for loss in (interpreted, eager)]
    for ours, theirs in zip(found[0].named().values(), found[1].named().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    assert math.isnan(found[0].loss.sum()) == (reduction == "mean")


# --- numbers that are none, and targets ----------------------------------------------------------------------------


@PATHS
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["hidden", "bias"])
def test_nan_and_infinity_go_where_torch_lets_them_go(where: str, value: float, recompute: bool) -> None:
    hidden, weight, bias, target = (t.detach() for t in problem())
    target[target == 5] = 6
    {"hidden": hidden, "bias": bias}[where].view(-1)[5] = value
    tensors = tuple(t.requires_grad_() for t in (hidden, weight, bias))
    ours, theirs = (run(loss, tensors, target, recompute=recompute) for loss in (interpreted, eager))
    for name, right in theirs.named().items():
        torch.testing.assert_close(ours.named()[name], right, equal_nan=True, msg=f"{name}: {ours} is not {theirs}")


@PATHS
def test_classes_that_are_ruled_out_by_a_bias_fill_whole_tiles(recompute: bool) -> None:
    """The first tiles of 16 classes, and the first part of 32, have no finite logit."""
    hidden, weight, bias, target = problem()
    ruled_out = bias.detach().clone()
    ruled_out[:40] = -math.inf
    check((hidden, weight, ruled_out), target % 17 + 40, lowering="interpret", recompute=recompute)


@PATHS
def test_an_ignored_row_has_no_part_in_the_loss_even_if_it_is_nan(recompute: bool) -> None:
    hidden, weight, bias, target = problem()
    target[4] = -100
    poisoned = hidden.detach().clone()
    poisoned[4] = math.nan
    weight.requires_grad_(False)  # its gradient is eager's: 0 * NaN
    clean, ours = (
        run(interpreted, (one, weight, bias), target, recompute=recompute)
        for one in (hidden, poisoned.requires_grad_())
    )
    assert all(torch.equal(a, b) for a, b in zip(_there(clean), _there(ours), strict=True))


def _there(step: Any) -> list[Tensor]:
    return [one for one in step.named().values() if one is not None]


@PATHS
@pytest.mark.parametrize("wrong", [57, 63, -1, 2**40])
def test_the_loss_of_a_target_that_is_no_class_is_nan(wrong: int, recompute: bool) -> None:
    """A kernel cannot raise; 63 is a column of the last tile."""
    *tensors, target = problem()
    target[2] = wrong
    losses = interpreted(*tensors, target, reduction="none", recompute=recompute)
    assert torch.arange(70)[losses.isnan()].tolist() == [2]


@PATHS
def test_a_small_probability_keeps_its_loss_and_a_large_one_its_gradient(recompute: bool) -> None:
    """exp(-200) is 0 in fp32, and 1 - exp(-9) is 1 in bf16."""
    hidden, target = torch.tensor([[1.0], [1.0]]), torch.tensor([0, 1])
    how = {"lowering": "interpret", "recompute": recompute}
    for dtype in (torch.float32, torch.bfloat16):
        far = (hidden.to(dtype).requires_grad_(), torch.tensor([[-200.0], [0.0]], dtype=dtype).requires_grad_(), None)
        assert check(far, target, reduction="none", **how).loss.tolist() == [200.0, 0.0]
        near = (hidden.to(dtype).requires_grad_(), torch.tensor([[0.0], [9.0]], dtype=dtype).requires_grad_(), None)
        assert check(near, target[1:].expand(2), **how).gradients["weight"].abs().min() > 1e-4


@PATHS
def test_argmax_is_the_first_of_the_largest_logits_in_any_tile(recompute: bool) -> None:
    hidden, weight, bias, target = whole_numbers()
    target[3] = -100
    loss, best, _ = linear_cross_entropy_with(
        hidden, weight, bias, target, argmax=True, reduction="none", lowering="interpret", recompute=recompute
    )
    logits = hidden @ weight.t()
    largest = logits == logits.amax(-1, keepdim=True)
    assert (largest[:, :32].any(-1) & largest[:, 32:].any(-1)).any()  # in two parts of the vocabulary
    assert torch.equal(loss, interpreted(hidden, weight, bias, target, reduction="none", recompute=recompute))
    assert torch.equal(best, logits.argmax(-1))


@PATHS
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_argmax_is_of_logits_rounded_to_the_inputs_dtype(
    dtype: torch.dtype, softcap: float | None, recompute: bool
) -> None:
    """Logits of 256 and a little: 8 or 11 bits keep few of them apart, and the product in fp32 all."""
    draw = torch.Generator().manual_seed(0)
    hidden, weight = ((size + torch.rand(rows, 16, generator=draw)).to(dtype) for size, rows in ((1, 70), (12, 150)))
    target = torch.randint(0, 150, (70,), generator=draw).masked_fill(torch.arange(70) % 3 == 0, -100)
    _, best, _ = linear_cross_entropy_with(
        hidden, weight, None, target, argmax=True, softcap=softcap, lowering="interpret", recompute=recompute
    )
    product = hidden.double() @ weight.double().t()
    rounded = product.to(dtype).double()
    expected = rounded.argmax(-1) if softcap is None else (rounded.float() / softcap).tanh().argmax(-1)
    assert not torch.equal(expected, product.argmax(-1))
    assert torch.equal(best, expected)


@PATHS
@pytest.mark.parametrize("dtype", DTYPES)
def test_beside_an_argmax_loss_and_gradients_are_of_the_same_logits(dtype: torch.dtype, recompute: bool) -> None:
    *tensors, target = problem(dtype=dtype)
    target[::5] = -100
    check(tensors, target, 0.3, with_argmax, softcap=5.0, lowering="interpret", recompute=recompute)


@PATHS
def test_argmax_of_rows_that_are_no_numbers_is_torchs(recompute: bool) -> None:
    hidden, weight, bias, target = (t.detach() for t in problem())
    hidden[3] = bias[40] = math.nan
    _, best, _ = linear_cross_entropy_with(
        hidden, weight, bias, target, argmax=True, lowering="interpret", recompute=recompute
    )
    assert torch.equal(best, (hidden @ weight.t() + bias).argmax(-1))


# --- as an operator ------------------------------------------------------------------------------------------------


@PATHS
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("transposed", [False, True])
def test_fake_and_autograd_registrations_are_true(reduction: str, transposed: bool, recompute: bool) -> None:
    hidden, weight, bias, target = problem(20)
    weight = (weight.detach().t().contiguous().t() if transposed else weight.detach()).requires_grad_()
    how = {"recompute": recompute, "lowering": "interpret", "argmax": transposed}
    values = constants(reduction, True, True, True, **how)
    torch.library.opcheck(FORWARD, (hidden, weight, bias, target, *values))
    *_, normalizer, _, _ = FORWARD(hidden, weight, bias, target, *values)
    if normalizer.numel():
        saved = (hidden.detach(), weight.detach(), bias.detach(), target, normalizer)
        for by_lse in (None, torch.rand(20)):
            upstream = torch.rand(20 if reduction == "none" else ())
            torch.library.opcheck(BACKWARD, (upstream, by_lse, *saved, *values))


def test_compiles_with_changing_sizes() -> None:
    compiled = torch.compile(interpreted, backend="aot_eager", dynamic=True, fullgraph=True)
    for rows in (40, 7, 1):
        *tensors, target = problem(rows)
        ours, here = (run(function, tensors, target) for function in (compiled, interpreted))
        assert all(torch.equal(a, b) for a, b in zip(ours.named().values(), here.named().values(), strict=True))


def launch_and_let_go(*arguments: Any) -> None:
    """The interpreter leaves what it was given in reference cycles."""
    launch(*arguments)
    gc.collect()


def nothing(*arguments: Any, **named: Any) -> None:
    """Unlike a mock, which would hold what it is called with."""


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow), torch.bfloat16])
def test_the_memory_formulas_of_tiles_are_what_the_allocator_sees(dtype: torch.dtype) -> None:
    hidden, weight, _, target = (t.detach() for t in problem(100, 16, 200, dtype))
    values = constants("mean", True, True, False, argmax=True, lse=True, recompute=True, lowering="interpret")
    forward = (hidden, weight, None, target, *values)
    *_, normalizer, _, _ = FORWARD(*forward)
    backward = (torch.ones(()), torch.ones(100), hidden, weight, None, target, normalizer, *values)
    with (
        mock.patch.multiple(loss_launch, PIECE_BYTES=1, LEAST_CLASSES=64),
        # A CPU's library copies and widens what 16-bit products are of, which ones depends on the processor.
        mock.patch.object(loss_launch, "add_product", nothing),
        mock.patch.object(torch, "mm", nothing),
        mock.patch.object(loss_launch, "launch", launch_and_let_go),
    ):
        peaks = [peak_bytes(lambda: FORWARD(*forward)), peak_bytes(lambda: BACKWARD(*backward))]
        formulas = [memory_of(FORWARD, *forward), memory_of(BACKWARD, *backward)]
    for peak, formula in zip(peaks, formulas, strict=True):
        assert formula is not None
        assert formula.outputs + formula.workspace == pytest.approx(peak, rel=0.1)


# --- in models -----------------------------------------------------------------------------------------------------

LOSS_ALONE = {"kernels": "interpret", "rules": ["-attention", "-norm"]}


def loss_alone(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """fxopt with an interpreted loss and nothing else, and AOTAutograd's eager compiler: no C++ to compile."""
    report, call = pipeline.run(gm, inputs, fxopt.Options.parse(LOSS_ALONE), harness.original)
    pipeline.record(fxopt.Report([report]))
    return call


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_training_step_of_a_model(family: str) -> None:
    fxopt.clear_reports()
    model, inputs = models.build(family, dtype=torch.bfloat16)
    with mock.patch.object(loss_launch, "gradients", wraps=loss_launch.gradients) as tiles:
        harness.check(model, torch.compile(model, backend=loss_alone), inputs)
    assert tiles.call_count == 1
    harness.assert_loss_rewritten()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_argmax_beside_the_loss_comes_from_the_tiles(dtype: torch.dtype) -> None:
    """Of all rows, though the loss reads others and ignores some."""
    hidden, weight, _, target = whole_numbers(dtype)
    target[::4] = -100
    hidden.requires_grad_(), weight.requires_grad_()

    def model(h: Tensor, w: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.linear(h.view(7, 10, -1), w)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), t.view(7, 10)[:, 1:].flatten())
        return loss, logits.argmax(-1)

    fxopt.clear_reports()
    with mock.patch.object(loss_launch, "token_losses", wraps=loss_launch.token_losses) as tiles:
        loss, best = torch.compile(model, backend=loss_alone)(hidden, weight, target)
    assert tiles.call_count == 1
    harness.assert_loss_rewritten()
    assert torch.equal(best, model(hidden, weight, target)[1])
    gradients, expected = (
        torch.autograd.grad(one, (hidden, weight)) for one in (loss, model(hidden, weight, target)[0])
    )
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=1e-4)
