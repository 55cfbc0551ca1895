"""Loss and gradients of a linear layer under cross-entropy, a chunk of rows at a time.

For each chunk of C rows the logits [C, V] are computed, turned into losses and, where they lie, into their own
gradient, multiplied out, and overwritten by the next chunk's. The idea is Cut Cross-Entropy's (Wijmans et al. 2024,
arXiv:2411.09009) and Liger Kernel's (Hsu et al. 2024, arXiv:2410.10989); unlike Liger's, sums over chunks are fp32.

With z the logits after scale and softcap, p = softmax(z), e = label_smoothing, y the target:

    loss = log(sum(exp(z))) - (1 - e) z[y] - e mean(z)
    dloss/dz = p - (1 - e) onehot(y) - e / V

Ignored rows are left out before the first product where that costs no synchronisation (on a CPU), and have no part in
anything: a NaN in an ignored row of `hidden` does not reach the gradients, as it would through eager's 0 * NaN.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxopt.ops.products import accumulate_dtype, gradient_dtype, held_bytes, products_for, slices
from fxopt.ops.rows import Rows

CHUNK_BYTES = 32 * 2**20
"""Most bytes of a chunk's logits in fp32: from 32 MiB on, glibc gives memory back to the system at every free."""
LEAST_ROWS = 128
"""Least rows of a chunk, whatever their size: the weight's gradient is read and written once for every chunk."""
BLOCK_BYTES = 8 * 2**20
"""Most bytes of the logits that are turned into their gradient at a time: half a dozen passes, so they stay cached."""


@dataclass(frozen=True)
class LossSpec:
    """The constants of a loss: ``cross_entropy(softcap * tanh(scale * logits / softcap), ...)``; softcap 0 is none."""

    scale: float
    softcap: float
    label_smoothing: float
    ignore_index: int
    reduction: str


@dataclass(frozen=True)
class Wanted:
    """Which gradients to compute."""

    hidden: bool
    weight: bool
    bias: bool

    @property
    def flags(self) -> tuple[bool, bool, bool]:
        return self.hidden, self.weight, self.bias

    def __bool__(self) -> bool:
        return any(self.flags)


