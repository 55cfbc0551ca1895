"""Bugs put in on purpose are each caught by what is said to catch them, and the right rules by nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from graphs import captured
from seeded_bugs import BUGS, Bug
from torch import Tensor

import fxopt
from fxopt import fallback
from fxopt.differential import same_function
from fxopt.passes import attention, linear_cross_entropy, norm
from fxopt.rewrite import apply_rule
from fxopt.testing import check_laws
from fxopt.testing.laws import own_gradient
from fxopt.testing.near import as_near_as
from fxopt.verify import VerificationError

EACH = pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
RIGHT = {rule.spellings: rule for rule in (norm.RULE, attention.RULE, linear_cross_entropy.RULE)}


def test_there_are_at_least_twelve_and_every_catcher_catches_some() -> None:
    assert len({bug.name for bug in BUGS}) == len(BUGS) >= 12
    assert {bug.catcher for bug in BUGS} == {"interface", "fp64", "laws"}


@EACH
@pytest.mark.fault("recompute of dropout")
@pytest.mark.fault("output strides unlike eager's")
@pytest.mark.fault("output aliasing an input")
@pytest.mark.fault("elided bf16 round trips")
def test_is_caught_by_what_is_said_to_catch_it(bug: Bug) -> None:
    graph = captured(bug.function, *bug.arguments()).module
    tensors = graph.meta["inputs"]  # in Dynamo's order
    if bug.catcher == "interface":
        with pytest.raises(VerificationError, match=bug.message):
            apply_rule(bug.rule, graph, force=True)
        return
    outcome = apply_rule(bug.rule, graph, force=True)
    assert outcome.rewrites, outcome.refusals
    if bug.catcher == "fp64":
        with pytest.raises(VerificationError, match=bug.message):
            same_function(graph, outcome.module, tensors)
    elif "dropout" in bug.name:
        with pytest.raises(AssertionError, match=bug.message):
            own_gradient(outcome.module, tensors)
    else:
        with pytest.raises(AssertionError, match=bug.message):
            check_laws(bug.rule, bug.rule.spellings[0], {"x": tensors[0], "k": 1.5})


@EACH
def test_the_right_rule_is_caught_by_nothing(bug: Bug) -> None:
    """Else the catcher would say nothing of the bug."""
    if bug.rule.spellings not in RIGHT:
        pytest.skip("its rule has no right one")
    graph = captured(bug.function, *bug.arguments()).module
    tensors = graph.meta["inputs"]  # in Dynamo's order
    outcome = apply_rule(RIGHT[bug.rule.spellings], graph, force=True)
    assert outcome.rewrites, outcome.refusals
    if "dropout" in bug.name:
        own_gradient(outcome.module, tensors)
    else:
        same_function(graph, outcome.module, tensors)
        as_near_as(graph, outcome.module, tensors)


@pytest.mark.parametrize("bug", [bug for bug in BUGS if bug.catcher != "laws"][::4], ids=lambda bug: bug.name)
def test_a_caught_bug_costs_a_warning_and_training_is_right(bug: Bug, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fallback, "_WARNED", set())
    expected = _step(bug.function, bug.arguments())
    compiled = torch.compile(bug.function, backend=_uncompiled(bug))
    with pytest.warns(fxopt.FxoptWarning, match=f"rule {bug.rule.name} failed"):
        found = _step(compiled, bug.arguments())
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def _uncompiled(bug: Bug) -> Any:
    """fxopt with the bug's options, and no compiler at its end."""
    options = fxopt.Options.parse(bug.options())
    return lambda gm, inputs: fxopt.backend.run(gm, inputs, options, lambda graph, _: graph.forward)[1]


def _step(function: Any, tensors: Sequence[Tensor]) -> list[Tensor | None]:
    out = function(*tensors)
    outputs = list(out) if isinstance(out, tuple) else [out]
    sum(one.double().square().sum() for one in outputs).backward()
    return [*(one.detach() for one in outputs), *(one.grad for one in tensors)]
