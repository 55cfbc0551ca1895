"""Which keys each query of an attention may attend to, found once a step: [first, last + 1) and how many in between.

    fxopt::key_intervals    (documents, keep, rows, lengths, prefix, lower, upper, batch, queries, keys) -> [B, Sq, 3]

A mask tensor is batch x queries x keys; this is three int64 a query, and says what kernels ask: which keys bound the
work of a row, and whether all keys between them are allowed (count == hi - lo), so that nothing more need be read.

Key k is allowed for query q of batch row b iff all of these hold, of those that are given:

    lower <= k - q <= upper, or k < prefix[b]        the band, and what is allowed besides it
    documents[b, q] == documents[b, k]               ids in any order, in runs or not
    keep[b, k], rows[b, q], k < lengths[b]

The answer is exact for every combination: keys are listed by document, then position, so that the keys of a band are a
slice of a list; its ends come from two binary searches. So ids that come back later cost no more than ids in runs: they
are counted too, and the row is exact where they happen to leave no gap. A row that is allowed no key is (0, 0, 0).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fxopt.ops.registry import OpMemory

__all__ = ["FORWARD", "MEMORY", "key_intervals"]

Maybe = Tensor | None
Segment = tuple[Tensor, Tensor]
"""Positions [start, stop) of keys, both in 0..Sk and [1 or B, Sq]; of no keys where stop <= start."""
_ARGUMENTS = (
    "Tensor? documents, Tensor? keep, Tensor? rows, Tensor? lengths, Tensor? prefix, int? lower, int? upper, "
    "SymInt batch, SymInt queries, SymInt keys"
)
_TENSORS = _ARGUMENTS.count("Tensor")


def key_intervals(
    *,
    batch: int,
    queries: int,
    keys: int,
    documents: Maybe = None,
    keep: Maybe = None,
    rows: Maybe = None,
    lengths: Maybe = None,
    prefix: Maybe = None,
    lower: int | None = None,
    upper: int | None = None,
) -> Tensor:
    """Intervals of the keys that each query may attend to.

    Args:
        batch, queries, keys: B, Sq and Sk of the attention.
        documents: [B or 1, S] of integers, S == Sq == Sk: a query attends to keys of its own document.
        keep: [B or 1, Sk] of bool: False for keys that nobody attends to (padding).
        rows: [B or 1, Sq] of bool: False for queries that attend to nothing.
        lengths: [B or 1] of integers: keys from there on are not attended to.
        prefix: [B or 1] or [] of integers: keys before it are attended to whatever the band says.
        lower, upper: the band, lower <= k - q <= upper; None: unbounded. Causal is upper=0.

    Returns:
        int64 [batch, queries, 3], contiguous: (lo, hi, count): lo the first key that is allowed, hi - 1 the last,
        count their number; zeros where there is none. The band is in them.

    Raises:
        ValueError, TypeError: for shapes and dtypes that do not fit, and where no tensor is given: the band alone
            needs no intervals.
    """
    given = {"documents": documents, "keep": keep, "rows": rows, "lengths": lengths, "prefix": prefix}
    tensors = {name: one for name, one in given.items() if one is not None}
    if not tensors:
        raise ValueError("a band alone needs no intervals: give lower and upper to the attention")
    if documents is not None and queries != keys:
        raise ValueError(
            f"documents need one id for query and key of a position, but there are {queries} queries and {keys} keys:"
            " give what the queries may attend to as keep, lengths or a band"
        )
    _check_dtypes(tensors)
    _check_shapes(tensors, batch, {"documents": keys, "keep": keys, "rows": queries})
    result: Tensor = FORWARD(documents, keep, rows, lengths, prefix, lower, upper, batch, queries, keys)
    return result


def _check_dtypes(tensors: dict[str, Tensor]) -> None:
    for name, one in tensors.items():
        if name in ("keep", "rows"):
            if one.dtype != torch.bool:
                raise TypeError(f"{name} is {one.dtype}, not torch.bool: compare it, as in `attention_mask != 0`")
        elif one.dtype.is_floating_point or one.dtype.is_complex:
            raise TypeError(f"{name} is {one.dtype}, not of integers")


def _check_shapes(tensors: dict[str, Tensor], batch: int, widths: dict[str, int]) -> None:
    devices = {one.device for one in tensors.values()}
    if len(devices) > 1:
        raise ValueError(f"tensors on one device are needed, not on {', '.join(sorted(map(str, devices)))}")
    for name, one in tensors.items():
        if name == "prefix" and one.dim() == 0:
            continue
        tail = (widths[name],) if name in widths else ()
        if one.dim() != 1 + len(tail) or one.shape[0] not in (1, batch) or one.shape[1:] != tail:
            raise ValueError(f"{name} must be {[batch, *tail]} or {[1, *tail]}, not {list(one.shape)}")


# --- fxopt::key_intervals: tensors and constants are those of _ARGUMENTS ------------------------------------------


@torch.library.custom_op("fxopt::key_intervals", mutates_args=(), schema=f"({_ARGUMENTS}) -> Tensor")
def _forward(*arguments: Any) -> Tensor:
    tensors, (lower, upper, batch, queries, keys) = arguments[:_TENSORS], arguments[_TENSORS:]
    result = _fake(*arguments)
    if 0 in (batch, queries, keys):
        return result.zero_()
    computed = _computed_rows(tensors, batch)
    documents, keep, rows = (None if one is None else one.expand(computed, -1) for one in tensors[:3])
    lengths, prefix = (None if one is None else one.long().clamp(0, keys).reshape(-1, 1) for one in tensors[3:])
    lists = None if documents is None and keep is None else _keys_by_document(documents, keep, keys)
    segments = _segments(_band(lower, upper, queries, keys, result.device), lengths, prefix)
    lo, hi, count = _joined([_search(*segment, lists, keys) for segment in segments], keys)
    some = count > 0 if rows is None else (count > 0) & rows
    for place, one in enumerate((lo, hi, count)):
        result[:, :, place] = one * some
    return result


@_forward.register_fake
def _fake(*arguments: Any) -> Tensor:
    batch, queries = arguments[-3:-1]
    device = next((one.device for one in arguments[:_TENSORS] if one is not None), None)
    return torch.empty(batch, queries, 3, dtype=torch.int64, device=device)


def _computed_rows(tensors: Sequence[Maybe], batch: int) -> int:
    """1 where all batch rows have the same intervals, since every tensor is [1, ...]; else all of them."""
    return batch if any(one is not None and one.dim() and one.shape[0] == batch for one in tensors) else 1


def _band(lower: int | None, upper: int | None, queries: int, keys: int, device: torch.device) -> Segment:
    """The band's keys, each [1, Sq]; bounds are cut to what matters first: q + 2^63 - 1 would overflow."""
    q = torch.arange(queries, device=device)[None]
    least, most = (-queries if lower is None else lower), (keys if upper is None else upper)
    start, past = (max(-queries, min(one, keys)) for one in (least, most + 1))
    return (q + start).clamp_(0, keys), (q + past).clamp_(0, keys)


