"""One call of the attention operators: its inputs, what its constants mean, and which keys its tiles allow.

    s = scale * q @ k.T;  s' = program(s, b, h, q, k);  -inf where not allowed;  p = softmax(s', with the sink);  p @ v

Shapes: q [B, H, Sq, D], k [B, Hk, Sk, D], v [B, Hk, Sk, Dv]; query head h reads key head h // (H // Hk). Scores,
softmax and lse are `wide`: fp64 for fp64 inputs, else fp32.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fxopt.ops.launch import uninitialized
from fxopt.ops.products import accumulate_dtype
from fxopt.ops.tiles import Tile, allowed, tiles_of
from fxopt.score.program import Program
from fxopt.score.term import variable

__all__ = ["Attention", "AttentionSpec", "length", "part_of"]

IDENTITY = Program.of(variable("s"))[0]


@dataclass(frozen=True)
class AttentionSpec:
    """The constants of the operators, in the schema's order."""

    program: str
    predicate: str
    scale: float
    lower: int | None
    upper: int | None
    dropout: float
    empty: str
    heads_last: bool
    lowering: str

    @property
    def score(self) -> Program:
        """s -> s'."""
        return Program.parse(self.program) if self.program else IDENTITY

    @property
    def condition(self) -> Program | None:
        """What decides within intervals, True where a key is allowed."""
        return Program.parse(self.predicate) if self.predicate else None

    @property
    def affine(self) -> tuple[float, Program | None] | None:
        """(factor, bias) where s' = factor * s + bias and bias does not read s."""
        return _affine(self.score)


@functools.lru_cache(64)
def _tiles_of_band(*band: Any) -> tuple[Tile, ...]:
    return tiles_of(None, *band)


@functools.lru_cache(256)
def _affine(program: Program) -> tuple[float, Program | None] | None:
    return program.split_affine()


