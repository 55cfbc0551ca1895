"""The operators of a linear layer's cross-entropy: schema, fake, autograd, flops and memory.

    fxopt::linear_cross_entropy           losses; where gradients do not wait for the backward, these too, while a
                                          chunk's logits are there: three matrix products in all, none recomputed
    fxopt::linear_cross_entropy_backward  gradients that waited: logits are computed again, a fourth product

Gradients wait where each row has an upstream gradient of its own (reduction "none" with a trained weight or bias, or
`lse`), and where `recompute` says so. Between forward and backward only hidden- and weight-shaped tensors are kept, and
two numbers a row; nothing [N, V]. Arguments:

    hidden [N, H], weight [V, H], bias [V] or None: one floating dtype; target [N]: int64
    scale, softcap (0: none), label_smoothing, z_loss, ignore_index, reduction: the loss (`LossSpec`)
    argmax, lse: whether the class of each row's largest logit and logsumexp(z) are asked for
    need_hidden, need_weight, need_bias: the gradients that the backward will be asked for
    recompute: whether all of them wait; lowering: how it is computed (`fxopt.ops.launch`)

By Triton, gradients that wait are computed by tiles, as losses alone are (`fxopt.ops.loss_launch`); all else goes by
chunks (`fxopt.ops.chunked_loss`). Results, of which those not computed are empty:

    loss: fp32 (fp64 for fp64), a scalar, or [N] for "none"; grad_hidden, grad_weight, grad_bias: in `gradient_dtype`
    normalizer: [2, N], what the backward by tiles needs; best: [N] int64, the argmax of every row, ignored or not
    lse: [N], logsumexp(z) of every row, ignored or not; it has a gradient
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fxopt.kernels.refused import or_else
from fxopt.ops import loss_launch
from fxopt.ops.chunked_loss import loss_and_gradients, workspace_bytes
from fxopt.ops.launch import operator, runs_triton
from fxopt.ops.loss_spec import LossSpec, Wanted
from fxopt.ops.products import accumulate_dtype, gradient_dtype
from fxopt.ops.registry import OpMemory

__all__ = ["BACKWARD", "FORWARD", "MEMORY"]

Tensors = tuple[Tensor, ...]
_CONSTANTS = (
    "float scale, float softcap, float label_smoothing, float z_loss, int ignore_index, str reduction, bool argmax, "
    "bool lse, bool need_hidden, bool need_weight, bool need_bias, bool recompute, str lowering"
)
_INPUTS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor target"
_GRADIENTS = "Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias"
_OTHERS = 2 + _CONSTANTS.count(",")  # arguments after bias: they have no gradient


@dataclass(frozen=True)
class _Call:
    """Arguments of the operator after the tensors, and what follows from them."""

    spec: LossSpec
    argmax: bool
    lse: bool
    wanted: Wanted
    recompute: bool
    lowering: str

    @classmethod
    def of(cls, constants: Sequence[Any]) -> _Call:
        spec, (argmax, lse), wanted = LossSpec(*constants[:6]), constants[6:8], Wanted(*constants[8:11])
        return cls(spec, argmax, lse, wanted, *constants[11:])

    @property
    def waits(self) -> bool:
        """Whether gradients wait for the backward: a sum over rows needs every row's upstream gradient first."""
        sums = self.wanted.weight or self.wanted.bias
        by_row = self.lse or (self.spec.reduction == "none" and sums)
        return bool(self.wanted) and (self.recompute or by_row)

    @property
    def now(self) -> Wanted:
        """The gradients that the forward computes."""
        return Wanted(False, False, False) if self.waits else self.wanted

    def by_tiles(self, hidden: Tensor) -> bool:
        """Whether the logits are only ever tiles in a Triton kernel."""
        return not self.now and runs_triton(hidden, self.lowering)


# --- fxopt::linear_cross_entropy: constants are those of _CONSTANTS ----------------------------------------------


def _by_tiles(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *constants: Any) -> bool:
    return _Call.of(constants).by_tiles(hidden)