def _segments(band: Segment, lengths: Maybe, prefix: Maybe) -> list[Segment]:
    """The band, and where there is a prefix the rest of that first; lengths and prefix are [1 or B, 1]."""
    start, stop = band
    if lengths is not None:
        stop = torch.minimum(stop, lengths)
    if prefix is None:
        return [(start, stop)]
    end = prefix if lengths is None else torch.minimum(prefix, lengths)
    return [(torch.zeros_like(start), end.expand(-1, start.shape[1])), (torch.maximum(start, prefix), stop)]


def _keys_by_document(documents: Maybe, keep: Maybe, keys: int) -> tuple[Tensor, Tensor | int]:
    """(codes, base): a key is written ``rank of its document * Sk + position``.

    codes: [1 or B, Sk], those of kept keys in order, filled up with Sk * Sk, which is above all of them.
    base: [1 or B, Sq], the code that position 0 has in the query's document; 0 without documents.
    """
    if documents is None:
        assert keep is not None
        base: Tensor | int = 0
        codes = torch.arange(keys, device=keep.device)
    else:
        ids, order = documents.sort(stable=True)  # a document after another, its positions in order
        ranks = torch.nn.functional.pad((ids[:, 1:] != ids[:, :-1]).cumsum(1), (1, 0)) * keys
        base, codes = torch.empty_like(ranks).scatter_(1, order, ranks), ranks + order
        keep = None if keep is None else keep.gather(1, order)
    return codes if keep is None else torch.where(keep, codes, keys * keys).sort()[0], base


def _search(start: Tensor, stop: Tensor, lists: tuple[Tensor, Tensor | int] | None, keys: int) -> tuple[Tensor, ...]:
    """(first, last + 1, count) of the allowed keys in [start, stop); first and last mean nothing where count is 0."""
    if lists is None:
        return start, stop, (stop - start).clamp_(min=0)
    codes, base = lists
    low, high = (torch.searchsorted(codes, (base + one).expand(len(codes), -1).contiguous()) for one in (start, stop))
    first, last = codes.gather(1, low.clamp(max=keys - 1)), codes.gather(1, (high - 1).clamp_(min=0))
    return first - base, last - base + 1, (high - low).clamp_(min=0)


def _joined(found: list[tuple[Tensor, ...]], keys: int) -> tuple[Tensor, ...]:
    """The keys of one segment, or of two that share none; either may be empty."""
    if len(found) == 1:
        return found[0]
    firsts = [torch.where(count > 0, first, keys) for first, _, count in found]
    ends = [torch.where(count > 0, end, 0) for _, end, count in found]
    return torch.minimum(*firsts), torch.maximum(*ends), found[0][2] + found[1][2]


# --- what it costs -----------------------------------------------------------------------------------------------


@register_flop_formula(torch.ops.fxopt.key_intervals)
def _flops(*arguments: Any, **_: Any) -> int:
    """Comparisons of sorts and searches, and what is done to each query: of integers, but work like any other."""
    shapes, (_, _, batch, queries, keys) = arguments[:_TENSORS], arguments[_TENSORS:]
    rows = batch if any(one and one[0] == batch for one in shapes) else 1
    sorts, segments = sum(one is not None for one in shapes[:2]), 1 + (shapes[4] is not None)
    steps = max(keys, 2).bit_length() - 1
    return rows * (sorts * keys * steps + segments * queries * (2 * steps * bool(sorts) + 8))


def _memory(*arguments: Any) -> OpMemory:
    """At the end of a search most is held: codes, order and base, its bounds and what it found, for each segment."""
    tensors, (_, _, batch, queries, keys) = arguments[:_TENSORS], arguments[_TENSORS:]
    a_key = 0 if tensors[0] is None and tensors[1] is None else 6
    a_query = 6 if tensors[4] is None else 13
    workspace = 8 * _computed_rows(tensors, batch) * (a_key * keys + a_query * queries)
    return OpMemory(24 * batch * queries, workspace)


FORWARD = torch.ops.fxopt.key_intervals.default
MEMORY = {FORWARD: _memory}
