"""Masks are put in the class they have: against the tensor itself, for every spelling and for random conjunctions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from fxopt.capture import trace
from fxopt.score.masks import Mask, classify
from fxopt.score.operands import B, H, K, Q
from fxopt.score.program import Program
from fxopt.score.reader import Reader, written_in
from fxopt.score.scores import separate
from fxopt.score.term import Term, apply, constant, variable

BATCH, HEADS = 2, 3
MIN = torch.finfo(torch.float32).min


class Recorder(fx.Interpreter):
    """Runs a graph and keeps what every node computed."""

    def __init__(self, gm: fx.GraphModule):
        super().__init__(gm, garbage_collect_values=False)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.values[n] = super().run_node(n)
        return self.values[n]


class Case:
    """A mask that a function of index tensors and inputs builds, read and classified."""

    def __init__(self, build: Callable[..., Tensor], queries: int, keys: int, **inputs: Tensor):
        self.queries, self.keys = queries, keys
        gm = trace(lambda **given: build(*indices(queries, keys), **given), inputs)
        recorder = Recorder(gm)
        self.tensor = recorder.run(*inputs.values())
        self.values = recorder.values
        self.node = next(iter(reversed(gm.graph.nodes))).args[0]
        self.reader = Reader({"b": BATCH, "h": HEADS, "q": queries, "k": keys}, mutated=written_in(gm.graph))
        self.term = self.reader.broadcast(self.node, (B, H, Q, K))

    def classified(self, condition: Term | None = None) -> Mask:
        return classify(self.term if condition is None else condition, self.reader, self.queries, self.keys)

    def evaluated(self, term: Term) -> Tensor:
        """A term without s at every (b, h, q, k)."""
        program, sources = Program.of(term)
        captures = [self.values[source] for source in sources]
        sizes = (BATCH, HEADS, self.queries, self.keys)
        found = program.on_block(None, *(slice(0, size) for size in sizes), captures)
        return found.expand(sizes)

    def dense(self, mask: Mask) -> Tensor:
        """Which keys `mask` allows, element by element."""
        distance = torch.arange(self.keys) - torch.arange(self.queries)[:, None]
        allowed = torch.ones(BATCH, HEADS, self.queries, self.keys, dtype=torch.bool)
        if mask.lower is not None:
            allowed &= distance >= mask.lower
        if mask.upper is not None:
            band = (distance <= mask.upper).expand_as(allowed)
            if mask.prefix is not None:
                band = band | (torch.arange(self.keys) < self.evaluated(mask.prefix))
            allowed &= band
        if mask.lengths is not None:
            allowed &= torch.arange(self.keys) < self.evaluated(mask.lengths)
        if mask.rows is not None:
            allowed &= self.evaluated(mask.rows)
        return allowed & self.evaluated(mask.condition)


def indices(queries: int, keys: int) -> tuple[Tensor, Tensor]:
    return torch.arange(queries)[:, None], torch.arange(keys)[None, :]


def ids_of(positions: Tensor) -> Tensor:
    return (torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1) != 1).cumsum(-1)


def same(ids: Tensor) -> Tensor:
    return ids[:, None, :, None] == ids[:, None, None, :]


def batch_index() -> Tensor:
    return torch.arange(BATCH)[:, None, None, None]


def by_position(q: Tensor, k: Tensor, positions: Tensor) -> Tensor:
    ids, b = ids_of(positions), batch_index()
    inside = ids[b, q] == ids[b, k]
    return inside & (positions[b, k] <= positions[b, q])


def position_window(q: Tensor, k: Tensor, positions: Tensor) -> Tensor:
    b = batch_index()
    return by_position(q, k, positions) & (positions[b, k] > positions[b, q] - 3)


def default_positions(q: Tensor, k: Tensor) -> Tensor:
    positions = torch.arange(q.shape[0]).unsqueeze(0).expand(BATCH, -1)
    return by_position(q, k, positions)


SPELLINGS: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "le": ("causal", lambda q, k: k <= q),
    "not gt": ("causal", lambda q, k: ~(k > q)),
    "tril of ones": ("causal", lambda q, k: torch.tril(torch.ones(len(q), k.shape[1], dtype=torch.bool))),
    "tril of floats": ("causal", lambda q, k: torch.tril(torch.ones(len(q), k.shape[1])) != 0),
    "tril == 0": ("causal", lambda q, k: ~(torch.ones(len(q), k.shape[1]).tril() == 0)),
    "triu inverted": ("causal", lambda q, k: torch.triu(torch.ones(len(q), k.shape[1]), diagonal=1).logical_not()),
    "triu by bool": ("causal", lambda q, k: ~torch.ones(len(q), k.shape[1], dtype=torch.bool).triu(1)),
    "rows - columns": ("causal", lambda q, k: q - k >= 0),
    "where": ("causal", lambda q, k: torch.where(k <= q, True, False)),
    "transformers' positions": ("causal", default_positions),
    "all true": ("all", lambda q, k: (q >= 0) & (k >= 0)),
    "wide window": ("all", lambda q, k: (q - k).abs() <= 100),
    "window": ("window(3)", lambda q, k: (k <= q) & (k > q - 3)),
    "window by triu of tril": ("window(3)", lambda q, k: torch.ones(len(q), k.shape[1]).tril().triu(-2).bool()),
    "both sides": ("bidirectional window(2)", lambda q, k: (q - k).abs() <= 2),
    "both sides, strictly": ("bidirectional window(2)", lambda q, k: (q - k).abs() < 3),
    "a band": ("band(-2..1)", lambda q, k: (k - q >= -2) & (k - q < 2)),
    "offset causal": ("band(..2)", lambda q, k: k <= q + 2),
    "chunks": ("documents", lambda q, k: q // 4 == k // 4),
    "causal chunks": ("causal & documents", lambda q, k: (q // 4 == k // 4) & (k <= q)),
}
WITH_INPUTS: dict[str, tuple[str, str, Callable[..., Tensor]]] = {
    "packed": ("causal & documents", "positions", by_position),
    "packed window": ("window(3) & documents", "positions", position_window),
    "ids": ("documents", "ids", lambda q, k, ids: same(ids)),
    "ids and causal": ("causal & documents", "ids", lambda q, k, ids: same(ids) & (k <= q)),
    "some ids": ("documents & rows", "ids", lambda q, k, ids: same(ids) & (ids >= 1)[:, None, :, None]),
    "padding": ("causal & padding", "keep", lambda q, k, keep: (k <= q) & keep.bool()[:, None, None]),
    "padding by index": ("padding", "keep", lambda q, k, keep: (q >= 0) & keep.bool()[batch_index(), k]),
    "padding == 1": ("padding", "keep", lambda q, k, keep: (keep == 1)[:, None, None].expand(-1, 1, len(q), -1)),
    "padded rows": ("rows", "keep", lambda q, k, keep: keep.bool()[:, None, :, None].expand(-1, 1, -1, k.shape[1])),
    "lengths": ("lengths", "lengths", lambda q, k, lengths: (k < lengths[:, None, None, None]) & (q >= 0)),
    "lengths, other side": ("lengths", "lengths", lambda q, k, lengths: lengths[:, None, None, None] >= k + q * 0),
    "prefix": ("prefix", "lengths", lambda q, k, lengths: (k <= q) | (k < lengths[:, None, None, None])),
    "prefix in a window": (
        "band(-2..) & dense", "lengths",
        lambda q, k, lengths: ((k <= q) | (k < lengths[:, None, None, None])) & (k > q - 3),
    ),
    "given": ("dense", "given", lambda q, k, given: given),
    "given and causal": ("causal & dense", "given", lambda q, k, given: given & (k <= q)),
    "positions that are no documents": (
        "dense", "positions", lambda q, k, positions: positions[:, None, None] <= positions[:, None, :, None]
    ),
    "equal up to an offset": ("dense", "ids", lambda q, k, ids: ids[:, None, :, None] == ids[:, None, None] + 1),
    "two ids": ("documents & dense", "ids", lambda q, k, ids: same(ids) & same(ids.flip(-1))),
    "written in place": ("dense", "given", lambda q, k, given: written_in_place(given)),
}  # fmt: skip


def written_in_place(given: Tensor) -> Tensor:
    mask = given.clone()
    mask[:, :, 0] = True
    return mask


def drawn(name: str, length: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    if name == "positions":
        index = torch.arange(length).expand(BATCH, -1)
        starts = torch.where((integers(3, BATCH, length) == 0) | (index == 0), index, 0).cummax(1).values
        return index - starts + integers(5, BATCH, 1)
    if name == "given":
        return integers(2, BATCH, 1, length, length).bool()
    return {
        "ids": integers(4, BATCH, length) - 1,
        "keep": integers(2, BATCH, length),
        "lengths": integers(length, BATCH),
    }[name]


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize(("queries", "keys"), [(9, 9), (5, 9), (9, 5)])
def test_structure_of_indices(name: str, queries: int, keys: int) -> None:
    if queries != keys and name == "transformers' positions":
        keys = queries  # its positions are those of queries
    case = Case(SPELLINGS[name][1], queries, keys)
    mask = case.classified()
    assert torch.equal(case.dense(mask), case.tensor.expand(BATCH, HEADS, queries, keys))
    if queries == keys:
        assert mask.name == SPELLINGS[name][0]
    assert "dense" not in mask.name


@pytest.mark.parametrize("name", WITH_INPUTS)
@settings(max_examples=12)
@given(length=st.integers(6, 9), seed=st.integers(0, 2**20))
def test_structure_of_inputs(name: str, length: int, seed: int) -> None:
    expected, source, build = WITH_INPUTS[name]
    case = Case(build, length, length, **{source: drawn(source, length, seed)})
    mask = case.classified()
    assert mask.name == expected
    assert torch.equal(case.dense(mask), case.tensor.expand(BATCH, HEADS, length, length))


@st.composite
def conditions(draw: st.DrawFn) -> tuple[int, int, Callable[..., Tensor]]:
    """A conjunction of a few conditions, some negated or joined by `or`, over random sizes."""
    queries, keys = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    number = st.integers(-4, 9)
    parts: list[Callable[..., Tensor]] = []
    for _ in range(draw(st.integers(1, 4))):
        kind, one, other = draw(st.integers(0, 9)), draw(number), draw(number)
        parts.append(
            [
                lambda q, k, given, n=one: k <= q + n,
                lambda q, k, given, n=one: k > q - n,
                lambda q, k, given, n=one: (q - k).abs() <= n,
                lambda q, k, given, n=one: q // (n * n + 1) == k // (n * n + 1),
                lambda q, k, given, n=one, m=other: (k <= q + n) | (k < m),
                lambda q, k, given, n=one: (k < n) & (q >= 0),
                lambda q, k, given, n=one: (q > n) & (k >= 0),
                lambda q, k, given, n=one, m=other: ~((k <= q + n) & (q <= k + m)),
                lambda q, k, given, n=one: 2 * k <= q + n,
                lambda q, k, given: given,
            ][kind]
        )

    def build(q: Tensor, k: Tensor, given: Tensor) -> Tensor:
        found = parts[0](q, k, given)
        for part in parts[1:]:
            found = found & part(q, k, given)
        return found

    return queries, keys, build


@given(drawn_condition=conditions(), seed=st.integers(0, 2**20))
def test_never_a_wrong_class(drawn_condition: Any, seed: int) -> None:
    queries, keys, build = drawn_condition
    generator = torch.Generator().manual_seed(seed)
    given_mask = torch.randint(2, (BATCH, HEADS, queries, keys), generator=generator).bool()
    case = Case(build, queries, keys, given=given_mask)
    mask = case.classified()
    dense = case.dense(mask)
    assert torch.equal(dense, case.tensor.expand_as(dense)), mask.name
    if mask.never_empty(queries, keys):
        assert dense.any(-1).all()


ADDITIVE: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "where min": ("uniform+", lambda allowed: torch.where(allowed, 0.0, MIN)),
    "where inf": ("nan", lambda allowed: torch.where(allowed, 0.0, float("-inf"))),
    "masked_fill": ("uniform+", lambda allowed: torch.zeros(allowed.shape).masked_fill(~allowed, -1e9)),
    "one minus mask": ("uniform+", lambda allowed: (1.0 - allowed.float()) * MIN),
    "minus times mask": ("uniform+", lambda allowed: (~allowed).float() * -1e10),
    "sum with a number": ("uniform+", lambda allowed: torch.where(allowed, 0.0, MIN) + 0.0),
}


@pytest.mark.parametrize("name", ADDITIVE)
@pytest.mark.fault("finfo.min masks")
def test_additive_spellings_are_conditions(name: str) -> None:
    empty, spell = ADDITIVE[name]
    case = Case(lambda q, k: spell(k <= q), 6, 6)
    found = separate(apply("add", variable("s"), case.term))
    assert found.program is variable("s")
    assert found.empty == empty
    assert case.classified(found.conditions[0]).name == "causal"


def test_a_small_number_is_a_bias() -> None:
    """-10000 is the mask of the first BERTs, and a difference of scores that exists."""
    case = Case(lambda q, k: torch.where(k <= q, 0.0, -10000.0), 6, 6)
    found = separate(apply("add", variable("s"), case.term))
    assert found.conditions == ()
    assert torch.equal(case.evaluated(found.program.args[1]), case.tensor.expand(BATCH, HEADS, 6, 6))


def test_two_finite_masks_name_no_empty_row() -> None:
    case = Case(lambda q, k: torch.where(k <= q, 0.0, MIN) + torch.where(k > 2, 0.0, MIN), 6, 6)
    found = separate(apply("add", variable("s"), case.term))
    assert len(found.conditions) == 2
    assert found.empty is None


def test_a_mask_of_floats_keeps_what_it_adds() -> None:
    case = Case(lambda q, k, bias: bias.masked_fill(k > q, MIN), 6, 6, bias=torch.randn(HEADS, 6, 6))
    found = separate(apply("add", variable("s"), case.term))
    assert case.classified(found.conditions[0]).name == "causal"
    assert torch.equal(case.evaluated(found.program.args[1])[0], case.values[found.program.args[1].args[0]])


def test_conditions_that_are_constants() -> None:
    case = Case(lambda q, k: k <= q, 4, 4)
    assert case.classified(constant(True)).name == "all"
    assert not case.dense(case.classified(constant(False))).any()
