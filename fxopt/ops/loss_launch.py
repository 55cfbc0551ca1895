"""A linear layer's cross-entropy by Triton kernels: the launches, and what is around them.

The forward is one pass over tiles of tokens x vocabulary that keeps no logits: each part of the vocabulary leaves, for
every token, the largest logit and the sum of exponentials, and these are put together in a fixed order. The backward
computes the logits again, some classes at a time, and writes their gradient [N, C] in the inputs' dtype, which two
products of the library turn into C rows of the weight's gradient, each whole and so rounded once, and into a part of
the fp32 sum that becomes the gradient of hidden. A fused kernel would need either an accumulator [tile, H], which no
card has room for, or atomic additions. Everything is deterministic, and nothing is left out for being small.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fxopt.kernels.cards import card_of
from fxopt.kernels.configs import Config, config_for
from fxopt.kernels.linear_cross_entropy import LossKernelSpec, backward_kernel, forward_kernel, tile_configs
from fxopt.kernels.source import Kernel
from fxopt.ops.launch import count_blocks, launch, triton_dtype, uninitialized
from fxopt.ops.loss_spec import LossAndGradients, LossSpec, Wanted
from fxopt.ops.products import add_product, slices

__all__ = ["LEAST_CLASSES", "backward_workspace", "forward_workspace", "gradients", "token_losses"]

PIECE_BYTES = 64 * 2**20
"""Bytes of the gradient of logits that is held at a time, unless that is fewer than `LEAST_CLASSES`."""
LEAST_CLASSES = 4096
"""Least classes of it: hidden's fp32 gradient is read and written once for each, a fifth of a product's time (H100)."""


# --- forward -----------------------------------------------------------------------------------------------------


def token_losses(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, spec: LossSpec, argmax: bool, lse: bool = False
) -> tuple[LossAndGradients, Tensor]:
    """Losses without gradients, and [2, N] that `gradients` needs: the largest logit and sum(exp(logit - largest)).

    hidden and weight: of any strides. A target that is no class gives NaN.
    """
    x, w, generated = _operands(hidden, weight, bias, spec, argmax)
    kernel = forward_kernel(generated)
    config = _config(kernel, generated, x)
    tokens, (vocabulary, width) = x.shape[0], w.shape
    parts = _parts(config, vocabulary)
    names = ["Largest", "Total", *(["Sum"] if spec.label_smoothing else [])]
    found = {name: uninitialized((parts, tokens), torch.float32, x) for name in names}
    found["Chosen"] = x.new_full((tokens,), torch.nan, dtype=torch.float32)
    if argmax:
        found["Best"] = uninitialized((parts, tokens), torch.int32, x)
    arguments = _tensors(x, w, bias, target) | found
    arguments |= {"tokens": tokens, "vocabulary": vocabulary, "width": width, **_strides(generated, x, w)}
    launch(kernel, count_blocks(tokens, config.tile("BLOCK_M")) * parts, arguments, config)
    return _put_together(found, target, vocabulary, spec, lse)


def _parts(config: Config, vocabulary: int) -> int:
    return count_blocks(count_blocks(vocabulary, config.tile("BLOCK_N")), config.tile("SPLIT"))


def _put_together(
    found: dict[str, Tensor], target: Tensor, vocabulary: int, spec: LossSpec, with_lse: bool
) -> tuple[LossAndGradients, Tensor]:
    """Of the parts [parts, N]. The largest logit is subtracted first: a small loss is no difference of large ones."""
    largest = found["Largest"].amax(0)
    total = (found["Total"] * (found["Largest"] - largest).exp()).sum(0)
    losses, smoothing = largest - found["Chosen"], spec.label_smoothing
    if smoothing:
        losses = (1.0 - smoothing) * losses + smoothing * (largest - found["Sum"].sum(0) / vocabulary)
    losses = losses + total.log()
    if spec.z_loss:
        losses = losses + spec.z_loss * (largest + total.log()).square()
    ignored, best = target == spec.ignore_index, None
    if "Best" in found:
        best = found["Best"].gather(0, found["Largest"].argmax(0, keepdim=True)).squeeze(0).to(torch.int64)
    losses, count = losses.masked_fill(ignored, 0.0), (target != spec.ignore_index).sum()
    lse = largest + total.log() if with_lse else None
    return LossAndGradients(losses, count, None, None, None, best, lse), torch.stack((largest, total))


# --- backward ----------------------------------------------------------------------------------------------------


def gradients(
    upstream: Tensor,
    by_lse: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    normalizer: Tensor,
    spec: LossSpec,
    argmax: bool,
    wanted: Wanted,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """By hidden, weight and bias, in their dtype and (weight) strides.

    upstream: the loss's, a scalar or [N]; by_lse: that of lse, [N], where it has one; argmax: whether the forward was
    asked for it, since it rounded logits then.
    """
    x, w, generated = _operands(hidden, weight, bias, spec, argmax)
    generated = replace(generated, lse=by_lse is not None)
    rows = {"Factor": _row_factors(upstream, target, spec), "Largest": normalizer[0], "Total": normalizer[1]}
    if by_lse is not None:
        rows["Factor"] = rows["Factor"].masked_fill(target == spec.ignore_index, 0.0)
        rows["LseFactor"] = (by_lse.to(torch.float32) * spec.scale).contiguous()
    by_x = x.new_zeros(x.shape, dtype=torch.float32) if wanted.hidden else None
    by_w = torch.empty_like(weight) if wanted.weight else None
    by_bias = w.new_empty(w.shape[0]) if wanted.bias else None
    step = _classes_at_a_time(x.shape[0], w)
    piece = x.new_empty(x.shape[0], step)
    for classes in slices(w.shape[0], step):
        _multiply(
            _logit_gradient(piece, classes, x, w, bias, target, rows, generated),
            classes, x, w, by_x, by_w, by_bias,
        )  # fmt: skip
    del piece  # before hidden's gradient is there twice
    return None if by_x is None else by_x.to(x.dtype), by_w, by_bias


def _multiply(
    part: Tensor, classes: slice, x: Tensor, w: Tensor, by_x: Tensor | None, by_w: Tensor | None, by_bias: Tensor | None
) -> None:
    """Put what the gradient `part` [N, C] of the logits of `classes` gives where it belongs."""
    if by_x is not None:
        add_product(by_x, part, w[classes])
    if by_w is not None:
        torch.mm(part.t(), x, out=by_w[classes])
    if by_bias is not None:
        by_bias[classes] = part.sum(0, dtype=torch.float32)


def _logit_gradient(
    piece: Tensor,
    classes: slice,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    target: Tensor,
    rows: dict[str, Tensor],
    generated: LossKernelSpec,
) -> Tensor:
    """The gradient [N, C] by the products with the rows `classes` of w, in the memory of `piece`; rows: [N] each."""
    kernel = backward_kernel(generated)
    config = _config(kernel, generated, x)
    here, part = w[classes], piece[:, : classes.stop - classes.start]
    arguments = _tensors(x, here, None if bias is None else bias[classes], target)
    arguments |= rows | {"Gradient": part}
    if generated.label_smoothing:
        arguments["vocabulary"] = w.shape[0]
    arguments |= {"tokens": x.shape[0], "classes_here": here.shape[0], "offset": classes.start, "width": x.shape[1]}
    arguments |= _strides(generated, x, here) | {"gradient_stride": part.stride(0)}
    tiles = [count_blocks(size, config.tile(f"BLOCK_{axis}")) for axis, size in zip("MN", part.shape, strict=True)]
    launch(kernel, tiles[0] * tiles[1], arguments, config)
    return part


def _row_factors(upstream: Tensor, target: Tensor, spec: LossSpec) -> Tensor:
    """What multiplies each row's gradient by its logits before the scale: [N], fp32."""
    factors = (upstream.to(torch.float32) * spec.scale).expand(target.shape)
    if spec.reduction == "mean":
        factors = factors / (target != spec.ignore_index).sum()
    return factors.contiguous()


