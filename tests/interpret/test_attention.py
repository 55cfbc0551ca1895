"""Generated kernels of attention, interpreted, against attention written out in PyTorch by the fp64 rule."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from attention_cases import MASKS, PROGRAMS, Case, case, cases, masked, normal, with_intervals, with_program
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxopt.kernels.attention_configs import grain_of
from fxopt.kernels.attention_spec import parts_of
from fxopt.kernels.cards import INTERPRETER, Card
from fxopt.ops.attention import attention
from fxopt.ops.attention_operator import BACKWARD, FORWARD
from fxopt.ops.dropout_bits import keep_bits
from fxopt.ops.key_intervals import key_intervals
from fxopt.ops.query_tiles import query_tiles
from fxopt.score.bounds import largest
from fxopt.score.program import Program
from fxopt.score.term import Term, apply, cast_to, constant, variable

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def interpreted(one: Case) -> Case:
    """The case by Triton kernels."""
    one.options["lowering"] = "interpret"
    return one


@settings(max_examples=14)
@given(drawn=cases(dtypes=(F32, BF16, F16), small=True))
def test_equals_attention_written_out(drawn: Case) -> None:
    interpreted(drawn).check()


@pytest.mark.parametrize("dtype", [F32, BF16, pytest.param(F16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", MASKS)
def test_every_mask(name: str, dtype: torch.dtype) -> None:
    interpreted(masked(name, batch=2, heads=4, key_heads=2, queries=40, keys=40, width=16, dtype=dtype)).check()


@pytest.mark.parametrize("name", sorted(PROGRAMS))
def test_every_program_and_the_gradients_of_what_it_captures(name: str) -> None:
    interpreted(with_program(case(queries=40, upper=0, dtype=BF16), name)).check()


def test_dynamo_need_not_know_how_a_card_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA that is a call which gives a string, in the middle of a function that a user compiles."""

    def card_of(device: torch.device) -> Card:
        torch._dynamo.graph_break()
        return INTERPRETER

    monkeypatch.setattr("fxopt.ops.attention.card_of", card_of)
    one = masked("documents", batch=1, heads=2, key_heads=1, queries=20, keys=20, width=16)
    q, k, v = (one.tensors[name].detach() for name in "qkv")
    how = {"intervals": one.options["intervals"], "captures": one.captures, "predicate": str(one.options["predicate"])}

    def called(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, lowering="interpret", **how)

    compiled = torch.compile(called, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), called(q, k, v))


S, Q, K = (variable(name) for name in "sqk")
SHUT = apply("where", apply("lt", K, constant(20)), constant(-math.inf), S)
OPEN = cast_to("float", apply("ge", K, constant(20)))


def shut(s: Tensor) -> Tensor:
    return s.masked_fill(torch.arange(s.shape[-1]) < 20, -math.inf)


def opened(s: Tensor) -> Tensor:
    return (torch.arange(s.shape[-1]) >= 20).to(s.dtype)


@pytest.mark.parametrize("empty", ["zero", "uniform"])
@pytest.mark.parametrize(
    ("program", "score"),
    [
        (apply("mul", SHUT, constant(1.5)), lambda s: shut(s) * 1.5),
        (apply("add", S, apply("log", OPEN)), lambda s: s + opened(s).log()),
        (apply("sub", S, apply("div", constant(1.0), OPEN)), lambda s: s - 1 / opened(s)),
        (
            apply("where", apply("eq", apply("mod", Q, constant(2)), constant(0)), S, SHUT),
            lambda s: torch.where(torch.arange(s.shape[-2])[:, None] % 2 == 0, s, shut(s)),
        ),
        (apply("max", SHUT, apply("sub", SHUT, constant(1.0))), lambda s: torch.maximum(shut(s), shut(s) - 1)),
    ],
    ids=["scaled", "logarithm", "quotient", "every second row", "larger"],
)
def test_a_program_may_rule_out_all_of_the_first_keys(program: Term, score: Any, empty: str) -> None:
    """The first tile of 16 keys has no finite score, in a loop without a mask."""
    one = case(1, 2, 1, 40, empty=empty)
    one.options["program"], one.score = Program(program), score
    assert largest(program) == math.inf
    interpreted(one).check()


