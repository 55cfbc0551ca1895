"""Tiles against dense masks: every claim that a tile makes is held up to the mask, element by element."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from fxopt.ops.key_intervals import key_intervals
from fxopt.ops.tiles import Tile, allowed, computed_pairs, tiles_of
from fxopt.testing.interval_masks import Arguments, dense, masks

ROWS = st.sampled_from((1, 7, 32, 128))
S = 4096


def cover(intervals: Tensor, keys: int) -> Tensor:
    """bool [B, Sq, Sk] of [lo, hi)."""
    k = torch.arange(keys)
    return (k >= intervals[..., :1]) & (k < intervals[..., 1:2])


def length(one: slice) -> int:
    return one.stop - one.start


def check_tiles(
    tiles: tuple[Tile, ...], mask: Tensor, exact: Tensor, rows: int, intervals: Tensor | None,
    lower: int | None = None, upper: int | None = None,
) -> None:  # fmt: skip
    """Hold tiles up to what intervals or a band allow, [B, Sq, Sk], and in which rows that is all, [B, Sq]."""
    times = torch.zeros(mask.shape[:2], dtype=torch.int64)
    for tile in tiles:
        times[tile.b, tile.q] += 1
        inside, outside = mask[tile.b, tile.q, tile.k], mask[tile.b, tile.q].clone()
        outside[..., tile.k] = False
        assert not outside.any()
        assert tile.exact == bool((exact[tile.b, tile.q] | ~mask[tile.b, tile.q].any(-1)).all())
        said = allowed(tile, intervals, lower, upper)
        assert said.shape == (1, 1, length(tile.q), length(tile.k))
        assert torch.equal(said[0].expand(inside.shape), inside)
        assert tile.exact or tile.kind == "masked"
        check_kind(tile, inside, rows)
    assert (times == 1).all()


def check_kind(tile: Tile, inside: Tensor, rows: int) -> None:
    """Whether `inside`, [batch rows, rows, keys], is as the kind says."""
    if tile.kind == "empty":
        assert tile.k == slice(0, 0)
    elif tile.kind == "full":
        assert inside.all()
    elif tile.kind == "causal":
        assert torch.equal(inside[0], torch.ones(inside.shape[1:], dtype=torch.bool).tril())
        assert inside.shape[1] == inside.shape[2]
    else:
        assert length(tile.q) <= rows
        assert inside[..., 0].any()
        assert inside[..., -1].any()


@given(masks(), st.booleans(), ROWS)
def test_of_what_users_mask(arguments: Arguments, predicate: bool, rows: int) -> None:
    batch, queries, keys = (arguments[name] for name in ("batch", "queries", "keys"))
    intervals = key_intervals(**arguments)
    exact = torch.ones(batch, queries, dtype=torch.bool)
    if predicate:
        exact = intervals[..., 1] - intervals[..., 0] == intervals[..., 2]
        assert torch.equal(dense(**arguments)[exact], cover(intervals, keys)[exact])
    tiles = tiles_of(intervals, batch, queries, keys, None, None, predicate, rows)
    check_tiles(tiles, cover(intervals, keys), exact, rows, intervals)


@st.composite
def any_intervals(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Intervals [B, Sq, 3] that wander, stay and jump, and the number of keys; counts may be -1 or too few."""
    batch, queries, keys = draw(st.integers(1, 3)), draw(st.integers(1, 80)), draw(st.integers(0, 40))
    move = st.sampled_from(
        ((0, 0), (0, 1), (1, 1), (1, 0), (0, 0), (0, 1), (-1, 1), (0, 9), (9, 9), (-40, -40), (-40, -39))
    )
    lo = hi = 0
    found = []
    for _ in range(batch):
        for _ in range(0, queries, 8):
            first, last = draw(move)
            for _ in range(8):
                lo, hi = (min(max(one, 0), keys) for one in (lo + first, hi + last))
                found.append(
                    (lo, max(lo, hi), max(lo, hi) - lo if draw(st.integers(0, 20)) else draw(st.sampled_from((-1, 0))))
                )
    together = torch.tensor(found).reshape(batch, -1, 3)[:, :queries]
    return together[:1].expand(batch, -1, -1) if draw(st.booleans()) else together, keys


@given(any_intervals(), st.booleans(), ROWS)
def test_of_any_intervals(drawn: tuple[Tensor, int], predicate: bool, rows: int) -> None:
    intervals, keys = drawn
    batch, queries, _ = intervals.shape
    exact = intervals[..., 1] - intervals[..., 0] == intervals[..., 2]
    tiles = tiles_of(intervals, batch, queries, keys, None, None, predicate, rows)
    check_tiles(tiles, cover(intervals, keys), exact if predicate else torch.ones_like(exact), rows, intervals)