def _by_kernels(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *constants: Any) -> bool:
    """By tiles, or by chunks whose rows of logits a kernel goes over."""
    return runs_triton(hidden, _Call.of(constants).lowering)


@operator(
    "fxopt::linear_cross_entropy",
    f"({_INPUTS}, {_CONSTANTS}) -> (Tensor loss, {_GRADIENTS}, Tensor normalizer, Tensor best, Tensor lse)",
    launches=_by_kernels,
    traced=_by_tiles,
)
def _forward(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *constants: Any) -> Tensors:
    call, normalizer = _Call.of(constants), None
    with torch.autocast(hidden.device.type, enabled=False):
        if call.by_tiles(hidden):
            found, normalizer = loss_launch.token_losses(hidden, weight, bias, target, call.spec, call.argmax, call.lse)
        else:
            by_aten = partial(
                loss_and_gradients, hidden, weight, bias, target, call.spec, call.now, argmax=call.argmax, lse=call.lse
            )
            kernels = _by_kernels(hidden, weight, bias, target, *constants)
            found = or_else(partial(by_aten, kernels=True), by_aten) if kernels else by_aten()
    loss = found.losses
    if call.spec.reduction != "none":
        loss = loss.sum() if call.spec.reduction == "sum" else loss.sum() / found.count
    if normalizer is None or not call.waits:
        normalizer = loss.new_empty(0)
    best = target.new_empty(0) if found.argmax is None else found.argmax
    lse = loss.new_empty(0) if found.lse is None else found.lse
    return loss, *_present(found.gradients, weight, gradient_dtype(weight.dtype)), normalizer, best, lse