@pytest.mark.parametrize("empty", ["zero", "uniform", "uniform+"])
@pytest.mark.parametrize("program", ["identity", "bias"])
@pytest.mark.parametrize("sink", [False, True])
def test_rows_without_keys(empty: str, program: str, sink: bool) -> None:
    """The first rows of one batch row (padding on the left), the last of another, and one in the middle."""
    one = with_program(case(3, 4, 2, 40, upper=0, empty=empty), program)
    rows = torch.ones(3, 40, dtype=torch.bool)
    rows[0, :9], rows[1, 30:], rows[2, 17] = False, False, False
    one = with_intervals(one, rows=rows)
    if sink:
        one.tensors["sink"] = normal(4).requires_grad_()
    interpreted(one).check()


@pytest.mark.parametrize("dropout", [0.0, 0.9])
def test_rows_without_keys_poison_where_softmax_would(dropout: float) -> None:
    """Also where dropout keeps none of their probabilities: 0 times NaN is NaN."""
    one = case(1, 2, 1, 40, lower=-200, upper=-3, empty="nan")
    one.options |= {"dropout": dropout, "seed": torch.tensor(3)}
    every = interpreted(one).run(one.ours).named()
    assert every["loss"] is not None
    assert every["loss"][:, :, :3].isnan().all()
    assert not every["loss"][:, :, 3:].isnan().any()
    for name in ("k", "v"):
        gradient = every[f"grad {name}"]
        assert gradient is not None
        assert gradient.isnan().all()


@pytest.mark.parametrize("width", [3, 16, 24, 40, 80, 96, 200])
def test_heads_that_are_no_power_of_two(width: int) -> None:
    interpreted(case(1, 2, 1, 20, width=width, value_width=17, upper=0)).check()
    assert sum(length for _, length, _ in parts_of(width)) < 2 * max(width, 16)


SHAPES: dict[str, tuple[str, str, dict[str, int]]] = {
    # name: (mask, program, sizes other than 1 x 2 heads x 24 positions x 16)
    "cross attention": ("none", "identity", {"keys": 45, "key_heads": 1}),
    "cross attention, more queries than keys": ("lengths", "bias", {"queries": 40, "keys": 19}),
    "cross attention, causal at the right end": ("right", "softcap", {"keys": 45}),
    "odd heads": ("causal", "softcap", {"width": 33, "value_width": 7}),
    "values wider than keys": ("documents", "identity", {"width": 8, "value_width": 50}),
    "values narrower than keys": ("window", "alibi", {"width": 48, "value_width": 32}),
    "a bias of grouped heads": ("causal", "bias", {"heads": 4, "batch": 2}),
    "a bias of grouped heads, cross": ("rows", "bias", {"heads": 4, "keys": 45}),
    "buckets of grouped heads, odd": ("causal", "buckets", {"heads": 4, "key_heads": 2, "width": 20}),
}


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("name", SHAPES)
def test_every_shape(name: str, dtype: torch.dtype) -> None:
    mask, program, changes = SHAPES[name]
    usual = {"batch": 1, "heads": 2, "key_heads": 1, "queries": 24, "keys": 24, "width": 16}
    one = masked(mask, dtype=dtype, **usual | changes)
    interpreted(one if one.captures else with_program(one, program)).check()


@pytest.mark.parametrize("name", ["none", "documents"])
def test_dropout_draws_the_bits_of_the_cpu(name: str) -> None:
    """One seed drops the same probabilities on every device: by position, whatever the tiles are."""
    one = masked(name, batch=2, heads=4, key_heads=2, queries=40, keys=40, width=16)
    seed = torch.tensor(2**40 + 7)
    one.options |= {"dropout": 0.3, "seed": seed}
    whole = [slice(0, size) for size in (2, 4, 40, 40)]
    one.keep = (keep_bits(seed, 0.3, *whole) != 0, 1 / 0.7)
    interpreted(one).check()


@pytest.mark.parametrize("shape", [(0, 2, 5, 5), (1, 2, 0, 5), (1, 2, 5, 0), (2, 2, 1, 1)])
def test_sizes_of_nothing_and_one(shape: tuple[int, int, int, int]) -> None:
    batch, heads, queries, keys = shape
    one = interpreted(case(batch, heads, heads, queries, keys))
    step, right = one.run(one.ours), one.run(one.eager)
    for name, value in step.named().items():
        assert value is not None
        torch.testing.assert_close(value, right.named()[name], msg=name)


