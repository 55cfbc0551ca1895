"""Laws that every rule obeys, checked on inputs that hypothesis draws.

1. A rule fires exactly once on each of its own spellings, and never on the result.
2. The rewritten graph is the same function: outputs and gradients agree in fp64.
3. In the dtype drawn it is as near to fp64 as the spelling is: error at most twice the spelling's, plus a floor.
4. The canonical graph replays the spelling bit for bit, gradients too, and simplifying it again changes nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from fxopt.capture import trace
from fxopt.differential import same_function
from fxopt.rewrite import apply_rule
from fxopt.rule import Rule
from fxopt.simplify import simplify
from fxopt.testing.near import as_near_as, results


class HypothesisDraw:
    """A `fxopt.rule.Draw` on hypothesis: sizes and choices shrink, seeds replay, layouts vary."""

    def __init__(self, draw: st.DrawFn):
        self.draw = draw

    def size(self, low: int, high: int) -> int:
        """An integer in [low, high]."""
        return self.draw(st.integers(low, high))

    def choice(self, *options: Any) -> Any:
        """One of `options`."""
        return self.draw(st.sampled_from(options))

    def tensor(self, *shape: int, dtype: torch.dtype, requires_grad: bool = True) -> Tensor:
        """Normal values; contiguous, or a transposed view, or every second element of a wider tensor."""
        layout = self.draw(st.sampled_from(("contiguous", "transposed", "strided")))
        drawn = torch.randn(*shape, generator=self._generator()).to(dtype)
        if layout == "transposed" and len(shape) > 1:
            drawn = drawn.transpose(-1, -2).contiguous().transpose(-1, -2)
        elif layout == "strided" and shape:
            drawn = torch.stack([drawn, drawn], dim=-1)[..., 0]
        return drawn.requires_grad_(requires_grad)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """An int64 tensor of values in [low, high)."""
        return torch.randint(low, high, shape, generator=self._generator())

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.draw(st.integers(0, 2**31 - 1)))


def drawn_inputs(rule: Rule) -> st.SearchStrategy[dict[str, Any]]:
    """Inputs that `rule` must accept, by argument name."""

    @st.composite
    def build(draw: st.DrawFn) -> dict[str, Any]:
        return rule.inputs(HypothesisDraw(draw))

    return build()


def check_rule(rule: Rule, max_examples: int = 25) -> None:
    """Check every law on every spelling of `rule`. Raises AssertionError; hypothesis prints the shrunk inputs."""
    for spelling in rule.spellings:
        check_spelling(rule, spelling, max_examples)


def check_spelling(rule: Rule, spelling: Callable[..., Any], max_examples: int = 25) -> None:
    """Check every law on one spelling of `rule`."""

    @settings(max_examples=max_examples, deadline=None)
    @given(drawn_inputs(rule))
    def laws(values: dict[str, Any]) -> None:
        check_laws(rule, spelling, values)

    laws()


def check_laws(rule: Rule, spelling: Callable[..., Any], values: Mapping[str, Any]) -> None:
    """Check every law for one spelling on one set of inputs. Raises AssertionError."""
    chosen = {name: values[name] for name in inspect.signature(spelling).parameters}
    original = trace(spelling, chosen)
    tensors = [value for value in chosen.values() if isinstance(value, Tensor)]
    replays_exactly(spelling, original, chosen)
    outcome = apply_rule(rule, original, force=True)
    assert len(outcome.rewrites) == 1, (
        f"{rule.name} fired {len(outcome.rewrites)} times on {spelling.__name__}: "
        f"{[item.reasons for item in outcome.refusals]}"
    )
    again = apply_rule(rule, outcome.module, force=True)
    assert not again.rewrites, f"{rule.name} fires again on its own result for {spelling.__name__}"
    same_function(original, outcome.module, tensors)
    as_near_as(original, outcome.module, tensors)


def replays_exactly(spelling: Callable[..., Any], graph: fx.GraphModule, chosen: Mapping[str, Any]) -> None:
    """Law 4. Raises AssertionError."""
    tensors = [value for value in chosen.values() if isinstance(value, Tensor)]
    direct = results(lambda *given: spelling(**{**chosen, **dict(zip(_names(chosen), given, strict=True))}), tensors)
    replayed = results(graph, tensors)
    for name, value in direct.items():
        other = replayed[name]
        assert (value is None) == (other is None), f"{spelling.__name__}: {name} appears on one side only"
        same = value is None or other is None or torch.equal(value.nan_to_num(), other.nan_to_num())
        assert same, f"{spelling.__name__}: the canonical graph's {name} is not bit-equal"
    before = str(graph.graph)
    simplify(graph)
    assert str(graph.graph) == before, f"{spelling.__name__}: simplifying twice changes the graph"


def _names(chosen: Mapping[str, Any]) -> list[str]:
    return [name for name, value in chosen.items() if isinstance(value, Tensor)]
