"""The operators of attention: schema, fake, autograd, flops and memory.

    fxopt::attention           out and lse, the logarithm of each row's sum of exponentials
    fxopt::attention_backward  gradients by q, k, v, sink and captures; those not wanted are without elements

Between forward and backward are kept: the inputs, out and lse; nothing [Sq, Sk]. Arguments:

    q [B, H, Sq, D], k [B, Hk, Sk, D], v [B, Hk, Sk, Dv], sink [H] or None: floating dtypes; H a multiple of Hk
    intervals [B or 1, Sq, 3] or None: int64, (lo, hi, count) a row (`fxopt.ops.key_intervals`)
    tiles: `fxopt.ops.query_tiles` of these, for the backward by Triton kernels, or None
    seed: int64 scalar or None; captures: the tensors that program and predicate load
    the constants of `AttentionSpec` (fxopt.ops.attention_call)

out has v's dtype and is contiguous as [B, H, Sq, Dv], or with heads_last as [B, Sq, H, Dv]. lse is fp32 (fp64 for
fp64), with the sink, -inf for rows without keys, and cannot be differentiated. Gradients have their input's dtype, and
the strides of ``torch.empty_like`` of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fxopt.ops import attention_launch, empty_rows, flash_tiles, score_tiles
from fxopt.ops.attention_call import Attention
from fxopt.ops.attention_costs import backward_flops, backward_workspace, forward_flops, forward_workspace
from fxopt.ops.attention_gradients import Gradients, Wanted, laid_out
from fxopt.ops.launch import operator, runs_triton
from fxopt.ops.registry import OpMemory

__all__ = ["BACKWARD", "FORWARD", "MEMORY"]

Maybe = Tensor | None

_TENSORS = (
    "Tensor q, Tensor k, Tensor v, Tensor? sink, Tensor? intervals, Tensor? tiles, Tensor? seed, Tensor[] captures"
)
_CONSTANTS = (
    "str program, str predicate, float scale, int? lower, int? upper, float dropout, str empty, bool heads_last, "
    "str lowering"
)
_WITHOUT_GRADIENT = _CONSTANTS.count(",") + 1
_TENSOR_INPUTS = _TENSORS.count("Tensor")


# --- fxopt::attention: constants are those of AttentionSpec ------------------------------------------------------


@operator(
    "fxopt::attention",
    f"({_TENSORS}, {_CONSTANTS}) -> (Tensor out, Tensor lse)",
    launches=lambda q, *arguments: runs_triton(q, arguments[-1]),  # the last of the constants is the lowering
)
def _forward(
    q: Tensor, k: Tensor, v: Tensor, sink: Maybe, intervals: Maybe, tiles: Maybe, seed: Maybe, *rest: Any
) -> tuple[Tensor, Tensor]:
    call = Attention.of((q, k, v, sink, intervals, tiles, seed, *rest))
    if runs_triton(q, call.spec.lowering):
        return attention_launch.forward(call)
    with torch.autocast(q.device.type, enabled=False):
        if flash_tiles.can_compute(call):
            out, lse = _with_sink(call, *flash_tiles.forward(call))
        else:
            out, lse = score_tiles.forward(call)
        empty_rows.fill(call, out, lse)
    return call.in_layout(out), lse.contiguous()


def _with_sink(call: Attention, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """out and lse with one more logit a row, that has no value. Overwrites `out`."""
    if call.sink is None:
        return out, lse
    total = torch.logaddexp(lse, call.sink[:, None].to(lse.dtype))
    return out.mul_((lse - total).exp_()[..., None]), total


@_forward.register_fake
def _fake_forward(
    q: Tensor, k: Tensor, v: Tensor, sink: Maybe, intervals: Maybe, tiles: Maybe, seed: Maybe, *rest: Any
) -> tuple[Tensor, Tensor]:
    call = Attention.of((q, k, v, sink, intervals, tiles, seed, *rest))
    return call.new_out(), call.new_lse()


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, captures = inputs[:_TENSOR_INPUTS]
    ctx.constants = inputs[_TENSOR_INPUTS:]
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, out, lse, *captures)


def _backward(ctx: Any, upstream: Maybe, _: None) -> tuple[Any, ...]:
    """Gradients by q, k, v, sink and the captures; upstream is that of out [B, H, Sq, Dv]."""
    if torch.is_grad_enabled():
        raise RuntimeError("fxopt::attention cannot be differentiated twice: do without create_graph=True")
    q, k, v, sink, _, _, _, captures, *_ = ctx.needs_input_grad
    saved = ctx.saved_tensors  # once: in a checkpoint that runs uncompiled, each look unpacks all of them again
    *inputs, out, lse = saved[: _TENSOR_INPUTS + 1]
    loaded = list(saved[_TENSOR_INPUTS + 1 :])
    wanted = [q, k, v, sink, *captures]
    if upstream is None:
        found: list[Maybe] = [None] * len(wanted)
    else:
        *first, last = BACKWARD(upstream, *inputs, loaded, *ctx.constants, out, lse, wanted)
        found = [one if want else None for one, want in zip((*first, *last), wanted, strict=True)]
    return (*found[:4], None, None, None, found[4:], *(None,) * _WITHOUT_GRADIENT)


_forward.register_autograd(_backward, setup_context=_setup_context)


# --- fxopt::attention_backward: also what the forward found, and which gradients are wanted -----------------------


@operator(
    "fxopt::attention_backward",
    f"(Tensor upstream, {_TENSORS}, {_CONSTANTS}, Tensor out, Tensor lse, bool[] wanted)"
    " -> (Tensor by_q, Tensor by_k, Tensor by_v, Tensor by_sink, Tensor[] by_captures)",
    launches=lambda upstream, q, *arguments: runs_triton(q, arguments[-4]),
)
def _gradients(upstream: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    *inputs, out, lse, flags = arguments
    call, wanted = Attention.of(inputs), Wanted.of(flags)
    if runs_triton(call.q, call.spec.lowering):
        gradients, by_sink = attention_launch.backward(call, upstream, out, lse, wanted)
    else:
        gradients, by_sink = _by_aten(call, upstream, out, lse, wanted)
    by_q, by_k, by_v, by_sink, *others = (
        laid_out(one, like) if want and one is not None and like is not None else out.new_empty(0)
        for one, like, want in zip(
            (gradients.q, gradients.k, gradients.v, by_sink, *gradients.captures),
            (call.q, call.k, call.v, call.sink, *call.captures),
            flags,
            strict=True,
        )
    )
    return by_q, by_k, by_v, by_sink, others


def _by_aten(call: Attention, upstream: Tensor, out: Tensor, lse: Tensor, wanted: Wanted) -> tuple[Gradients, Maybe]:
    with torch.autocast(out.device.type, enabled=False):
        if flash_tiles.can_compute(call) and not any(wanted.captures):
            gradients = Gradients(*flash_tiles.backward(call, upstream, out, lse), [None] * len(call.captures))
        else:
            gradients = Gradients.to_add_to(call, wanted)
            score_tiles.backward(call, upstream, lse, gradients)
        empty_rows.add_gradients(call, upstream, lse, gradients)
        return gradients, _by_sink(call, upstream, out, lse) if wanted.sink else None


def _by_sink(call: Attention, upstream: Tensor, out: Tensor, lse: Tensor) -> Maybe:
    """[H]: its weight in each row, times what the row loses by it; a batch row at a time."""
    if call.sink is None:
        return None
    total = lse.new_zeros(call.heads)
    for by_out, rows, sums in zip(upstream, out, lse, strict=True):
        weight = (call.sink.to(lse.dtype)[:, None] - sums).exp_()
        total -= (weight * (by_out.to(lse.dtype) * rows).sum(-1)).sum(-1)
    return total


@_gradients.register_fake
def _fake_gradients(upstream: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    *inputs, out, _, flags = arguments
    likes = zip((*inputs[:4], *inputs[_TENSOR_INPUTS - 1]), flags, strict=True)
    by_q, by_k, by_v, by_sink, *others = (
        torch.empty_like(like) if want and like is not None else out.new_empty(0) for like, want in likes
    )
    return by_q, by_k, by_v, by_sink, others


# --- what it costs -----------------------------------------------------------------------------------------------


@register_flop_formula(torch.ops.fxopt.attention)
def _forward_flops(q: Any, k: Any, v: Any, *arguments: Any, **_: Any) -> int:
    return forward_flops(q, k, v, arguments[_TENSOR_INPUTS - 3 :])


@register_flop_formula(torch.ops.fxopt.attention_backward)
def _backward_flops(upstream: Any, q: Any, k: Any, v: Any, *arguments: Any, **_: Any) -> int:
    *constants, _, _, flags = arguments[_TENSOR_INPUTS - 3 :]
    return backward_flops(q, k, v, constants, Wanted.of(flags))


def _forward_memory(*arguments: Any) -> OpMemory:
    call = Attention.of(arguments)
    return OpMemory(_bytes(_fake_forward(*arguments)), forward_workspace(call))


def _backward_memory(upstream: Tensor, *arguments: Any) -> OpMemory:
    *inputs, _, _, flags = arguments
    *first, captures = _fake_gradients(upstream, *arguments)
    call = Attention.of(inputs)
    return OpMemory(_bytes((*first, *captures)), backward_workspace(call, Wanted.of(flags)))


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


FORWARD = torch.ops.fxopt.attention.default
BACKWARD = torch.ops.fxopt.attention_backward.default
MEMORY = {FORWARD: _forward_memory, BACKWARD: _backward_memory}
