"""The matrix products of a chunk of a linear layer's loss, by the library that is fastest at them.

For C rows of x [N, H] and a weight [V, H]: the logits x @ weight.T + bias [C, V] and, from their gradient d [C, V],
d @ weight [C, H] and the sum over chunks of d.T @ x [V, H].

One such product of 2048 x 256 x 32000 on two cores of an AMD EPYC (Zen 5), in chunks of 256 rows, fp32: 185 ms by
`aten.mm` (MKL, which uses no AVX-512 there), 80 ms by oneDNN. bf16: 41 ms by `aten.mm`, which is oneDNN's already.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fxopt.compat import has_onednn, onednn_linear


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of softmax, losses and sums over chunks: fp64 for fp64, fp32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which gradients wait for the upstream gradient: fp32 for fp16, whose range a scaled loss exceeds."""
    return torch.float32 if dtype == torch.float16 else dtype


class AtenProducts:
    """By `aten.mm`, for every device and dtype. The logits are in one buffer that all chunks share.

    weight: [V, H] of any strides; bias: [V] or None, of weight's dtype; rows: the most rows of a chunk; accumulates:
    whether the weight's gradient is wanted; factor: what multiplies the gradients. The weight's is summed in fp32 (fp64
    for fp64). Where it is rounded to bf16 in the end, its memory holds the logits until then.
    """

    PIECE_BYTES = 2 * 2**20
    """Most bytes of d.T @ x that wait to be added to the accumulator: they stay in a core's cache."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, rows: int, accumulates: bool, factor: float | Tensor = 1.0
    ):  # fmt: skip
        self.weight, self.bias, self.factor, vocabulary = weight, bias, factor, weight.shape[0]
        wide, dtype = accumulate_dtype(weight.dtype), gradient_dtype(weight.dtype)
        self.accumulator = torch.zeros_like(weight, dtype=wide) if accumulates else None
        self.result = torch.empty_like(weight, dtype=dtype) if accumulates and dtype != wide else None
        lent = self.result is not None and rows <= weight.shape[1]
        memory = _flat(self.result) if lent and self.result is not None else weight.new_empty(rows * vocabulary)
        self.buffer = memory[: rows * vocabulary].view(rows, vocabulary)

    @classmethod
    def piece(cls, weight: Tensor) -> int:
        """Rows of the accumulator [V, H] to add at a time, where the product does not add by itself."""
        return max(cls.PIECE_BYTES // max(weight.shape[1] * weight.itemsize, 1), 1)

    def logits(self, x: Tensor) -> Tensor:
        """[C, H] -> [C, V] in weight's dtype, valid until the next call."""
        out = self.buffer[: x.shape[0]]
        if self.bias is None:
            return torch.mm(x, self.weight.t(), out=out)
        return torch.addmm(self.bias, x, self.weight.t(), out=out)

    def times_weight(self, d: Tensor) -> Tensor:
        """``factor * d @ weight``, [C, V] -> new [C, H], in d's dtype or wider."""
        wide = accumulate_dtype(d.dtype)
        if d.is_cuda and d.dtype != wide:
            return torch.mm(d, self.weight, out_dtype=torch.float32) * self.factor
        return torch.mm(d, self.weight).to(wide) * self.factor

    def accumulate(self, d: Tensor, x: Tensor) -> None:
        """Add ``d.T @ x`` to the accumulator, if there is one: d [C, V], x [C, H]."""
        if self.accumulator is not None:
            add_product(self.accumulator, d.t(), x)

    def weight_gradient(self) -> Tensor:
        """``factor`` times the sum, in `gradient_dtype`, rounded once, [V, H] in weight's layout. Comes last, once."""
        assert self.accumulator is not None
        return self._rounded(self.accumulator.mul_(self.factor))

    def _rounded(self, total: Tensor) -> Tensor:
        return total if self.result is None else self.result.copy_(total)  # `mul(out=)` would widen a copy of it

    @classmethod
    def held_bytes(cls, weight: Tensor, rows: int, accumulates: bool) -> int:
        """Bytes held at the peak by arguments as of the constructor, less those of the gradient that is returned."""
        logits = rows * weight.shape[0] * weight.itemsize
        if not accumulates or weight.dtype == accumulate_dtype(weight.dtype):
            return logits
        narrow = weight.dtype == gradient_dtype(weight.dtype)
        summed = weight.numel() * torch.float32.itemsize if narrow else 0
        piece = min(cls.PIECE_BYTES, weight.nbytes) * 3  # as it is, and in fp32 as it is added
        return summed + (0 if narrow and rows <= weight.shape[1] else logits) + piece