BOUNDS = st.none() | st.integers(-90, 90) | st.sampled_from((2**63 - 1, -(2**63)))


@example(1, 40, 40, -1, -1, False, 32)  # a row of nothing, next to rows of one key that start where nothing does
@given(st.integers(0, 2), st.integers(0, 80), st.integers(0, 80), BOUNDS, BOUNDS, st.booleans(), ROWS)
def test_of_a_band(
    batch: int, queries: int, keys: int, lower: int | None, upper: int | None, predicate: bool, rows: int
) -> None:
    mask = dense(batch, queries, keys, lower=lower, upper=upper)
    exact = torch.full(mask.shape[:2], not predicate)
    tiles = tiles_of(None, batch, queries, keys, lower, upper, predicate, rows)
    check_tiles(tiles, mask, exact, rows, None, lower, upper)
    if queries and batch:
        assert {(tile.b.start, tile.b.stop) for tile in tiles} == {(0, batch)}
    if predicate:
        assert {tile.kind for tile in tiles} <= {"masked", "empty"}


def test_equal_batch_rows_share_tiles() -> None:
    lengths = torch.tensor([5, 5, 3, 5])
    intervals = key_intervals(batch=4, queries=6, keys=6, lengths=lengths)
    tiles = tiles_of(intervals, 4, 6, 6, None, None, False)
    assert [(tile.b.start, tile.b.stop, tile.k.stop) for tile in tiles] == [(0, 2, 5), (2, 3, 3), (3, 4, 5)]
    (one,) = tiles_of(intervals[:1], 4, 6, 6, None, None, False)
    assert one == Tile(slice(0, 4), slice(0, 6), slice(0, 5), "full", True)
    assert computed_pairs((one,)) == 4 * 6 * 5


def test_runs_end_with_their_batch_row() -> None:
    """The last interval of one batch row is the first of the next."""
    lo = torch.tensor([[3, 2, 1, 0], [0, 1, 2, 3]])
    intervals = torch.stack([lo, lo + 2, torch.full_like(lo, 2)], -1)
    tiles = tiles_of(intervals, 2, 4, 5, None, None, False)
    assert tiles == tuple(Tile(slice(b, b + 1), slice(0, 4), slice(0, 5), "masked", True) for b in range(2))


@given(masks(), st.sampled_from((1, 16, 128)))
def test_attention_of_tiles_is_attention(arguments: Arguments, rows: int) -> None:
    """With torch's own `is_causal`, in fp64; rows that see nothing are zero."""
    batch, queries, keys = (arguments[name] for name in ("batch", "queries", "keys"))
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(batch, 2, n, 4, generator=generator).double() for n in (queries, keys, keys))
    mask = dense(**arguments)[:, None]
    intervals, out = key_intervals(**arguments), torch.zeros_like(q)
    for tile in tiles_of(intervals, batch, queries, keys, None, None, True, rows):
        if tile.kind != "empty":
            inside = None if tile.kind != "masked" else allowed(tile, intervals, None, None)
            inside = inside if tile.exact else mask[tile.b, :, tile.q, tile.k]
            parts = q[tile.b, :, tile.q], k[tile.b, :, tile.k], v[tile.b, :, tile.k]
            part = F.scaled_dot_product_attention(*parts, attn_mask=inside, is_causal=tile.kind == "causal")
            out[tile.b, :, tile.q] = part.nan_to_num()  # rows of a masked tile that see nothing
    right = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).nan_to_num() if keys else out
    torch.testing.assert_close(out, right, rtol=1e-12, atol=1e-12)


# --- how many and how large --------------------------------------------------------------------------------------


def documents(lengths: list[int] | Tensor) -> Tensor:
    lengths = torch.as_tensor(lengths)
    return torch.arange(len(lengths)).repeat_interleave(lengths)[None]


def random_documents(number: int) -> list[int]:
    starts = torch.randperm(S - 1, generator=torch.Generator().manual_seed(number))[: number - 1] + 1
    bounds = torch.cat([torch.tensor([0]), starts.sort()[0], torch.tensor([S])])
    return bounds.diff().tolist()


def kinds_and_factor(
    intervals: Tensor | None, lower: int | None = None, upper: int | None = None
) -> tuple[dict[str, int], float]:
    """How many tiles of each kind at 4096, and pairs computed for each that is allowed."""
    batch = 1 if intervals is None else len(intervals)
    tiles = tiles_of(intervals, batch, S, S, lower, upper, False)
    pairs = dense(1, S, S, lower=lower, upper=upper).sum() if intervals is None else intervals[..., 2].sum()
    return Counter(tile.kind for tile in tiles), computed_pairs(tiles) / int(pairs)


