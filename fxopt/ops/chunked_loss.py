"""Loss and gradients of a linear layer under cross-entropy, a chunk of rows at a time.

For each chunk of C rows the logits [C, V] are computed, turned into losses and, where they lie, into their own
gradient, multiplied out, and overwritten by the next chunk's. The idea is Cut Cross-Entropy's (Wijmans et al. 2024,
arXiv:2411.09009) and Liger Kernel's (Hsu et al. 2024, arXiv:2410.10989); unlike Liger's, sums over chunks are fp32.

Ignored rows are left out before the first product where that costs no synchronisation (on a CPU), and have no part in
anything but the argmax, for which their logits, and no gradients, are computed last: a NaN in an ignored row of
`hidden` does not reach the gradients, as it would through eager's 0 * NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from fxopt.ops.logit_blocks import LogitBlocks, block_bytes, block_rows
from fxopt.ops.logit_rows import LogitRows
from fxopt.ops.loss_spec import LossAndGradients, LossSpec, Wanted
from fxopt.ops.products import accumulate_dtype, gradient_dtype, held_bytes, products_for, slices
from fxopt.ops.rows import Rows

CHUNK_BYTES = 32 * 2**20
"""Most bytes of a chunk's logits in fp32: from 32 MiB on, glibc gives memory back to the system at every free."""
LEAST_ROWS = 128
"""Least rows of a chunk, whatever their size: the weight's gradient is read and written once for every chunk."""
ROWS_OF_SUM, ROWS_OF_PRODUCT = 1024, 256
"""The same on a card: where a 16-bit weight's gradient is summed in fp32, to read and write the sum takes as long as
the product of 650 (A100) to 970 rows (B200); else products of 256 rows keep it busy."""


def least_rows(weight: Tensor, accumulates: bool) -> int:
    """Least rows of a chunk on weight's device; accumulates: whether the weight's gradient is wanted."""
    if weight.device.type != "cuda":
        return LEAST_ROWS
    return ROWS_OF_SUM if accumulates and weight.itemsize == 2 else ROWS_OF_PRODUCT


