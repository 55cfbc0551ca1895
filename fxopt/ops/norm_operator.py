"""The operators of a norm: schema, fake, autograd, flops and memory.

    fxopt::norm           the result, the new residual stream where a residual is added first, rstd and mean
    fxopt::norm_backward  gradients by the normalised sum, weight, bias and gate

Between forward and backward are kept: what was normalised (the stream, or x), weight, bias and gate as they are, and
rstd and mean; normalised values are computed again. Arguments:

    x [..., H], residual [..., H] or None; weight [H], bias [H], gate [..., H] or None: floating dtypes
    the constants of `NormSpec` (fxopt.ops.norm_formulas), which has the formulas; how they are computed
    (`fxopt.ops.launch`)

Results have the strides that ``torch.empty_like(x)`` has, which are those of eager's pointwise operators. What there is
not (a stream without a residual, the mean of "rms", gradients nobody wants) is a tensor without elements.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fxopt.ops import norm_launch
from fxopt.ops.launch import operator, runs_triton
from fxopt.ops.norm_formulas import NormSpec, forward, gradients, sum_dtype
from fxopt.ops.registry import OpMemory

__all__ = ["BACKWARD", "FORWARD", "MEMORY"]

Tensors = tuple[Tensor, ...]
Maybe = Tensor | None

_CONSTANTS = (
    "str kind, float? eps, str eps_at, ScalarType compute, ScalarType normalized, bool rounded_rstd, float offset, "
    "ScalarType affine, ScalarType output, str lowering"
)
_TENSORS = 5  # arguments of the forward that can have a gradient
_WITHOUT_GRADIENT = _CONSTANTS.count(",") + 1


# --- fxopt::norm: constants are those of NormSpec, and the lowering ------------------------------------------------


def _on_triton(x: Tensor, residual: Maybe, weight: Maybe, bias: Maybe, gate: Maybe, *constants: Any) -> bool:
    *values, lowering = constants
    return norm_launch.can_compute(x, residual, weight, bias, gate, NormSpec(*values)) and runs_triton(x, lowering)


@operator(
    "fxopt::norm",
    f"(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? gate, {_CONSTANTS})"
    " -> (Tensor out, Tensor stream, Tensor rstd, Tensor mean)",
    launches=_on_triton,
)
def _forward(x: Tensor, residual: Maybe, weight: Maybe, bias: Maybe, gate: Maybe, *constants: Any) -> Tensors:
    spec = NormSpec(*constants[:-1])
    with torch.autocast(x.device.type, enabled=False):
        if _on_triton(x, residual, weight, bias, gate, *constants):
            out, stream, rstd, mean = norm_launch.forward(x, residual, weight, bias, gate, spec)
        else:
            stream = None if residual is None else x + residual
            out, rstd, mean = forward(x if stream is None else stream, weight, bias, gate, spec)
    stream = x.new_empty(0) if stream is None else _laid_out(stream, x)
    return _laid_out(out, x), stream, rstd.contiguous(), rstd.new_empty(0) if mean is None else mean.contiguous()


@_forward.register_fake
def _fake_forward(x: Tensor, residual: Maybe, weight: Maybe, bias: Maybe, gate: Maybe, *constants: Any) -> Tensors:
    spec = NormSpec(*constants[:-1])
    rows = (*x.shape[:-1], 1)
    return (
        torch.empty_like(x, dtype=spec.output),
        x.new_empty(0) if residual is None else torch.empty_like(x, dtype=sum_dtype(x, residual)),
        x.new_empty(rows, dtype=spec.compute),
        x.new_empty(rows if spec.kind == "layer" else 0, dtype=spec.compute),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    x, residual, weight, bias, gate, *ctx.constants = inputs
    _, stream, rstd, mean = output
    ctx.dtypes = x.dtype, None if residual is None else residual.dtype
    ctx.mark_non_differentiable(rstd, mean, *(() if residual is not None else (stream,)))
    ctx.set_materialize_grads(False)  # else zeros as large as x stand for the stream's gradient where there is none
    ctx.save_for_backward(x if residual is None else stream, weight, bias, gate, rstd, mean)


def _backward(ctx: Any, upstream: Maybe, by_stream: Maybe, *_: None) -> tuple[Maybe, ...]:
    """Gradients by x, residual, weight, bias and gate; `upstream` is that of out, `by_stream` that of the stream."""
    if torch.is_grad_enabled():
        raise RuntimeError("fxopt::norm cannot be differentiated twice: do without create_graph=True")
    x, residual, *others = ctx.needs_input_grad[:_TENSORS]
    if upstream is None:
        found: Sequence[Maybe] = (by_stream, None, None, None)
    else:
        found = BACKWARD(upstream, by_stream, *ctx.saved_tensors, *ctx.constants, x or residual, *others)
    by_sum, *rest = (one if want else None for one, want in zip(found, (x or residual, *others), strict=True))
    of_x, of_residual = (
        by_sum.to(dtype) if want and by_sum is not None else None
        for want, dtype in zip((x, residual), ctx.dtypes, strict=True)
    )
    return (of_x, of_residual, *rest, *(None,) * _WITHOUT_GRADIENT)


_forward.register_autograd(_backward, setup_context=_setup_context)


# --- fxopt::norm_backward: also what the forward saved, and which gradients are wanted ---------------------------


def _gradients_on_triton(
    upstream: Tensor, by_stream: Maybe, s: Tensor, weight: Maybe, bias: Maybe, gate: Maybe, *rest: Any
) -> bool:
    return _on_triton(s, None, weight, bias, gate, *rest[2:-4])


@operator(
    "fxopt::norm_backward",
    "(Tensor upstream, Tensor? by_stream, Tensor s, Tensor? weight, Tensor? bias, Tensor? gate, Tensor rstd, "
    f"Tensor mean, {_CONSTANTS}, bool need_s, bool need_weight, bool need_bias, bool need_gate)"
    " -> (Tensor by_s, Tensor by_weight, Tensor by_bias, Tensor by_gate)",
    launches=_gradients_on_triton,
)
def _gradients(
    upstream: Tensor,
    by_stream: Maybe,
    s: Tensor,
    weight: Maybe,
    bias: Maybe,
    gate: Maybe,
    rstd: Tensor,
    mean: Tensor,
    *constants: Any,
) -> Tensors:
    spec, wanted = NormSpec(*constants[:-5]), constants[-4:]
    by_triton = _on_triton(s, None, weight, bias, gate, *constants[:-4])
    with torch.autocast(s.device.type, enabled=False):
        found = (norm_launch.gradients if by_triton else gradients)(
            upstream, by_stream, s, weight, bias, gate, rstd, mean if spec.kind == "layer" else None, spec, wanted
        )  # fmt: skip
    pairs = zip(found, (s, weight, bias, gate), strict=True)
    return tuple(s.new_empty(0) if one is None or like is None else _laid_out(one, like) for one, like in pairs)


@_gradients.register_fake
def _fake_gradients(
    upstream: Tensor,
    by_stream: Maybe,
    s: Tensor,
    weight: Maybe,
    bias: Maybe,
    gate: Maybe,
    rstd: Tensor,
    mean: Tensor,
    *constants: Any,
) -> Tensors:
    likes = zip((s, weight, bias, gate), constants[-4:], strict=True)
    return tuple(torch.empty_like(like) if want and like is not None else s.new_empty(0) for like, want in likes)


def _laid_out(value: Tensor, like: Tensor) -> Tensor:
    """`value` in memory with the strides that the fake says: those of ``torch.empty_like(like)``."""
    wanted = torch.empty_like(like, dtype=value.dtype, device="meta")
    if value.stride() == wanted.stride():
        return value
    return torch.empty_like(like, dtype=value.dtype).copy_(value)


# --- what it costs -----------------------------------------------------------------------------------------------


@register_flop_formula(torch.ops.fxopt.norm)
def _forward_flops(x: Any, residual: Any, weight: Any, bias: Any, gate: Any, kind: str, *_: Any, **__: Any) -> int:
    """Operations on elements: square, sum, scale; sum and subtract for the mean; weight, bias, residual; gate is 5."""
    parts = sum(one is not None for one in (residual, weight, bias)) + 5 * (gate is not None)
    return math.prod(x) * (3 + 2 * (kind == "layer") + parts)


@register_flop_formula(torch.ops.fxopt.norm_backward)
def _backward_flops(
    upstream: Any,
    by_stream: Any,
    s: Any,
    weight: Any,
    bias: Any,
    gate: Any,
    rstd: Any,
    mean: Any,
    kind: str,
    *constants: Any,
    **_: Any,
) -> int:
    """As above: normalise again, two products and a sum along the row, scale; a product and a sum by weight."""
    need_s, need_weight, need_bias, need_gate = constants[-4:]
    layer = kind == "layer"
    by_s = need_s * (6 + 2 * layer + (weight is not None) + (by_stream is not None))
    by_gate = (gate is not None) * 5 + need_gate * (2 + (weight is not None) + (bias is not None))
    return math.prod(s) * (1 + layer + by_s + 2 * need_weight + need_bias + by_gate)


def _forward_memory(x: Tensor, residual: Maybe, *arguments: Any) -> OpMemory:
    """By ATen two tensors as large as x in `compute` at a time, fewer where x need not be widened."""
    *factors, kind, _, _, compute = arguments[:7]
    if _on_triton(x, residual, *arguments):
        workspace = norm_launch.forward_workspace(x, residual, factors[2], NormSpec(*arguments[3:-1]))
        return OpMemory(_bytes(_fake_forward(x, residual, *arguments)), workspace)
    steps = sum(one is not None for one in factors) + (kind == "layer")
    a_row = 2 * compute.itemsize + x.itemsize if x.dtype != compute else min(steps, 2) * compute.itemsize
    return OpMemory(_bytes(_fake_forward(x, residual, *arguments)), x.numel() * a_row)


def _backward_memory(
    upstream: Tensor, by_stream: Maybe, s: Tensor, weight: Maybe, bias: Maybe, gate: Maybe, *arguments: Any
) -> OpMemory:
    """By ATen the normalised row and a product with it; the widened upstream; silu and its slope."""
    spec = NormSpec(*arguments[2:-5])
    outputs = _bytes(_fake_gradients(upstream, by_stream, s, weight, bias, gate, *arguments))
    if _gradients_on_triton(upstream, by_stream, s, weight, bias, gate, *arguments):
        kept = (upstream, by_stream, s, weight, bias, gate)
        return OpMemory(outputs, norm_launch.backward_workspace(*kept, spec, arguments[-4:]))
    wide = spec.backward
    tensors = 2 + 2 * (upstream.dtype != wide) + 2 * (gate is not None)
    return OpMemory(outputs, s.numel() * wide.itemsize * tensors)


def _bytes(tensors: Tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors)


FORWARD = torch.ops.fxopt.norm.default
BACKWARD = torch.ops.fxopt.norm_backward.default
MEMORY = {FORWARD: _forward_memory, BACKWARD: _backward_memory}
