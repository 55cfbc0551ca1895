"""Triton source of a linear layer's cross-entropy: tiles of tokens x vocabulary, and rows of logits that are there.

    linear_cross_entropy_forward    X [N, H], W [V, H] -> of each token and part of the vocabulary the largest logit,
                                    the sum of exponentials and what else the loss needs; logits stay in registers
    linear_cross_entropy_backward   the same products again, of some classes -> their gradient [N, C]
    cross_entropy_rows              logits [C, V] of a matrix product -> losses, and their gradient in place

The first two are the idea of Cut Cross-Entropy (Wijmans et al. 2024, arXiv:2411.09009), without its filter of small
gradients: those are exact here. X and W have unit stride along H, or W along V (`transposed`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from fxopt.kernels.cards import INTERPRETER, Card
from fxopt.kernels.catalog import Shipped
from fxopt.kernels.configs import Config
from fxopt.kernels.pointwise import HELPERS
from fxopt.kernels.source import TRITON_DTYPES, Kernel, generate, render

__all__ = [
    "LossKernelSpec",
    "backward_kernel",
    "forward_kernel",
    "row_configs",
    "rows_kernel",
    "shipped",
    "tile_configs",
]

Arguments = list[tuple[str, str]]


@dataclass(frozen=True)
class LossKernelSpec:
    """What the kernels of a loss are generated for.

    dtype: of X, W, bias and logits: "bf16", "fp16" or "fp32".
    scale, softcap (0: none), label_smoothing, z_loss, ignore_index: the loss, as in `fxopt.ops.chunked_loss`.
    bias, transposed: whether there is one; whether W's unit stride is along V.
    whole: H is a multiple of every BLOCK_K there is, so that nothing is masked along it.
    argmax: the class of each token's largest logit is asked for too.
    lse (backward alone): logsumexp of each token's logits has an upstream gradient of its own.
    gradient, upstream (rows alone): the logits become their gradient; each row has an upstream gradient of its own.
    """

    dtype: str
    scale: float = 1.0
    softcap: float = 0.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    ignore_index: int = -100
    bias: bool = False
    transposed: bool = False
    whole: bool = True
    argmax: bool = False
    lse: bool = False
    gradient: bool = False
    upstream: bool = False

    @property
    def rounds(self) -> bool:
        """Whether products are rounded to `dtype`, as they are where they are written: rounded logits tie where others
        differ, and an argmax is to be the first of them. The loss and its gradient are of the same logits then."""
        return self.argmax and self.dtype != "fp32"


_TILES: Arguments = [(name, "constexpr") for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP_M")]


@functools.lru_cache(256)
def forward_kernel(spec: LossKernelSpec) -> Kernel:
    """Largest, Total, Chosen, with smoothing Sum, for `argmax` Best; a program a tile of tokens, SPLIT of classes."""
    spec = replace(spec, lse=False)
    arguments = [*_operands(spec), ("Largest", "*fp32"), ("Total", "*fp32"), ("Chosen", "*fp32")]
    arguments += [("Sum", "*fp32")] if spec.label_smoothing else []
    arguments += [("Best", "*i32")] if spec.argmax else []
    arguments += [(name, "i32") for name in ("tokens", "vocabulary", "width", "x_stride", "w_stride")]
    return _rendered("linear_cross_entropy_forward", spec, [*arguments, *_TILES, ("SPLIT", "constexpr")], "vocabulary")


@functools.lru_cache(256)
def backward_kernel(spec: LossKernelSpec) -> Kernel:
    """Gradient [N, C] of the products with C rows of W; a program a tile of it."""
    spec = replace(spec, argmax=spec.rounds)
    rows = [(name, "*fp32") for name in ("Factor", "Largest", "Total", *(("LseFactor",) if spec.lse else ()))]
    arguments = [*_operands(spec), *rows, ("Gradient", f"*{spec.dtype}")]
    arguments += [("vocabulary", "i32")] if spec.label_smoothing else []
    sizes = ("tokens", "classes_here", "offset", "width", "x_stride", "w_stride", "gradient_stride")
    arguments += [(name, "i32") for name in sizes]
    return _rendered("linear_cross_entropy_backward", spec, [*arguments, *_TILES], "classes_here")


@functools.lru_cache(256)
def rows_kernel(spec: LossKernelSpec) -> Kernel:
    """Losses, for `gradient` the logits' gradient in place of them, for `argmax` Best; a program a row."""
    spec = replace(spec, bias=False, transposed=False, whole=True, lse=False)
    arguments: Arguments = [("Logits", f"*{spec.dtype}"), ("Target", "*i64"), ("Losses", "*fp32")]
    arguments += [("Upstream", "*fp32")] if spec.upstream else []
    arguments += [("Best", "*i64")] if spec.argmax else []
    arguments += [("vocabulary", "i32"), ("stride", "i32"), ("BLOCK", "constexpr")]
    return _rendered("cross_entropy_rows", spec, arguments, "vocabulary")


