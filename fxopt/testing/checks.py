"""Property tests of a user's own rules and passes, with failures shrunk and printed as code that runs."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import fx

from fxopt import verify
from fxopt.capture import capture
from fxopt.differential import same_function
from fxopt.fake import propagate
from fxopt.rewrite import copy_module
from fxopt.rule import Rule
from fxopt.testing.graphs import targets
from fxopt.testing.judge import Run, Verdict
from fxopt.testing.laws import check_laws, check_symbolic, chosen_of
from fxopt.testing.random_modules import ModuleSpec
from fxopt.testing.strategies import drawn_with_code, modules
from fxopt.testing.trial import HOW, OPTIONS, Trial

Pass = Callable[[fx.GraphModule], fx.GraphModule | None]
"""From a canonical graph to one: a new one, or the same, changed in place, and then it may return None."""

_SETTINGS: dict[str, Any] = {
    "deadline": None,  # the first example compiles for seconds
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
}


def check_rule(rule: Rule, max_examples: int = 25) -> None:
    """Check every law (`fxopt.testing.laws`) on every spelling of `rule`.

    Raises AssertionError, or whatever the rule raises, on the smallest inputs found; notes of the error are code that
    runs just that. Raises TypeError for a rule without spellings or inputs, of which nothing can be checked.
    """
    if not rule.spellings:
        raise TypeError(f"rule {rule.name!r} has no spellings, and the laws run over those: give it what users write")
    for spelling in rule.spellings:
        check_spelling(rule, spelling, max_examples)


def check_spelling(rule: Rule, spelling: Callable[..., Any], max_examples: int = 25, symbolic: bool = True) -> None:
    """Check every law on one spelling of `rule`; with symbolic sizes on the first example alone."""
    seen: list[bool] = []

    @settings(max_examples=max_examples, **_SETTINGS)
    @given(drawn_with_code(rule))
    def laws(drawn: tuple[dict[str, Any], dict[str, str]]) -> None:
        values, codes = drawn
        try:
            check_laws(rule, spelling, values)
            if symbolic and (not seen or seen[-1]):
                seen.append(True)  # stays if it fails, so that every replay asks again
                check_symbolic(rule, spelling, values)
                seen[-1] = False
        except Exception as error:
            error.add_note(rule_code(rule, spelling, codes))
            raise

    laws()


def check_pass(apply: Pass, max_examples: int = 25, kinds: Sequence[ModuleSpec] = ()) -> None:
    """Check a pass over canonical graphs on random training modules, static and with symbolic sizes.

    It must leave a canonical graph of the same interface (shapes, dtypes, strides, devices, aliases, writes, random
    operators) and the same function, outputs and gradients, in fp64; do nothing more when applied again; and train as
    eager does in the module's own dtype, on the sizes it was traced with and on others.

    kinds: modules to check besides those drawn, each first. Raises AssertionError, or what the pass raises, on the
    smallest module found; notes of the error are code that runs just that.
    """
    for spec in kinds:
        check_pass_on(apply, spec)

    @settings(max_examples=max_examples, **_SETTINGS)
    @given(modules(most=3), st.booleans(), st.booleans())
    def laws(spec: ModuleSpec, dynamic: bool, resized: bool) -> None:
        try:
            check_pass_on(apply, spec, dynamic, resized)
        except Exception as error:
            error.add_note(pass_code(apply, spec, dynamic, resized))
            raise

    laws()


def check_pass_on(apply: Pass, spec: ModuleSpec, dynamic: bool = False, resized: bool = False) -> None:
    """Check a pass on one module. Raises AssertionError."""
    defaults = {name: choices[0] for name, choices in HOW.items()}
    how = {**defaults, "dynamic": dynamic or None, "resized": resized, "read": True}
    trial = Trial(spec, {name: choices[0] for name, choices in OPTIONS.items()}, how)
    verdict = Verdict()
    run = _PassRun([(trial, verdict)], apply)
    run.judge()
    if run.failed is not None:
        raise run.failed
    assert verdict.failure is None, verdict.failure


class _PassRun(Run):
    """A module compiled by one pass alone."""

    def __init__(self, cases: list[tuple[Trial, Verdict]], apply: Pass):
        super().__init__(cases)
        self.apply, self.failed = apply, None

    failed: Exception | None

    def compile(self, trial: Trial, verdict: Verdict, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        try:
            return check_graph(self.apply, capture(gm).module, inputs).forward
        except Exception as error:  # through Dynamo it would come out wrapped
            self.failed = self.failed or error
            verdict.fail("exception", str(error))
            return gm.forward


def check_graph(apply: Pass, graph: fx.GraphModule, inputs: Sequence[Any]) -> fx.GraphModule:
    """Check a pass on one canonical graph, called with `inputs`. Returns the graph that it gave.

    Raises `fxopt.verify.VerificationError`, an AssertionError.
    """
    after = _applied(apply, graph)
    verify.canonical(after)
    verify.same_interface(graph, after)
    same_function(graph, after, inputs)
    again = _applied(apply, after)
    assert targets(again) == targets(after), (
        f"applied to its own result the pass changes it again: {targets(after)} becomes {targets(again)}"
    )
    return after


def _applied(apply: Pass, graph: fx.GraphModule) -> fx.GraphModule:
    """The result of a pass on a copy, recompiled, with fresh values."""
    copied = copy_module(graph)
    after = apply(copied)
    after = copied if after is None else after
    assert isinstance(after, fx.GraphModule), f"a pass returns a GraphModule or None, not {type(after).__name__}"
    propagate(after)
    after.recompile()
    return after


# --- failures as code --------------------------------------------------------------------------------------------


def rule_code(rule: Rule, spelling: Callable[..., Any], codes: Mapping[str, str]) -> str:
    """A script that checks `rule` on one spelling with one set of inputs."""
    taken = chosen_of(spelling, codes)
    lines = [
        "from math import inf, nan",
        "import torch",
        "from fxopt.testing import check_laws, check_symbolic, literal, made",
        *_import_of(rule, "rule"),
        f"spelling = rule.spellings[{rule.spellings.index(spelling)}]  # {spelling.__name__}",
        "values = {",
        *(f"    {name!r}: {code}," for name, code in taken.items()),
        "}",
        "check_laws(rule, spelling, values)",
        "check_symbolic(rule, spelling, values)",
    ]
    return _script(lines)


def pass_code(apply: Pass, spec: ModuleSpec, dynamic: bool, resized: bool) -> str:
    """A script that checks a pass on one module, which is shown as a comment."""
    lines = [
        "from fxopt.testing import ModuleSpec, check_pass_on",
        *_import_of(apply, "apply"),
        *(f"# {line}".rstrip() for line in spec.source().splitlines()),
        f"spec = ModuleSpec.from_json({dataclasses.asdict(spec)!r})",
        f"check_pass_on(apply, spec, dynamic={dynamic}, resized={resized})",
    ]
    return _script(lines)


def _script(lines: Sequence[str]) -> str:
    return "\n".join(["This runs the smallest failure found:", "", *lines, ""])


def _import_of(item: Any, name: str) -> list[str]:
    """How to import `item`, of some module's top level, as `name`; a comment where it is of none."""
    for known in list(sys.modules.values()):
        if getattr(known, "__name__", "__main__") == "__main__":
            continue
        for attribute, value in list(getattr(known, "__dict__", {}).items()):
            if value is item:
                return [f"from {known.__name__} import {attribute} as {name}"]
    made_by = item if callable(item) else getattr(item, "replacement", None)
    place = inspect.getsourcefile(made_by) if inspect.isfunction(made_by) else "a function"
    return [f"{name} = ...  # put it here: it is made in {place}, and no module has it by name"]
