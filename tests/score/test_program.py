"""Score programs: text, evaluation against one score at a time, derivatives against autograd, rewrites."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxopt.compat import FakeTensorMode
from fxopt.score.program import Program, ProgramError
from fxopt.score.term import BINARY, COMPARISONS, LOGICAL, UNARY, Term, apply, cast_to, constant, load, variable
from fxopt.testing.programs import Sizes, score_programs, terms

SIZES: Sizes = (2, 3, 3, 4)
WHOLE = tuple(slice(0, size) for size in SIZES)
DOUBLE = torch.float64
S, B, H, Q, K = map(variable, "sbhqk")

ALIBI = """(s, b, h, q, k):
  %0: float = mul s, 0.125
  %1: int = sub k, q
  %2: float = cast %1
  %3: float = load 0[h]
  %4: float = mul %2, %3
  %5: float = add %0, %4
  return %5"""
SOFTCAP = """(s, b, h, q, k):
  %0: float = div s, 30.0
  %1: float = tanh %0
  %2: float = mul %1, 30.0
  return %2"""

Problem = tuple[Program, list[Tensor]]


def problems(**how: Any) -> st.SearchStrategy[Problem]:
    """Programs for `SIZES`, captures in fp64."""
    return score_programs(SIZES, dtype=DOUBLE, **how)


def scores(seed: int = 0, sizes: Sequence[int] = SIZES, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(tuple(sizes), generator=torch.Generator().manual_seed(seed), dtype=DOUBLE).to(dtype)


def indices(spans: Sequence[slice] = WHOLE) -> list[Tensor]:
    shapes = [[-1 if axis == own else 1 for axis in range(4)] for own in range(4)]
    return [torch.arange(span.start, span.stop).view(shape) for span, shape in zip(spans, shapes, strict=True)]


def simple(op: str, *args: Any) -> Term:
    return apply(op, *(constant(item) if isinstance(item, bool | int | float) else item for item in args))


def same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.nan_to_num(nan=7.25), other.nan_to_num(nan=7.25))


# --- one score at a time -----------------------------------------------------------------------------------------

ONE: dict[str, Any] = {
    **{name: getattr(torch, name) for name in UNARY - {"not"}},
    **{name: getattr(torch, name) for name in BINARY & {"add", "sub", "mul", "div", "pow"} | COMPARISONS},
    "floordiv": torch.floor_divide,
    "mod": torch.remainder,
    "min": torch.minimum,
    "max": torch.maximum,
    "and": torch.logical_and,
    "or": torch.logical_or,
    "not": torch.logical_not,
    "where": torch.where,
}


def element(program: Program, s: Tensor, captures: Sequence[Tensor], at: Sequence[int]) -> Tensor:
    """The program's result at one score, on tensors without axes."""
    dtypes = {"float": s.dtype, "int": torch.int64, "bool": torch.bool}
    known: dict[Term, Tensor] = {variable(name): torch.tensor(i) for name, i in zip("bhqk", at, strict=True)}
    known[S] = s[tuple(at)]
    for term in program.result.walk():
        operands = [known[item] for item in term.terms]
        if term.op == "const":
            known[term] = torch.tensor(term.value, dtype=dtypes[term.kind])
        elif term.op == "load":
            known[term] = captures[term.args[0]][tuple(map(int, operands))].to(dtypes[term.kind])
        elif term.op == "cast":
            known[term] = operands[0].to(dtypes[term.kind])
        elif term.op == "pow" and term.args[1].op == "const":
            known[term] = torch.pow(operands[0], term.args[1].value)  # x * x * x, say; by a tensor rounds otherwise
        elif term not in known:
            known[term] = ONE[term.op](*operands)
    return known[program.result]


def elements(program: Program, s: Tensor, captures: Sequence[Tensor]) -> Tensor:
    places = itertools.product(*map(range, SIZES))
    return torch.stack([element(program, s, captures, at) for at in places]).view(SIZES)


def close(found: Tensor, expected: Tensor) -> None:
    """Equal but for the last bits: exponentials of vectors and of single numbers round differently."""
    if found.dtype == DOUBLE:
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11, equal_nan=True)
    else:
        assert torch.equal(found, expected)


