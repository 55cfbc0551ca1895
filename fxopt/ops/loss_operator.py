"""The operators of a linear layer's cross-entropy: schema, fake, autograd, flops and memory.

    fxopt::linear_cross_entropy           losses, and for mean and sum the gradients too, while a chunk's logits are
                                          there: three matrix products in all, none of them recomputed
    fxopt::linear_cross_entropy_backward  gradients where each row has an upstream gradient of its own (reduction
                                          "none" with a trained weight or bias): logits recomputed, a fourth product

Between forward and backward only hidden- and weight-shaped tensors are kept, and nothing [N, V]. Arguments:

    hidden [N, H], weight [V, H], bias [V] or None: one floating dtype; target [N]: int64
    scale, softcap (0: none), label_smoothing, ignore_index, reduction: the loss (`LossSpec`)
    need_hidden, need_weight, need_bias: the gradients that the backward will be asked for

Losses are fp32 (fp64 for fp64): a scalar, or [N] for "none". Gradients that the forward does not compute are empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fxopt.ops.chunked_loss import (
    LossAndGradients,
    LossSpec,
    Wanted,
    loss_and_gradients,
    workspace_bytes,
)
from fxopt.ops.products import accumulate_dtype, gradient_dtype
from fxopt.ops.registry import OpMemory

__all__ = ["BACKWARD", "FORWARD", "MEMORY"]

Tensors = tuple[Tensor, ...]
_ARGUMENTS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor target, float scale, float softcap, float label_smoothing, "
    "int ignore_index, str reduction, bool need_hidden, bool need_weight, bool need_bias"
)
_GRADIENTS = "Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias"
_OTHERS = 9  # arguments after bias: they have no gradient


@dataclass(frozen=True)
class _Call:
    """Arguments of the operator after the tensors, and what follows from them."""

    spec: LossSpec
    wanted: Wanted

    @classmethod
    def of(cls, constants: Sequence[Any]) -> _Call:
        return cls(LossSpec(*constants[:-3]), Wanted(*constants[-3:]))

    @property
    def recomputes(self) -> bool:
        """Whether gradients wait for the backward: a sum over rows needs every row's upstream gradient first."""
        return self.spec.reduction == "none" and (self.wanted.weight or self.wanted.bias)

    @property
    def now(self) -> Wanted:
        """The gradients that the forward computes."""
        return Wanted(False, False, False) if self.recomputes else self.wanted


# --- fxopt::linear_cross_entropy: constants are those of _ARGUMENTS after target ---------------------------------


@torch.library.custom_op(
    "fxopt::linear_cross_entropy", mutates_args=(), schema=f"({_ARGUMENTS}) -> (Tensor loss, {_GRADIENTS})"
)
def _forward(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *constants: Any) -> Tensors:
    call = _Call.of(constants)
    with torch.autocast(hidden.device.type, enabled=False):
        found = loss_and_gradients(hidden, weight, bias, target, call.spec, call.now)
    loss = found.losses
    if call.spec.reduction != "none":
        loss = loss.sum() if call.spec.reduction == "sum" else loss.sum() / found.count
    return loss, *_present(found, weight)


@_forward.register_fake
def _fake_forward(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *constants: Any) -> Tensors:
    call = _Call.of(constants)
    shape = hidden.shape[:1] if call.spec.reduction == "none" else ()
    loss = hidden.new_empty(shape, dtype=accumulate_dtype(hidden.dtype))
    return loss, *_empty_gradients(hidden, weight, call.now)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    hidden, weight, bias, target, *constants = inputs
    ctx.constants, ctx.call, ctx.dtype = constants, _Call.of(constants), hidden.dtype
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # else zeros as large as the weight stand for gradients that nobody has
    inputs_saved = (hidden, weight, target, *(() if bias is None else (bias,)))
    ctx.save_for_backward(*(inputs_saved if ctx.call.recomputes else output[1:]))


def _backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    """Gradients by hidden, weight and bias, in their dtype; upstream is a scalar, or [N] for reduction "none"."""
    if torch.is_grad_enabled():
        raise RuntimeError("fxopt::linear_cross_entropy cannot be differentiated twice: do without create_graph=True")
    _check_wanted(ctx)
    if upstream is None:
        return (None,) * (3 + _OTHERS)
    if ctx.call.recomputes:
        hidden, weight, target, *bias = ctx.saved_tensors
        gradients = BACKWARD(upstream, hidden, weight, bias[0] if bias else None, target, *ctx.constants)
    else:
        rows = upstream[:, None] if upstream.dim() else upstream
        # Widened first: a scalar tensor would be rounded to bf16 before it multiplies a bf16 tensor.
        gradients = [one.to(upstream.dtype) * rows if one.numel() else one for one in ctx.saved_tensors]
    by_input = [one.to(ctx.dtype) if want else None for one, want in zip(gradients, ctx.call.wanted.flags, strict=True)]
    return (*by_input, *(None,) * _OTHERS)