@pytest.mark.parametrize(
    ("lower", "upper", "kinds", "most"),
    [
        (None, None, {"full": 1}, 1.0),
        (None, 0, {"causal": 1}, 1.13),
        (-255, 0, {"causal": 1, "masked": 60}, 1.3),
        (-1023, 0, {"causal": 1, "masked": 24}, 1.2),
        (-128, 128, {"masked": 64}, 1.3),
        (0, None, {"masked": 32}, 1.05),
        (0, 0, {"masked": 128}, 32.0),
        (-1, -1, {"empty": 1, "masked": 127}, 33.0),
        (None, -1, {"empty": 1, "causal": 1}, 1.13),
    ],
)
def test_of_bands_at_4096(lower: int | None, upper: int | None, kinds: dict[str, int], most: float) -> None:
    found, factor = kinds_and_factor(None, lower, upper)
    assert found == kinds
    assert factor <= most


@pytest.mark.parametrize(
    ("arguments", "kinds", "most"),
    [
        ({"documents": documents([512] * 8), "upper": 0}, {"causal": 8}, 2.0),
        ({"documents": documents([512] * 8)}, {"full": 8}, 1.0),
        ({"documents": documents([1] * S), "upper": 0}, {"masked": 128}, 32.0),
        ({"documents": documents([2] * (S // 2)), "upper": 0}, {"masked": 128}, 22.0),
        ({"documents": documents([20] * 204 + [16]), "upper": 0}, {"masked": 102, "causal": 1}, 4.0),
        ({"documents": documents([4000, 3, 93]), "upper": 0}, {"causal": 3}, 1.2),
        ({"lengths": torch.tensor([3000, 4096]), "upper": 0}, {"causal": 2, "full": 1}, 1.15),
        ({"keep": torch.arange(S)[None] >= 1000, "upper": 0}, {"empty": 1, "causal": 1}, 1.2),
        ({"prefix": torch.tensor(1000), "upper": 0}, {"full": 1, "masked": 25}, 1.05),
    ],
)  # fmt: skip
def test_of_intervals_at_4096(arguments: Arguments, kinds: dict[str, int], most: float) -> None:
    batch = max(len(one) if one.dim() else 1 for one in arguments.values() if isinstance(one, Tensor))
    found, factor = kinds_and_factor(key_intervals(batch=batch, queries=S, keys=S, **arguments))
    assert found == kinds
    assert factor <= most


@pytest.mark.parametrize("number", [8, 60, 200, 1000])
@pytest.mark.parametrize("upper", [0, None])
def test_documents_compute_little_more_than_they_need(number: int, upper: int | None) -> None:
    """Half as much again as the documents' squares, and 32 x 32 a tile; neighbours have more than 32 rows together."""
    lengths = random_documents(number)
    intervals = key_intervals(batch=1, queries=S, keys=S, documents=documents(lengths), upper=upper)
    tiles = tiles_of(intervals, 1, S, S, None, None, False)
    assert computed_pairs(tiles) <= 1.5 * sum(n * n for n in lengths) + 1024 * len(tiles)
    assert len(tiles) <= min(number, 2 * S // 32 + 1)
    whole = [length(tile.q) for tile in tiles if tile.kind != "masked"]
    assert Counter(n for n in whole if n >= 32) == Counter(n for n in lengths if n >= 32)


def test_causal_pairs_are_those_of_the_kernels_blocks() -> None:
    def pairs(rows: int) -> int:
        return computed_pairs([Tile(slice(0, 1), slice(0, rows), slice(0, rows), "causal", True)])

    assert [pairs(n) / n**2 for n in (1, 100, 512, 1024, 4096)] == [1, 1, 1, 0.75, 0.5625]
    for n in range(1, 2000, 37):
        assert n * (n + 1) // 2 <= pairs(n) <= n * n


@pytest.mark.parametrize(
    ("words", "shape", "rows"), [(r"\[2, 4, 3\] or \[1, 4, 3\]: \[3, 4, 3\]", (3, 4, 3), 8), ("not 0", (2, 4, 3), 0)]
)
def test_what_does_not_fit_raises(words: str, shape: tuple[int, ...], rows: int) -> None:
    with pytest.raises(ValueError, match=words):
        tiles_of(torch.zeros(shape, dtype=torch.int64), 2, 4, 4, None, None, False, rows)
