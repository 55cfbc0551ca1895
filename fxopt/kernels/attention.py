"""Triton source of attention: forward, backward, and which queries a square of keys is seen by.

The algorithm is FlashAttention-2's (Dao 2023, arXiv:2307.08691): online softmax over tiles of keys, the scores computed
again in the backward, one kernel by rows for the gradient of q and one by columns for those of k and v, so that no sum
crosses programs and nothing is atomic. What is between ``q @ k.T`` and softmax is the site's program, emitted inline;
tiles that no mask cuts are a loop of their own without one. Tensors and what they hold:

    Q, Out, ByOut, ByQ [B, H, Sq, D or Dv], K, V, ByK, ByV [B, Hk, Sk, D or Dv]: strides given, the last is 1
    Lse, Delta [B, H, Sq]: fp32, contiguous; Sink [H]; Intervals [B or 1, Sq, 3], Seed: int64; C0, C1, ...: captures
    QueryTiles [B or 1, cdiv(Sk, grain), 4]: int32, of `query_tiles_kernel`
    ByC0, ...: fp32; sums over keys [B, H, Sq] or queries [B, H, Sk], or [B or 1, H or 1, Sq, Sk] of pairs
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fxopt.kernels.attention_spec import ACROSS, DOWN, LOG2E, AttentionKernelSpec, Emitted, emitted, parts_of
from fxopt.kernels.pointwise import helpers_of
from fxopt.kernels.source import TRITON_DTYPES, Kernel, generate, render
from fxopt.score.bounds import largest

__all__ = ["backward_kv_kernel", "backward_pairs_kernel", "backward_q_kernel", "delta_kernel", "forward_kernel",
           "query_tiles_kernel", "slots_by_kernel"]  # fmt: skip

LN2 = 0.6931471805599453
LOWEST = -3.0e38
"""The score of all keys in a row without any, where that means all of them alike; no finite score is less."""

Arguments = list[tuple[str, str]]

_DROPOUT = '''
@triton.jit
def mixed(x):
    """splitmix64's output function (Steele et al. 2014)."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def row_keys(seed, b, h, rows):
    """The two halves of each row's key, as fxopt.ops.dropout_bits has them."""
    key = mixed((b + 1).to(tl.uint64) * 0x9E3779B97F4A7C15 + seed.to(tl.uint64))
    key = mixed((h + 1).to(tl.uint64) * 0x9E3779B97F4A7C15 + key)
    key = mixed((rows + 1).to(tl.uint64) * 0x9E3779B97F4A7C15 + key)
    return key.to(tl.uint32), (key >> 32).to(tl.uint32)


@triton.jit
def is_kept(low, high, columns, threshold: tl.constexpr):
    """Whether dropout keeps a pair of row and column."""
    x = low + columns.to(tl.uint32) * 0x9E3779B9
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13) ^ high) * 0xC2B2AE35
    return (x >> 1).to(tl.int32) >= threshold