def _check_wanted(ctx: Any) -> None:
    """A gradient that is missing is an error: autograd would take it for zero."""
    names = ("hidden", "weight", "bias")
    for name, want, needs in zip(names, ctx.call.wanted.flags, ctx.needs_input_grad, strict=False):
        if needs and not want:
            raise RuntimeError(
                f"fxopt::linear_cross_entropy was called with need_{name}=False, but {name} requires grad: pass True,"
                " or call fxopt.ops.linear_cross_entropy.linear_cross_entropy, which looks"
            )


_forward.register_autograd(_backward, setup_context=_setup_context)


# --- fxopt::linear_cross_entropy_backward ------------------------------------------------------------------------


@torch.library.custom_op(
    "fxopt::linear_cross_entropy_backward", mutates_args=(), schema=f"(Tensor upstream, {_ARGUMENTS}) -> ({_GRADIENTS})"
)
def _recompute(
    upstream: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *constants: Any
) -> Tensors:
    call = _Call.of(constants)
    with torch.autocast(hidden.device.type, enabled=False):
        found = loss_and_gradients(hidden, weight, bias, target, call.spec, call.wanted, upstream)
    return _present(found, weight)


@_recompute.register_fake
def _fake_recompute(
    upstream: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *constants: Any
) -> Tensors:
    return _empty_gradients(hidden, weight, _Call.of(constants).wanted)


def _present(found: LossAndGradients, weight: Tensor) -> Tensors:
    """The gradients; those not wanted as tensors without elements, since an operator's outputs are all there."""
    empty = gradient_dtype(weight.dtype)
    return tuple(
        weight.new_empty(0, dtype=empty) if gradient is None else gradient
        for gradient in (found.hidden, found.weight, found.bias)
    )


def _empty_gradients(hidden: Tensor, weight: Tensor, wanted: Wanted) -> Tensors:
    """Gradients with the strides that `loss_and_gradients` gives them, not computed."""
    dtype = gradient_dtype(weight.dtype)
    return (
        hidden.new_empty(hidden.shape if wanted.hidden else 0, dtype=dtype),
        torch.empty_like(weight, dtype=dtype) if wanted.weight else weight.new_empty(0, dtype=dtype),
        weight.new_empty(weight.shape[0] if wanted.bias else 0, dtype=dtype),
    )


# --- what it costs -----------------------------------------------------------------------------------------------


def _flops(hidden: Sequence[int], weight: Sequence[int], products: int) -> int:
    return 2 * hidden[0] * weight[0] * weight[1] * products


@register_flop_formula(torch.ops.fxopt.linear_cross_entropy)
def _forward_flops(hidden: Any, weight: Any, bias: Any, target: Any, *constants: Any, **_: Any) -> int:
    now = _Call.of(constants).now
    return _flops(hidden, weight, 1 + now.hidden + now.weight)


@register_flop_formula(torch.ops.fxopt.linear_cross_entropy_backward)
def _recompute_flops(upstream: Any, hidden: Any, weight: Any, bias: Any, target: Any, *constants: Any, **_: Any) -> int:
    wanted = _Call.of(constants).wanted
    return _flops(hidden, weight, 1 + wanted.hidden + wanted.weight)


def _memory(hidden: Tensor, weight: Tensor, call: _Call, wanted: Wanted, losses: Tensors) -> OpMemory:
    outputs = sum(tensor.nbytes for tensor in (*losses, *_empty_gradients(hidden, weight, wanted)))
    return OpMemory(outputs, workspace_bytes(hidden.shape[0], weight, call.spec, wanted))


def _forward_memory(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *constants: Any) -> OpMemory:
    loss = _fake_forward(hidden, weight, bias, target, *constants)[:1]
    call = _Call.of(constants)
    return _memory(hidden, weight, call, call.now, loss)


def _recompute_memory(
    upstream: Any, hidden: Tensor, weight: Tensor, bias: Any, target: Any, *constants: Any
) -> OpMemory:
    call = _Call.of(constants)
    return _memory(hidden, weight, call, call.wanted, ())


FORWARD = torch.ops.fxopt.linear_cross_entropy.default
BACKWARD = torch.ops.fxopt.linear_cross_entropy_backward.default
MEMORY = {FORWARD: _forward_memory, BACKWARD: _recompute_memory}
