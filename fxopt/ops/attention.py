"""Attention that never holds the scores, for training and evaluation: what graphs and people call.

`attention` checks the arguments and calls the operator (`fxopt.ops.attention_operator`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fxopt.kernels.attention_configs import grain_of
from fxopt.kernels.cards import card_of
from fxopt.ops.attention_operator import FORWARD
from fxopt.ops.empty_rows import EMPTY
from fxopt.ops.launch import check_lowering, runs_triton
from fxopt.ops.query_tiles import query_tiles
from fxopt.score.program import Program

__all__ = ["attention"]

Maybe = Tensor | None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    sink: Maybe = None,
    intervals: Maybe = None,
    captures: Sequence[Tensor] = (),
    program: Program | str = "",
    predicate: Program | str = "",
    scale: float | None = None,
    lower: int | None = None,
    upper: int | None = None,
    dropout: float = 0.0,
    seed: Maybe = None,
    empty: str = "zero",
    heads_last: bool = True,
    lowering: str = "auto",
) -> Tensor:
    """``softmax(program(scale * q @ k.T), where allowed) @ v``.

    Scores and softmax are computed in fp32 (fp64 for fp64 inputs). Key k is allowed for query q where ``lower <= k - q
    <= upper``, the intervals have it, and the predicate is true; so ``upper=0`` is causal, and ``lower=1 - w, upper=0``
    a window of w keys.

    Args:
        q, k, v: [B, H, Sq, D], [B, Hk, Sk, D], [B, Hk, Sk, Dv], of one floating dtype and any strides; H a multiple of
            Hk: query head h attends to key head ``h // (H // Hk)``.
        sink: [H], one more logit in each row's softmax, that has no value; any floating dtype.
        intervals: int64 [B or 1, Sq, 3], from `fxopt.ops.key_intervals`, which were given the same band; they say which
            keys a row has, and in which rows the predicate is asked.
        captures: tensors that program and predicate load, by slot.
        program: of s, b, h, q, k; returns the score that softmax sees. predicate: of b, h, q, k; returns a bool.
            In a function that is compiled: their texts.
        scale: 1 / sqrt(D) if None.
        lower, upper: constants of the band; None: no bound.
        dropout: the share of probabilities set to 0, the others growing to make up for it; 0 <= dropout < 1.
        seed: int64 scalar, needed for dropout: the same seed drops the same ones.
        empty: what a row without keys gives: "zero", "nan", "uniform" or "uniform+" (`fxopt.ops.empty_rows`).
        lowering: "auto" (Triton kernels on CUDA, else ATen), "aten", or "interpret" (`fxopt.ops.launch`).
        heads_last: lay out the result as [B, Sq, H, Dv], which a following ``transpose(1, 2).reshape`` takes as it is.

    Returns:
        [B, H, Sq, Dv], of v's dtype.

    Raises:
        ValueError, TypeError: for shapes, dtypes or options that do not fit.
        RuntimeError: in the backward, if it is to be differentiated again (``create_graph=True``).

    q, k, v, sink and floating captures have gradients. Ambient autocast is not looked at: cast the arguments.
    """
    _check_inputs(q, k, v, sink)
    _check_intervals(intervals, q)
    _check_dropout(dropout, seed, empty)
    check_lowering(lowering)
    tiles = None
    if intervals is not None and runs_triton(q, lowering):
        spreads = empty != "zero" and sink is None
        tiles = query_tiles(intervals, k.shape[2], _grain_on(q.device), spreads)
    out, _ = FORWARD(
        q, k, v, sink, intervals, tiles, seed, list(captures),
        _text("program", str(program), len(captures)), _text("predicate", str(predicate), len(captures)),
        1 / math.sqrt(q.shape[-1]) if scale is None else scale, lower, upper, dropout, empty, heads_last, lowering,
    )  # fmt: skip
    return out


@torch.compiler.assume_constant_result
def _text(name: str, text: str, captures: int) -> str:
    """`text`, "" if it says nothing; checked to be a program or a predicate of so many captures."""
    program = Program.parse(text) if text else None
    if program is None or (name == "program" and program.is_identity):
        return ""
    kind = "float" if name == "program" else "bool"
    if program.result.kind != kind:
        raise TypeError(f"the {name} returns {program.result.kind}, not {kind}")
    if name == "predicate" and "s" in program.reads:
        raise ValueError("the predicate reads s: a mask may depend on b, h, q and k only")
    if program.captures > captures:
        raise ValueError(f"the {name} loads from {program.captures} tensors, and captures are {captures}")
    return text


@torch.compiler.assume_constant_result  # Dynamo, which may trace this, need not know how a device is asked
def _grain_on(device: torch.device) -> int:
    return grain_of(card_of(device))


def _check_inputs(q: Tensor, k: Tensor, v: Tensor, sink: Maybe) -> None:
    if any(one.dim() != 4 for one in (q, k, v)):
        raise ValueError(f"{_shapes(q, k, v)}: each must have 4 axes, [batch, heads, positions, width]")
    if q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3]:
        raise ValueError(f"{_shapes(q, k, v)} do not fit: they must be [B, H, Sq, D], [B, Hk, Sk, D], [B, Hk, Sk, Dv]")
    if q.shape[1] < 1 or k.shape[1] < 1 or q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads cannot share {k.shape[1]} key heads: there must be a multiple")
    if q.shape[3] < 1:
        raise ValueError(f"{_shapes(q, k, v)}: heads of q and k have width 0")
    if len({q.dtype, k.dtype, v.dtype}) > 1 or not q.dtype.is_floating_point:
        raise TypeError(f"q, k and v must share a floating dtype, not {q.dtype}, {k.dtype}, {v.dtype}")
    if sink is not None and (sink.dim() != 1 or sink.shape[0] != q.shape[1]):
        raise ValueError(f"sink must be [{q.shape[1]}], one a query head, not {list(sink.shape)}")
    if sink is not None and not sink.dtype.is_floating_point:
        raise TypeError(f"sink is {sink.dtype}, not of floats")


def _shapes(q: Tensor, k: Tensor, v: Tensor) -> str:
    return f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"


def _check_intervals(intervals: Maybe, q: Tensor) -> None:
    if intervals is None:
        return
    batch, queries = q.shape[0], q.shape[2]
    if intervals.dim() != 3 or intervals.shape[0] not in (1, batch) or intervals.shape[1:] != (queries, 3):
        raise ValueError(f"intervals must be {[batch, queries, 3]} or {[1, queries, 3]}, not {list(intervals.shape)}")
    if intervals.dtype != torch.int64:
        raise TypeError(f"intervals must be int64, not {intervals.dtype}: make them with fxopt.ops.key_intervals")


def _check_dropout(dropout: float, seed: Maybe, empty: str) -> None:
    if empty not in EMPTY:
        raise ValueError(f"empty is {empty!r}: it must be one of {', '.join(EMPTY)}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}: it must be at least 0 and less than 1")
    if dropout and empty.startswith("uniform"):
        raise ValueError(f'dropout of rows without keys is not computed for empty={empty!r}: use "zero" or "nan"')
    if dropout and seed is None:
        raise ValueError("dropout needs a seed: pass an int64 scalar tensor, a fresh one a step")
    if seed is not None and (seed.dtype != torch.int64 or seed.numel() != 1):
        raise ValueError(f"seed must be an int64 scalar, not {seed.dtype} {list(seed.shape)}")
