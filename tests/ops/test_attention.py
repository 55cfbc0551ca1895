"""fxopt::attention against attention written out in PyTorch, by the fp64 rule of `fxopt.testing.compare`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from allocations import peak_bytes
from attention_cases import (
    DTYPES,
    LAYOUTS,
    PROGRAMS,
    Case,
    S,
    case,
    cases,
    computed,
    masked,
    normal,
    with_intervals,
    with_program,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fxopt.ops.attention import attention
from fxopt.ops.attention_operator import BACKWARD, FORWARD
from fxopt.ops.dropout_bits import keep_bits
from fxopt.ops.registry import memory_of
from fxopt.score.program import Program
from fxopt.score.term import apply, constant

# --- values and gradients ----------------------------------------------------------------------------------------


@given(drawn=cases(), small=st.booleans(), flash=st.sampled_from((None, False)))
@pytest.mark.fault("non-unit last stride")
@pytest.mark.fault("misaligned storage offset")
def test_equals_attention_written_out(drawn: Case, small: bool, flash: bool | None) -> None:
    with computed(small, flash):
        drawn.check()


@pytest.mark.parametrize("flash", [None, False])
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("name", ["sink", "alibi", "temperature", "buckets"])
def test_gradients_of_few_numbers_are_as_good_as_eagers(name: str, dtype: torch.dtype, flash: bool | None) -> None:
    """Over 16 draws, for each of the numbers, root mean square: one draw says nothing of one number."""
    off: list[list[Tensor]] = [[], []]
    for seed in range(16):
        one = case(dtype=dtype, seed=seed, queries=48, upper=0)
        if name == "sink":
            one.tensors["sink"] = normal(4, seed=seed, dtype=dtype).requires_grad_()
        else:
            one = with_program(one, name, seed)
        where = "sink" if name == "sink" else "capture 0"
        with computed(True, flash):
            steps = [one.run(one.ours), one.run(one.eager)]
        exact = one.run(one.eager, torch.float64).gradients[where]
        assert exact is not None
        for found, step in zip(off, steps, strict=True):
            found.append((step.gradients[where] - exact) / exact.norm())
    ours, eager = (torch.stack(found).square().mean().sqrt() for found in off)
    assert ours <= 1.5 * eager + torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["none", "causal", "window", "documents", "padding", "predicate"])
@pytest.mark.parametrize("program", ["identity", "softcap", "bias of keys"])
def test_equals_attention_in_blocks_of_real_size(name: str, dtype: torch.dtype, program: str) -> None:
    one = masked(name, batch=2, heads=6, key_heads=2, queries=700, keys=700, width=40, dtype=dtype)
    (one if one.captures else with_program(one, program)).check()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("limits", [{}, {"upper": 0}, {"lower": -255, "upper": 0}])
@pytest.mark.parametrize("program", ["identity", "softcap", "alibi"])
def test_equals_attention_of_long_sequences(dtype: torch.dtype, limits: dict[str, int], program: str) -> None:
    with_program(case(1, 4, 2, 2500, width=64, dtype=dtype, **limits), program).check()


@pytest.mark.parametrize("program", sorted(PROGRAMS))
def test_gradcheck(program: str) -> None:
    one = with_program(case(1, 2, 1, 5, 6, width=3, value_width=2, dtype=torch.float64, upper=1), program)
    one.tensors["sink"] = normal(2, dtype=torch.float64).requires_grad_()
    names = sorted(one.tensors)

    def function(*tensors: Tensor) -> Tensor:
        return one.ours(dict(zip(names, tensors, strict=False)), tensors[len(names) :])

    with computed(True):
        assert torch.autograd.gradcheck(function, (*(one.tensors[name] for name in names), *one.captures))


@pytest.mark.parametrize("program", ["identity", "softcap", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_repeats_bit_for_bit(program: str, dtype: torch.dtype) -> None:
    one = with_program(case(queries=300, dtype=dtype, upper=0), program)
    first, second = one.run(one.ours).named(), one.run(one.ours).named()
    for name, value in first.items():
        assert value is not None
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("upstream", [512.0, 1e-6])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scaled_gradients_neither_vanish_nor_overflow(upstream: float, dtype: torch.dtype) -> None:
    one = case(queries=70, dtype=dtype, upper=0)
    one.upstream = lambda out: normal(*out.shape).to(out.dtype) * upstream  # type: ignore[method-assign]
    one.check()


# --- rows without keys -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("empty", ["zero", "uniform", "uniform+"])
@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("flash", [None, False])
@pytest.mark.parametrize("program", ["identity", "softcap", "bias"])
@pytest.mark.fault("fully masked rows")
def test_rows_without_keys(empty: str, sink: bool, dtype: torch.dtype, flash: bool | None, program: str) -> None:
    """The first rows of one batch row (padding on the left), the last of another, and one in the middle."""
    one = with_program(case(3, 4, 2, 40, dtype=dtype, upper=0, empty=empty), program)
    rows = torch.ones(3, 40, dtype=torch.bool)
    rows[0, :9], rows[1, 30:], rows[2, 17] = False, False, False
    one = with_intervals(one, rows=rows)
    if sink:
        one.tensors["sink"] = normal(4, dtype=dtype).requires_grad_()
    with computed(True, flash):
        one.check()


@pytest.mark.parametrize("flash", [None, False])
def test_a_bias_of_minus_infinity_is_a_mask(flash: bool | None) -> None:
    """Rows that a band and a bias leave no key are empty too: the first four, for all heads of batch row 1."""
    one = with_program(case(2, 4, 2, 40, upper=0, empty="uniform"), "bias of keys", requires_grad=False)
    one.captures[0][1, 0, :4] = -math.inf
    one.allowed = one.allowed & (one.captures[0] > -math.inf)[:, None]
    one.score = lambda s, c: s + c.clamp(min=-1e30).to(s.dtype)[:, None]
    for small in (False, True):
        with computed(small, flash):
            one.check()


@pytest.mark.parametrize("flash", [None, False])
@pytest.mark.parametrize("program", ["identity", "bias"])
def test_nan_rows_are_nan_and_reach_the_gradients_of_their_heads(flash: bool | None, program: str) -> None:
    one = with_program(case(2, 4, 2, 20, upper=0, empty="nan"), program)
    one = with_intervals(one, rows=torch.arange(40).view(2, 20) != 3)
    with computed(True, flash):
        step = one.run(one.ours)
    assert step.loss[0, :, 3].isnan().all()
    assert step.loss.isnan().sum() == 4 * 8
    for name in ("k", "v"):
        gradient = step.gradients[name]
        assert gradient is not None
        assert gradient[0].isnan().all()
        assert gradient[1].isfinite().all()


@pytest.mark.parametrize("empty", ["zero", "nan", "uniform", "uniform+"])
@pytest.mark.parametrize("sizes", [(0, 5, 5), (2, 0, 5), (2, 5, 0), (0, 0, 0)])
@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.fault("zero-size inputs and grid 0")
def test_nothing_to_attend_to(sizes: tuple[int, int, int], empty: str, sink: bool) -> None:
    batch, queries, keys = sizes
    one = case(batch, 4, 2, queries, keys, empty=empty)
    if sink:
        one.tensors["sink"] = normal(4).requires_grad_()
    for program in ("identity", "softcap"):
        step = with_program(one, program).run(one.ours)
        assert step.loss.shape == (batch, 4, queries, 8)
        assert (step.loss.isnan() if empty != "zero" and not sink else step.loss == 0).all()
        assert all(gradient is not None and (gradient == 0).all() for gradient in step.gradients.values())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("flash", [None, False])
@pytest.mark.parametrize("limits", [{}, {"upper": 0}, {"lower": -3, "upper": 0}])
@pytest.mark.fault("NaN/Inf inputs and GradScaler")
def test_nan_and_infinity_reach_the_rows_that_may_attend_to_them(
    value: float, where: str, flash: bool | None, limits: dict[str, int]
) -> None:
    """Eager lets them reach all rows, since 0 * NaN is NaN, if the mask forbids the key or not.

    Where the one score of a row is -inf, torch's flash attention gives 0 and eager NaN: that of row 0 is not looked at.
    """
    one = case(1, 2, 2, 40, empty="nan", **limits)
    poisoned = one.tensors[where].detach().clone()
    poisoned[0, 0, 0, 0] = value
    one.tensors[where] = poisoned.requires_grad_()
    with computed(True, flash):
        ours, eager = one.run(one.ours), one.run(one.eager)
    sees = one.allowed[0, 0, :, 0] & (torch.arange(40) > 0)
    for name in ("loss", "grad q"):
        mine, theirs = ((~step.named()[name][0, 0].isfinite()).any(-1) for step in (ours, eager))
        assert (mine | ~theirs)[sees].all(), name
        assert where != "q" or not mine[1:].any()


# --- dropout -----------------------------------------------------------------------------------------------------


def dropped(one: Case, rate: float, seed: int) -> Case:
    """The case with dropout; `written_out` multiplies by what the operator's hash keeps."""
    q, k = one.tensors["q"], one.tensors["k"]
    one.options |= {"dropout": rate, "seed": torch.tensor(seed)}
    spans = [slice(0, size) for size in (*q.shape[:3], k.shape[2])]
    one.keep = keep_bits(torch.tensor(seed), rate, *spans) != 0, 1 / (1 - rate)
    return one


