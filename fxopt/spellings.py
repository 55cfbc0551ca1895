"""Spellings of patterns, traced: the graphs that the matcher looks for.

Tracing one takes 20 ms and a rule may have dozens. So those that hold an operator which the graph lacks are left out,
the rest are traced together, once a process.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from fxopt.capture import trace
from fxopt.draw import SeededDraw
from fxopt.rule import Pattern

Spelling = Callable[..., Any]

SENTINEL = 0.731058578
"""Scalar holes are traced as numbers from here up, 0.001 apart, that nobody writes in a model."""

_TELLING = frozenset(
    "mean sum var layer_norm rms_norm group_norm softmax log_softmax logsumexp silu tanh".split()  # noqa: SIM905
)
"""Functions that the canonical graph always shows as the ATen operator of the same name."""


@dataclasses.dataclass
class Traced:
    """A spelling traced on particular inputs. `holes` names its placeholders, `scalars` its sentinel constants."""

    root: fx.Node
    holes: dict[fx.Node, str]
    scalars: dict[float, str]
    size: int


def skeletons_for(rule: Pattern, gm: fx.GraphModule) -> list[tuple[Spelling, Traced]]:
    """The spellings of `rule` that `gm` may hold, traced on inputs the rule draws.

    They show its structure, whatever dtype and rank a site has.
    """
    present = {_operator_name(node.target) for node in gm.graph.nodes if node.op == "call_function"}
    wanted = [spelling for spelling in rule.spellings if _telling(rule, spelling) <= present]
    missing = [spelling for spelling in wanted if (rule.inputs, spelling) not in _SKELETONS]
    for spelling, traced in zip(missing, traced_together(missing, rule.inputs(SeededDraw(0))), strict=True):
        _SKELETONS[rule.inputs, spelling] = traced
    return [(spelling, _SKELETONS[rule.inputs, spelling]) for spelling in wanted]


_SKELETONS: dict[tuple[Any, Spelling], Traced] = {}
_NAMES: dict[tuple[Any, Spelling], frozenset[str]] = {}


def traced_together(spellings: Sequence[Spelling], values: dict[str, Any]) -> list[Traced]:
    """Trace `spellings` in one go on the tensors among `values`; their other arguments become sentinels."""
    if not spellings:
        return []
    names = list(dict.fromkeys(name for spelling in spellings for name in inspect.signature(spelling).parameters))
    tensors = {name: values[name] for name in names if isinstance(values.get(name), Tensor)}
    scalars = {SENTINEL + 0.001 * index: name for index, name in enumerate(names) if name not in tensors}
    constants = {name: value for value, name in scalars.items()}

    def all_of_them(**given: Any) -> tuple[Any, ...]:
        return tuple(_called(spelling, {**given, **constants}) for spelling in spellings)

    gm = trace(all_of_them, tensors)
    holes = dict(zip(gm.graph.find_nodes(op="placeholder"), tensors, strict=True))
    output: Any = next(iter(reversed(gm.graph.nodes)))
    return [
        Traced(root, holes, scalars, len(_nodes_of(root)))
        for spelling, root in zip(spellings, output.args[0], strict=True)
    ]


def _called(spelling: Spelling, given: dict[str, Any]) -> Any:
    result = spelling(**{name: given[name] for name in inspect.signature(spelling).parameters})
    if not isinstance(result, Tensor):
        raise TypeError(f"spelling {spelling.__name__} must return one tensor, not {type(result).__name__}")
    return result


def _nodes_of(root: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if node.op == "call_function" and node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    return found


class _Names(TorchFunctionMode):
    """Collects the names of the torch functions called within."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found.add(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))


def _telling(rule: Pattern, spelling: Spelling) -> frozenset[str]:
    """The operators that a graph must hold for `spelling` to be in it; found by running it on meta tensors."""
    key = rule.inputs, spelling
    if key not in _NAMES:
        values = {
            name: value.to("meta") if isinstance(value, Tensor) else value
            for name, value in rule.inputs(SeededDraw(0)).items()
        }
        with torch.no_grad(), _Names() as names:
            _called(spelling, values)
        _NAMES[key] = _TELLING & names.found
    return _NAMES[key]


def _operator_name(target: Any) -> str:
    schema = getattr(target, "_schema", None)
    return "" if schema is None else schema.name.removeprefix("aten::")
