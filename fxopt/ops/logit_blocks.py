"""Logits to losses and to their own gradient, by ATen, a block of rows at a time.

With z the logits after scale and softcap, p = softmax(z), e = label_smoothing, y the target:

    dloss/dz = p (1 + 2 z_loss lse) - (1 - e) onehot(y) - e / V        dlse/dz = p
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxopt.ops.loss_spec import LossSpec
from fxopt.ops.products import accumulate_dtype, slices
from fxopt.ops.rows import Rows

BLOCK_BYTES = 8 * 2**20
"""Most bytes of the logits that are turned into their gradient at a time: half a dozen passes, so they stay cached."""


def block_rows(rows: int, vocabulary: int, dtype: torch.dtype) -> int:
    """Rows of a block of a chunk of `rows`."""
    return min(max(BLOCK_BYTES // max(vocabulary * accumulate_dtype(dtype).itemsize, 1), 1), rows)


def block_bytes(rows: int, vocabulary: int, dtype: torch.dtype, spec: LossSpec, gradients: bool) -> int:
    """Bytes of the buffers of `LogitBlocks` for chunks of `rows`."""
    wide = accumulate_dtype(dtype)
    copies = (dtype != wide) + bool(spec.softcap and gradients)
    return vocabulary * block_rows(rows, vocabulary, dtype) * wide.itemsize * copies


class LogitBlocks:
    """What the rows' logits give, once all of them have been handed in: `losses`, `argmax`, `lse` [N] and `bias` [V].

    step: the most rows of a chunk. gradients: whether logits become their gradient. argmax, lse, bias: whether the
    class of the largest logit, logsumexp and the sum of the gradient over rows are wanted; what is not is None.
    by_lse: [N], the upstream gradients of lse, where it has some; no rows are dropped then.
    """

    def __init__(
        self, rows: Rows, vocabulary: int, step: int, spec: LossSpec, gradients: bool, bias: bool, argmax: bool,
        upstream: Tensor | None, lse: bool = False, by_lse: Tensor | None = None,
    ):  # fmt: skip
        dtype = rows.hidden.dtype
        self.rows, self.spec, self.gradients, self.upstream, self.by_lse = rows, spec, gradients, upstream, by_lse
        self.vocabulary, self.dtype = vocabulary, accumulate_dtype(dtype)
        self.block = block_rows(step, vocabulary, dtype)
        wide = rows.hidden.new_empty(0, dtype=self.dtype)
        self.wide = wide.new_empty(self.block, vocabulary) if dtype != self.dtype else wide
        self.capped = wide.new_empty(self.block, vocabulary) if spec.softcap and gradients else wide
        self.losses = wide.new_zeros(rows.hidden.shape[0])
        self.argmax = rows.target.new_empty(rows.hidden.shape[0]) if argmax else None
        self.lse = wide.new_empty(rows.hidden.shape[0]) if lse else None
        self.bias = wide.new_zeros(vocabulary) if bias else None

    def turn(self, logits: Tensor, chunk: slice) -> None:
        """Take in the logits [C, V] of the rows `chunk`; with gradients they are overwritten by theirs."""
        for block in slices(logits.shape[0], self.block):
            self._turn_block(logits[block], slice(chunk.start + block.start, chunk.start + block.stop))

    def choose(self, logits: Tensor, positions: Tensor) -> None:
        """Take in the logits [C, V] of rows that were left out, at `positions` [C], for their argmax alone."""
        assert self.argmax is not None
        for block in slices(logits.shape[0], self.block):
            self.argmax[positions[block]] = self._scores(logits[block])[0].argmax(-1)

    def free(self) -> None:
        """Give the buffers back. Nothing can be handed in after that."""
        self.wide = self.capped = self.wide.new_empty(0)

    def _turn_block(self, logits: Tensor, block: slice) -> None:
        target, ignored = self.rows.target[block, None], None
        if self.rows.ignored is not None:
            ignored = self.rows.ignored[block, None]
            target = target.masked_fill(ignored, 0)
        scores, tanh = self._scores(logits)
        if self.argmax is not None:
            self.rows.put(scores.argmax(-1), block, self.argmax)
        losses, probabilities, lse = self._losses(scores, target)
        self.rows.put(losses if ignored is None else losses.masked_fill(ignored[:, 0], 0), block, self.losses)
        if self.lse is not None:
            self.rows.put(lse, block, self.lse)
        if not self.gradients:
            return
        if self.by_lse is not None:
            gradient = self._gradient_with_lse(probabilities, tanh, lse, target, block)
        else:
            gradient = self._logit_gradient(probabilities, tanh, lse, target, block)
            if ignored is not None:
                gradient.masked_fill_(ignored, 0)
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
        if not self.gradients:
            return tanh.mul_(softcap), None
        return torch.mul(tanh, softcap, out=self.capped[: logits.shape[0]]), tanh

    def _losses(self, scores: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Losses [B], softmax(scores) [B, V], which overwrites the scores on a CPU, and lse [B].

        The largest probability is 1 / sum(exp(scores - max)), which spares a pass for the sum's logarithm. The largest
        score is subtracted before that is, as log_softmax does: a small loss is no difference of two large numbers.
        """
        smoothing = self.spec.label_smoothing
        largest, chosen = scores.amax(-1), scores.gather(1, target).squeeze(1)
        losses = (1.0 - smoothing) * (largest - chosen)
        if smoothing:
            losses = losses + smoothing * (largest - scores.mean(-1))
        in_place = scores.device.type == "cpu"  # row by row, each element read before it is written
        probabilities = torch.softmax(scores, -1, out=scores) if in_place else torch.softmax(scores, -1)
        total = -probabilities.amax(-1).log()
        lse = largest + total
        losses = losses + total
        if self.spec.z_loss:
            losses = losses + self.spec.z_loss * lse.square()
        return losses, probabilities, lse

    def _logit_gradient(
        self, gradient: Tensor, tanh: Tensor | None, lse: Tensor, target: Tensor, block: slice
    ) -> Tensor:
        """From the probabilities, in place: the gradient of ``upstream * losses`` by the logits before the scale."""
        smoothing, z_loss = self.spec.label_smoothing, self.spec.z_loss
        elsewhere = smoothing / self.vocabulary
        if z_loss:
            gradient.mul_((1.0 + 2.0 * z_loss * lse)[:, None])
        chosen = gradient.gather(1, target) - (1.0 - smoothing + elsewhere)
        if smoothing:
            gradient.sub_(elsewhere)
        gradient.scatter_(1, target, chosen)
        if tanh is not None:
            gradient.addcmul_(gradient, tanh.square_(), value=-1)
        if self.upstream is not None:
            gradient.mul_(self.rows.take(self.upstream, block)[:, None])
        return gradient

    def _gradient_with_lse(
        self, gradient: Tensor, tanh: Tensor | None, lse: Tensor, target: Tensor, block: slice
    ) -> Tensor:
        """The same of ``upstream * losses + by_lse * lse``, to which ignored rows have their part by lse."""
        assert self.by_lse is not None
        assert self.upstream is not None
        assert self.rows.ignored is not None
        smoothing = self.spec.label_smoothing
        elsewhere = smoothing / self.vocabulary
        upstream = self.rows.take(self.upstream, block).masked_fill(self.rows.ignored[block], 0)
        of_losses = upstream * (1.0 + 2.0 * self.spec.z_loss * lse)
        gradient.mul_((of_losses + self.rows.take(self.by_lse, block))[:, None])
        chosen = gradient.gather(1, target) - (1.0 - smoothing + elsewhere) * upstream[:, None]
        if smoothing:
            gradient.sub_(elsewhere * upstream[:, None])
        gradient.scatter_(1, target, chosen)
        return gradient if tanh is None else gradient.addcmul_(gradient, tanh.square_(), value=-1)
