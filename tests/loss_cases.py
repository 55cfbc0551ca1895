"""A linear layer's cross-entropy in every form, and the same written out with logits, compared by the fp64 rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from fxopt.ops.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_with
from fxopt.testing.compare import Step, compare
from fxopt.testing.layouts import LAYOUTS

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NAMES = ("hidden", "weight", "bias")
Loss = Callable[..., Tensor]


def eager(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *, scale: float = 1.0,
    softcap: float | None = None, z_loss: float = 0.0, recompute: bool | None = None, lowering: str = "auto",
    **options: Any,
) -> Tensor:  # fmt: skip
    """What the operator stands for, with logits; scale and cap in the dtype of the logits, as models write them.

    recompute, lowering: the operator's business alone.
    """
    logits = logits_of(hidden, weight, bias, scale, softcap)
    loss = F.cross_entropy(logits, target.reshape(-1), **options)
    if z_loss:
        counts = target.reshape(-1) != options.get("ignore_index", -100)
        squares = torch.where(counts, z_loss * logits.logsumexp(-1).square(), 0.0)
        totals = {"sum": squares.sum(), "none": squares}
        loss = loss + totals.get(options.get("reduction", "mean"), squares.sum() / counts.sum())
    return loss.reshape(target.shape) if options.get("reduction") == "none" else loss


def logits_of(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    """[N, V] as they are exponentiated, in fp32 or wider."""
    logits = F.linear(hidden, weight, bias) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).reshape(-1, weight.shape[0])


def problem(rows: int = 70, width: int = 24, classes: int = 57, dtype: torch.dtype = torch.float32, seed: int = 0):
    """hidden [N, H], weight [V, H], bias [V] that require gradients and target [N]."""
    draw = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (
        torch.randn(*shape, generator=draw).to(dtype).requires_grad_()
        for shape in ((rows, width), (classes, width), (classes,))
    )
    return hidden, weight, bias, torch.randint(0, classes, (rows,), generator=draw)


def whole_numbers(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden [70, 8], weight [150, 8], a bias of zeros and target [70]: logits are exact, and the largest often tie."""
    draw = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randint(-1, 2, (rows, 8), generator=draw).to(dtype) for rows in (70, 150))
    return hidden, weight, torch.zeros(150, dtype=dtype), torch.randint(0, 150, (70,), generator=draw)


def constants(
    reduction: str, *needs: bool, softcap: float = 0.0, argmax: bool = False, lse: bool = False,
    recompute: bool = False, lowering: str = "auto",
) -> tuple[Any, ...]:  # fmt: skip
    """What the operators take after their tensors."""
    return (1.0, softcap, 0.0, 0.0, -100, reduction, argmax, lse, *needs, recompute, lowering)


def run(
    loss: Loss, tensors: Sequence[Any], target: Tensor, upstream: Any = 1.0, dtype: Any = None, **options: Any
) -> Step:
    """Loss and gradients, with everything in `dtype` if given; `requires_grad` and strides are the tensors' own."""
    inputs = [None if t is None else t.detach().to(dtype or t.dtype).requires_grad_(t.requires_grad) for t in tensors]
    found = loss(*inputs, target, **options)
    if found.requires_grad:
        found.backward(torch.as_tensor(upstream, dtype=found.dtype).expand(found.shape))
    gradients = {name: None if t is None else t.grad for name, t in zip(NAMES, inputs, strict=True)}
    losses = found.detach()
    return Step(losses, {}, gradients, torch.finfo(tensors[0].dtype).eps)


def with_argmax(*arguments: Any, **options: Any) -> Tensor:
    """The operator's loss where it is asked for the argmax too."""
    return linear_cross_entropy_with(*arguments, argmax=True, **options).loss


def with_lse(*arguments: Any, **options: Any) -> Tensor:
    """The operator's loss, and a share of every row's lse."""
    found = linear_cross_entropy_with(*arguments, lse=True, **options)
    assert found.lse is not None
    return mixed(found.loss, found.lse)


def eager_with_lse(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *, scale: float = 1.0,
    softcap: float | None = None, **options: Any,
) -> Tensor:  # fmt: skip
    """The same with logits."""
    loss = eager(hidden, weight, bias, target, scale=scale, softcap=softcap, **options)
    return mixed(loss, logits_of(hidden, weight, bias, scale, softcap).logsumexp(-1))


