"""Masks as users say them: drawn small, and made dense the slow way."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

Arguments = dict[str, Any]


@st.composite
def documents_of(draw: st.DrawFn, batch: int, size: int) -> Tensor:
    """Ids [batch, size]: in runs, in runs that come back, or anyhow; near the ends of int64 too."""
    kind = draw(st.sampled_from(("runs", "returning", "any")))
    drawn = draw(st.lists(st.integers(0, 9), min_size=batch * size, max_size=batch * size))
    steps = torch.tensor(drawn, dtype=torch.int64).reshape(batch, size)
    ids = steps % 3 if kind == "any" else (steps < 2).cumsum(1)
    ids = ids % 3 if kind == "returning" else ids
    return draw(st.sampled_from((ids, ids.int(), -ids, ids + 2**63 - 99, ids.to(torch.uint8))))


@st.composite
def masks(draw: st.DrawFn, most: int = 24) -> Arguments:
    """Arguments of `key_intervals`: any of its tensors, at least one; of one batch row or all."""
    batch, queries = draw(st.integers(0, 3)), draw(st.integers(0, most))
    given = draw(st.sets(st.sampled_from(("documents", "keep", "rows", "lengths", "prefix")), min_size=1))
    keys = queries if "documents" in given or draw(st.booleans()) else draw(st.integers(0, most))
    bounds = st.none() | st.integers(-most - 2, most + 2)
    found: Arguments = {"batch": batch, "queries": queries, "keys": keys, "lower": draw(bounds), "upper": draw(bounds)}
    for name in sorted(given):
        rows = draw(st.sampled_from((1, batch)))
        if name == "documents":
            found[name] = draw(documents_of(rows, keys))
        elif name in ("lengths", "prefix"):
            values = draw(st.lists(st.integers(-1, keys + 2), min_size=rows, max_size=rows))
            found[name] = torch.tensor(values, dtype=draw(st.sampled_from((torch.int64, torch.int32))))
        else:
            size = queries if name == "rows" else keys
            kept = draw(st.lists(st.integers(0, 5), min_size=rows * size, max_size=rows * size))
            found[name] = torch.tensor(kept, dtype=torch.int64).reshape(rows, size) > draw(st.sampled_from((0, 3)))
    if "prefix" in given and draw(st.booleans()) and len(found["prefix"]):
        found["prefix"] = found["prefix"][0]
    return found


def dense(
    batch: int, queries: int, keys: int, documents: Tensor | None = None, keep: Tensor | None = None,
    rows: Tensor | None = None, lengths: Tensor | None = None, prefix: Tensor | None = None,
    lower: int | None = None, upper: int | None = None,
) -> Tensor:  # fmt: skip
    """bool [batch, queries, keys]: the definition, a tensor a line."""
    q, k = torch.arange(queries)[:, None], torch.arange(keys)
    mask = torch.ones(batch, queries, keys, dtype=torch.bool)
    if lower is not None:
        mask &= k - q >= lower
    if upper is not None:
        mask &= k - q <= upper
    if prefix is not None:
        mask |= k < prefix.reshape(-1, 1, 1)
    if documents is not None:
        mask &= documents[:, :, None] == documents[:, None, :]
    if keep is not None:
        mask &= keep[:, None, :]
    if rows is not None:
        mask &= rows[:, :, None]
    if lengths is not None:
        mask &= k < lengths[:, None, None]
    return mask
