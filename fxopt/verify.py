"""What must hold between stages: the graph is sound, and it still is the function it was.

Each layer catches what the others miss: lint a broken graph; fresh fake propagation a changed dtype, stride or
alias; a differential run in fp64 a wrong formula.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import fx

from fxopt import compat
from fxopt.effects import is_pure, is_random, mutates, storage_of
from fxopt.fake import value_of


class VerificationError(AssertionError):
    """A stage broke a graph; the message names what differs. Caught by the pipeline, which falls back."""


def is_removable(node: fx.Node) -> bool:
    """Whether dead code elimination may drop `node` when nobody uses it."""
    if node.op in ("placeholder", "output"):
        return False
    if node.op == "get_attr" or node.target is operator.getitem:
        return True
    return node.op == "call_function" and is_pure(node)


def canonical(gm: fx.GraphModule) -> None:
    """Check the properties of a canonical graph (docs/architecture.md). Raises `VerificationError`."""
    gm.graph.lint()
    for node in gm.graph.nodes:
        if node.op == "output" or "kept" in node.meta:
            continue
        if "val" not in node.meta and node.op != "get_attr":
            raise VerificationError(f"{node.name} ({node.target}) carries no fake value")
        if node.op == "call_function" and not _is_canonical_target(node):
            raise VerificationError(f"{node.name}: {node.target} is not an ATen overload")


def _is_canonical_target(node: fx.Node) -> bool:
    whole = (compat.OpOverload, compat.HigherOrderOperator)
    symbolic = all(not isinstance(value_of(argument), torch.Tensor) for argument in node.all_input_nodes)
    return (
        isinstance(node.target, whole)
        or node.target in compat.STATE_SWITCHES
        or node.target is operator.getitem
        or symbolic
    )


def same_interface(
    before: fx.GraphModule, after: fx.GraphModule, redrawn: Collection[str] = (), made: Collection[str] = ()
) -> None:
    """Check that two propagated graphs agree in inputs, outputs, aliasing, mutations and random operators.

    redrawn: names of random nodes of `before` that a rewrite replaced by draws of its own, and
    made:    names of the nodes of `after` that it made. The random operators besides those two must be the same ones
             in the same order, and if any was redrawn, some node made must be random: else its numbers are constant.
             If none was, no node made may draw: all draws after it would come out different.

    Raises `VerificationError` naming the first difference.
    """
    after.graph.lint()
    if _names(before, "placeholder") != _names(after, "placeholder"):
        raise VerificationError("the inputs of the graph changed")
    old, new = _outputs(before), _outputs(after)
    if len(old) != len(new):
        raise VerificationError(f"the graph returned {len(old)} values and now returns {len(new)}")
    for index, (one, other) in enumerate(zip(old, new, strict=True)):
        same_value(f"output {index}", value_of(one), value_of(other))
    for what, listed in (
        ("aliasing of the outputs", _alias_classes),
        ("in-place writes", _writes),
    ):
        if listed(before) != listed(after):
            raise VerificationError(f"the {what} changed: {listed(before)} became {listed(after)}")
    _same_draws(before, after, redrawn, made)


def _same_draws(before: fx.GraphModule, after: fx.GraphModule, redrawn: Collection[str], made: Collection[str]) -> None:
    old = [str(node.target) for node in _random(before) if node.name not in redrawn]
    new = [str(node.target) for node in _random(after) if not redrawn or node.name not in made]
    if old != new:
        raise VerificationError(f"the random operators changed: {old} became {new}")
    if len(old) < len(_random(before)) and len(new) == len(_random(after)):
        raise VerificationError(f"{', '.join(sorted(redrawn))} should be drawn anew, and nothing is")


def same_value(name: str, before: Any, after: Any, grad: bool = True) -> None:
    """Check that two fake values are interchangeable for every later reader. Raises `VerificationError`.

    grad: whether requires_grad counts; a value fresh from tracing above autograd does not know its own.
    """
    if not isinstance(before, torch.Tensor):
        if isinstance(after, torch.Tensor) or type(before) is not type(after):
            raise VerificationError(f"{name}: {before!r} became {after!r}")
        return
    if not isinstance(after, torch.Tensor):
        raise VerificationError(f"{name}: a tensor became {after!r}")
    for field, one, other in zip(
        ("shape", "dtype", "device", "stride", "requires_grad"), _facts(before), _facts(after), strict=True
    ):
        if one != other and (grad or field != "requires_grad") and not _known_alike(field, before, after):
            raise VerificationError(f"{name}: {field} was {one} and is {other}")


def _facts(value: torch.Tensor) -> tuple[str, ...]:
    """As text: comparing symbolic sizes by value would install guards. Sizes that depend on data (u0) have new names
    whenever a graph is propagated, and count as one another."""
    facts = (str(tuple(map(compat.size_text, value.shape))), str(_strides(value)))
    shape, strides = (re.sub(r"\bu\d+\b", "u", one) for one in facts)
    return shape, str(value.dtype), str(value.device), strides, str(value.requires_grad)


def _known_alike(field: str, before: torch.Tensor, after: torch.Tensor) -> bool:
    """Whether sizes or strides of other texts are equal by the guards that there are: rows of logits and of labels."""
    if field not in ("shape", "stride") or before.dim() != after.dim():
        return False
    ones, others = (one.shape if field == "shape" else one.stride() for one in (before, after))
    return all(compat.statically_known_true(one == other) for one, other in zip(ones, others, strict=True))


def _strides(value: torch.Tensor) -> list[str]:
    """Strides that address something: those of axes with one element, or of empty tensors, do not."""
    sizes = list(map(str, value.shape))
    if value.layout is not torch.strided or "0" in sizes:
        return []
    return [compat.size_text(stride) for size, stride in zip(sizes, value.stride(), strict=True) if size != "1"]


def _outputs(gm: fx.GraphModule) -> list[Any]:
    output = next(iter(reversed(gm.graph.nodes)))
    return list(compat.pytree.tree_leaves(output.args[0]))


def _names(gm: fx.GraphModule, op: str) -> list[str]:
    return [node.name for node in gm.graph.nodes if node.op == op]


def _alias_classes(gm: fx.GraphModule) -> list[int]:
    """For each output, the first input or output with the same memory."""
    values = [*(value_of(node) for node in gm.graph.nodes if node.op == "placeholder"), *map(value_of, _outputs(gm))]
    seen: dict[Any, int] = {}
    return [
        seen.setdefault(storage_of(value), index) if storage_of(value) is not None else -1
        for index, value in enumerate(values)
    ]


def _calls(gm: fx.GraphModule) -> Iterator[fx.Node]:
    return (node for node in gm.graph.nodes if node.op == "call_function")


def _writes(gm: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in _calls(gm) if mutates(node)]


def _random(gm: fx.GraphModule) -> list[fx.Node]:
    return [node for node in _calls(gm) if is_random(node)]