def mixed(loss: Tensor, lse: Tensor) -> Tensor:
    """The loss with its rows' lse squared, in other shares than the loss has them, some negative."""
    shares = torch.linspace(-0.5, 1.0, lse.numel(), dtype=lse.dtype).view(lse.shape) * lse.square()
    return loss + (shares.view(loss.shape) if loss.dim() else shares.mean())


def check(
    tensors: Sequence[Any], target: Tensor, upstream: float | Tensor = 1.0, loss: Loss = linear_cross_entropy,
    reference: Loss = eager, **options: Any,
) -> Step:  # fmt: skip
    """Run the operator as `loss`, eager and eager in fp64; apply the rule and return the operator's step.

    reference: what `loss` stands for, with logits.

    A loss is one number, which eager gets right by luck now and then: where the rule is broken it is asked again, with
    the sums over H in other orders. There is nothing exact to hold fp64 against: 64 roundings are allowed there.
    """
    ours = run(loss, tensors, target, upstream, **options)
    exact = run(reference, tensors, target, upstream, torch.float64, **options)
    if tensors[0].dtype == torch.float64:
        for name, right in exact.named().items():
            scale = 1.0 if right is None else max(float(right.abs().max()), 1.0)
            torch.testing.assert_close(ours.named()[name], right, rtol=0, atol=64 * ours.eps * scale)
    else:
        orders = [torch.arange(tensors[0].shape[1]), *(torch.randperm(tensors[0].shape[1]) for _ in range(7))]
        again = (run(partial(reordered, reference, o), tensors, target, upstream, **options) for o in orders)
        found = (compare(ours, one, exact) for one in again)
        first = next(found)
        assert first.ok or any(comparison.ok for comparison in found), str(first)
    return ours


def reordered(loss: Loss, order: Tensor, hidden: Tensor, weight: Tensor, *rest: Any, **options: Any) -> Tensor:
    """`loss` with H permuted: the same value, and gradients, from sums in another order."""
    return loss(hidden[:, order], weight[:, order], *rest, **options)


@st.composite
def problems(
    draw: st.DrawFn, dtypes: Sequence[torch.dtype] = DTYPES
) -> tuple[tuple[Any, ...], Tensor, Tensor, dict[str, Any]]:
    """Tensors of any dtype and layout, targets some of which are ignored, upstream gradients and options."""
    dtype = draw(st.sampled_from(dtypes))
    least = dtype == torch.float64  # in fp32 a single number says nothing about accuracy: eager's is right by luck
    classes = draw(st.sampled_from((1, 2, 7, 57) if least else (7, 57)))
    rows, width = draw(st.sampled_from((1, 3, 70) if least else (33, 70))), draw(st.sampled_from((1, 8, 70)))
    hidden, weight, bias, target = problem(rows, width, classes, dtype, draw(st.integers(0, 2**16)))
    hidden, weight = (LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))](t.detach()) for t in (hidden, weight))
    tensors = (hidden, weight, bias.detach() if draw(st.booleans()) else None)
    for tensor in tensors:
        if tensor is not None:
            tensor.requires_grad_(draw(st.booleans()))
    ignore = draw(st.sampled_from((-100, 0)))
    target = target.masked_fill(torch.rand(target.shape) < draw(st.sampled_from((0.0, 0.4))), ignore)
    target[0] = classes - 1  # `mean` is NaN where all are ignored: a test of its own
    options = {
        "reduction": draw(st.sampled_from(("mean", "sum", "none"))),
        "label_smoothing": draw(st.sampled_from((0.0, 0.1))),
        "ignore_index": ignore if classes > 1 else -100,
        "scale": draw(st.sampled_from((1.0, 0.3, -2.0))),
        "softcap": draw(st.sampled_from((None, 5.0))),
        "z_loss": draw(st.sampled_from((0.0, 0.05))),
        "recompute": draw(st.booleans()),
    }
    upstream = torch.randn(target.shape) if options["reduction"] == "none" else torch.randn(())
    return tensors, target, upstream, options
