"""Rows that are allowed no key: what they give, and the gradients of that.

    "zero"      0, as `scaled_dot_product_attention` has it
    "nan"       NaN, as softmax of nothing but -inf: through 0 * NaN it reaches every gradient of its keys' head
    "uniform"   the mean of v over all keys, as scores that are all ``finfo.min``; no gradient by the scores
    "uniform+"  the same, of ``scores + finfo.min``, which pass softmax's gradient on

A row with a sink is none of them: all its weight is the sink's, and it gives 0.
"""

from __future__ import annotations

from dataclasses import astuple, replace

import torch
from torch import Tensor

from fxopt.ops.attention_call import Attention
from fxopt.ops.attention_gradients import Gradients
from fxopt.ops.score_block import needs_program
from fxopt.ops.score_tiles import blocks_of

__all__ = ["EMPTY", "add_gradients", "fill"]

EMPTY = ("zero", "nan", "uniform", "uniform+")


def fill(call: Attention, out: Tensor, lse: Tensor) -> None:
    """Overwrite the rows of out [B, H, Sq, Dv] whose lse is -inf."""
    if call.spec.empty == "zero":
        return
    empty = lse == -torch.inf
    if not empty.any():
        return
    if call.spec.empty == "nan" or call.keys == 0:
        out.masked_fill_(empty[..., None], torch.nan)
        return
    mean = call.v.mean(2, keepdim=True, dtype=call.wide).repeat_interleave(call.group, 1)
    out.copy_(torch.where(empty[..., None], mean.to(out.dtype), out))


def add_gradients(call: Attention, upstream: Tensor, lse: Tensor, gradients: Gradients) -> None:
    """Add the part of the rows whose lse is -inf; those of "zero" have none. Rows of q's gradient are zero so far."""
    if call.spec.empty == "zero" or call.keys == 0:
        return
    empty = lse == -torch.inf
    if not empty.any():
        return
    if call.spec.empty == "nan":
        _poison(call, empty, gradients)
        return
    gradients.v = None if gradients.v is None else gradients.v.to(call.wide)
    gradients.k = None if gradients.k is None else gradients.k.to(call.wide)
    passed = gradients if call.spec.empty == "uniform+" else Gradients(None, None, gradients.v, [])
    for block in blocks_of(_over_all_keys(call, empty)):
        weights = (block.rows(empty)[..., None].to(call.wide) / call.keys).expand(-1, -1, -1, call.keys)
        slopes = block.evaluated(passed)[1] if needs_program(call, passed) else None
        block.add_gradients(weights, slopes, upstream, passed)


def _over_all_keys(call: Attention, empty: Tensor) -> Attention:
    """The call with all keys allowed, for rows that are empty in some head, and no others."""
    intervals = empty.any(1)[..., None] * torch.tensor([0, call.keys, call.keys], device=empty.device)
    spec = replace(call.spec, predicate="", lower=None, upper=None)
    return Attention(call.q, call.k, call.v, None, intervals, None, None, call.captures, astuple(spec))


def _poison(call: Attention, empty: Tensor, gradients: Gradients) -> None:
    """NaN in the rows of q, in all keys and values of their heads, and in captures."""
    heads = empty.any(2).view(call.batch, call.key_heads, call.group).any(2)[..., None, None]
    for one, where in ((gradients.q, empty[..., None]), (gradients.k, heads), (gradients.v, heads)):
        if one is not None:
            one.masked_fill_(where, torch.nan)
    for one in gradients.captures:
        if one is not None:
            one.fill_(torch.nan)