@_forward.register_fake
def _fake_forward(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *constants: Any) -> Tensors:
    call, dtype = _Call.of(constants), accumulate_dtype(hidden.dtype)
    rows = hidden.shape[0]
    return (
        hidden.new_empty((rows,) if call.spec.reduction == "none" else (), dtype=dtype),
        *_empty_gradients(hidden, weight, call.now, gradient_dtype(weight.dtype)),
        hidden.new_empty((2, rows) if call.waits and call.by_tiles(hidden) else 0, dtype=dtype),
        target.new_empty(rows if call.argmax else 0),
        hidden.new_empty(rows if call.lse else 0, dtype=dtype),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    hidden, weight, bias, target, *constants = inputs
    ctx.constants, ctx.call, ctx.dtype = constants, _Call.of(constants), hidden.dtype
    ctx.mark_non_differentiable(*output[1 : 6 if ctx.call.lse else 7])
    ctx.set_materialize_grads(False)  # else zeros as large as the weight stand for gradients that nobody has
    ctx.save_for_backward(*((hidden, weight, bias, target, output[4]) if ctx.call.waits else output[1:4]))


def _backward(ctx: Any, upstream: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients by hidden, weight and bias, in their dtype; upstream is a scalar, or [N] for reduction "none", and the
    last of the others that of lse, [N]."""
    if torch.is_grad_enabled():
        raise RuntimeError("fxopt::linear_cross_entropy cannot be differentiated twice: do without create_graph=True")
    _check_wanted(ctx)
    by_lse = others[-1]
    if upstream is None:
        if by_lse is None:
            return (None,) * (3 + _OTHERS)
        upstream = by_lse.new_zeros(())
    if ctx.call.waits:
        gradients = BACKWARD(upstream, by_lse, *ctx.saved_tensors, *ctx.constants)
    else:
        # With an axis, fp32 makes the product fp32; a scalar tensor would be rounded to bf16 before it multiplies bf16.
        rows = upstream[:, None] if upstream.dim() else upstream[None]
        gradients = [one * rows if one.numel() else one for one in ctx.saved_tensors]
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


# Opaque on every device: it adds to what it has in a loop, and ``addmm(out_dtype=)`` has no meta kernel (torch 2.13).
@operator(
    "fxopt::linear_cross_entropy_backward",
    f"(Tensor upstream, Tensor? by_lse, {_INPUTS}, Tensor normalizer, {_CONSTANTS}) -> ({_GRADIENTS})",
    launches=lambda upstream, by_lse, hidden, weight, bias, target, _, *constants: _by_tiles(
        hidden, weight, bias, target, *constants
    ),
    traced=lambda *_: False,
)
def _recompute(
    upstream: Tensor,
    by_lse: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    normalizer: Tensor,
    *constants: Any,
) -> Tensors:
    call = _Call.of(constants)
    with torch.autocast(hidden.device.type, enabled=False):
        by_chunks = partial(
            loss_and_gradients, hidden, weight, bias, target, call.spec, call.wanted,
            upstream=upstream.expand(target.shape), by_lse=by_lse,
        )  # fmt: skip
        if call.by_tiles(hidden):
            tiles = partial(
                loss_launch.gradients,
                upstream, by_lse, hidden, weight, bias, target, normalizer, call.spec, call.argmax, call.wanted,
            )  # fmt: skip
            found = or_else(tiles, lambda: by_chunks().gradients)
        else:
            found = by_chunks().gradients
    return _present(found, weight, weight.dtype)


@_recompute.register_fake
def _fake_recompute(
    upstream: Tensor,
    by_lse: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    normalizer: Tensor,
    *constants: Any,
) -> Tensors:
    return _empty_gradients(hidden, weight, _Call.of(constants).wanted, weight.dtype)


def _present(gradients: Sequence[Tensor | None], weight: Tensor, dtype: torch.dtype) -> Tensors:
    """The gradients in `dtype`; those not wanted without elements, since an operator's outputs are all there."""
    return tuple(weight.new_empty(0, dtype=dtype) if gradient is None else gradient.to(dtype) for gradient in gradients)


def _empty_gradients(hidden: Tensor, weight: Tensor, wanted: Wanted, dtype: torch.dtype) -> Tensors:
    """Gradients with their strides, not computed."""
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
    return _flops(hidden, weight, 1 + _Call.of(constants).now.products)


@register_flop_formula(torch.ops.fxopt.linear_cross_entropy_backward)
def _recompute_flops(
    upstream: Any,
    by_lse: Any,
    hidden: Any,
    weight: Any,
    bias: Any,
    target: Any,
    normalizer: Any,
    *constants: Any,
    **_: Any,
) -> int:
    return _flops(hidden, weight, 1 + _Call.of(constants).wanted.products)


def _forward_memory(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *constants: Any) -> OpMemory:
    call = _Call.of(constants)
    outputs = _bytes(_fake_forward(hidden, weight, bias, target, *constants))
    if call.by_tiles(hidden):
        return OpMemory(outputs, loss_launch.forward_workspace(hidden, weight, bias, call.spec, call.argmax))
    kernels = runs_triton(hidden, call.lowering)
    return OpMemory(outputs, workspace_bytes(hidden.shape[0], weight, call.spec, call.now, kernels))


def _recompute_memory(
    upstream: Any, by_lse: Any, hidden: Tensor, weight: Tensor, bias: Any, target: Any, normalizer: Any, *constants: Any
) -> OpMemory:
    call = _Call.of(constants)
    outputs = _bytes(_fake_recompute(upstream, by_lse, hidden, weight, bias, target, normalizer, *constants))
    if call.by_tiles(hidden):
        return OpMemory(outputs, loss_launch.backward_workspace(hidden, weight, call.wanted, by_lse is not None))
    workspace = workspace_bytes(hidden.shape[0], weight, call.spec, call.wanted)
    wide = _bytes(_empty_gradients(hidden, weight, call.wanted, gradient_dtype(weight.dtype)))
    if wide != outputs:  # they are rounded last, when the rest is gone
        workspace = wide - outputs + max(workspace, outputs)
    return OpMemory(outputs, workspace)


def _bytes(tensors: Tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors)


FORWARD = torch.ops.fxopt.linear_cross_entropy.default
BACKWARD = torch.ops.fxopt.linear_cross_entropy_backward.default
MEMORY = {FORWARD: _forward_memory, BACKWARD: _recompute_memory}