# --- text --------------------------------------------------------------------------------------------------------


@given(st.sampled_from(("float", "int", "bool")).flatmap(lambda kind: problems(kind=kind, tame=False)))
def test_text_round_trips(problem: Problem) -> None:
    text = str(problem[0])
    assert Program.parse(text) is Program.parse(text)
    assert Program.parse(text) == problem[0]
    assert str(Program.parse(text)) == text


def test_text_is_as_documented() -> None:
    distance = cast_to("float", apply("sub", K, Q))
    term = apply("add", simple("mul", S, 0.125), apply("mul", distance, load("slopes", (H,), "float")))
    program, sources = Program.of(term)
    assert str(program) == ALIBI
    assert sources == ["slopes"]
    assert (program.reads, program.captures, program.is_identity) == ({"s", "h", "q", "k"}, 1, False)
    assert str(Program(simple("where", apply("le", K, Q), S, -math.inf))).endswith("where %0, s, -inf\n  return %1")
    assert Program.parse("(s, b, h, q, k):\n\n return s\n").is_identity


def test_programs_are_copied_and_pickled_as_text() -> None:
    program = Program.parse(ALIBI)
    assert copy.deepcopy(program) == program
    assert pickle.loads(pickle.dumps(program)) == program
    assert eval(repr(program)) == program


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: a score program begins with"),
        ("(s, b, h):\n  return s", "line 1: a score program begins with"),
        ("(s, b, h, q, k):", "line 1: the program ends without a return"),
        ("(s, b, h, q, k):\n  %0: float = exp s", "line 2: the program ends without a return"),
        ("(s, b, h, q, k):\n  %0: float = frobnicate s\n  return %0", "line 2: there is no operator 'frobnicate'"),
        ("(s, b, h, q, k):\n  %0: float = const s\n  return %0", "line 2: there is no operator 'const'"),
        ("(s, b, h, q, k):\n  %1: float = exp s\n  return %1", "line 2: statement %1 stands where %0 is due"),
        ("(s, b, h, q, k):\n  %0: float = exp %1\n  return %0", "line 2: '%1' is no variable, no earlier statement"),
        ("(s, b, h, q, k):\n  %0: int = exp s\n  return %0", "line 2: exp gives float here, not int"),
        ("(s, b, h, q, k):\n  %0: float = exp s, s\n  return %0", "line 2: 'exp' with 2 arguments"),
        ("(s, b, h, q, k):\n  %0: float = cast\n  return %0", "line 2: cast takes one operand, not 0"),
        ("(s, b, h, q, k):\n  %0 = exp s\n  return %0", "line 2: not of the form"),
        ("(s, b, h, q, k):\n  %0: float = load 0\n  return %0", "line 2: a load is of the form"),
        ("(s, b, h, q, k):\n  %0: float = load 0[s]\n  return %0", "line 2: an index must be an int"),
        ("(s, b, h, q, k):\n  %0: float = add s, 'x'\n  return %0", "line 2: \"'x'\" is no bool, int or float"),
        (
            "(s, b, h, q, k):\n  %0: int = add q, 9223372036854775808\n  return %0",
            "line 2: 92233720368547758",
        ),
        ("(s, b, h, q, k):\n  return s\n  %0: float = exp s", "line 2: nothing may follow the return"),
        ("(s, b, h, q, k):\n\n  return x", "line 3: 'x' is no variable"),
    ],
)
def test_errors_name_the_line(text: str, message: str) -> None:
    with pytest.raises(ProgramError) as error:
        Program.parse(text)
    assert str(error.value).startswith(message)


