"""Where terms come from is remembered beside them, through everything that is done to them on the way to a kernel."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import torch
from graphs import captured
from torch import Tensor

from fxopt.dump_kernels import Use, annotated
from fxopt.kernels.attention import backward_q_kernel, forward_kernel
from fxopt.kernels.attention_spec import AttentionKernelSpec
from fxopt.passes.attention import RULE
from fxopt.rewrite import apply_rule
from fxopt.rule import Place
from fxopt.score.algebra import bottom_up
from fxopt.score.origins import Origins
from fxopt.score.program import Program
from fxopt.score.scores import separate
from fxopt.score.term import Term, apply, constant, load, substitute, variable

S, Q, K = variable("s"), variable("q"), variable("k")
SCALED = apply("mul", S, constant(0.5))
CAPPED = apply("tanh", SCALED)


def origins(**known: Term) -> Origins[str]:
    """Each term from the line of its name."""
    found = Origins[str]()
    for line, term in known.items():
        found.note(term, line)
    return found


# --- what is remembered ------------------------------------------------------------------------------------------


def test_a_term_is_of_the_line_that_made_it_and_not_of_those_that_read_it() -> None:
    found = origins(first=SCALED, second=CAPPED, third=apply("add", CAPPED, SCALED))
    assert [found.of(term) for term in (SCALED, CAPPED, apply("add", CAPPED, SCALED))] == ["first", "second", "third"]


def test_what_a_line_makes_on_the_way_is_of_that_line() -> None:
    assert origins(only=CAPPED).of(SCALED) == "only"


def test_variables_and_numbers_come_from_nowhere() -> None:
    assert origins(only=CAPPED).of(S) is None
    assert origins(only=S).of(CAPPED) is None


def test_a_term_without_a_line_is_of_the_nearest_one_below() -> None:
    found = origins(first=SCALED, second=CAPPED)
    slope = apply("sub", constant(1.0), apply("mul", CAPPED, CAPPED))
    assert found.of(slope) == "second"
    assert not found.knows(slope)


def test_rewriting_keeps_the_lines() -> None:
    found = origins(first=SCALED, second=CAPPED)
    index = load("bias", (Q, K), "float")
    found.note(index, "bias")
    inside = substitute(CAPPED, {S: apply("add", S, constant(1.0))}, found.inherit)
    assert found.of(inside) == "second"
    assert found.of(inside.args[0]) == "first"
    negated = bottom_up(CAPPED, lambda item: apply("neg", item) if item is SCALED else item, found.inherit)
    assert (found.of(negated), found.of(negated.args[0])) == ("second", "first")
    program, _ = Program.of(apply("add", CAPPED, index), note=found.inherit)
    assert [found.of(term) for term in program.result.args] == ["second", "bias"]


def test_masks_taken_off_keep_the_lines() -> None:
    causal = apply("le", K, Q)
    masked = apply("where", causal, apply("add", CAPPED, SCALED), constant(-torch.inf))
    found = origins(mask=causal, first=SCALED, second=CAPPED, third=masked)
    scores = separate(apply("sub", masked, constant(1.0)), found.inherit)
    assert [found.of(item) for item in scores.conditions] == ["mask"]
    assert found.of(scores.program) == "third"


# --- in a graph --------------------------------------------------------------------------------------------------


def attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    scores = q @ k.transpose(-1, -2)
    scores = scores * 0.5
    scores = torch.tanh(scores / 20.0)
    near = torch.arange(6)[:, None] // 4 >= torch.arange(6)[None, :] // 4
    scores = scores.masked_fill(~near, -torch.inf)
    scores = scores.masked_fill(keep[:, None, None, :] == 0, -torch.inf)
    return torch.softmax(scores, -1) @ v


def code_of(found: dict[Term, Place]) -> dict[str, str]:
    """By operator; each is in the programs once."""
    return {term.op: place.code for term, place in found.items()}


def rewritten() -> Any:
    tensors = [torch.randn(2, 4, 6, 8, requires_grad=True) for _ in range(3)]
    keep = torch.ones(2, 6, dtype=torch.int64)
    module = apply_rule(RULE, captured(attention, *tensors, keep).module, lowering="interpret").module
    return next(node for node in module.graph.nodes if node.target is torch.ops.fxopt.attention.default)


def test_every_statement_of_a_site_has_its_line() -> None:
    node = rewritten()
    assert node.meta["sites"][0][1].code == "return torch.softmax(scores, -1) @ v"
    codes = code_of(node.meta["origins"])
    assert codes["mul"] == "scores = scores * 0.5"
    assert codes["div"] == codes["tanh"] == "scores = torch.tanh(scores / 20.0)"
    assert "torch.arange(6)[:, None] // 4" in codes["floordiv"]
    assert codes["load"] == codes["ne"] == "scores = scores.masked_fill(keep[:, None, None, :] == 0, -torch.inf)"
    lines = {place.source for place in node.meta["origins"].values()}
    assert len(lines) == 4
    assert all(__file__ in line for line in lines)


# --- in a kernel -------------------------------------------------------------------------------------------------

SPEC = AttentionKernelSpec("fp32", 16, 16, 1.0, program=str(Program(CAPPED)))
HERE, THERE = (Place(f"/somewhere/{name}.py:{line}", "x = cap(y)", name) for name, line in (("here", 7), ("there", 9)))


def use(place: Place, **changes: Any) -> Use:
    return dataclasses.replace(Use("attention", "matmul", place, {SCALED: place, CAPPED: place}), **changes)


def comments(text: str, statement: str) -> set[str]:
    return {line.split("#", 1)[1].strip() for line in text.splitlines() if statement in line and "#" in line}


def test_origins_are_in_no_key() -> None:
    forward = forward_kernel(SPEC)
    assert forward == dataclasses.replace(forward, terms={})
    assert hash(forward) == hash(dataclasses.replace(forward, terms={}))
    assert ".py" not in forward.source
    assert set(forward.terms.values()) == {SCALED, CAPPED}


def test_annotated_kernel_is_the_kernel_with_comments() -> None:
    forward = forward_kernel(SPEC)
    text = annotated(forward, [use(HERE)])
    assert "# launched by attention at here.py:7 (here)\n# here.py is /somewhere/here.py\n" in text
    assert comments(text, " = tanh(") == {"here.py:7: x = cap(y)"}
    _, code = text.split("\n\n", 1)
    assert re.sub("  # here.py:7.*", "", code) == forward.source


def test_sites_of_one_kernel_are_all_named() -> None:
    text = annotated(forward_kernel(SPEC), [use(HERE), use(THERE), use(HERE)])
    assert comments(text, " = tanh(") == {"here.py:7, there.py:9"}
    assert text.count("# launched by") == 2


def test_statements_of_the_derivative_say_so() -> None:
    text = annotated(backward_q_kernel(SPEC, True), [use(HERE, origins={SCALED: THERE, CAPPED: HERE})])
    assert comments(text, " = tanh(") == {"here.py:7: x = cap(y)"}
    assert comments(text, "1.0 - t") == {"derivative of here.py:7"}
    assert text.count(" = tanh(") == 2  # in the loop without a mask, and in that with one


def test_without_known_places_there_are_no_comments() -> None:
    for unknown in (use(Place()), use(Place(), origins={})):
        text = annotated(forward_kernel(SPEC), [unknown])
        assert "# launched by attention at unknown source" in text
        assert comments(text, " = tanh(") == set()
        compile(text, "kernel", "exec")
