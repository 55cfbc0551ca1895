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
from fxopt.differential import relative_error, same_function, typical_entry
from fxopt.rewrite import apply_rule
from fxopt.rule import Rule
from fxopt.simplify import simplify

RATIO, FLOOR = 2.0, 8.0
"""Allowed: RATIO times the spelling's own error, plus FLOOR roundings of the coarsest dtype (a sum of few terms may
happen to be exact in one order and not in another), of the tensor and, as in `fxopt.testing.compare`, of one with the
gradients' typical entries: where a softmax is saturated, gradients by queries are differences that vanish."""


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
    direct = _results(lambda *given: spelling(**{**chosen, **dict(zip(_names(chosen), given, strict=True))}), tensors)
    replayed = _results(graph, tensors)
    for name, value in direct.items():
        other = replayed[name]
        assert (value is None) == (other is None), f"{spelling.__name__}: {name} appears on one side only"
        same = value is None or other is None or torch.equal(value.nan_to_num(), other.nan_to_num())
        assert same, f"{spelling.__name__}: the canonical graph's {name} is not bit-equal"
    before = str(graph.graph)
    simplify(graph)
    assert str(graph.graph) == before, f"{spelling.__name__}: simplifying twice changes the graph"


def as_near_as(original: fx.GraphModule, rewritten: fx.GraphModule, tensors: list[Tensor]) -> None:
    """Law 3. Raises AssertionError naming the output or gradient and the errors."""
    from fxopt.differential import in_double

    double = [
        value.detach().double().requires_grad_(value.requires_grad) if value.is_floating_point() else value
        for value in tensors
    ]
    exact, eager, ours = (
        _results(in_double(original), double),
        _results(original, tensors),
        _results(rewritten, tensors),
    )
    eps = max([torch.finfo(value.dtype).eps for value in tensors if value.is_floating_point()], default=0.0)
    typical = typical_entry({name: value for name, value in exact.items() if name.startswith("gradient")})
    for name, reference in exact.items():
        beside = typical if name.startswith("gradient") else 0.0
        theirs, mine = (relative_error(_wide(found[name]), reference, beside) for found in (eager, ours))
        allowed = RATIO * theirs + FLOOR * eps
        assert mine <= allowed, (
            f"{name}: error {mine:.2e} against fp64, the spelling's is {theirs:.2e}, allowed {allowed:.2e}"
        )


def _wide(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.double()


def _names(chosen: Mapping[str, Any]) -> list[str]:
    return [name for name, value in chosen.items() if isinstance(value, Tensor)]


def _results(fn: Callable[..., Any], tensors: list[Tensor]) -> dict[str, Tensor | None]:
    """Outputs of `fn`, and gradients of an unevenly weighed sum of them (a plain sum's cancel in norms)."""
    leaves = [
        value.detach().clone(memory_format=torch.preserve_format).requires_grad_(value.requires_grad)
        for value in tensors
    ]
    out = fn(*leaves)
    outputs = [value for value in (out if isinstance(out, list | tuple) else [out]) if isinstance(value, Tensor)]
    found: dict[str, Tensor | None] = {f"output {index}": value.detach() for index, value in enumerate(outputs)}
    wanted = [(index, leaf) for index, leaf in enumerate(leaves) if leaf.requires_grad]
    losses = [
        (value.reshape(-1) * torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype)).sum().double()
        for value in outputs
        if value.requires_grad
    ]
    if wanted and losses:
        gradients = torch.autograd.grad(torch.stack(losses).sum(), [leaf for _, leaf in wanted], allow_unused=True)
        found |= {
            f"gradient of input {index}": gradient for (index, _), gradient in zip(wanted, gradients, strict=True)
        }
    return found
