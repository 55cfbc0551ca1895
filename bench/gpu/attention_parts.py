"""What attention sites have between ``q @ k.T`` and softmax: programs and masks, for our operator and for others."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fxopt.score.program import Program
from fxopt.score.term import Term, apply, cast_to, constant, load, variable

S, B, H, Q, K = (variable(name) for name in "sbhqk")
DISTANCE = apply("sub", K, Q)
CAP = 20.0

Shape = Callable[[int, int, int, int], tuple[int, ...]]


@dataclass(frozen=True)
class Score:
    """A program of scores.

    term: ours. plain: of the scores [B, H, Sq, Sk] and the capture. element: of one score, where it stands, and the
    capture, as FlexAttention takes it. shape: of the capture, by B, H, Sq and Sk.
    """

    term: Term
    plain: Callable[..., Tensor]
    element: Callable[..., Tensor] | None = None
    shape: Shape | None = None


def _distance(s: Tensor) -> Tensor:
    return torch.arange(s.shape[-1], device=s.device) - torch.arange(s.shape[-2], device=s.device)[:, None]


def _softcap(s: Tensor) -> Tensor:
    return torch.tanh(s / CAP) * CAP


_CAPPED = apply("mul", apply("tanh", apply("div", S, constant(CAP))), constant(CAP))
_BUCKET = apply("add", apply("max", apply("min", DISTANCE, constant(3)), constant(-3)), constant(3))

SCORES: dict[str, Score] = {
    "none": Score(S, lambda s: s, lambda s, b, h, q, k: s),
    "softcap": Score(_CAPPED, _softcap, lambda s, b, h, q, k: _softcap(s)),
    "affine": Score(apply("sub", apply("mul", S, constant(0.5)), constant(1.5)), lambda s: s * 0.5 - 1.5),
    "far is weak": Score(
        apply("where", apply("lt", DISTANCE, constant(-10)), apply("mul", S, constant(0.25)), S),
        lambda s: torch.where(_distance(s) < -10, s * 0.25, s),
    ),
    "alibi": Score(
        apply("add", S, apply("mul", load(0, (H,), "float"), cast_to("float", DISTANCE))),
        lambda s, c: s + c[:, None, None] * _distance(s).to(s.dtype),
        lambda s, b, h, q, k, c: s + c[h] * (k - q),
        lambda b, h, q, k: (h,),
    ),
    "bias": Score(
        apply("add", S, load(0, (H, Q, K), "float")),
        lambda s, c: s + c,
        lambda s, b, h, q, k, c: s + c[h, q, k],
        lambda b, h, q, k: (h, q, k),
    ),
    "bias of keys": Score(
        apply("add", S, load(0, (B, constant(0), K), "float")), lambda s, c: s + c[:, None], None,
        lambda b, h, q, k: (b, 1, k),
    ),
    "bias of rows": Score(
        apply("add", S, load(0, (Q, H), "float")), lambda s, c: s + c.t()[:, :, None], None, lambda b, h, q, k: (q, h)
    ),
    "buckets": Score(
        apply("add", _CAPPED, load(0, (_BUCKET, H), "float")),
        lambda s, c: _softcap(s) + c[_distance(s).clamp(-3, 3) + 3].permute(2, 0, 1), None,
        lambda b, h, q, k: (7, h),
    ),
    "temperature": Score(
        apply("mul", S, load(0, (H,), "float")), lambda s, c: s * c[:, None, None], None, lambda b, h, q, k: (h,)
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Mask:
    """Which keys a query attends to.

    rule: of index tensors b, h, q, k that broadcast, as FlexAttention takes it. lower, upper: the band. intervals: what
    `fxopt.ops.key_intervals` is given besides the band, if anything. predicate, captures: what decides where the
    intervals do not say it all; the predicate's first slot is `slot`.
    """

    rule: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    lower: int | None = None
    upper: int | None = None
    intervals: dict[str, Tensor] = field(default_factory=dict)
    predicate: Program | None = None
    captures: tuple[Tensor, ...] = ()

    def allowed(self, batch: int, heads: int, queries: int, keys: int, device: str) -> Tensor:
        """bool, broadcastable to [B, H, Sq, Sk]."""
        sizes = (batch, heads, queries, keys)
        index = [torch.arange(size, device=device).view([-1 if at == axis else 1 for at in range(4)])
                 for axis, size in enumerate(sizes)]  # fmt: skip
        return self.rule(*index)


MASKS = ("none", "causal", "window", "band", "ahead", "documents", "padding", "rows", "lengths", "prefix", "dense")


def mask(name: str, batch: int, queries: int, keys: int, window: int, slot: int, device: str, seed: int) -> Mask:
    """A mask of `MASKS`; slot: how many captures the program has. Raises KeyError for another name."""
    made: Mask = _MAKERS[name](_Sizes(batch, queries, keys, window, slot, device, seed))
    return made


@dataclass(frozen=True)
class _Sizes:
    batch: int
    queries: int
    keys: int
    window: int
    slot: int
    device: str
    seed: int

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=torch.Generator(self.device).manual_seed(self.seed), device=self.device)

    def of_keys(self) -> Tensor:
        """int64 [batch], each in 1..keys."""
        return (self.uniform(self.batch) * self.keys).long() + 1


def _causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return k <= q


def _band(lower: int, upper: int) -> Any:
    return lambda s: Mask(lambda b, h, q, k: (k - q >= lower) & (k - q <= upper), lower, upper)


def _window(s: _Sizes) -> Mask:
    made: Mask = _band(1 - s.window, 0)(s)
    return made


def _documents(s: _Sizes) -> Mask:
    """Causal within runs of equal ids, of a quarter of the keys on average."""
    ids = (s.uniform(s.batch, s.keys) < 4 / s.keys).cumsum(1)
    same = apply("eq", load(s.slot, (B, Q), "int"), load(s.slot, (B, K), "int"))
    predicate = Program(apply("and", apply("le", K, Q), same))
    return Mask(lambda b, h, q, k: (k <= q) & (ids[b, q] == ids[b, k]), None, 0, {"documents": ids}, predicate, (ids,))


def _padding(s: _Sizes) -> Mask:
    """Causal, and a third of the keys are nobody's."""
    keep = s.uniform(s.batch, s.keys) < 0.67
    predicate = Program(apply("and", apply("le", K, Q), load(s.slot, (B, K), "bool")))
    return Mask(lambda b, h, q, k: (k <= q) & keep[b, k], None, 0, {"keep": keep}, predicate, (keep,))