class RoundedProducts(AtenProducts):
    """For bf16 on a CPU, whose products are rounded as they are written: the factor multiplies their sums before that.

    Rounded first and multiplied by 1 / 500 they would be rounded twice, and all gradients of a model come from them: of
    the 4-layer Llama of bench/small_models.py, each weight's had 1.02x the error.
    """

    def times_weight(self, d: Tensor) -> Tensor:
        return self._scaled(d, self.weight)

    def accumulate(self, d: Tensor, x: Tensor) -> None:
        """Add ``factor * d.T @ x``."""
        if self.accumulator is not None:
            for piece in slices(d.shape[1], self.piece(self.weight)):
                self.accumulator[piece].add_(self._scaled(d[:, piece].t(), x))

    def weight_gradient(self) -> Tensor:
        assert self.accumulator is not None
        return self._rounded(self.accumulator)

    def _scaled(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.addmm(a.new_zeros(()), a, b, beta=0, alpha=float(self.factor))


class HalfProducts(AtenProducts):
    """In fp32, a piece of the vocabulary at a time, for fp16 on a CPU: `aten.mm` takes 3 to 40 times as long there."""

    def logits(self, x: Tensor) -> Tensor:
        out, wide = self.buffer[: x.shape[0]], x.float()
        for piece in slices(self.weight.shape[0], self.piece(self.weight)):
            part = torch.mm(wide, self.weight[piece].float().t())
            out[:, piece] = part if self.bias is None else part.add_(self.bias[piece])
        return out

    def times_weight(self, d: Tensor) -> Tensor:
        out = d.new_zeros(d.shape[0], self.weight.shape[1], dtype=torch.float32)
        for piece in slices(self.weight.shape[0], self.piece(self.weight)):
            out.addmm_(d[:, piece].float(), self.weight[piece].float())
        return out.mul_(self.factor)

    def accumulate(self, d: Tensor, x: Tensor) -> None:
        if self.accumulator is not None:  # in fp32: partial sums can pass 65504
            wide = x.float()
            for piece in slices(d.shape[1], self.piece(self.weight)):
                self.accumulator[piece].addmm_(d[:, piece].t().float(), wide)

    @classmethod
    def held_bytes(cls, weight: Tensor, rows: int, accumulates: bool) -> int:
        wide = weight.shape[1] + 2 * rows  # for each class of a piece: its weights, its column of d now and before
        return (rows * weight.shape[0]) * weight.itemsize + min(cls.piece(weight), weight.shape[0]) * wide * 4


class OneDnnProducts(AtenProducts):
    """By oneDNN's inner product, for fp32 on a CPU. The accumulator is [H, V], the layout that is written fastest."""

    PIECE_BYTES = 16 * 2**20

    def __init__(
        self, weight: Tensor, bias: Tensor | None, rows: int, accumulates: bool, factor: float | Tensor = 1.0
    ):  # fmt: skip
        dense = weight.is_contiguous() or weight.t().is_contiguous()
        super().__init__(weight if dense else weight.contiguous(), bias, 0, False, factor)
        self.like = weight
        self.accumulator = weight.new_zeros(weight.shape[1], weight.shape[0]).t() if accumulates else None

    @classmethod
    def piece(cls, weight: Tensor) -> int:
        """Rows of the accumulator [H, V] to add at a time: 64 at least, for the product's sake."""
        return max(cls.PIECE_BYTES // (weight.shape[0] * weight.itemsize), 64)

    def logits(self, x: Tensor) -> Tensor:
        return onednn_linear(x, self.weight, self.bias)

    def times_weight(self, d: Tensor) -> Tensor:
        return onednn_linear(d, self.weight.t()).mul_(self.factor)

    def accumulate(self, d: Tensor, x: Tensor) -> None:
        if self.accumulator is None:
            return
        columns, total = x.t().contiguous(), self.accumulator.t()
        for piece in slices(x.shape[1], self.piece(self.weight)):
            total[piece].add_(onednn_linear(columns[piece], d.t()))

    def weight_gradient(self) -> Tensor:
        assert self.accumulator is not None
        total = self.accumulator.mul_(self.factor)
        return total if self.like.t().is_contiguous() else torch.empty_like(self.like).copy_(total)

    @classmethod
    def held_bytes(cls, weight: Tensor, rows: int, accumulates: bool) -> int:
        logits = rows * weight.shape[0] * weight.itemsize
        if not accumulates:
            return logits
        chunk = logits + min(cls.piece(weight) * weight.shape[0] * weight.itemsize, weight.nbytes)
        return chunk if weight.t().is_contiguous() else max(chunk, weight.nbytes)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b``: a and b of one dtype, total of it or fp32. Sums are fp32 (fp64) throughout."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:  # there alone is a product wider than what it is of
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def products_for(
    weight: Tensor, bias: Tensor | None, rows: int, accumulates: bool, factor: float | Tensor
) -> AtenProducts:
    """The fastest kind for weight's dtype and device, and the most exact; arguments as of `AtenProducts`.

    The choice hangs on nothing that changes from run to run, so that results repeat bit for bit.
    """
    return _kind(weight)(weight, bias, rows, accumulates, factor)


def held_bytes(weight: Tensor, rows: int, accumulates: bool) -> int:
    """Bytes that `products_for` with these arguments holds at its peak, less those of the gradient it returns."""
    return _kind(weight).held_bytes(weight, rows, accumulates)


def _kind(weight: Tensor) -> type[AtenProducts]:
    if weight.device.type not in ("cpu", "meta") or not weight.numel():
        return AtenProducts
    narrow = {torch.float16: HalfProducts, torch.bfloat16: RoundedProducts}
    if weight.dtype in narrow:
        return narrow[weight.dtype]
    fast = has_onednn() and torch.backends.cpu.get_cpu_capability() == "AVX512"
    return OneDnnProducts if fast and weight.dtype == torch.float32 else AtenProducts


def slices(total: int, step: int) -> Iterator[slice]:
    """Cut `range(total)` into slices of `step` (1 or more), the last one shorter."""
    for start in range(0, total, max(step, 1)):
        yield slice(start, min(start + step, total))


def _flat(matrix: Tensor) -> Tensor:
    """The elements of a dense matrix as they lie in memory."""
    return (matrix if matrix.is_contiguous() else matrix.t()).view(-1)