def _operands(spec: LossKernelSpec) -> Arguments:
    bias = [("Bias", f"*{spec.dtype}")] if spec.bias else []
    return [("X", f"*{spec.dtype}"), ("W", f"*{spec.dtype}"), *bias, ("Target", "*i64")]


def _rendered(name: str, spec: LossKernelSpec, arguments: Arguments, end: str) -> Kernel:
    """end: the name of the number of rows of W."""
    precision = ', input_precision="ieee"' if spec.dtype == "fp32" else ""
    values = {"s": spec, "end": end, "dtype": TRITON_DTYPES[spec.dtype], "precision": precision}
    helpers = [HELPERS["tanh"]] if spec.softcap else []
    return generate(name, arguments, render(f"{name}.py.jinja", values), helpers)


# --- how they are launched ---------------------------------------------------------------------------------------

# BLOCK_M, BLOCK_N, BLOCK_K, warps, stages; the first that fits is the default.
_NARROW = ((128, 256, 64, 8, 4), (128, 128, 64, 8, 4), (128, 128, 64, 8, 3), (128, 128, 32, 8, 4), (128, 64, 64, 8, 2))
_FP32 = ((128, 64, 16, 8, 3), (128, 128, 16, 8, 2), (64, 64, 32, 8, 3), (64, 64, 32, 4, 2))
_PART = 1024
"""Classes that a program of the forward goes through: 126 programs for each tile of tokens at 128k."""


def tile_configs(kernel: Kernel, spec: LossKernelSpec, card: Card) -> tuple[Config, ...]:
    """Candidates for the forward or the backward on `card`, the default first."""
    if card == INTERPRETER:
        return (_tile_config(kernel, (16, 16, 16, 4, 2), group=2, split=2),)
    sizes = _FP32 if spec.dtype == "fp32" else _NARROW
    fitting = [
        size for size in sizes if _shared_bytes(size, spec) <= card.shared and not _spills(size, kernel, spec, card)
    ]
    group = 32 if card.shared > 128 * 1024 else 16  # tiles of tokens whose X fits the second cache, or what there is
    return tuple(_tile_config(kernel, size, group, max(_PART // size[1], 1)) for size in fitting)


def row_configs(card: Card) -> tuple[Config, ...]:
    """Candidates for the rows, the default first."""
    sizes = ((32, 4),) if card == INTERPRETER else ((8192, 16), (4096, 8), (8192, 8))
    return tuple(Config((("BLOCK", block),), warps, 1) for block, warps in sizes)


def _tile_config(kernel: Kernel, size: tuple[int, ...], group: int, split: int) -> Config:
    *blocks, warps, stages = size
    values = dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), blocks, strict=True)) | {"GROUP_M": group, "SPLIT": split}
    return Config(tuple((name, values[name]) for name in kernel.tiles), warps, stages)


def _shared_bytes(size: tuple[int, ...], spec: LossKernelSpec) -> int:
    m, n, k, _, stages = size
    return (m + n) * k * (4 if spec.dtype == "fp32" else 2) * stages


def _spills(size: tuple[int, ...], kernel: Kernel, spec: LossKernelSpec, card: Card) -> bool:
    """Tiles of 128 x 256 take half of the registers (`fxopt kernels` has the numbers): on an H100 what is kept of a row
    has place beside them, an argmax has not; in the backward a cap has not, on any card."""
    forward = kernel.name == "linear_cross_entropy_forward"
    full = card.arch != 90 or spec.argmax if forward else bool(spec.softcap)
    return size[1] == 256 and (full or spec.transposed)


def shipped(card: Card) -> Iterator[Shipped]:
    """What ``fxopt kernels`` compiles: in each dtype the plain loss, Gemma's cap, and everything at a time."""
    strides = ("width", "x_stride", "w_stride", "gradient_stride", "offset", "stride")
    for dtype in TRITON_DTYPES:
        plain = LossKernelSpec(dtype)
        every = LossKernelSpec(
            dtype, 0.5, 30.0, 0.1, 1e-4, bias=True, transposed=True, whole=False, argmax=True, lse=True, upstream=True
        )
        for name, spec in {"": plain, " softcap": replace(plain, softcap=30.0), " everything": every}.items():
            forward, backward = forward_kernel(spec), backward_kernel(spec)
            rows = rows_kernel(replace(spec, gradient=True))
            for kernel, configs in (
                (forward, tile_configs(forward, spec, card)),
                (backward, tile_configs(backward, spec, card)),
                (rows, row_configs(card)),
            ):
                aligned = [argument for argument, kind in kernel.signature if kind[0] == "*" or argument in strides]
                yield Shipped(f"{kernel.name} {dtype}{name}", kernel, configs, tuple(aligned))