@pytest.mark.parametrize("program", ["identity", "bias", "alibi", "buckets"])
def test_repeats_bit_for_bit(program: str) -> None:
    one = interpreted(with_program(case(queries=40, dtype=BF16, upper=0), program))
    first, second = one.run(one.ours).named(), one.run(one.ours).named()
    for name, value in first.items():
        assert value is not None
        assert torch.equal(value, second[name]), name


def test_an_expanded_upstream_gradient() -> None:
    one = interpreted(case(1, 2, 1, 20))
    one.upstream = lambda out: torch.ones((), dtype=out.dtype).expand(out.shape)  # type: ignore[method-assign]
    one.check()


@pytest.mark.parametrize("upstream", [512.0, 1e-6])
@pytest.mark.parametrize("dtype", [F16, BF16])
def test_scaled_gradients_neither_vanish_nor_overflow(upstream: float, dtype: torch.dtype) -> None:
    one = interpreted(case(queries=40, dtype=dtype, upper=0))
    one.upstream = lambda out: normal(*out.shape).to(out.dtype) * upstream  # type: ignore[method-assign]
    one.check()


def test_gradients_that_nobody_wants_are_not_computed() -> None:
    one = interpreted(case(1, 2, 1, 20))
    for name in ("q", "k", "v"):
        one.tensors[name] = one.tensors[name].detach().requires_grad_(name == "v")
    step = one.check()
    assert [name for name, value in step.gradients.items() if value is not None] == ["v"]


# --- which queries a square of keys is seen by ---------------------------------------------------------------------


@given(seed=st.integers(0, 2**16), queries=st.sampled_from((1, 40, 96)), spreads=st.booleans())
@settings(max_examples=20)
def test_query_tiles_bound_what_is_seen(seed: int, queries: int, spreads: bool) -> None:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 3, (2, queries), generator=draw).sort(1).values
    keep = torch.rand(2, queries, generator=draw) < 0.9
    intervals = key_intervals(batch=2, queries=queries, keys=queries, documents=ids, keep=keep, upper=0)
    grain = grain_of(INTERPRETER)
    found = query_tiles(intervals, queries, grain, spreads)
    lo, hi, count = intervals.unbind(-1)
    for b in range(2):
        for tile, (first, stop, full_first, full_stop) in enumerate(found[b].tolist()):
            start, past = tile * grain, min((tile + 1) * grain, queries)
            seen = (lo[b] < past) & (hi[b] > start) | (spreads & (count[b] <= 0))
            rows = seen.nonzero().flatten().tolist()
            assert (first, stop) == ((rows[0], rows[-1] + 1) if rows else (0, 0))
            full = (lo[b] <= start) & (hi[b] >= past) & (count[b] == hi[b] - lo[b])
            assert full[full_first:full_stop].all()
            squares = [bool(one.all()) and len(one) == grain for one in full.split(grain)]
            assert (full_stop - full_first) // grain == max(map(len, "".join("01"[s] for s in squares).split("0")))


# --- the operator --------------------------------------------------------------------------------------------------


def test_fake_and_autograd_registrations_are_true() -> None:
    one = with_program(masked("documents", batch=2, heads=4, key_heads=2, queries=9, keys=9, width=8), "identity")
    q, k, v = (one.tensors[name] for name in "qkv")
    options = one.options
    arguments: list[Any] = [
        q, k, v, normal(4).requires_grad_(), options["intervals"], None, None, one.captures, "",
        str(options["predicate"]), 0.3, None, 0, 0.0, "zero", True, "interpret",
    ]  # fmt: skip
    torch.library.opcheck(FORWARD, arguments)
    plain = [one.detach() if isinstance(one, Tensor) else one for one in arguments]
    out, lse = FORWARD(*plain)
    torch.library.opcheck(BACKWARD, (torch.rand_like(out), *plain, out, lse, [True, True, True, True, False]))


def test_a_lowering_that_is_none() -> None:
    x = normal(1, 1, 4, 8)
    with pytest.raises(ValueError, match="lowering is 'triton': it must be one of auto, aten, interpret"):
        attention(x, x, x, lowering="triton")
