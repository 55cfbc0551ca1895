"""``cross_entropy(hidden @ weight.T)`` that never holds the logits, for training and evaluation.

`linear_cross_entropy` is what graphs and people call: it checks the arguments, works out which gradients will be asked
for and calls the operator (`fxopt.ops.loss_operator`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fxopt.ops.launch import check_lowering
from fxopt.ops.loss_costs import recomputes
from fxopt.ops.loss_operator import FORWARD
from fxopt.ops.loss_spec import LossSpec, Wanted

__all__ = ["LossWith", "linear_cross_entropy", "linear_cross_entropy_with"]

REDUCTIONS = ("mean", "sum", "none")


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    recompute: bool | None = None,
    lowering: str = "auto",
) -> Tensor:
    """Cross-entropy of a linear layer's outputs without the outputs.

    Equals ``F.cross_entropy(z.float(), target, ...)`` with ``l = scale * (hidden @ weight.T + bias)`` and
    ``z = softcap * tanh(l / softcap)``, or ``z = l`` without a softcap, plus for each row ``z_loss * logsumexp(z)**2``.
    Logits are rounded to the inputs' dtype once, by the matrix product, or not at all; all after that is fp32.

    Args:
        hidden: [..., H], of any strides.
        weight: [V, H], of hidden's dtype; a transposed [H, V] is as good, and gets a gradient of that layout.
        bias: [V], of hidden's dtype, or None.
        target: class indices, int64, hidden's shape without H, or the same number of them in any shape.
        scale, softcap, label_smoothing, z_loss, ignore_index: constants. The softcap is positive or None.
        reduction: "mean" (over the rows not ignored; NaN if all are), "sum" or "none".
        recompute: whether the backward computes the logits again, rather than the forward the gradients; None: what
            `fxopt.ops.loss_costs` finds better. With "none" and a trained weight or bias there is no choice.
        lowering: how it is computed (`fxopt.ops.launch`).

    Returns:
        A scalar, or for "none" the losses in target's shape. fp32 (fp64 for fp64 inputs), also for bf16 and fp16: cast
        it where the loss was computed on narrow logits.

    Raises:
        ValueError, TypeError: for shapes, dtypes or options that do not fit.
        IndexError: at run time on a CPU, for a target outside [0, V) that is not `ignore_index`. On a GPU the loss is
            NaN then.
        RuntimeError: in the backward, if it is to be differentiated again (``create_graph=True``).

    Gradients are computed for the inputs that require them where grad mode is on, both as they are when this is called
    or traced. Ambient autocast is not looked at: cast the arguments.
    """
    spec = LossSpec(scale, _checked(softcap), label_smoothing, z_loss, ignore_index, reduction)
    return _call(hidden, weight, bias, target, spec, False, False, recompute, lowering).loss


class LossWith(NamedTuple):
    """A loss and what else one pass over the logits gives, None where that is not asked for.

    loss:   as `linear_cross_entropy` gives it.
    argmax: int64, in target's shape: the class of each row's largest logit, ignored rows included.
    lse:    fp32 (fp64 for fp64), in target's shape: ``z.logsumexp(-1)`` of each row, ignored rows included. It has a
            gradient.
    """

    loss: Tensor
    argmax: Tensor | None
    lse: Tensor | None


def linear_cross_entropy_with(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    argmax: bool = False,
    lse: bool = False,
    scale: float = 1.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    recompute: bool | None = None,
    lowering: str = "auto",
) -> LossWith:
    """`linear_cross_entropy`, and from the same pass the class of each row's largest logit, or each row's logsumexp.

    argmax: what ``z.argmax(-1)`` gives. Unless `ignore_index` is a class,
    ``(argmax == target).sum() / (target != ignore_index).sum()`` is the accuracy. Logits are rounded to the inputs'
    dtype here, however they are computed, then scaled and capped in fp32. Of several that are largest it is the first;
    NaN counts as the largest, by kernels as one of those that are infinite. Logits that differ by no more than the
    order of the sums over H makes may change places, or may be equal, as they may from one matrix product of a library
    to another.

    lse: of which a z-loss is made, in any form; where all of it is ``z_loss * lse**2``, reduced as the loss is, the
    argument of that name costs less. Its upstream gradients come with the backward, which computes the logits again.
    """
    spec = LossSpec(scale, _checked(softcap), label_smoothing, z_loss, ignore_index, reduction)
    return _call(hidden, weight, bias, target, spec, argmax, lse, recompute, lowering)


def _call(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    spec: LossSpec,
    argmax: bool,
    lse: bool,
    recompute: bool | None,
    lowering: str,
) -> LossWith:
    _check_options(spec)
    check_lowering(lowering)
    _check_tensors(hidden, weight, bias, target)
    training = torch.is_grad_enabled()
    wanted = Wanted(*(training and one is not None and one.requires_grad for one in (hidden, weight, bias)))
    if recompute is None:
        recompute = recomputes(hidden, weight, target.numel(), wanted, lowering)
    loss, *_, best, logsumexp = FORWARD(
        hidden.reshape(-1, hidden.shape[-1]), weight, bias, target.reshape(-1),
        spec.scale, spec.softcap, spec.label_smoothing, spec.z_loss, spec.ignore_index, spec.reduction, argmax, lse,
        *wanted.flags, recompute, lowering,
    )  # fmt: skip
    shape = target.shape
    return LossWith(
        loss.reshape(shape) if spec.reduction == "none" else loss,
        best.reshape(shape) if argmax else None,
        logsumexp.reshape(shape) if lse else None,
    )


def _checked(softcap: float | None) -> float:
    """As `LossSpec` has it."""
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}: it must be positive, or None for no cap")
    return softcap or 0.0


def _check_options(spec: LossSpec) -> None:
    if spec.reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {spec.reduction!r}: it must be one of {', '.join(REDUCTIONS)}")
    if not 0 <= spec.label_smoothing <= 1:
        raise ValueError(f"label_smoothing is {spec.label_smoothing}: it must be between 0 and 1")


def _check_tensors(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> None:
    if hidden.dim() == 0 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(f"hidden [..., H] and weight [V, H] do not fit: {list(hidden.shape)} and {list(weight.shape)}")
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != weight.shape[0]):
        raise ValueError(f"bias must be [{weight.shape[0]}], not {list(bias.shape)}")
    if target.numel() * hidden.shape[-1] != hidden.numel():
        raise ValueError(f"{target.numel()} targets do not fit hidden {list(hidden.shape)}: there must be one a row")
    dtypes = [tensor.dtype for tensor in (hidden, weight, bias) if tensor is not None]
    if len(set(dtypes)) > 1 or not dtypes[0].is_floating_point:
        raise TypeError(f"hidden, weight and bias must share a floating dtype, not {', '.join(map(str, dtypes))}")
    if target.dtype != torch.int64:
        raise TypeError(f"target must be int64, not {target.dtype}")