def chunk_rows(rows: int, vocabulary: int, dtype: torch.dtype, least: int = LEAST_ROWS) -> int:
    """Rows of a chunk: as many as fit `CHUNK_BYTES`, in chunks of equal size, in steps of 32 for the products."""
    most = max(CHUNK_BYTES // max(vocabulary * accumulate_dtype(dtype).itemsize, 1) // 32 * 32, least)
    chunks = max(-(-rows // most), 1)
    return min(-(-rows // (chunks * 32)) * 32, rows)


def workspace_bytes(rows: int, weight: Tensor, spec: LossSpec, wanted: Wanted, kernels: bool = False) -> int:
    """Bytes that `loss_and_gradients` holds at its peak, less inputs and results; weight [V, H].

    Where ignored rows are dropped, a few are: those that count are copied, a chunk at a time, beside their positions.
    """
    vocabulary, wide = weight.shape[0], accumulate_dtype(weight.dtype)
    step = chunk_rows(rows, vocabulary, weight.dtype, least_rows(weight, wanted.weight))
    blocks = 0 if kernels else block_bytes(step, vocabulary, weight.dtype, spec, bool(wanted))
    whole = spec.scale != 1.0 or weight.dtype != wide  # rows before and after the factor, or x and its transpose
    second = step if whole or kernels else block_rows(step, vocabulary, weight.dtype)
    rows_of_hidden = (step + second) * weight.shape[1] * wide.itemsize
    dropping = 0 if kernels or weight.device.type != "cpu" else step * weight.shape[1] * weight.itemsize + 17 * rows
    return blocks + rows_of_hidden + dropping + held_bytes(weight, step, wanted.weight)


def loss_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    spec: LossSpec,
    wanted: Wanted,
    *,
    argmax: bool = False,
    lse: bool = False,
    upstream: Tensor | None = None,
    by_lse: Tensor | None = None,
    kernels: bool = False,
) -> LossAndGradients:
    """Every row's loss and the gradients wanted.

    hidden [N, H], weight [V, H] and bias [V] or None of one floating dtype, target [N] int64, upstream [N] or None for
    ones; lse: whether logsumexp of every row is wanted; by_lse: [N], its upstream gradients, where it has some, and
    then upstream is there too; kernels: whether the logits are turned into losses by a Triton kernel, to which neither
    is known. A target that is no class raises IndexError on a CPU; elsewhere the device's own assertion fails, or with
    kernels the loss is NaN.
    """
    here = hidden.device.type == "cpu" and not kernels
    rows = Rows(hidden, target, spec.ignore_index, weight.shape[0], here and not lse and by_lse is None, here)
    if by_lse is not None:
        # lse has its own upstream gradients, which no mean over the losses divides.
        assert upstream is not None
        upstream, spec = (
            (upstream / rows.count, replace(spec, reduction="sum")) if spec.reduction == "mean" else (upstream, spec)
        )
    kind: Callable[..., LogitBlocks | LogitRows] = (
        LogitRows if kernels else partial(LogitBlocks, lse=lse, by_lse=by_lse)
    )
    chunks = _Chunks(rows, weight, bias, spec, wanted, argmax, upstream, kind)
    for chunk in slices(len(rows), chunks.step):
        chunks.add(chunk)
    if argmax and rows.dropped is not None:
        for some in rows.dropped.split(chunks.step):
            chunks.choose(some)
    return chunks.result()


class _Chunks:
    """The pass over the rows: buffers that all chunks share, and what they add up to."""

    def __init__(
        self,
        rows: Rows,
        weight: Tensor,
        bias: Tensor | None,
        spec: LossSpec,
        wanted: Wanted,
        argmax: bool,
        upstream: Tensor | None,
        kind: Callable[..., LogitBlocks | LogitRows],
    ):
        self.rows, self.wanted, self.dtype = rows, wanted, accumulate_dtype(weight.dtype)
        passing = rows.hidden.shape[0] if argmax else len(rows)
        self.step = chunk_rows(passing, weight.shape[0], weight.dtype, least_rows(weight, wanted.weight))
        self.factor = self._factor(spec)
        self.products = products_for(weight, bias, self.step, wanted.weight, self.factor)
        self.logits = kind(rows, weight.shape[0], self.step, spec, bool(wanted), wanted.bias, argmax, upstream)
        waiting = gradient_dtype(weight.dtype)
        self.hidden = torch.zeros(rows.hidden.shape, dtype=waiting, device=weight.device) if wanted.hidden else None

    def add(self, chunk: slice) -> None:
        """Losses of the chunk's rows, and their part in the gradients."""
        x = self.rows.take(self.rows.hidden, chunk)
        logits = self.products.logits(x)
        self.logits.turn(logits, chunk)
        self.products.accumulate(logits, x)
        if self.hidden is not None:
            gradient = self.products.times_weight(logits)
            self.rows.put(gradient.to(self.hidden.dtype), chunk, self.hidden)

    def choose(self, positions: Tensor) -> None:
        """The argmax of rows that were left out, at `positions` [C], no more than `step`."""
        assert isinstance(self.logits, LogitBlocks)  # by kernels no row is left out
        self.logits.choose(self.products.logits(self.rows.hidden[positions]), positions)

    def result(self) -> LossAndGradients:
        """What all chunks add up to. Call it once, last."""
        waiting, weight, bias = gradient_dtype(self.rows.hidden.dtype), None, self.logits.bias
        self.logits.free()
        if self.wanted.weight:
            weight = self.products.weight_gradient()
        if bias is not None:
            bias = (bias * self.factor).to(waiting)
        found = self.logits
        return LossAndGradients(found.losses, self.rows.count, self.hidden, weight, bias, found.argmax, found.lse)

    def _factor(self, spec: LossSpec) -> float | Tensor:
        """What gradients of the sum of losses by the logits before the scale are multiplied by; 0 if no row counts."""
        scale, count = spec.scale, self.rows.count
        if spec.reduction != "mean":
            return scale
        if isinstance(count, Tensor):
            return torch.where(count > 0, scale / count, 0.0).to(self.dtype)
        return scale / count if count else 0.0
