"""One block of scores: rows of a tile, for some heads, forward and backward.

With s the scores, s' what the program makes of them, and d for gradients:

    p = softmax(s')    dp = dout @ v.T    ds' = p * (dp - sum(p * dp))    ds = ds' * program'(s)
    dq = scale * ds @ k    dk = scale * ds.T @ q    dv = p.T @ dout

The shape of a block is chosen in `fxopt.ops.score_tiles`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fxopt.ops.attention_call import Attention, length
from fxopt.ops.attention_gradients import Gradients
from fxopt.ops.dropout_bits import keep_bits, keep_only
from fxopt.ops.tiles import Tile

__all__ = ["Block", "Buffers", "Slopes", "needs_program"]


def needs_program(call: Attention, gradients: Gradients) -> bool:
    """Whether the program has to be differentiated: not where s' = factor * s + bias, and nobody asks by bias."""
    return gradients.by_captures or call.spec.affine is None


class Buffers:
    """Memory that blocks take in turn: the C library gives blocks of MiB back to the system when they are freed, and
    the faults of getting them again take three times as long as a product of two of them."""

    def __init__(self, device: torch.device):
        self._device, self._flat = device, dict[str, Tensor]()

    def __call__(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The buffer of that name as a tensor of `shape`, with whatever is in it."""
        size, flat = math.prod(shape), self._flat.get(name)
        if flat is None or flat.numel() < size or flat.dtype != dtype:
            flat = self._flat[name] = torch.empty(size, dtype=dtype, device=self._device)
        return flat[:size].view(shape)


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
    memory: Buffers

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

    def buffer(self, name: str, dtype: torch.dtype) -> Tensor:
        """Memory for [nb * key heads, group * nq, nk], the same in every block."""
        rows, columns = self.call.group * length(self.tile.q), length(self.tile.k)
        return self.memory(name, (length(self.tile.b) * length(self.shared), rows, columns), dtype)

    # --- products, of operands in the inputs' dtype ---

    def product(self, x: Tensor, y: Tensor, name: str, factor: float = 1.0) -> Tensor:
        """``factor * x @ y`` of folded operands, [nb, nh, nq, nk], in the buffer of that name, of dtype `wide`; rounded
        to the operands' dtype on the way."""
        found = self.buffer(name, self.call.wide)
        if x.dtype == found.dtype:
            return self.unfolded(found.baddbmm_(x, y, beta=0, alpha=factor))
        found.copy_(torch.bmm(x, y, out=self.buffer("narrow", x.dtype)))
        return self.unfolded(found if factor == 1.0 else found.mul_(factor))

    def narrow(self, values: Tensor) -> Tensor:
        """[nb, nh, nq, nk] as a folded operand, valid until the next call."""
        folded, dtype = self.folded(values), self.call.operand_dtype
        return folded if folded.dtype == dtype else self.buffer("narrow", dtype).copy_(folded)

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
        return self.product(q, k.mT, "scores", factor)

    def scores(self) -> Tensor:
        """s' [nb, nh, nq, nk], nobody else's memory."""
        call, spec = self.call, self.call.spec
        if spec.affine is None:
            s = self.product_of_scores(spec.scale)
            return spec.score.on_block(s, *self.place, call.captures, overwrite=True)
        scores = self.product_of_scores(call.factor)
        if call.bias is not None:
            scores += call.without_s(call.bias, self.tile, self.heads)
        return scores

    def masked(self, scores: Tensor) -> Tensor:
        """Scores with -inf where no key is allowed; overwrites them. (`masked_fill_` takes 20 times as long.)"""
        mask, first = self.call.mask(self.tile, self.heads)
        if mask is not None:
            scores[..., first:] += mask
        return scores

    def probabilities(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """(softmax of masked scores, with the sink, 0 in rows without keys; lse [nb, nh, nq, 1]). Overwrites them."""
        top = scores.amax(-1, keepdim=True)
        p = _softmax(scores)
        lse = top - p.amax(-1, keepdim=True).log()  # the largest probability is 1 / sum(exp(scores - top))
        nothing = top == -torch.inf
        if nothing.any():
            lse, p = lse.masked_fill_(nothing, -torch.inf), p.masked_fill_(nothing, 0)
        if self.call.sink is None:
            return p, lse
        sink = self.call.sink[self.heads, None, None].to(lse.dtype)
        return p.mul_((lse - sink).sigmoid_()), torch.logaddexp(lse, sink)

    def probabilities_again(self, scores: Tensor, lse: Tensor, some_empty: bool) -> Tensor:
        """As above, for the backward, which has the lse of all rows; `some_empty`: somewhere it is -inf.

        Not exp(scores - lse): that is off by a rounding of lse, the same for all of a row, which does not cancel where
        gradients of a row's scores are added up.
        """
        if self.call.sink is not None:
            return self.probabilities(scores)[0]
        p = _softmax(scores)
        return p.masked_fill_((self.rows(lse) == -torch.inf)[..., None], 0) if some_empty else p

    def forward(self, out: Tensor, lse: Tensor) -> None:
        """Write the block's rows of out and lse."""
        call, keep = self.call, 1.0 - self.call.spec.dropout
        p, of_rows = self.probabilities(self.masked(self.scores()))
        if keep < 1:
            p = keep_only(p, self.bits).mul_(1 / keep)
        values = self.columns(call.operand_v)
        self.rows(out).copy_(self.unfolded(torch.bmm(self.narrow(p), values)))
        self.rows(lse).copy_(of_rows[..., 0])

    def backward(self, upstream: Tensor, lse: Tensor, gradients: Gradients, some_empty: bool) -> None:
        """Add the block's part to every gradient wanted."""
        scores, slopes = self.evaluated(gradients)
        p = self.probabilities_again(self.masked(scores), lse, some_empty)
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
            self.add_product(gradients.v, self.narrow(self.kept(p)), by_out, 1 / keep)
        if gradients.needs_scores:
            by_p = self.product(by_out, self.columns(call.operand_v).mT, "by_p", 1 / keep)
            by_p = keep_only(by_p, self.bits) if keep < 1 else by_p
            # The sum is that of dout * out too, but for roundings, which would not cancel over the row.
            both = torch.mul(by_p, p, out=self.unfolded(self.buffer("both", call.wide)))
            by_scores = by_p.sub_(both.sum(-1, keepdim=True)).mul_(p)
            self.add_scores_gradient(by_scores, slopes, gradients)

    def kept(self, p: Tensor) -> Tensor:
        """The probabilities that dropout keeps, not grown."""
        if not self.call.spec.dropout:
            return p
        return keep_only(self.unfolded(self.buffer("both", self.call.wide)).copy_(p), self.bits)

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
        by_s = self.narrow(by_scores)
        if gradients.q is not None:
            by_q = torch.bmm(by_s, self.columns(call.operand_k))
            self.rows(gradients.q).add_(self.unfolded(by_q))
        if gradients.k is not None:
            self.add_product(gradients.k, by_s, call.narrow(self.folded(self.rows(call.q))))


def _softmax(scores: Tensor) -> Tensor:
    """Over the last axis; in place on a CPU, whose kernel reads each element of a row before it writes it."""
    return torch.softmax(scores, -1, out=scores) if scores.device.type == "cpu" else torch.softmax(scores, -1)
