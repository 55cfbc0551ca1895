"""Which of two ways to go through a vocabulary, and what each costs. Not measured on a GPU.

    tiles   a Triton kernel for the losses; in the backward the logits again by tiles, then the library's products:
            2 + n products for n gradients, 2 of them by the kernel; hardly any memory
    chunks  the library's products, a chunk of tokens at a time, and the gradients while a chunk's logits are there:
            1 + n products; the logits are written and read, and so is the fp32 sum of the weight's gradient, which is
            twice as large as the weight where that is of 16 bits

By its rates (fxopt.memory.rates) an H100 takes, in bf16 and with a trained head, at 8192 tokens:

                    tiles               chunks              Inductor with logits
    256k x 2304     73 ms, 136 MiB      64 ms, 2.2 GiB      51 ms, 16 GiB       (besides the gradients)
    128k x 4096     63 ms, 192 MiB      54 ms, 2.0 GiB      42 ms, 8 GiB

So exact gradients in a twelfth of Inductor's memory cost a fourth product, 1.5 times its time; Cut Cross-Entropy buys
that back by leaving out small gradients. With a frozen head chunks have no sum to keep, and win where H is 384 and
more. fp32, whose exact products are slow in Triton, goes by chunks.
"""

from __future__ import annotations

import torch
from torch import SymInt, Tensor

from fxopt import compat
from fxopt.kernels.cards import card_of
from fxopt.memory.rates import BY_ARCHITECTURE, Device
from fxopt.ops.chunked_loss import least_rows
from fxopt.ops.launch import runs_triton
from fxopt.ops.loss_launch import LEAST_CLASSES
from fxopt.ops.loss_spec import Wanted

__all__ = ["chunk_seconds", "chunks_are_small", "rates_of", "recomputes", "tile_seconds", "tokens_for_chunks"]


NARROW_SHARE, FP32_SHARE = 0.75, 0.5
"""Of the library's rate, what a Triton product of 16-bit and of fp32 numbers reaches."""

MOST_BYTES_A_LOGIT = 0.64
"""What chunks may hold: a twelfth of the 8 bytes a logit that Inductor holds (Cut Cross-Entropy's table 1)."""
FREE_BYTES = 256 * 2**20
"""What they may hold in any case."""


def recomputes(hidden: Tensor, weight: Tensor, tokens: int | SymInt, wanted: Wanted, lowering: str) -> bool:
    """Whether gradients are better computed in the backward, by tiles. hidden [..., H], weight [V, H].

    Of the sizes only the number of tokens is looked at last, by a single comparison: where it is symbolic that is the
    one guard. Under the interpreter it is always tiles, so that tests of models see them.
    """
    if not wanted or not runs_triton(hidden, lowering):
        return False
    if lowering == "interpret":
        return True
    rates = _rates_on(hidden.device)
    if chunk_seconds(weight, wanted, rates) > tile_seconds(weight, wanted, rates):
        return True
    return not chunks_are_small(weight, tokens, wanted)


def chunks_are_small(weight: Tensor, tokens: int | SymInt, wanted: Wanted) -> bool:
    """Whether chunks hold little enough beside the logits of `tokens` to be chosen for their time."""
    return compat.guard_or_false(tokens >= tokens_for_chunks(weight, wanted))


@torch.compiler.assume_constant_result  # Dynamo, which may trace this, need not know how a device is asked
def _rates_on(device: torch.device) -> Device:
    return rates_of(card_of(device).arch)


def rates_of(arch: int) -> Device:
    """Of the newest architecture in the table that is no newer than `arch`. Only ratios of rates decide anything."""
    return BY_ARCHITECTURE[max([known for known in BY_ARCHITECTURE if known <= arch], default=min(BY_ARCHITECTURE))]


def tile_seconds(weight: Tensor, wanted: Wanted, rates: Device) -> float:
    """Per logit, forward and backward."""
    share, rate = (NARROW_SHARE, rates.flops16) if weight.itemsize == 2 else (FP32_SHARE, rates.flops)
    products = 2 / share + wanted.products
    gradient = weight.itemsize * (1 + wanted.products)
    by_hidden = 8 * weight.shape[1] / LEAST_CLASSES if wanted.hidden else 0
    return 2 * weight.shape[1] * products / rate + (gradient + by_hidden) / rates.bandwidth


def chunk_seconds(weight: Tensor, wanted: Wanted, rates: Device) -> float:
    """Per logit, forward and backward."""
    rate = rates.flops16 if weight.itemsize == 2 else rates.flops
    products = 1 + wanted.products
    logits = weight.itemsize * (4 + wanted.products)
    by_weight = 8 * weight.shape[1] / least_rows(weight, True) if wanted.weight else 0
    return 2 * weight.shape[1] * products / rate + (logits + by_weight) / rates.bandwidth


def tokens_for_chunks(weight: Tensor, wanted: Wanted) -> int:
    """The least number of tokens whose logits would take so much memory that chunks take little."""
    (vocabulary, width), rows = weight.shape, least_rows(weight, wanted.weight)
    sums = weight.itemsize == 2 and wanted.weight
    lent = sums and rows <= width  # the logits lie in what becomes the weight's gradient
    held = 4 * weight.numel() * sums + (0 if lent else rows * vocabulary * weight.itemsize)
    return 0 if held <= FREE_BYTES else int(held / (MOST_BYTES_A_LOGIT * vocabulary)) + 1
