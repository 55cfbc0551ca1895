"""The differential check: two graphs run in fp64 on the same inputs must agree, gradients too.

Lint and fake values cannot tell `rsqrt` from `sqrt`; numbers can. In fp64 two ways to write one function differ by
rounding alone, some 1e-16 a step, so that a wrong formula stands out by ten orders of magnitude.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fxopt import compat
from fxopt.effects import is_random
from fxopt.fake import bound_arguments
from fxopt.rewrite import copy_module
from fxopt.verify import VerificationError

TOLERANCE = 1e-9
"""Largest relative difference: 1e-16 of rounding, times the hundreds of operations and cancellation of a deep graph."""

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def same_function(before: fx.GraphModule, after: fx.GraphModule, inputs: Sequence[Any]) -> None:
    """Check that both graphs give the same outputs and input gradients in fp64 on `inputs` (tensors and numbers).

    Symbolic numbers among `inputs` stand for those they were traced with: a real tensor takes no other.

    Where one draws other random numbers than the other, a dropout drawn anew, both are run with nothing dropped.

    Outputs that are integers are compared as numbers are: an argmax of fp64 values has no ties that are not exact.

    Raises `VerificationError` naming the output or input, and the error. Nothing of `inputs` is changed.
    """
    modules = [in_double(before), in_double(after)]
    if _draws(before) != _draws(after):
        for module in modules:
            _drop_nothing(module)
    with torch.random.fork_rng(devices=[]):
        one = _run(modules[0], inputs)
    with torch.random.fork_rng(devices=[]):
        other = _run(modules[1], inputs)
    typical = typical_entry({name: value for name, value in one.items() if "gradient" in name})
    for name in one:
        error = relative_error(other[name], one[name], typical if "gradient" in name else 0.0)
        if not error <= TOLERANCE:
            raise VerificationError(f"in fp64 {name} differs by {error:.1e} (relative), more than {TOLERANCE:.0e}")


def relative_error(value: torch.Tensor | None, reference: torch.Tensor | None, typical: float = 0.0) -> float:
    """``|value - reference| / (|reference| + |a tensor of `typical` entries|)``, norms being 2-norms.

    0 where both are None or NaN alike, inf where only one is; where the divisor is 0, the difference itself. `typical`
    is for gradients that cancellation has left next to nothing of, such as those of a saturated softmax by queries.
    """
    if value is None or reference is None:
        return 0.0 if value is reference else float("inf")
    if not torch.equal(value.isnan(), reference.isnan()) or not torch.equal(value.isinf(), reference.isinf()):
        return float("inf")
    finite = reference.isfinite()
    value, reference = value[finite].double(), reference[finite].double()
    size = float(reference.norm()) + typical * math.sqrt(reference.numel())
    return float((value - reference).norm()) / (size or 1.0)


def typical_entry(gradients: Mapping[str, torch.Tensor | None]) -> float:
    """Root mean square of all finite entries of `gradients`."""
    present = [g[g.isfinite()] for g in gradients.values() if g is not None]
    count = sum(g.numel() for g in present)
    return math.sqrt(sum(float(g.square().sum()) for g in present) / count) if count else 0.0


def _graphs(gm: fx.GraphModule) -> list[fx.GraphModule]:
    return [module for module in gm.modules() if isinstance(module, fx.GraphModule)]


def _draws(gm: fx.GraphModule) -> list[str]:
    """The random operators of `gm` and its bodies, in order."""
    return [str(node.target) for one in _graphs(gm) for node in one.graph.nodes if _is_random(node)]


def _is_random(node: fx.Node) -> bool:
    """Whether `node` draws, or is an operator of fxopt's that drops by a seed drawn elsewhere."""
    return node.op == "call_function" and (is_random(node) or bool(_rate(node)))


def _rate(node: fx.Node) -> str:
    """The argument of `node` that says how much is dropped, where that is more than 0; "" for none."""
    if node.op != "call_function" or not isinstance(node.target, compat.OpOverload):
        return ""
    given = bound_arguments(node)
    named = [name for name in ("dropout_p", "dropout", "p") if isinstance(given.get(name), float) and given[name]]
    drops = "dropout" in str(node.target) or "attention" in str(node.target)
    return named[0] if named and drops else ""


def _drop_nothing(gm: fx.GraphModule) -> None:
    """Set every dropout of `gm`, in place, to 0."""
    for module in _graphs(gm):
        for node in module.graph.nodes:
            rate = _rate(node)
            if rate:
                at = [argument.name for argument in node.target._schema.arguments].index(rate)
                if at < len(node.args):
                    node.update_arg(at, 0.0)
                else:
                    node.update_kwarg(rate, 0.0)
        module.recompile()


def _run(module: fx.GraphModule, inputs: Sequence[Any]) -> dict[str, torch.Tensor | None]:
    given = [_double(compat.size_hint(item)) for item in inputs]
    leaves = [item for item in given if isinstance(item, torch.Tensor) and item.requires_grad]
    work = [item.clone() if isinstance(item, torch.Tensor) else item for item in given]
    device = next((item.device.type for item in given if isinstance(item, torch.Tensor)), "cpu")
    with torch.enable_grad(), torch.autocast(device, enabled=False):
        outputs = [item for item in compat.pytree.tree_leaves(module(*work)) if isinstance(item, torch.Tensor)]
        found: dict[str, torch.Tensor | None] = {f"output {index}": item.detach() for index, item in enumerate(outputs)}
        losses = [_weighed(item) for item in outputs if item.requires_grad]
        if losses and leaves:
            gradients = torch.autograd.grad(torch.stack(losses).sum(), leaves, allow_unused=True)
            found |= {f"the gradient of input {index}": item for index, item in enumerate(gradients)}
    return found


def _weighed(value: torch.Tensor) -> torch.Tensor:
    """A sum with fixed, uneven weights: a plain sum has gradients that cancel in norms and softmaxes."""
    weights = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype, device=value.device)
    return (value.reshape(-1) * weights).sum()


def _double(value: Any) -> Any:
    if not isinstance(value, torch.Tensor) or value.dtype not in _FLOATS:
        return value
    return value.detach().double().requires_grad_(value.requires_grad)


def in_double(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of `gm` in which every lower floating-point dtype, cast and constant is fp64; bodies included."""
    copy = copy_module(gm)
    for module in copy.modules():
        if isinstance(module, fx.GraphModule):
            _raise_dtypes(module)
    return copy


def _raise_dtypes(gm: fx.GraphModule) -> None:
    def raised(item: Any) -> Any:
        return torch.float64 if item in _FLOATS else item

    for node in gm.graph.nodes:
        if node.op == "get_attr":
            value = getattr(gm, str(node.target), None)
            if isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter):
                setattr(gm, str(node.target), _double(value))
        elif node.op == "call_function":
            node.args = compat.pytree.tree_map_only(torch.dtype, raised, node.args)
            node.kwargs = compat.pytree.tree_map_only(torch.dtype, raised, node.kwargs)
    gm.recompile()