@dataclass(frozen=True)
class LossAndGradients:
    """What one pass over the rows gives, in fp32 (losses; fp64 for fp64) and `gradient_dtype`.

    losses: [N], zero where ignored; count: how many rows are not ignored; hidden [N, H], weight [V, H] and bias [V]:
    gradients of the sum of ``upstream * losses`` (of its mean, if that is the reduction), None where not wanted.
    """

    losses: Tensor
    count: int | Tensor
    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def chunk_rows(rows: int, vocabulary: int, dtype: torch.dtype) -> int:
    """Rows of a chunk: as many as fit `CHUNK_BYTES`, in chunks of equal size, in steps of 32 for the products."""
    most = max(CHUNK_BYTES // max(vocabulary * accumulate_dtype(dtype).itemsize, 1) // 32 * 32, LEAST_ROWS)
    chunks = max(-(-rows // most), 1)
    return min(-(-rows // (chunks * 32)) * 32, rows)


def block_rows(rows: int, vocabulary: int, dtype: torch.dtype) -> int:
    """Rows of a block of a chunk of `rows`."""
    return min(max(BLOCK_BYTES // max(vocabulary * accumulate_dtype(dtype).itemsize, 1), 1), rows)


def workspace_bytes(rows: int, weight: Tensor, spec: LossSpec, wanted: Wanted) -> int:
    """Bytes that `loss_and_gradients` holds at its peak, less inputs and results; no row ignored, weight [V, H]."""
    vocabulary, wide = weight.shape[0], accumulate_dtype(weight.dtype)
    step = chunk_rows(rows, vocabulary, weight.dtype)
    copies = (weight.dtype != wide) + bool(spec.softcap and wanted)
    block = vocabulary * block_rows(step, vocabulary, weight.dtype) * wide.itemsize * copies
    rows_of_hidden = step * weight.shape[1] * wide.itemsize * 2  # before and after the factor, or x and its transpose
    return block + rows_of_hidden + held_bytes(weight, step, wanted.weight)


def loss_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    spec: LossSpec,
    wanted: Wanted,
    upstream: Tensor | None = None,
) -> LossAndGradients:
    """Every row's loss and the gradients wanted.

    hidden [N, H], weight [V, H] and bias [V] or None of one floating dtype, target [N] int64, upstream [N] or None for
    ones. Raises IndexError for a target that is no class, on a CPU; elsewhere the device's own assertion fails.
    """
    rows = Rows(hidden, target, spec.ignore_index, weight.shape[0])
    chunks = _Chunks(rows, weight, bias, spec, wanted, upstream)
    for chunk in slices(len(rows), chunks.step):
        chunks.add(chunk)
    return chunks.result()


class _Chunks:
    """The pass over the rows: buffers that all chunks share, and what they add up to."""

    def __init__(
        self, rows: Rows, weight: Tensor, bias: Tensor | None, spec: LossSpec, wanted: Wanted, upstream: Tensor | None
    ):
        self.rows, self.spec, self.wanted, self.upstream = rows, spec, wanted, upstream
        self.vocabulary, self.dtype = weight.shape[0], accumulate_dtype(weight.dtype)
        self.step = chunk_rows(len(rows), self.vocabulary, weight.dtype)
        self.block = block_rows(self.step, self.vocabulary, weight.dtype)
        self.products = products_for(weight, bias, self.step, wanted.weight)
        wide = weight.new_empty(0, dtype=self.dtype)
        self.wide = wide.new_empty(self.block, self.vocabulary) if weight.dtype != self.dtype else wide
        self.capped = wide.new_empty(self.block, self.vocabulary) if spec.softcap and wanted else wide
        self.losses, self.factor = wide.new_zeros(rows.hidden.shape[0]), self._factor()
        waiting = gradient_dtype(weight.dtype)
        self.hidden = torch.zeros(rows.hidden.shape, dtype=waiting, device=weight.device) if wanted.hidden else None
        self.bias = wide.new_zeros(self.vocabulary) if wanted.bias else None

    def add(self, chunk: slice) -> None:
        """Losses of the chunk's rows, and their part in the gradients."""
        x = self.rows.take(self.rows.hidden, chunk)
        logits = self.products.logits(x)
        for block in slices(logits.shape[0], self.block):
            self._add_block(logits[block], slice(chunk.start + block.start, chunk.start + block.stop))
        self.products.accumulate(logits, x)
        if self.hidden is not None:
            gradient = self.products.times_weight(logits).to(self.dtype) * self.factor
            self.rows.put(gradient.to(self.hidden.dtype), chunk, self.hidden)

    def result(self) -> LossAndGradients:
        """What all chunks add up to. Call it once, last."""
        waiting, weight, bias = gradient_dtype(self.rows.hidden.dtype), None, self.bias
        self.wide = self.capped = self.wide.new_empty(0)
        if self.wanted.weight:
            weight = self.products.weight_gradient(self.factor)
        if bias is not None:
            bias = (bias * self.factor).to(waiting)
        return LossAndGradients(self.losses, self.rows.count, self.hidden, weight, bias)

    def _factor(self) -> float | Tensor:
        """What gradients of the sum of losses by the logits before the scale are multiplied by; 0 if no row counts."""
        scale, count = self.spec.scale, self.rows.count
        if self.spec.reduction != "mean":
            return scale
        if isinstance(count, Tensor):
            return torch.where(count > 0, scale / count, 0.0).to(self.dtype)
        return scale / count if count else 0.0

    def _add_block(self, logits: Tensor, block: slice) -> None:
        """Take the losses of logits [B, V] and, if gradients are wanted, overwrite them by their gradient."""
        target = self.rows.target[block, None]
        scores, tanh = self._scores(logits)
        losses, probabilities = self._losses(scores, target)
        if self.rows.ignored is not None:
            losses = losses.masked_fill(self.rows.ignored[block], 0)
        self.rows.put(losses, block, self.losses)
        if not self.wanted:
            return
        gradient = self._logit_gradient(probabilities, tanh, target, block)
        if self.bias is not None:
            self.bias.add_(gradient.sum(0))
        if gradient.data_ptr() != logits.data_ptr():
            logits.copy_(gradient)

    def _scores(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scaled and capped logits [B, V] in `dtype`, and the tanh that capped them."""
        scale, softcap = self.spec.scale, self.spec.softcap
        scores = logits if logits.dtype == self.dtype else self.wide[: logits.shape[0]].copy_(logits)
        if not softcap:
            return (scores if scale == 1.0 else scores.mul_(scale)), None
        tanh = scores.mul_(scale / softcap).tanh_()
        if not self.wanted:
            return tanh.mul_(softcap), None
        return torch.mul(tanh, softcap, out=self.capped[: logits.shape[0]]), tanh

    def _losses(self, scores: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Losses [B] and softmax(scores) [B, V], which overwrites the scores on a CPU.

        The largest probability is 1 / sum(exp(scores - max)), which spares a pass for the sum's logarithm. The largest
        score is subtracted before that is, as log_softmax does: a small loss is no difference of two large numbers.
        """
        smoothing = self.spec.label_smoothing
        largest, chosen = scores.amax(-1), scores.gather(1, target).squeeze(1)
        below = (1.0 - smoothing) * (largest - chosen)
        if smoothing:
            below = below + smoothing * (largest - scores.mean(-1))
        in_place = scores.device.type == "cpu"  # row by row, each element read before it is written
        probabilities = torch.softmax(scores, -1, out=scores) if in_place else torch.softmax(scores, -1)
        return below - probabilities.amax(-1).log(), probabilities

    def _logit_gradient(self, gradient: Tensor, tanh: Tensor | None, target: Tensor, block: slice) -> Tensor:
        """From the probabilities, in place: the gradient of ``upstream * losses`` by the logits before the scale."""
        smoothing = self.spec.label_smoothing
        elsewhere = smoothing / self.vocabulary
        chosen = gradient.gather(1, target) - (1.0 - smoothing + elsewhere)
        if smoothing:
            gradient.sub_(elsewhere)
        gradient.scatter_(1, target, chosen)
        if tanh is not None:
            gradient.addcmul_(gradient, tanh.square_(), value=-1)
        if self.upstream is not None:
            gradient.mul_(self.rows.take(self.upstream, block)[:, None])
        if self.rows.ignored is not None:
            gradient.masked_fill_(self.rows.ignored[block, None], 0)
        return gradient
