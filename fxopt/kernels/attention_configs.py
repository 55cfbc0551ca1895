"""Tiles, warps and stages for kernels of attention, by dtype, head dims and card."""

from __future__ import annotations

from fxopt.kernels.attention_spec import AttentionKernelSpec, parts_of
from fxopt.kernels.cards import Card
from fxopt.kernels.configs import Config

__all__ = ["GRAIN", "configs", "grain_of", "row_config", "tiles_config"]

GRAIN = 128
"""Rows and columns of the largest tile, which squares of `fxopt::query_tiles` must be multiples of."""

_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


def grain_of(card: Card) -> int:
    """Rows and columns of a square of `fxopt::query_tiles`: every tile of keys lies in one, whatever its size."""
    return GRAIN if card.arch else 32


def row_config(width: int, card: Card) -> Config:
    """For the kernel that goes over rows of out and its gradient once, entries `width` a row.

    With 4096 entries of each a thread has 32 of both in flight; with 8192 it took 250 registers.
    """
    if not card.arch:
        return Config((("BLOCK_Q", 16),), num_warps=4, num_stages=1)
    whole = sum(length for _, length, _ in parts_of(width))
    rows = next(size for size in (128, 64, 32, 16) if size * whole <= 4096 or size == 16)
    return Config((("BLOCK_Q", rows),), num_warps=4, num_stages=1)


def tiles_config(grain: int) -> Config:
    """For the kernel of `fxopt::query_tiles`."""
    return Config((("GRAIN", grain),), num_warps=4, num_stages=2)


def configs(kernel: str, spec: AttentionKernelSpec, card: Card) -> tuple[Config, ...]:
    """Candidates for "attention_forward", "attention_backward_q", "..._kv" or "..._pairs", the default first.

    Defaults are the largest tiles that spill next to nothing when compiled for the card (`fxopt kernels` shows them).
    Products of fp32 are not computed by tensor cores, and hold operands in registers: their tiles are small.
    """
    which = kernel.removeprefix("attention_backward_").removeprefix("attention_")
    if not card.arch:
        return (_config(16, 16 if which == "kv" else 32, 4, 1),)
    found = [_DEFAULTS[which][_class_of(spec, card)], *_OTHERS[spec.dtype == "fp32"]]
    return tuple(dict.fromkeys(one for one in found if _fits(which, one, spec, card)))


def _class_of(spec: AttentionKernelSpec, card: Card) -> tuple[str, int, str]:
    """(operands, head size, card) as `_DEFAULTS` has them."""
    size = max(spec.depth, spec.width)
    operands = "fp32" if spec.dtype == "fp32" else "half"
    widths = (64, 96, 128, 256) if operands == "half" else (64, 256)
    shared = "ampere" if card.arch < 90 else "hopper"
    return (
        operands,
        next(width for width in widths if size <= width or width == 256),
        ("consumer" if card.shared < 100 * 1024 else shared),
    )


def _config(rows: int, columns: int, warps: int, stages: int) -> Config:
    return Config((("BLOCK_Q", rows), ("BLOCK_K", columns)), warps, stages)


_CARDS = ("consumer", "ampere", "hopper")
"""99 KiB of shared memory; 163 (sm_80); 227 (sm_90, sm_100)."""

_Row = tuple[tuple[int, int, int, int], ...]


def _table(rows: dict[tuple[str, int], _Row]) -> dict[tuple[str, int, str], Config]:
    return {(*key, card): _config(*one) for key, row in rows.items() for card, one in zip(_CARDS, row, strict=True)}


_DEFAULTS = {
    "forward": _table({
        ("half", 64): ((128, 64, 8, 2),) * 3,
        ("half", 96): ((128, 64, 8, 3),) * 3,
        ("half", 128): ((64, 64, 8, 2), (64, 64, 4, 3), (128, 64, 8, 3)),
        ("half", 256): ((32, 32, 4, 2), (64, 32, 8, 3), (64, 32, 8, 3)),
        ("fp32", 64): ((32, 32, 4, 2),) * 3,
        ("fp32", 256): ((16, 16, 4, 1),) * 3,
    }),
    "q": _table({
        ("half", 64): ((128, 32, 8, 2),) * 3,
        ("half", 96): ((64, 32, 8, 2), (64, 64, 8, 2), (64, 64, 8, 2)),
        ("half", 128): ((64, 64, 8, 2),) * 3,
        ("half", 256): ((32, 32, 4, 2), (64, 32, 8, 2), (64, 32, 8, 2)),
        ("fp32", 64): ((32, 32, 4, 2),) * 3,
        ("fp32", 256): ((16, 16, 4, 1),) * 3,
    }),
    "kv": _table({
        ("half", 64): ((64, 32, 8, 2),) * 3,
        ("half", 96): ((16, 32, 4, 1),) * 3,
        ("half", 128): ((64, 32, 8, 2), (64, 64, 8, 2), (64, 32, 8, 2)),
        ("half", 256): ((32, 32, 8, 2),) * 3,
        ("fp32", 64): ((16, 32, 4, 1),) * 3,
        ("fp32", 256): ((16, 16, 4, 1),) * 3,
    }),
    "pairs": _table({
        **{("half", width): ((32, 32, 4, 1),) * 3 for width in (64, 96, 128, 256)},
        **{("fp32", width): ((16, 16, 4, 1),) * 3 for width in (64, 256)},
    }),
}  # fmt: skip

_OTHERS = (
    [
        _config(*one)
        for one in (
            (128, 128, 8, 3), (128, 64, 8, 3), (128, 64, 4, 3), (128, 32, 4, 3), (64, 128, 8, 2), (64, 64, 8, 2),
            (64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 8, 2), (64, 32, 4, 2), (32, 64, 4, 2), (32, 32, 4, 2),
        )
    ],
    [_config(*one) for one in ((64, 32, 8, 2), (32, 32, 8, 1), (32, 32, 4, 1), (16, 32, 4, 1), (16, 16, 2, 1))],
)  # fmt: skip
"""What tuning tries besides: of half precision, and of fp32."""


def _fits(which: str, config: Config, spec: AttentionKernelSpec, card: Card) -> bool:
    """Whether shared memory holds the tile that stays, and all but one of the `num_stages` tiles that pass."""
    rows, columns = (size for _, size in config.tiles)
    d, v = (sum(length for _, length, _ in parts_of(size)) for size in (spec.depth, spec.width))
    stays, passes = (columns * (d + v), rows * (d + v)) if which == "kv" else (rows * d, columns * (d + v))
    held = stays + passes * max(config.num_stages - 1, 1)
    return _BYTES[spec.dtype] * held <= card.shared