def test_slots() -> None:
    bias, ids = load("bias", (H, K), "float"), load("ids", (Q,), "int")
    term = apply("where", apply("eq", ids, load("ids", (K,), "int")), apply("add", S, bias), constant(0.0))
    program, sources = Program.of(term, ["ids"])
    assert sources == ["ids", "bias"]
    assert [item.args[0] for item in program.result.walk() if item.op == "load"] == [0, 0, 1]
    twice, sources = Program.of(apply("add", apply("add", bias, load("bias", (H, Q), "float")), bias))
    assert sources == ["bias", "bias"]
    assert set(twice.derivative().by_load) == {0, 1}
    nested, sources = Program.of(load("table", (load("buckets", (Q, K), "int"),), "float"))
    assert (sources, nested.captures) == (["buckets", "table"], 2)
    with pytest.raises(ProgramError, match="numbered slots, not from 'bias'"):
        Program(bias)


# --- evaluation --------------------------------------------------------------------------------------------------


@settings(max_examples=150)
@given(st.sampled_from(("float", "float", "int", "bool")).flatmap(lambda kind: problems(kind=kind, tame=False)))
def test_evaluation_is_that_of_one_score_at_a_time(problem: Problem) -> None:
    program, captures = problem
    s = scores()
    found = program(s, *indices(), captures)
    expected = elements(program, s, captures)
    close(found.expand(SIZES), expected)
    close(program.on_block(s, *WHOLE, captures).expand(SIZES), expected)


@given(problems(tame=False), st.data())
def test_a_block_is_a_part_of_the_whole(problem: Problem, data: st.DataObject) -> None:
    program, captures = problem
    spans = []
    for size in SIZES:
        start = data.draw(st.integers(0, size - 1))
        spans.append(slice(start, data.draw(st.integers(start, size))))
    s, part = scores(), scores()[tuple(spans)]
    expected = program.on_block(s, *WHOLE, captures).expand(SIZES)[tuple(spans)]
    close(program.on_block(part, *spans, captures).expand(part.shape), expected)
    close(program(part, *indices(spans), captures).expand(part.shape), expected)
    close(program.on_block(part.clone(), *spans, captures, overwrite=True).expand(part.shape), expected)


@settings(max_examples=40)
@given(problems(tame=False))
def test_nothing_given_is_written_to(problem: Problem) -> None:
    program, captures = problem
    s, before = scores(), [item.clone() for item in problem[1]]
    program.on_block(s, *WHOLE, captures)
    program.derivative().on_block(s, *WHOLE, captures)
    program(s, *indices(), captures)
    assert torch.equal(s, scores())
    assert all(same(one, other) for one, other in zip(captures, before, strict=True))


def depends_on(term: Term) -> set[str]:
    """The axes of a term's value when s has all four."""
    return set("bhqk") if "s" in term.reads else set(term.reads)


@given(problems(tame=False))
def test_results_are_broadcast_only_as_far_as_they_depend(problem: Problem) -> None:
    program, captures = problem
    expected = [size if name in depends_on(program.result) else 1 for name, size in zip("bhqk", SIZES, strict=True)]
    assert list(program(scores(), *indices(), captures).shape) == expected
    assert list(program.on_block(scores(), *WHOLE, captures).shape) == expected


def test_a_bias_of_head_and_key_is_a_view() -> None:
    bias = scores(0, (2, 1, 3, 4))
    program = Program(load(0, (constant(1), constant(0), H, K), "float"))
    found = program.on_block(None, slice(0, 9), slice(1, 3), slice(5, 7), slice(0, 3), [bias], dtype=DOUBLE)
    assert found.shape == (1, 2, 1, 3)
    assert found.untyped_storage().data_ptr() == bias.untyped_storage().data_ptr()
    turned = Program(load(0, (K, H), "float")).on_block(None, *WHOLE, [scores(1, (4, 3))], dtype=DOUBLE)
    assert torch.equal(turned[0, :, 0], scores(1, (4, 3)).T)


def test_floats_are_computed_in_the_dtype_of_s() -> None:
    program = Program(apply("add", S, load(0, (H,), "float")))
    for dtype in (torch.float32, DOUBLE):
        assert program(scores(dtype=dtype), *indices(), [torch.ones(3, dtype=torch.bfloat16)]).dtype == dtype
    bias = Program(load(0, (H,), "float"))
    assert bias(None, *indices(), [torch.ones(3, dtype=torch.bfloat16)]).dtype == torch.float32
    assert bias.on_block(None, *WHOLE, [torch.ones(3)], dtype=DOUBLE).dtype == DOUBLE
    assert Program(load(0, (H,), "int"))(None, *indices(), [torch.ones(3, dtype=torch.int32)]).dtype == torch.int64
    assert Program(constant(0.1)).on_block(None, *WHOLE, dtype=DOUBLE).item() == 0.1