@given(
    dtype=st.sampled_from((torch.float64, torch.float32, torch.bfloat16)), rate=st.sampled_from((0.1, 0.5, 0.9)),
    seed=st.integers(-(2**63), 2**63 - 1), name=st.sampled_from(("none", "causal", "window", "padding")),
    program=st.sampled_from(("identity", "softcap", "bias")), small=st.booleans(),
)  # fmt: skip
@pytest.mark.fault("recompute of dropout")
def test_dropout_drops_the_same_in_every_tiling_and_in_the_backward(
    dtype: torch.dtype, rate: float, seed: int, name: str, program: str, small: bool
) -> None:
    one = masked(name, seed % 99, batch=2, heads=4, key_heads=2, queries=40, keys=40, width=16, dtype=dtype)
    one = dropped(one if one.captures else with_program(one, program), rate, seed)
    with computed(small):
        one.check()


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.75])
def test_dropout_keeps_its_share_everywhere_and_neighbours_are_independent(rate: float) -> None:
    """Within 5 standard deviations of what independent draws give."""
    spans = (slice(0, 4), slice(0, 8), slice(0, 128), slice(0, 512))
    kept = (keep_bits(torch.tensor(17), rate, *spans) != 0).double()
    off = (kept - (1 - rate)) / math.sqrt(rate * (1 - rate))
    for axes in ((0, 1, 2, 3), (1, 2, 3), (0, 1, 3), (0, 1, 2), (3,)):
        mean = off.mean(axes)
        deviations = mean * math.sqrt(off.numel() / mean.numel())
        assert deviations.abs().max() < 5, axes
        if mean.numel() > 100:
            assert 0.8 < deviations.std() < 1.2
    for axis in range(4):
        for step in (1, 2, 3):
            together = (off * off.roll(step, axis)).mean()
            assert abs(together) * math.sqrt(off.numel()) < 5
    other = (keep_bits(torch.tensor(18), rate, *spans) != 0).double()
    assert abs(((other - (1 - rate)) * off).mean()) * math.sqrt(off.numel()) < 5


