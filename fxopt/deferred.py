"""Outputs that the compiled graph never computed: a tensor that projects hidden states when somebody looks.

A training model returns its logits [..., V] beside the loss, and nobody reads them. The compiled graph returns the
hidden states [..., H] instead, and `deferred` gives the caller a tensor of the right shape, dtype and device. The first
access to its values computes ``tail(linear(hidden, weight, bias))``: of the rows looked at, or of all of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxopt.deferred_tensor import DeferredTensor
from fxopt.deferred_values import Projection, Recipe, Values, autocast, project

__all__ = ["DeferredTensor", "Projection", "deferred"]


def deferred(hidden: Tensor, weight: Tensor, bias: Tensor | None, projection: Projection) -> Tensor:
    """A tensor [..., V] of dtype `projection.dtype` whose values are computed when they are first read.

    hidden: [..., H]; weight: [V, H], of any strides; bias: [V] or None. All on one device. Where one is a tensor
    subclass (`DTensor`, quantized weights), the result is computed at once and is whatever the subclass makes of it.

    Autograd sees a function of those three that require gradients. Metadata, `detach`, casts, views, and indexing of
    the leading axes compute nothing; `clone`, being a snapshot, does. Where data are shared in eager mode they are
    shared here: the result can be changed in place, and its views, numpy arrays and data pointers see that.

    Raises `ValueError` where the shapes do not fit. Reading raises `RuntimeError` if weight, bias or hidden states were
    changed in place before the values were computed.
    """
    _check_shapes(hidden, weight, bias, projection.name)
    if not all(tensor is None or type(tensor.detach()) is Tensor for tensor in (hidden, weight, bias)):
        return project(hidden, weight, bias, projection)
    result: Tensor = _Defer.apply(hidden, weight, bias, projection)
    return result


def _check_shapes(hidden: Tensor, weight: Tensor, bias: Tensor | None, name: str) -> None:
    if weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(f"{name}: cannot project {list(hidden.shape)} by a weight of {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{name}: a bias of {list(bias.shape)} does not fit a weight of {list(weight.shape)}")


class _Defer(torch.autograd.Function):
    """The projection to autograd: nothing is computed forward, and backward recomputes it to differentiate it."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, projection: Projection) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias)
        ctx.set_materialize_grads(False)  # undefined gradients would become zeros of [..., V]
        ctx.projection = projection
        return DeferredTensor(Values(Recipe.of(hidden, weight, bias, projection)))

    @staticmethod
    @torch.compiler.disable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad, needs, projection = grads[0], ctx.needs_input_grad[:3], ctx.projection
        if grad is None:
            return (None, None, None, None)
        if projection.tail is None and projection.autocast is None:
            hidden, weight, _ = ctx.saved_tensors
            return (*_linear_gradients(grad, hidden, weight, needs), None)
        return (*_gradients(grad, ctx.saved_tensors, needs, projection), None)


def _linear_gradients(grad: Tensor, hidden: Tensor, weight: Tensor, needs: tuple[bool, ...]) -> list[Tensor | None]:
    """Of a linear layer alone, which needs none of the logits again."""
    with autocast(grad.device.type, None):
        grad = grad.to(hidden.dtype)
        rows = grad.reshape(-1, weight.shape[0])
        return [
            grad @ weight if needs[0] else None,
            rows.t() @ hidden.reshape(-1, weight.shape[1]) if needs[1] else None,
            rows.sum(0) if needs[2] else None,
        ]


def _gradients(
    grad: Tensor, inputs: tuple[Tensor | None, ...], needs: tuple[bool, ...], projection: Projection
) -> list[Tensor | None]:
    """By computing the projection again, connected to its inputs' history if a second derivative may follow."""
    twice = torch.is_grad_enabled()  # create_graph=True
    hidden, weight, bias = (_input(tensor, need, twice) for tensor, need in zip(inputs, needs, strict=True))
    assert hidden is not None
    assert weight is not None
    with torch.enable_grad():
        logits = project(hidden, weight, bias, projection)
    wanted = [tensor for tensor, need in zip((hidden, weight, bias), needs, strict=True) if need and tensor is not None]
    found = iter(torch.autograd.grad(logits, wanted, grad, create_graph=twice))
    return [next(found) if need else None for need in needs]


def _input(tensor: Tensor | None, need: bool, connected: bool) -> Tensor | None:
    if tensor is None or (need and connected):
        return None if tensor is None else tensor.view_as(tensor)
    return tensor.detach().requires_grad_(need)