@pytest.mark.parametrize("op", ["add", "mul", "max", "where", "lt", "pow"])
def test_numbers_too_large_for_the_dtype_are_infinite(op: str) -> None:
    huge, s = torch.finfo(DOUBLE).min, scores(dtype=torch.float32)
    args = (apply("le", K, Q), S, huge) if op == "where" else (S, huge)
    turned = (*args[:-2], *args[:-3:-1])
    for program in (Program(simple(op, *args)), Program(simple(op, *(args if op == "pow" else turned)))):
        expected = elements(program, s.double(), []).to(torch.bool if op == "lt" else torch.float32)
        assert same(program(s, *indices()).expand(SIZES), expected)


def test_a_call_says_what_is_missing() -> None:
    program = Program.parse(ALIBI)
    with pytest.raises(ProgramError, match="reads s, and s is None"):
        program.on_block(None, *WHOLE, [torch.ones(3)])
    with pytest.raises(ProgramError, match="reads 1 captured tensors, and 0 are given"):
        program(scores(), *indices())
    for captures in ([torch.ones(3, 1)], [torch.tensor(1.0)]):
        with pytest.raises(ProgramError, match="slot 0 is read with 1 indices"):
            program(scores(), *indices(), captures)
        with pytest.raises(ProgramError, match="slot 0 is read with 1 indices"):
            program.on_block(scores(), *WHOLE, captures)
    with pytest.raises(ProgramError, match="slot 0 is read from 0 to 3 on axis 0, its tensor is \\[1\\]"):
        program.on_block(scores(), *WHOLE, [torch.ones(1)])