def _rows(s: _Sizes) -> Mask:
    rows = s.uniform(s.batch, s.queries) < 0.67
    return Mask(lambda b, h, q, k: rows[b, q] & (k >= 0), intervals={"rows": rows})


def _lengths(s: _Sizes) -> Mask:
    lengths = s.of_keys()
    return Mask(lambda b, h, q, k: (k <= q) & (k < lengths[b]), None, 0, {"lengths": lengths})


def _prefix(s: _Sizes) -> Mask:
    prefix = s.of_keys()
    predicate = Program(apply("or", apply("le", K, Q), apply("lt", K, load(s.slot, (B,), "int"))))
    return Mask(lambda b, h, q, k: (k <= q) | (k < prefix[b]), None, 0, {"prefix": prefix}, predicate, (prefix,))


def _dense(s: _Sizes) -> Mask:
    """A tensor of pairs, of which nothing is known; every row has its first key."""
    pairs = s.uniform(s.batch, s.queries, s.keys) < 0.7
    pairs[:, :, :1] = True
    predicate = Program(load(s.slot, (B, Q, K), "bool"))
    return Mask(lambda b, h, q, k: pairs[b, q, k], predicate=predicate, captures=(pairs,))


_MAKERS: dict[str, Callable[[_Sizes], Mask]] = {
    "none": lambda s: Mask(lambda b, h, q, k: (q >= 0) & (k >= 0)),
    "causal": lambda s: Mask(_causal, None, 0),
    "window": _window,
    "band": _band(-9, 40),
    "ahead": _band(2, 90),
    "documents": _documents,
    "padding": _padding,
    "rows": _rows,
    "lengths": _lengths,
    "prefix": _prefix,
    "dense": _dense,
}


def default_scale(depth: int) -> float:
    """1 / sqrt(D)."""
    return 1 / math.sqrt(depth)