'''


# --- the kernels -------------------------------------------------------------------------------------------------


@functools.lru_cache(1024)
def forward_kernel(spec: AttentionKernelSpec) -> Kernel:
    """Out and Lse; a program a tile of rows of a head."""
    arguments = [*_tensors(spec, "Q", "K", "V", "Out"), ("Lse", "*fp32")]
    arguments += [("Sink", f"*{spec.sink}")] if spec.sink else []
    return _kernel("attention_forward", spec, arguments, emitted(spec, DOWN, ["bhq"], None))


@functools.lru_cache(1024)
def delta_kernel(spec: AttentionKernelSpec) -> Kernel:
    """Delta; a program a tile of rows of a head. Only dtype and width of `spec` are looked at."""
    arguments = [*_tensors(spec, "Out", "ByOut"), ("Delta", "*fp32"), *_strides("out", "by_out")]
    arguments += [("heads", "i32"), ("queries", "i32"), ("BLOCK_Q", "constexpr")]
    values = {"v_parts": parts_of(spec.width), "s": spec, "dtype": TRITON_DTYPES[spec.dtype]}
    return _rendered("attention_delta", arguments, values)


@functools.lru_cache(1024)
def backward_q_kernel(spec: AttentionKernelSpec, by_q: bool, row_slots: tuple[int, ...] = ()) -> Kernel:
    """ByQ if `by_q`, and for each of `row_slots` the sums over keys; a program a tile of rows of a head."""
    arguments = [*_tensors(spec, "Q", "K", "V", "ByOut"), ("Lse", "*fp32"), ("Delta", "*fp32")]
    arguments += _tensors(spec, "ByQ") if by_q else []
    arguments += [(f"ByC{slot}", "*fp32") for slot in row_slots]
    found = emitted(spec, DOWN, ["bhq"], row_slots)
    return _kernel("attention_backward_q", spec, arguments, found, by_q=by_q, row_slots=row_slots)


@functools.lru_cache(1024)
def backward_kv_kernel(spec: AttentionKernelSpec, by_k: bool, by_v: bool, column_slots: tuple[int, ...] = ()) -> Kernel:
    """ByK and ByV as asked, and for each of `column_slots` the sums over queries; a program a tile of keys of a key
    head, which goes through all query heads that share it."""
    arguments = [*_tensors(spec, "Q", "K", "V", "ByOut"), ("Lse", "*fp32"), ("Delta", "*fp32")]
    arguments += _tensors(spec, *["ByK"] * by_k, *["ByV"] * by_v)
    arguments += [(f"ByC{slot}", "*fp32") for slot in column_slots]
    arguments += [("QueryTiles", "*i32")] if spec.intervals else []
    found = emitted(spec, ACROSS, ["bk", "bhk"], column_slots)
    return _kernel(
        "attention_backward_kv", spec, arguments, found, by_k=by_k, by_v=by_v, column_slots=column_slots
    )  # fmt: skip


@functools.lru_cache(1024)
def backward_pairs_kernel(spec: AttentionKernelSpec, slot: int) -> Kernel:
    """The gradient by each pair's element of the capture in `slot`, summed over the batch or heads that it does not
    depend on; a program a tile of rows and columns."""
    arguments = [*_tensors(spec, "Q", "K", "V", "ByOut"), ("Lse", "*fp32"), ("Delta", "*fp32"), ("ByC", "*fp32")]
    found = emitted(spec, DOWN, [], (slot,))
    sums = "".join(name for name in "bh" if name not in spec.loads[slot].reads)
    return _kernel("attention_backward_pairs", spec, arguments, found, slot=slot, sums=sums)


@functools.lru_cache(8)
def query_tiles_kernel(spreads: bool) -> Kernel:
    """Of each GRAIN keys (first, stop, full_first, full_stop) of queries; spreads: rows without keys see all."""
    arguments = [("Intervals", "*i64"), ("Tiles", "*i32"), ("queries", "i32"), ("keys", "i32"), ("GRAIN", "constexpr")]
    return _rendered("attention_query_tiles", arguments, {"spreads": spreads})


def slots_by_kernel(spec: AttentionKernelSpec, wanted: Sequence[bool]) -> tuple[tuple[int, ...], ...]:
    """(row, column, pair slots): which kernel adds up each capture's gradient, of those wanted that there are."""
    by_load = spec.score.derivative().by_load if any(wanted) else {}
    slots = [slot for slot, want in enumerate(wanted) if want and slot in by_load]
    reads = {slot: spec.loads[slot].reads & {"q", "k"} for slot in slots}
    return (
        tuple(slot for slot in slots if "k" not in reads[slot]),
        tuple(slot for slot in slots if reads[slot] == {"k"}),
        tuple(slot for slot in slots if reads[slot] == {"q", "k"}),
    )


# --- how they are put together -----------------------------------------------------------------------------------


def _tensors(spec: AttentionKernelSpec, *names: str) -> Arguments:
    return [(name, f"*{spec.dtype}") for name in names]


def _strides(*names: str) -> Arguments:
    """Of batch, heads and positions."""
    return [(f"{name}_{axis}", "i32") for name in names for axis in "bhs"]


_STRIDES = {"Q": "q", "K": "k", "V": "v", "Out": "out", "ByOut": "by_out", "ByQ": "by_q", "ByK": "by_k", "ByV": "by_v"}


def _kernel(name: str, spec: AttentionKernelSpec, tensors: Arguments, found: Emitted, **values: Any) -> Kernel:
    """The kernel of a template, with the arguments that all of them have."""
    captured = spec.capture_arguments()
    arguments = [*tensors]
    arguments += [("Intervals", "*i64")] if spec.intervals else []
    arguments += [("Seed", "*i64")] if spec.dropout else []
    arguments += [one for one in captured if one[0].startswith("C")]
    arguments += _strides(*(_STRIDES[tensor] for tensor, _ in tensors if tensor in _STRIDES))
    arguments += [("intervals_b", "i32")] if spec.intervals else []
    arguments += [("tiles_b", "i32")] if ("QueryTiles", "*i32") in tensors else []
    arguments += [one for one in captured if not one[0].startswith("C")]
    arguments += [("batch", "i32")] if name == "attention_backward_pairs" else []
    arguments += [(size, "i32") for size in ("heads", "group", "queries", "keys")]
    arguments += [("BLOCK_Q", "constexpr"), ("BLOCK_K", "constexpr")]
    helpers = [*([_DROPOUT] if spec.dropout else []), *helpers_of(found.calls)]
    return replace(_rendered(name, arguments, _values(spec, found) | values, helpers), terms=found.terms)


def _values(spec: AttentionKernelSpec, found: Emitted) -> dict[str, Any]:
    affine = spec.score.split_affine()
    return {
        "s": spec,
        "e": found,
        "d_parts": parts_of(spec.depth),
        "v_parts": parts_of(spec.width),
        "dtype": TRITON_DTYPES[spec.dtype],
        "precision": ', input_precision="ieee"' if spec.dtype == "fp32" else "",
        "uses_s": affine is None or affine[1] is not None,
        "finite": largest(spec.score.result) * LOG2E < -LOWEST,
        "has_full": not spec.predicate or spec.intervals,
        "threshold": min(round(spec.dropout * 2**31), 2**31 - 1),
        "growth": repr(1 / (1 - spec.dropout)),
        "share": 'float("nan")' if spec.empty == "nan" else "1.0 / keys",
        "lowest": repr(LOWEST),
        "log2e": repr(LOG2E),
        "ln2": repr(LN2),
    }


def _rendered(name: str, arguments: Arguments, values: dict[str, Any], helpers: Sequence[str] = ()) -> Kernel:
    return generate(name, arguments, render(f"{name}.py.jinja", values), helpers)
