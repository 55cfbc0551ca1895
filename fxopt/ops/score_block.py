"""One block of scores: rows of a tile, for some heads, forward and backward.

With s the scores, s' what the program makes of them, and d for gradients:

    p = softmax(s')    dp = dout @ v.T    ds' = p * (dp - sum(p * dp))    ds = ds' * program'(s)
    dq = scale * ds @ k    dk = scale * ds.T @ q    dv = p.T @ dout

The shape of a block is chosen in `fxopt.ops.score_tiles`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fxopt.ops.attention_call import Attention, length
from fxopt.ops.attention_gradients import Gradients
from fxopt.ops.dropout_bits import keep_bits, keep_only
from fxopt.ops.tiles import Tile

__all__ = ["Block", "Slopes", "needs_program"]


def needs_program(call: Attention, gradients: Gradients) -> bool:
    """Whether the program has to be differentiated: not where s' = factor * s + bias, and nobody asks by bias."""
    return gradients.by_captures or call.spec.affine is None


class Slopes(NamedTuple):
    """Derivatives of the program on a block, by s and by what its loads read; what is missing is 0."""

    by_s: Tensor | None
    by_load: dict[int, Tensor]


@dataclass(frozen=True)
class Block:
    """Rows of a tile and the heads that share key heads `shared`, computed at a time. Batches are folded:

    [nb * key heads, group * nq, width] for what has a row a query, [nb * key heads, nk, width] for k and v.
    """

    call: Attention
    tile: Tile
    shared: slice

    # --- parts of tensors ---

    @functools.cached_property
    def heads(self) -> slice:
        """Query heads."""
        return slice(self.shared.start * self.call.group, self.shared.stop * self.call.group)

    def rows(self, tensor: Tensor) -> Tensor:
        """The block's part of [B, H, Sq, ...], a view."""
        return tensor[self.tile.b, self.heads, self.tile.q]

    def columns(self, tensor: Tensor) -> Tensor:
        """The block's part of a contiguous [B, Hk, Sk, width], folded; a view if it has all keys, or one batch row."""
        return tensor[self.tile.b, self.shared, self.tile.k].flatten(0, 1)

    def folded(self, rows: Tensor) -> Tensor:
        """[nb, nh, nq, width], folded."""
        return rows.reshape(-1, self.call.group * length(self.tile.q), rows.shape[-1])

    def unfolded(self, rows: Tensor) -> Tensor:
        """The inverse of `folded`."""
        return rows.view(length(self.tile.b), length(self.heads), length(self.tile.q), -1)

    @functools.cached_property
    def place(self) -> tuple[slice, slice, slice, slice]:
        """Where the block is, as programs ask."""
        return self.tile.b, self.heads, self.tile.q, self.tile.k

    @functools.cached_property
    def bits(self) -> Tensor:
        """Which probabilities dropout keeps."""
        assert self.call.seed is not None
        return keep_bits(self.call.seed, self.call.spec.dropout, *self.place)

    # --- products, of operands in the inputs' dtype ---

    def product(self, x: Tensor, y: Tensor, factor: float = 1.0) -> Tensor:
        """``factor * x @ y`` of folded operands, `wide`, rounded to the operands' dtype on the way."""
        if x.dtype == self.call.wide:
            return torch.baddbmm(x.new_empty(()), x, y, beta=0, alpha=factor)
        product = torch.bmm(x, y).to(self.call.wide)
        return product if factor == 1.0 else product.mul_(factor)

    def add_product(self, total: Tensor, x: Tensor, y: Tensor, factor: float = 1.0) -> None:
        """``total[keys] += factor * x.T @ y`` for total [B, Hk, Sk, width] of dtype `wide`."""
        part, columns = total[self.tile.b, self.shared, self.tile.k], self.columns(total)
        if x.dtype == total.dtype and part.shape[0] == 1:
            columns.baddbmm_(x.mT, y, alpha=factor)
        else:
            part.add_(torch.bmm(x.mT, y).view(part.shape), alpha=factor)

    # --- the steps ---

    def product_of_scores(self, factor: float) -> Tensor:
        """``factor * q @ k.T`` [nb, nh, nq, nk]."""
        k = self.columns(self.call.scored_k)
        q = self.folded(self.rows(self.call.q)).to(k.dtype)
        return self.unfolded(self.product(q, k.mT, factor))

    def scores(self) -> Tensor:
        """s' [nb, nh, nq, nk], nobody else's memory."""
        call, spec = self.call, self.call.spec
        if spec.affine is None:
            s = self.product_of_scores(spec.scale)
            return spec.score.on_block(s, *self.place, call.captures, overwrite=True)
        scores = self.product_of_scores(call.factor)
        if call.bias is not None:
            scores += call.bias.on_block(None, *self.place, call.captures, dtype=call.wide)
        return scores

    def masked(self, scores: Tensor) -> Tensor:
        """Scores with -inf where no key is allowed; overwrites them. (`masked_fill_` takes 20 times as long.)"""
        mask, first = self.call.mask(self.tile, self.heads)
        if mask is not None:
            scores[..., first:] += mask
        return scores

    def probabilities(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """(softmax of masked scores, with the sink, and 0 in rows without keys; lse [nb, nh, nq, 1]). Overwrites them.

        The backward too normalises: exp(scores - lse) is off by a rounding of lse, the same for all of a row, which
        does not cancel where gradients of a row's scores are added up.
        """
        top = scores.amax(-1, keepdim=True)
        p = torch.softmax(scores, -1, out=scores) if scores.device.type == "cpu" else torch.softmax(scores, -1)
        lse = top - p.amax(-1, keepdim=True).log()  # the largest probability is 1 / sum(exp(scores - top))
        nothing = top == -torch.inf
        if nothing.any():
            lse, p = lse.masked_fill_(nothing, -torch.inf), p.masked_fill_(nothing, 0)
        if self.call.sink is None:
            return p, lse
        sink = self.call.sink[self.heads, None, None].to(lse.dtype)
        return p.mul_((lse - sink).sigmoid_()), torch.logaddexp(lse, sink)

    def forward(self, out: Tensor, lse: Tensor) -> None:
        """Write the block's rows of out and lse."""
        call, keep = self.call, 1.0 - self.call.spec.dropout
        p, of_rows = self.probabilities(self.masked(self.scores()))
        if keep < 1:
            p = keep_only(p, self.bits).mul_(1 / keep)
        values = self.columns(call.operand_v)
        self.rows(out).copy_(self.unfolded(torch.bmm(self.folded(call.narrow(p)), values)))
        self.rows(lse).copy_(of_rows[..., 0])

    def backward(self, upstream: Tensor, gradients: Gradients) -> None:
        """Add the block's part to every gradient wanted."""
        scores, slopes = self.evaluated(gradients)
        p, _ = self.probabilities(self.masked(scores))
        self.add_gradients(p, slopes, upstream, gradients)

    def evaluated(self, gradients: Gradients) -> tuple[Tensor, Slopes | None]:
        """(s', nobody else's memory; the program's derivatives); None where that is the constant `call.factor`."""
        call, spec = self.call, self.call.spec
        if not needs_program(call, gradients):
            return self.scores(), None
        s = self.product_of_scores(spec.scale)
        shape, derivative = s.shape, spec.score.derivative()
        scores, by_s, by_load = derivative.on_block(s, *self.place, call.captures, overwrite=True)
        kept = (by_s, *by_load.values())
        if scores.shape != shape or spec.score.result.op == "load" or any(scores is one for one in kept):
            scores = scores.expand(shape).clone()
        return scores, Slopes(by_s, by_load)

    def add_gradients(self, p: Tensor, slopes: Slopes | None, upstream: Tensor, gradients: Gradients) -> None:
        """Add what follows from the probabilities p [nb, nh, nq, nk] before dropout."""
        call, keep = self.call, 1.0 - self.call.spec.dropout
        by_out = call.narrow(self.folded(self.rows(upstream)))
        if gradients.v is not None:
            self.add_product(gradients.v, call.narrow(self.folded(self.kept(p))), by_out, 1 / keep)
        if gradients.needs_scores:
            by_p = self.unfolded(self.product(by_out, self.columns(call.operand_v).mT, 1 / keep))
            by_p = keep_only(by_p, self.bits) if keep < 1 else by_p
            # The sum is that of dout * out too, but for roundings, which would not cancel over the row.
            by_scores = by_p.sub_((by_p * p).sum(-1, keepdim=True)).mul_(p)
            self.add_scores_gradient(by_scores, slopes, gradients)

    def kept(self, p: Tensor) -> Tensor:
        """The probabilities that dropout keeps, not grown."""
        return keep_only(p.clone(), self.bits) if self.call.spec.dropout else p

    def add_scores_gradient(self, by_scores: Tensor, slopes: Slopes | None, gradients: Gradients) -> None:
        """From the gradient by s' to those by captures, q and k. Overwrites it."""
        call, spec = self.call, self.call.spec
        for slot, total in enumerate(gradients.captures):
            if total is not None and slopes is not None and slot in slopes.by_load:
                by_value = by_scores * slopes.by_load[slot]
                spec.score.accumulate(slot, total, by_value, *self.place, call.captures)
        if gradients.q is None and gradients.k is None:
            return
        if slopes is None:
            by_scores *= call.factor
        else:
            by_scores = by_scores.zero_() if slopes.by_s is None else by_scores.mul_(slopes.by_s).mul_(spec.scale)
        by_s = call.narrow(self.folded(by_scores))
        if gradients.q is not None:
            by_q = torch.bmm(by_s, self.columns(call.operand_k))
            self.rows(gradients.q).add_(self.unfolded(by_q))
        if gradients.k is not None:
            self.add_product(gradients.k, by_s, call.narrow(self.folded(self.rows(call.q))))
