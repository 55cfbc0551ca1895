"""Is a rewritten graph as near to fp64 as the one it replaces? Both run on the same inputs, in the dtypes they have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxopt.differential import in_double, relative_error, typical_entry

__all__ = ["as_near_as", "results"]

RATIO, FLOOR = 2.0, 8.0
"""Allowed: RATIO times the spelling's own error, plus FLOOR roundings of the coarsest dtype (a sum of few terms may
happen to be exact in one order and not in another), of the tensor and, as in `fxopt.testing.compare`, of one with the
gradients' typical entries: where a softmax is saturated, gradients by queries are differences that vanish."""


def as_near_as(original: fx.GraphModule, rewritten: Callable[..., Any], tensors: Sequence[Tensor]) -> None:
    """Check that `rewritten` is as near to fp64 as `original` is, on `tensors`, gradients too.

    Raises AssertionError naming the output or gradient and the errors.
    """

    double = [
        value.detach().double().requires_grad_(value.requires_grad) if value.is_floating_point() else value
        for value in tensors
    ]
    exact, eager, ours = (
        results(in_double(original), double),
        results(original, tensors),
        results(rewritten, tensors),
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


def results(fn: Callable[..., Any], tensors: Sequence[Tensor]) -> dict[str, Tensor | None]:
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