def test_dropout_keeps_the_mean() -> None:
    one = case(8, 4, 4, 64, width=4)
    one.options |= {"dropout": 0.3, "seed": torch.tensor(5)}
    one.tensors["v"] = torch.ones_like(one.tensors["v"])
    out = one.ours(one.tensors, [])
    assert 0.99 < out.mean() < 1.01
    assert out.std() > 0.05


# --- gradients that are wanted -----------------------------------------------------------------------------------


@pytest.mark.parametrize("flash", [None, False])
@pytest.mark.parametrize("wanted", [("q",), ("k",), ("v",), ("q", "k"), ("sink",), ("capture",), ("capture", "v"), ()])
@pytest.mark.fault("partly frozen or tied weights")
def test_computes_the_gradients_that_are_wanted(wanted: tuple[str, ...], flash: bool | None) -> None:
    one = with_program(case(queries=70, upper=0), "bias")
    one.tensors["sink"] = normal(4)
    for name in one.tensors:
        one.tensors[name] = one.tensors[name].detach().requires_grad_(name in wanted)
    one.captures = [one.captures[0].detach().requires_grad_("capture" in wanted)]
    with computed(True, flash):
        step = one.check()
    found = {name.split()[0] for name, gradient in step.gradients.items() if gradient is not None}
    assert found == set(wanted)


