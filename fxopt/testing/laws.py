"""Laws that every rule obeys, for one spelling on one set of inputs. `fxopt.testing.check_rule` draws the inputs.

1. A rule fires exactly once on each of its own spellings, and never on the result.
2. The rewritten graph is the same function: outputs and gradients agree in fp64.
3. In the dtype drawn it is as near to fp64 as the spelling is: error at most twice the spelling's, plus a floor.
4. The canonical graph replays the spelling bit for bit, gradients too, and simplifying it again changes nothing.
5. Shapes, dtypes, strides, devices, aliasing, in-place writes and random operators stay (`fxopt.verify`).
6. With symbolic sizes it fires too or says why not, and what it makes is the same function.
7. Where random numbers are drawn, a seed repeats, and the gradient is that of what was computed with them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fxopt import compat
from fxopt.capture import trace
from fxopt.differential import in_double, same_function
from fxopt.effects import is_random
from fxopt.rewrite import Outcome, apply_rule
from fxopt.rule import Rule
from fxopt.simplify import simplify
from fxopt.testing.near import as_near_as, results, weighed, widened


def chosen_of(spelling: Callable[..., Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `values` that `spelling` takes. Raises AssertionError naming an argument that is not drawn."""
    names = list(inspect.signature(spelling).parameters)
    missing = [name for name in names if name not in values]
    assert not missing, f"{spelling.__name__} takes {missing}, and the rule's `inputs` draws only {sorted(values)}"
    return {name: values[name] for name in names}


def check_laws(rule: Rule, spelling: Callable[..., Any], values: Mapping[str, Any]) -> None:
    """Check laws 1 to 5 and 7. values: arguments by name; the spelling takes its own. Raises AssertionError."""
    chosen = chosen_of(spelling, values)
    original = trace(spelling, chosen)
    tensors = [value for value in chosen.values() if isinstance(value, Tensor)]
    if any(is_random(node) for node in original.graph.nodes):
        own_gradient(_fired(rule, spelling, original).module, tensors)
        return
    replays_exactly(spelling, original, chosen)
    outcome = _fired(rule, spelling, original)
    again = apply_rule(rule, outcome.module, force=True)
    assert not again.rewrites, f"{rule.name} fires again on its own result for {spelling.__name__}"
    same_function(original, outcome.module, tensors)
    as_near_as(original, outcome.module, tensors)


CONCRETE_ONLY = "SymIntArrayRef expected to contain only concrete integers"
"""What torch says of an operator that takes no symbolic sizes (`baddbmm`, 2.13)."""


def check_symbolic(rule: Rule, spelling: Callable[..., Any], values: Mapping[str, Any]) -> None:
    """Check law 6, but of what torch itself cannot trace. Raises AssertionError, or what the rule raises."""
    chosen = chosen_of(spelling, values)
    tensors = [value for value in chosen.values() if isinstance(value, Tensor)]
    try:
        graph = trace(spelling, dict(zip(chosen, compat.symbolic(list(chosen.values())), strict=True)))
    except RuntimeError as error:
        if CONCRETE_ONLY in str(error):
            return
        raise
    outcome = apply_rule(rule, graph, force=True)
    told = [reason for item in outcome.refusals for reason in item.reasons]
    assert outcome.rewrites or told, f"{rule.name} neither fires on {spelling.__name__} of any size nor says why not"
    same_function(graph, outcome.module, tensors)


def _fired(rule: Rule, spelling: Callable[..., Any], original: fx.GraphModule) -> Outcome:
    """Law 1, and law 5 in `apply_rule`."""
    outcome = apply_rule(rule, original, force=True)
    assert len(outcome.rewrites) == 1, (
        f"{rule.name} fired {len(outcome.rewrites)} times on {spelling.__name__}: "
        f"{[item.reasons for item in outcome.refusals]}"
    )
    return outcome


def replays_exactly(spelling: Callable[..., Any], graph: fx.GraphModule, chosen: Mapping[str, Any]) -> None:
    """Law 4. Raises AssertionError."""
    names = [name for name, value in chosen.items() if isinstance(value, Tensor)]
    tensors = [chosen[name] for name in names]
    direct = results(lambda *given: spelling(**{**chosen, **dict(zip(names, given, strict=True))}), tensors)
    replayed = results(graph, tensors)
    for name, value in direct.items():
        other = replayed[name]
        assert (value is None) == (other is None), f"{spelling.__name__}: {name} appears on one side only"
        same = value is None or other is None or torch.equal(value.nan_to_num(), other.nan_to_num())
        assert same, f"{spelling.__name__}: the canonical graph's {name} is not bit-equal"
    before = str(graph.graph)
    simplify(graph)
    assert str(graph.graph) == before, f"{spelling.__name__}: simplifying twice changes the graph"


def own_gradient(graph: fx.GraphModule, tensors: list[Tensor]) -> None:
    """Law 7, in fp64 by central differences along a random direction, with one seed. Raises AssertionError.

    It holds for what neither detaches nor jumps: a backward that drops other values than the forward did breaks it.
    """
    wide, double = in_double(graph), [widened(value) for value in tensors]
    draw = torch.Generator().manual_seed(0)
    along = [torch.randn(t.shape, generator=draw, dtype=torch.float64) if t.requires_grad else None for t in double]

    def moved(by: float) -> list[Tensor]:
        return [t if d is None else (t.detach() + by * d).requires_grad_() for t, d in zip(double, along, strict=True)]

    with torch.random.fork_rng(devices=[]):
        here, again, ahead, behind = (_seeded(wide, moved(by)) for by in (0.0, 0.0, 1e-5, -1e-5))
    for name, value in here.items():
        other = again[name]
        assert value is None or other is None or torch.equal(value, other), f"{name} does not repeat under a seed"
    numeric = (_total(ahead) - _total(behind)) / 2e-5
    gradients = [(here.get(f"gradient of input {at}"), direction) for at, direction in enumerate(along)]
    paired = [(value, direction) for value, direction in gradients if value is not None and direction is not None]
    analytic = sum(float((value * direction).sum()) for value, direction in paired)
    size = sum(float(value.square().sum()) for value, _ in paired) ** 0.5
    assert abs(numeric - analytic) <= 1e-3 * max(size, abs(analytic), 1e-9), (
        f"gradients are not those of what was drawn: outputs change by {numeric:.4e}, the gradient says {analytic:.4e}"
    )


def _seeded(graph: fx.GraphModule, tensors: list[Tensor]) -> dict[str, Tensor | None]:
    torch.manual_seed(0)
    return results(graph, tensors)


def _total(found: Mapping[str, Tensor | None]) -> float:
    """What gradients are taken of."""
    return sum(float(weighed(v)) for name, v in found.items() if name.startswith("output") and v is not None)