class Attention:
    """The inputs of one call and what follows from them; nothing is computed before it is asked for."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sink: Tensor | None,
        intervals: Tensor | None,
        tiles: Tensor | None,
        seed: Tensor | None,
        captures: Sequence[Tensor],
        constants: Sequence[Any],
    ):
        self.q, self.k, self.v, self.sink, self.intervals, self.query_tiles = q, k, v, sink, intervals, tiles
        self.seed = seed
        self.captures, self.spec = list(captures), AttentionSpec(*constants)
        self.batch, self.heads, self.queries = q.shape[:3]
        self.key_heads, self.keys = k.shape[1:3]
        self.wide = accumulate_dtype(q.dtype)

    @classmethod
    def of(cls, arguments: Sequence[Any]) -> Attention:
        """From the operator's arguments."""
        q, k, v, sink, intervals, tiles, seed, captures, *constants = arguments
        return cls(q, k, v, sink, intervals, tiles, seed, captures, constants)

    @functools.cached_property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.heads // max(self.key_heads, 1)

    @functools.cached_property
    def tiles(self) -> tuple[Tile, ...]:
        """Rectangles of rows and keys; every row of every batch row is in one of them."""
        spec = self.spec
        band = (self.batch, self.queries, self.keys, spec.lower, spec.upper, spec.condition is not None)
        return _tiles_of_band(*band) if self.intervals is None else tiles_of(self.intervals, *band)

    @property
    def some_rows_empty(self) -> bool:
        """Whether some rows are in no tile that is computed."""
        return any(tile.kind == "empty" for tile in self.tiles) or not self.key_heads

    @property
    def factor(self) -> float:
        """What q @ k.T is multiplied by, where the program is affine."""
        assert self.spec.affine is not None
        return self.spec.scale * self.spec.affine[0]

    @property
    def bias(self) -> Program | None:
        """What is added to it then."""
        assert self.spec.affine is not None
        return self.spec.affine[1]

    def without_s(self, program: Program, tile: Tile, heads: slice) -> Tensor:
        """The result of a program that does not read s, on a tile."""
        place = (tile.b, heads, tile.q, tile.k)
        return program.on_block(None, *place, self.captures, dtype=self.wide, device=self.q.device)

    def new_out(self) -> Tensor:
        """Memory for out [B, H, Sq, Dv], in the layout that was asked for."""
        width = self.v.shape[-1]
        if self.spec.heads_last:
            return uninitialized((self.batch, self.queries, self.heads, width), self.v.dtype, self.v).transpose(1, 2)
        return uninitialized((self.batch, self.heads, self.queries, width), self.v.dtype, self.v)

    def in_layout(self, out: Tensor) -> Tensor:
        """`out` as `new_out` lays it out; itself where it is."""
        axes = (0, 2, 1, 3) if self.spec.heads_last else (0, 1, 2, 3)
        return out if out.permute(axes).is_contiguous() else self.new_out().copy_(out)

    def new_lse(self) -> Tensor:
        """Memory for lse [B, H, Sq]."""
        return uninitialized((self.batch, self.heads, self.queries), self.wide, self.q)

    @property
    def operand_dtype(self) -> torch.dtype:
        """That of products: fp16 is multiplied as fp32 on a CPU, few of which have instructions for it."""
        return self.wide if self.q.dtype == torch.float16 and self.q.device.type == "cpu" else self.q.dtype

    def narrow(self, value: Tensor) -> Tensor:
        """`value` as an operand of products."""
        return value.to(self.operand_dtype)

    @functools.cached_property
    def operand_k(self) -> Tensor:
        """k as an operand, of k's layout."""
        return self.narrow(self.k)

    @functools.cached_property
    def operand_v(self) -> Tensor:
        """v as an operand, of v's layout."""
        return self.narrow(self.v)

    @functools.cached_property
    def scored_k(self) -> Tensor:
        """k as an operand of scores. bf16 is widened where torch's flash attention would do, whose scores are fp32."""
        if self.operand_dtype == self.wide or self.q.device.type != "cpu" or self.spec.affine is None:
            return self.operand_k
        return self.k.to(self.wide)

    def mask(self, tile: Tile, heads: slice) -> tuple[Tensor | None, int]:
        """(mask, first): what to add to the scores of keys ``tile.k[first:]``, 0 or -inf; None if all are allowed.

        mask: [1 or nb, 1 or nh, nq, nk - first] of dtype `wide`. `tile` may be part of a tile: then it is masked, or
        causal with rows cut (``tile.k`` ends with the last row's key).
        """
        if tile.kind == "full":
            return None, 0
        if tile.kind == "causal":
            rows = length(tile.q)
            return self._triangle(rows), length(tile.k) - rows
        inside = allowed(tile, self.intervals, self.spec.lower, self.spec.upper).to(self.q.device)
        condition = self.spec.condition
        if condition is not None and not tile.exact:
            decided = self.without_s(condition, tile, heads)
            inside = inside & (decided | self._exact_rows(tile))
        return self.q.new_zeros(inside.shape, dtype=self.wide).masked_fill_(~inside, -torch.inf), 0

    def _exact_rows(self, tile: Tile) -> Tensor | bool:
        """bool [1, 1, nq, 1]: rows whose intervals say it all, so that nobody asks the predicate."""
        if self.intervals is None:
            return False
        lo, hi, count = self.intervals[tile.b.start if len(self.intervals) > 1 else 0, tile.q].unbind(-1)
        return (count == hi - lo)[None, None, :, None]

    def _triangle(self, rows: int) -> Tensor:
        """[1, 1, n, n]: -inf above the diagonal. Blocks are as large as each other, so one is kept."""
        if self._kept is None or self._kept.shape[-1] != rows:
            self._kept = self.q.new_full((1, 1, rows, rows), -torch.inf, dtype=self.wide).triu_(1)
        return self._kept

    _kept: Tensor | None = None


def length(span: slice) -> int:
    """Elements of a slice with start and stop."""
    return span.stop - span.start


def part_of(tile: Tile, start: int, stop: int, b: slice | None = None) -> Tile:
    """Rows ``tile.q[start:stop]`` of a tile, of batch rows `b`, with the keys that they need."""
    q = slice(tile.q.start + start, tile.q.start + stop)
    k = slice(tile.k.start, tile.k.start + stop) if tile.kind == "causal" else tile.k
    return replace(tile, q=q, k=k, b=tile.b if b is None else b)