def test_multiplies_no_more_than_is_wanted() -> None:
    one = with_program(case(1, 2, 2, 64, width=16, upper=0), "softcap")
    product = 2 * 2 * 16 * (64 * 65 // 2)

    def products(*wanted: str) -> float:
        tensors = {name: t.detach().requires_grad_(name in wanted) for name, t in one.tensors.items()}
        with FlopCounterMode(display=False) as counter:
            out = one.ours(tensors, [])
            if out.requires_grad:
                out.sum().backward()
        return counter.get_total_flops() / product

    assert products() == 2
    assert products("v") == 4
    assert products("q") == products("k") == 5
    assert products("q", "k", "v") == 7


def test_gradients_have_the_layout_of_their_inputs() -> None:
    for program in ("identity", "softcap"):
        one = with_program(case(queries=70, upper=0), program)
        for name, change in (("q", LAYOUTS["contiguous"]), ("v", LAYOUTS["transposed"])):
            one.tensors[name] = change(one.tensors[name].detach()).requires_grad_()
        out = one.ours(one.tensors, [])
        for name, found in zip("qkv", torch.autograd.grad(out.sum(), [one.tensors[n] for n in "qkv"]), strict=True):
            assert found.stride() == one.tensors[name].stride()


@pytest.mark.parametrize("heads_last", [False, True])
@pytest.mark.parametrize("program", ["identity", "softcap"])
@pytest.mark.parametrize("queries", [1, 70])
@pytest.mark.fault("output strides unlike eager's")
def test_the_result_is_laid_out_as_asked(heads_last: bool, program: str, queries: int) -> None:
    one = with_program(case(queries=queries), program)
    one.heads_last = heads_last
    out = one.ours(one.tensors, [])
    assert (out.transpose(1, 2) if heads_last else out).is_contiguous()


def test_differentiating_twice_raises_and_keeping_the_graph_does_not() -> None:
    one = case()
    out = one.ours(one.tensors, [])
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(out.sum(), one.tensors["q"], create_graph=True)
    first, second = (torch.autograd.grad(out.sum(), one.tensors["q"], retain_graph=True) for _ in range(2))
    assert torch.equal(first[0], second[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("program", ["identity", "softcap"])
def test_ambient_autocast_changes_nothing(dtype: torch.dtype, program: str) -> None:
    one = with_program(case(queries=70, upper=0, dtype=dtype), program)
    steps = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.float16, enabled=enabled):
            steps.append(one.run(one.ours).named())
    assert all(torch.equal(one, steps[1][name]) for name, one in steps[0].items())


# --- what does not fit -------------------------------------------------------------------------------------------

READS_S = Program(apply("lt", S, constant(0.0)))


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, "4 axes", {"q": torch.zeros(2, 4, 33)}),
        (ValueError, "do not fit", {"k": torch.zeros(2, 2, 33, 9)}),
        (ValueError, "do not fit", {"v": torch.zeros(2, 2, 32, 8)}),
        (ValueError, "4 query heads cannot share 3", {"k": torch.zeros(2, 3, 33, 8), "v": torch.zeros(2, 3, 33, 8)}),
        (ValueError, "width 0", {"q": torch.zeros(2, 4, 33, 0), "k": torch.zeros(2, 2, 33, 0)}),
        (TypeError, "share a floating dtype", {"v": torch.zeros(2, 2, 33, 8, dtype=torch.bfloat16)}),
        (ValueError, r"sink must be \[4\]", {"sink": torch.zeros(2)}),
        (TypeError, "sink is torch.int64", {"sink": torch.zeros(4, dtype=torch.int64)}),
        (ValueError, "intervals must be", {"intervals": torch.zeros(2, 32, 3, dtype=torch.int64)}),
        (TypeError, "int64", {"intervals": torch.zeros(2, 33, 3)}),
        (ValueError, "the program loads from 1", {"program": Program(PROGRAMS["alibi"][0])}),
        (TypeError, "program returns bool", {"program": READS_S}),
        (TypeError, "predicate returns float", {"predicate": Program(S)}),
        (ValueError, "the predicate reads s", {"predicate": READS_S}),
        (ValueError, "line 1", {"program": "return s"}),
        (ValueError, "empty is 'none'", {"empty": "none"}),
        (ValueError, "less than 1", {"dropout": 1.0}),
        (ValueError, "needs a seed", {"dropout": 0.1}),
        (ValueError, "int64 scalar", {"seed": torch.zeros(2)}),
        (ValueError, "rows without keys", {"dropout": 0.1, "seed": torch.tensor(0), "empty": "uniform"}),
    ],
)
def test_what_does_not_fit_is_named(error: type[Exception], message: str, change: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        attention(**{**case().tensors, **change})


# --- as an operator in graphs ------------------------------------------------------------------------------------


def arguments(one: Case) -> tuple[Any, ...]:
    """The operator's."""
    tensors, options = one.tensors, {"program": "", "predicate": "", "dropout": 0.0, "empty": "zero", **one.options}
    return (
        *(tensors.get(name) for name in ("q", "k", "v", "sink")), options.get("intervals"), None, options.get("seed"),
        one.captures, str(options["program"]), str(options["predicate"]), 0.3,
        *(options.get(name) for name in ("lower", "upper", "dropout", "empty")), one.heads_last, "auto",
    )  # fmt: skip


@pytest.mark.parametrize("program", ["identity", "softcap", "bias"])
@pytest.mark.parametrize("name", ["none", "window", "padding"])
@pytest.mark.parametrize("layout", ["as projected", "contiguous"])
def test_fake_and_autograd_registrations_are_true(program: str, name: str, layout: str) -> None:
    one = masked(name, batch=2, heads=4, key_heads=2, queries=9, keys=9, width=8)
    one = one if one.captures else with_program(one, program)
    one.tensors |= {n: LAYOUTS[layout](t.detach()).requires_grad_() for n, t in one.tensors.items()}
    one.tensors["sink"] = normal(4).requires_grad_()
    one.heads_last = layout == "contiguous"
    torch.library.opcheck(FORWARD, arguments(one))
    plain = [one.detach() if isinstance(one, Tensor) else one for one in arguments(one)]
    plain[7] = [capture.detach() for capture in plain[7]]
    out, lse = FORWARD(*plain)
    for wanted in (True, False):
        flags = [True, wanted, True, wanted, *(wanted and c.is_floating_point() for c in plain[7])]
        torch.library.opcheck(BACKWARD, (torch.rand_like(out), *plain, out, lse, flags))


def test_lse_is_the_logarithm_of_the_sum_of_exponentials() -> None:
    one = case(queries=70, upper=0)
    q, k = one.tensors["q"].detach(), one.tensors["k"].detach().repeat_interleave(2, 1)
    s = (q @ k.mT * 0.3).masked_fill(~one.allowed, -math.inf)
    for sink in (None, normal(4)):
        one.tensors["sink"] = sink
        right = s.logsumexp(-1) if sink is None else torch.logaddexp(s.logsumexp(-1), sink[:, None])
        for flash in (None, False):
            with computed(True, flash):
                lse = FORWARD(*arguments(one))[1]
            assert not lse.requires_grad
            torch.testing.assert_close(lse, right)


@pytest.mark.parametrize("program", ["identity", "bias"])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_with_changing_sizes(program: str, dynamic: bool, backend: str) -> None:
    """Values and gradients through torch.compile; sizes that became symbols, then 1."""

    def function(tensors: Mapping[str, Tensor], captures: Sequence[Tensor], **options: Any) -> Tensor:
        changed = {name: torch.tanh(one) for name, one in tensors.items()}
        out = attention(**changed, captures=list(captures), **options)
        return out.transpose(1, 2).flatten(2) * 0.5

    compiled = torch.compile(function, backend=backend, dynamic=dynamic, fullgraph=True)
    for batch, queries in ((2, 40), (3, 21), (2, 1)) if dynamic else ((2, 40),):
        one = with_program(case(batch, 4, 2, queries, dtype=torch.float64, upper=0), program)
        one.options["program"] = str(one.options["program"])
        steps = [one.run(lambda t, c, f=f, o=one.options: f(t, c, **o)) for f in (compiled, function)]
        for name, right in steps[1].named().items():
            torch.testing.assert_close(steps[0].named()[name], right, rtol=1e-12, atol=1e-12)


# --- memory ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("program", ["identity", "softcap", "alibi", "bias of keys"])
@pytest.mark.parametrize(
    ("limits", "dropout"), [({"upper": 0}, 0.0), ({"lower": -127, "upper": 0}, 0.0), ({}, 0.0), ({"upper": 0}, 0.1)]
)
def test_the_memory_formula_bounds_what_the_allocator_sees(
    dtype: torch.dtype, program: str, limits: dict[str, int], dropout: float
) -> None:
    one = with_program(case(1, 4, 2, 2048, width=32, dtype=dtype, **limits), program, requires_grad=dropout > 0)
    one.options |= {"dropout": dropout, "seed": torch.tensor(0)}
    every = [t.detach() if isinstance(t, Tensor) else t for t in arguments(one)]
    every[7] = [capture.detach() for capture in one.captures]
    out, lse = FORWARD(*every)
    flags = [True, True, True, False, *(capture.requires_grad for capture in one.captures)]
    for op, inputs in ((FORWARD, every), (BACKWARD, [torch.rand_like(out), *every, out, lse, flags])):
        peak, formula = peak_bytes(lambda op=op, inputs=inputs: op(*inputs)), memory_of(op, *inputs)
        assert formula is not None
        assert peak <= formula.outputs + formula.workspace <= 2.5 * peak + 2**21
        assert peak < 2048 * 2048 * 4 * 4 / 2  # half of the scores


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["documents", "padding", "prefix", "predicate"])
def test_the_memory_formula_bounds_what_masks_take(name: str, dtype: torch.dtype) -> None:
    one = masked(name, batch=2, heads=4, key_heads=2, queries=1024, keys=1024, width=16, dtype=dtype)
    every = [t.detach() if isinstance(t, Tensor) else t for t in arguments(one)]
    out, lse = FORWARD(*every)
    backward = [torch.rand_like(out), *every, out, lse, [True, True, True, False, *(False for _ in one.captures)]]
    for op, inputs in ((FORWARD, every), (BACKWARD, backward)):
        formula = memory_of(op, *inputs)
        assert formula is not None
        assert peak_bytes(lambda op=op, inputs=inputs: op(*inputs)) <= formula.outputs + formula.workspace


@pytest.mark.parametrize("flash", [None, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["causal", "window", "documents", "padding", "predicate"])
def test_scores_never_exist(name: str, flash: bool | None) -> None:
    """4096 x 4096 x 4 heads of scores are 256 MiB, and a mask of them 16."""
    one = masked(name, batch=1, heads=4, key_heads=1, queries=4096, keys=4096, width=8)
    if name == "padding":
        one.captures, one.options["predicate"] = [], ""
    with computed(False, flash):
        peak = peak_bytes(lambda: one.ours(one.tensors, one.captures).sum().backward())
    assert peak < 30 * 2**20