def _classes_at_a_time(tokens: int, weight: Tensor) -> int:
    fitting = PIECE_BYTES // max(tokens * weight.itemsize, 1) // 256 * 256
    return min(max(fitting, LEAST_CLASSES), max(weight.shape[0], 1))


# --- operands ----------------------------------------------------------------------------------------------------


def _operands(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, spec: LossSpec, argmax: bool
) -> tuple[Tensor, Tensor, LossKernelSpec]:
    """hidden and weight with strides that the kernels take, and what the kernels are generated for."""
    x = hidden if _is_dense(hidden) else hidden.contiguous()
    w = weight if _is_dense(weight) or _is_dense(weight.t()) else weight.contiguous()
    return x, w, _generated(hidden, weight, bias, spec, argmax)


def _generated(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, spec: LossSpec, argmax: bool
) -> LossKernelSpec:  # fmt: skip
    return LossKernelSpec(
        triton_dtype(hidden.dtype),
        *spec.constants,
        bias=bias is not None,
        transposed=bool(not _is_dense(weight) and _is_dense(weight.t())),
        whole=bool(hidden.shape[1] % 64 == 0),
        argmax=argmax,
    )


def _is_dense(matrix: Tensor) -> bool:
    """Whether the rows of a matrix have unit stride."""
    return matrix.stride(1) == 1 or matrix.shape[1] == 1