def test_integers_divide_and_floats_round_as_python_does() -> None:
    for op, function in (("floordiv", lambda x, y: x // y), ("mod", lambda x, y: x % y)):
        for divisor in (3, -3):
            program = Program(simple(op, simple("sub", K, 2), divisor))
            found = program.on_block(None, *WHOLE)
            assert found.flatten().tolist() == [function(k - 2, divisor) for k in range(SIZES[3])]
    assert Program(cast_to("int", apply("neg", simple("add", cast_to("float", K), 0.75)))).on_block(
        None, *WHOLE
    ).flatten().tolist() == [0, -1, -2, -3]


# --- derivatives -------------------------------------------------------------------------------------------------


def by_autograd(program: Program, s: Tensor, captures: Sequence[Tensor], upstream: Tensor) -> list[Tensor | None]:
    leaves = [item.detach().clone() for item in (s, *captures)]
    wanted = [item.requires_grad_() for item in leaves if item.is_floating_point()]
    result = program(leaves[0], *indices(), leaves[1:])
    if not result.requires_grad:
        return [None] * len(wanted)
    return list(torch.autograd.grad((result * upstream).sum(), wanted, allow_unused=True))


def by_derivative(program: Program, s: Tensor, captures: Sequence[Tensor], upstream: Tensor) -> list[Tensor]:
    derivative = program.derivative()
    by_s = derivative.by_s
    found = [torch.zeros_like(s) if by_s is None else (upstream * by_s.on_block(s, *WHOLE, captures)).expand(SIZES)]
    for slot, capture in enumerate(captures):
        if capture.is_floating_point():
            found.append(torch.zeros_like(capture))
            if slot in derivative.by_load:
                values = upstream * derivative.by_load[slot](s, *indices(), captures)
                program.accumulate(slot, found[-1], values, *WHOLE, captures, s=s)
    return found


def gradients_agree(program: Program, captures: Sequence[Tensor], other: Program | None = None) -> None:
    """The derivative of `program` (or of `other`) is autograd's of `program`, to 1e-10 of the largest entry."""
    s, upstream = scores(), scores(1)
    expected = by_autograd(program, s, captures, upstream)
    for theirs, ours in zip(expected, by_derivative(other or program, s, captures, upstream), strict=True):
        theirs = torch.zeros_like(ours) if theirs is None else theirs
        scale = max(1.0, float(theirs.abs().max()) if theirs.numel() else 0.0)
        torch.testing.assert_close(ours / scale, theirs / scale, rtol=0, atol=1e-10)


@settings(max_examples=100)
@given(problems())
def test_derivatives_are_those_of_autograd(problem: Problem) -> None:
    gradients_agree(*problem)


@settings(max_examples=40)
@given(problems())
def test_value_and_derivatives_at_once(problem: Problem) -> None:
    program, captures = problem
    derivative, s = program.derivative(), scores()
    value, by_s, by_load = derivative.on_block(s, *WHOLE, captures)
    assert same(value, program.on_block(s, *WHOLE, captures))
    assert (by_s is None) == (derivative.by_s is None)
    assert set(by_load) == set(derivative.by_load)
    pairs = [(by_load[slot], one) for slot, one in derivative.by_load.items()]
    if by_s is not None and derivative.by_s is not None:
        pairs.append((by_s, derivative.by_s))
    for found, alone in pairs:
        assert same(found, alone.on_block(s, *WHOLE, captures))


FLOATS = sorted((UNARY | BINARY) - LOGICAL - COMPARISONS)
BIAS = load(0, (H, K), "float")


@pytest.mark.parametrize("op", FLOATS)
@pytest.mark.parametrize("shape", ["s", "s c", "c s", "s load", "load s", "s s"])
def test_every_operator_has_a_derivative(op: str, shape: str) -> None:
    operands = {"s": simple("add", apply("abs", S), 0.25), "c": constant(1.5), "load": BIAS}
    args = [operands[name] for name in shape.split()]
    if (op in UNARY) != (len(args) == 1):
        args = args[: 1 if op in UNARY else 2] * (1 if op in UNARY else 2)
    program = Program(apply(op, *args[:2]))
    gradients_agree(program, [scores(2, (3, 4)).abs() + 0.5])


@pytest.mark.parametrize(
    "term",
    [
        apply("abs", simple("mul", S, 0.0)),
        apply("max", S, S),
        apply("min", simple("mul", S, 0.0), simple("mul", BIAS, 0.0)),
        apply("max", simple("mul", S, 0.0), constant(0.0)),
        simple("pow", simple("mul", S, 0.0), 0.0),
        simple("pow", simple("mul", S, 0.0), 2.0),
        apply("pow", simple("mul", BIAS, 0.0), simple("add", apply("abs", S), 1.0)),
        apply("pow", apply("abs", S), simple("mul", BIAS, 0.0)),
        apply("where", simple("gt", S, 0.3), apply("exp", S), BIAS),
        apply("where", simple("gt", BIAS, 0.3), S, constant(2.0)),
        apply("mul", apply("floor", S), apply("exp", S)),
        apply("add", apply("floordiv", S, BIAS), apply("mod", S, BIAS)),
        apply("mul", cast_to("float", cast_to("int", S)), S),
        apply("mul", load(0, (apply("mod", cast_to("int", apply("mul", S, S)), constant(3)), K), "float"), S),
    ],
    ids=repr,
)
def test_derivatives_at_ties_zeros_and_jumps(term: Term) -> None:
    gradients_agree(Program(term), [scores(2, (3, 4))])


def test_derivatives_of_what_models_write() -> None:
    softcap = Program.parse(SOFTCAP).derivative()
    assert softcap.by_load == {}
    assert "div" in str(softcap.by_s)
    assert str(softcap.by_s).count("=") == 4  # s / 30, its tanh t, t * t, 1 - t * t
    alibi = Program.parse(ALIBI).derivative()
    assert alibi.by_s == Program(constant(0.125))
    assert alibi.by_load == {0: Program(cast_to("float", apply("sub", K, Q)))}


def test_what_has_no_derivative() -> None:
    assert Program(load(0, (H,), "int")).captures == 1
    with pytest.raises(ProgramError, match="the result is bool, and only a float has a derivative"):
        Program(apply("le", K, Q)).derivative()
    twice = apply("add", load(0, (H,), "float"), load(0, (K,), "float"))
    with pytest.raises(ProgramError, match="read at several indices"):
        Program(twice).derivative()
    flat = Program(apply("add", apply("floor", S), cast_to("float", apply("sub", K, Q)))).derivative()
    assert (flat.by_s, flat.by_load) == (None, {})
    assert Program(constant(1.0)).derivative().by_s is None


def test_an_operator_that_no_term_has_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from fxopt.score import evaluate

    monkeypatch.setitem(evaluate.OPERATORS, "tanh", torch.erf)
    with pytest.raises(ProgramError, match=r"the derivative needs .*aten\.erf.*, which is no operator"):
        Program(apply("mul", apply("tanh", simple("add", S, 0.123)), S)).derivative()


@pytest.mark.parametrize("ambient", [torch.no_grad, torch.inference_mode, FakeTensorMode])
def test_derivatives_do_not_depend_on_ambient_modes(ambient: Any) -> None:
    term = apply("mul", apply("tanh", S), simple("pow", S, float(len(ambient.__name__))))
    with ambient():
        found = Program(term).derivative()
    gradients_agree(Program(term), [])
    assert found is Program(term).derivative() or found.by_s == Program(term).derivative().by_s


def test_derivatives_within_a_backward() -> None:
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx: Any, *upstream: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            by_s = Program(simple("pow", S, 2.0)).derivative().by_s
            assert by_s is not None
            return upstream[0] * by_s(x, *indices())

    s = scores().requires_grad_()
    Square.apply(s).sum().backward()
    assert torch.equal(s.grad, 2 * s.detach())  # type: ignore[arg-type]


@settings(max_examples=40)
@given(problems(), st.integers(0, 3))
def test_gradients_of_blocks_add_up(problem: Problem, axis: int) -> None:
    program, captures = problem
    values, cut = scores(1), SIZES[axis] // 2
    for slot in program.derivative().by_load:
        whole, parts = (torch.zeros_like(captures[slot]) for _ in range(2))
        program.accumulate(slot, whole, values, *WHOLE, captures)
        for span in (slice(0, cut), slice(cut, SIZES[axis])):
            spans = [span if own == axis else other for own, other in enumerate(WHOLE)]
            program.accumulate(slot, parts, values[tuple(spans)], *spans, captures)
        torch.testing.assert_close(whole, parts, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(whole.sum(), values.sum(), rtol=1e-11, atol=1e-11)


# --- rewrites ----------------------------------------------------------------------------------------------------


@settings(max_examples=100)
@given(st.sampled_from(("float", "float", "int", "bool")).flatmap(lambda kind: problems(kind=kind, tame=False)))
def test_simplifying_changes_no_value_and_stops(problem: Problem) -> None:
    program, captures = problem
    less = program.simplified()
    assert less.simplified() == less
    for dtype in (DOUBLE, torch.float32):
        s = scores(dtype=dtype)
        before, after = (elements(one, s, captures) for one in (program, less))
        assert same(before, after)
        if before.is_floating_point():
            assert torch.equal(before.signbit() & (before == 0), after.signbit() & (after == 0))


@settings(max_examples=50)
@given(problems())
def test_simplifying_changes_no_gradient(problem: Problem) -> None:
    program, captures = problem
    gradients_agree(program, captures, program.simplified())


INT, FLAG = load(0, (Q,), "int"), load(1, (K,), "bool")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (simple("div", S, 8.0), simple("mul", S, 0.125)),
        (simple("div", S, 3.0), simple("div", S, 3.0)),
        (simple("mul", 2.0, S), simple("mul", S, 2.0)),
        (simple("mul", S, -1.0), apply("neg", S)),
        (apply("sub", S, apply("neg", BIAS)), apply("add", S, BIAS)),
        (simple("pow", S, 2.0), apply("mul", S, S)),
        (simple("sub", S, 0.0), S),
        (simple("add", S, 0.0), simple("add", S, 0.0)),
        (simple("add", simple("sub", Q, 3), 3), Q),
        (simple("gt", 3, Q), simple("lt", Q, 3)),
        (apply("not", apply("le", K, Q)), apply("gt", K, Q)),
        (apply("not", simple("le", S, 0.0)), apply("not", simple("le", S, 0.0))),
        (simple("eq", FLAG, False), apply("not", FLAG)),
        (cast_to("bool", cast_to("float", FLAG)), FLAG),
        (cast_to("float", cast_to("int", FLAG)), cast_to("float", FLAG)),
        (cast_to("int", cast_to("float", INT)), cast_to("int", cast_to("float", INT))),
        (simple("where", apply("not", FLAG), 1.0, 0.0), cast_to("float", apply("not", FLAG))),
        (apply("where", FLAG, apply("where", FLAG, S, BIAS), constant(2.0)), simple("where", FLAG, S, 2.0)),
        (simple("add", 1.0, simple("neg", 0.5)), constant(0.5)),
        (simple("mul", 0.1, 10.0), simple("mul", 0.1, 10.0)),
    ],
    ids=repr,
)
def test_simplified_terms(before: Term, after: Term) -> None:
    assert Program(before).simplified() == Program(after)


@given(problems(), st.sampled_from((1.0, 0.125, -3.0)))
def test_split_affine_gives_the_same_values(problem: Problem, factor: float) -> None:
    program, captures = problem
    program = Program(apply("add", simple("mul", S, factor), program.result))
    found = program.split_affine()
    if found is None:
        return
    s = scores()
    bias = 0.0 if found[1] is None else found[1].on_block(None, *WHOLE, captures, dtype=DOUBLE)
    assert found[1] is None or "s" not in found[1].reads
    expected = program.on_block(s, *WHOLE, captures).expand(SIZES)
    largest = max(1.0, float(expected.abs().max()), float(torch.as_tensor(bias).abs().max()), abs(found[0]))
    torch.testing.assert_close((s * found[0] + bias) / largest, expected / largest, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("term", "expected"),
    [
        (S, (1.0, None)),
        (simple("mul", 0.125, S), (0.125, None)),
        (simple("div", apply("neg", S), 4.0), (-0.25, None)),
        (apply("add", S, apply("sub", S, BIAS)), (2.0, apply("neg", BIAS))),
        (simple("mul", apply("add", S, BIAS), 2.0), (2.0, simple("mul", BIAS, 2.0))),
        (
            apply("sub", apply("add", BIAS, simple("mul", S, 0.5)), load(1, (B,), "float")),
            (0.5, apply("sub", BIAS, load(1, (B,), "float"))),
        ),
        (
            apply("where", FLAG, S, apply("add", S, BIAS)),
            (1.0, apply("where", FLAG, constant(0.0), BIAS)),
        ),
        (BIAS, (0.0, BIAS)),
        (apply("mul", S, BIAS), None),
        (apply("mul", S, S), None),
        (simple("mul", S, math.inf), None),
        (simple("where", FLAG, S, -math.inf), None),
        (apply("where", simple("gt", S, 0.0), S, S), (1.0, None)),
        (apply("max", S, BIAS), None),
        (simple("mul", apply("tanh", simple("div", S, 30.0)), 30.0), None),
    ],
    ids=repr,
)
def test_split_affine(term: Term, expected: tuple[float, Term | None] | None) -> None:
    found = Program(term).split_affine()
    if expected is None:
        assert found is None
    else:
        factor, bias = expected
        assert found == (factor, None if bias is None else Program(bias))


def test_split_affine_of_what_models_write() -> None:
    assert Program.parse(SOFTCAP).split_affine() is None
    bias = apply("mul", cast_to("float", apply("sub", K, Q)), load(0, (H,), "float"))
    assert Program.parse(ALIBI).split_affine() == (0.125, Program(bias))


@given(terms(tame=False))
def test_random_terms_read_no_capture_that_is_not_there(term: Term) -> None:
    assert not any(item.op == "load" for item in term.walk())
