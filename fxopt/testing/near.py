"""Whether results are as near to fp64 as eager's are: one rule for the laws, for repro scripts and for the fuzz run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxopt.differential import in_double, relative_error, typical_entry

__all__ = ["FLOOR", "as_near_as", "results", "too_far", "weighed", "widened"]

RATIO, FLOOR = 2.0, 8.0
"""Allowed: RATIO times the spelling's own error, plus FLOOR roundings of the coarsest dtype (a sum of few terms may
happen to be exact in one order and not in another), of the tensor and, as in `fxopt.testing.compare`, of one with the
gradients' typical entries: where a softmax is saturated, gradients by queries are differences that vanish."""

Named = Mapping[str, Tensor | None]


def too_far(exact: Named, eager: Sequence[Named], ours: Named, floor: float) -> str | None:
    """The first tensor of `ours` that is farther from `exact` than the rule allows, with the numbers; None if none is.

    eager: one run, or several, of which the farthest from the truth says how far one may be. Names that begin with
    "grad" are gradients. floor: relative error that is allowed in any case. NaN and infinities must be where the truth
    has them; where eager's are not, nothing can be said. Integers are left to the caller.
    """
    typical = typical_entry({name: value for name, value in exact.items() if name.startswith("grad")})
    for name, reference in exact.items():
        if reference is not None and not reference.is_floating_point():
            continue
        beside = typical if name.startswith("grad") else 0.0
        mine = relative_error(_wide(ours[name]), reference, beside)
        theirs = max(relative_error(_wide(one[name]), reference, beside) for one in eager)
        allowed = RATIO * theirs + floor
        if not mine <= allowed:
            return f"{name}: error {mine:.2e} against fp64, eager's is {theirs:.2e}, allowed {allowed:.2e}"
    return None


def _wide(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.double()


def as_near_as(original: fx.GraphModule, rewritten: Callable[..., Any], tensors: Sequence[Tensor]) -> None:
    """Check that `rewritten` is as near to fp64 as `original` is, on `tensors`, gradients too.

    Raises AssertionError naming the output or gradient and the errors.
    """
    exact = results(in_double(original), [widened(value) for value in tensors])
    eager, ours = results(original, tensors), results(rewritten, tensors)
    eps = max([torch.finfo(value.dtype).eps for value in tensors if value.is_floating_point()], default=0.0)
    failure = too_far(exact, [eager], ours, FLOOR * eps)
    assert failure is None, failure


def widened(value: Tensor) -> Tensor:
    """A leaf like `value` in fp64; integers are themselves."""
    return value.detach().double().requires_grad_(value.requires_grad) if value.is_floating_point() else value


def weighed(value: Tensor) -> Tensor:
    """A sum with uneven weights: a plain sum's gradients cancel in norms."""
    return (value.reshape(-1) * torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype)).sum().double()


def results(fn: Callable[..., Any], tensors: Sequence[Tensor]) -> dict[str, Tensor | None]:
    """Outputs of `fn`, and gradients of an unevenly weighed sum of them, by name."""
    leaves = [
        value.detach().clone(memory_format=torch.preserve_format).requires_grad_(value.requires_grad)
        for value in tensors
    ]
    out = fn(*leaves)
    outputs = [value for value in (out if isinstance(out, list | tuple) else [out]) if isinstance(value, Tensor)]
    found: dict[str, Tensor | None] = {f"output {index}": value.detach() for index, value in enumerate(outputs)}
    wanted = [(index, leaf) for index, leaf in enumerate(leaves) if leaf.requires_grad]
    losses = [weighed(value) for value in outputs if value.requires_grad]
    if wanted and losses:
        gradients = torch.autograd.grad(torch.stack(losses).sum(), [leaf for _, leaf in wanted], allow_unused=True)
        found |= {
            f"gradient of input {index}": gradient for (index, _), gradient in zip(wanted, gradients, strict=True)
        }
    return found