def _tensors(x: Tensor, w: Tensor, bias: Tensor | None, target: Tensor) -> dict[str, Any]:
    bias_if_any = {} if bias is None else {"Bias": bias.contiguous()}
    return {"X": x, "W": w, **bias_if_any, "Target": target.contiguous()}


def _strides(spec: LossKernelSpec, x: Tensor, w: Tensor) -> dict[str, int]:
    return {"x_stride": x.stride(0), "w_stride": w.stride(1 if spec.transposed else 0)}


def _config(kernel: Kernel, spec: LossKernelSpec, like: Tensor) -> Config:
    card = card_of(like.device)
    return config_for(kernel, tile_configs(kernel, spec, card), card)


# --- bytes -------------------------------------------------------------------------------------------------------


def forward_workspace(hidden: Tensor, weight: Tensor, bias: Tensor | None, spec: LossSpec, argmax: bool) -> int:
    """Bytes that `token_losses` holds at its peak, less its results: what the parts leave, and two to join them."""
    generated = _generated(hidden, weight, bias, spec, argmax)
    parts = _parts(_config(forward_kernel(generated), generated, hidden), weight.shape[0])
    numbers = parts * (4 + bool(spec.label_smoothing) + argmax)
    return 4 * hidden.shape[0] * numbers + _copied_bytes(hidden, weight)


def backward_workspace(hidden: Tensor, weight: Tensor, wanted: Wanted, lse: bool) -> int:
    """Bytes that `gradients` holds at its peak, less its results: the gradient of some logits, and hidden's in fp32."""
    piece = hidden.shape[0] * _classes_at_a_time(hidden.shape[0], weight) * weight.itemsize
    if wanted.hidden and hidden.dtype != torch.float32:
        wide = 4 * hidden.numel()
        piece = max(piece + wide - hidden.nbytes, wide)  # before and after it is rounded
    return piece + 4 * hidden.shape[0] * (1 + lse) + _copied_bytes(hidden, weight)


def _copied_bytes(hidden: Tensor, weight: Tensor) -> int:
    of_hidden = 0 if _is_dense(hidden) else hidden.nbytes
    return of_hidden + (0 if _is_dense(weight) or _is_dense(weight.t()) else weight.nbytes)
