"""Tiles, warps and stages for kernels of attention, by dtype, head dims and card."""

from __future__ import annotations

from fxopt.kernels.attention_spec import AttentionKernelSpec, parts_of
from fxopt.kernels.cards import Card
from fxopt.kernels.configs import Config

__all__ = ["GRAIN", "configs", "grain_of", "row_config"]

GRAIN = 128
"""Rows and columns of the largest tile, which squares of `fxopt::query_tiles` must be multiples of."""

_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


def grain_of(card: Card) -> int:
    """Rows and columns of a square of `fxopt::query_tiles`: every tile of keys lies in one, whatever its size."""
    return GRAIN if card.arch else 32


def row_config(card: Card) -> Config:
    """For kernels that go over rows of out once."""
    return Config((("BLOCK_Q", 64 if card.arch else 16),), num_warps=4, num_stages=1)


def configs(kernel: str, spec: AttentionKernelSpec, card: Card) -> tuple[Config, ...]:
    """Candidates for "attention_forward", "attention_backward_q", "..._kv" or "..._pairs", the default first.

    Shared memory holds the tile that stays and `num_stages` of those that pass: what does not fit is left out. The
    default is the first that fits of a list ordered by size of tile, which is what reuse of loads goes by.
    """
    if not card.arch:
        wide = "kv" in kernel
        return (Config((("BLOCK_Q", 16), ("BLOCK_K", 16 if wide else 32))),)
    found = [one for one in _CANDIDATES[kernel.removeprefix("attention_")] if _fits(kernel, one, spec, card)]
    return tuple(found) or (_config(16, 16, 4, 1),)


def _config(rows: int, columns: int, warps: int, stages: int) -> Config:
    return Config((("BLOCK_Q", rows), ("BLOCK_K", columns)), warps, stages)


_FORWARD = [
    _config(128, 128, 8, 3), _config(128, 64, 8, 3), _config(128, 64, 4, 3), _config(128, 64, 8, 2), _config(128, 32, 4, 3),
    _config(64, 64, 4, 3), _config(64, 64, 4, 2), _config(64, 32, 4, 3), _config(64, 32, 4, 2), _config(32, 32, 4, 2),
    _config(32, 32, 4, 1), _config(16, 32, 2, 2), _config(16, 16, 2, 1),
]  # fmt: skip
_BACKWARD = [
    _config(128, 64, 8, 2), _config(64, 64, 8, 2), _config(64, 64, 4, 2), _config(64, 32, 4, 3), _config(64, 32, 4, 2), _config(32, 64, 4, 2),
    _config(32, 32, 4, 2), _config(32, 32, 4, 1), _config(16, 32, 2, 1), _config(16, 16, 2, 1),
]  # fmt: skip
_CANDIDATES = {
    "forward": _FORWARD,
    "backward_q": _BACKWARD,
    "backward_kv": [_config(one.tiles[1][1], one.tiles[0][1], one.num_warps, one.num_stages) for one in _BACKWARD],
    "backward_pairs": [_config(64, 64, 8, 2), _config(64, 64, 4, 1), _config(32, 32, 4, 1), _config(16, 16, 2, 1)],
}


def _fits(kernel: str, config: Config, spec: AttentionKernelSpec, card: Card) -> bool:
    """By the estimate that what passes is held `num_stages` times, and what stays once; registers by fp32 totals."""
    rows, columns = (size for _, size in config.tiles)
    d, v = (sum(length for _, length, _ in parts_of(size)) for size in (spec.depth, spec.width))
    size = _BYTES[spec.dtype]
    if kernel.endswith("forward"):
        stays, passes, totals = rows * d, columns * (d + v), rows * (v + columns)
    elif kernel.endswith("kv"):
        stays, passes, totals = columns * (d + v), rows * (d + v), columns * (d + v + 2 * rows)
    else:
        stays, passes, totals = rows * (d + v), columns * (d + v), rows * (d + 2 * columns)
    shared = size * (stays + passes * config.num_stages + rows * columns)
    return shared <= card.shared and totals <= 128 * 32 * config.num_warps
