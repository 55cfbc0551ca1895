"""Which kernels a call of an operator would launch, forward and backward, found by calling it without launching."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fxopt import compat
from fxopt.fake import stand_in
from fxopt.kernels.source import Kernel
from fxopt.ops.launch import Launch, Noting

__all__ = ["kernels_of"]


def kernels_of(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any], read: Collection[int]) -> dict[Kernel, Launch]:
    """The kernels of ``op(*args, **kwargs)``, and of its backward where an argument wants its gradient.

    args, kwargs: with fake tensors. Those are stood in for by tensors of the sizes they were traced with, so that no
    guard is installed. read: which of several results somebody reads, so that they have a gradient.

    Raises what the operator raises.
    """
    with compat.FakeTensorMode(), Noting() as noted, torch.enable_grad():
        given, named = compat.pytree.tree_map(_differentiable, (tuple(args), dict(kwargs)))
        found = op(*given, **named)
        outputs = [one for at, one in enumerate(found) if at in read] if isinstance(found, tuple) else [found]
        inputs, results = ([one for one in _tensors(some) if one.requires_grad] for some in ((given, named), outputs))
        if inputs and results:
            with torch.autograd.set_multithreading_enabled(False):
                torch.autograd.grad(results, inputs, [torch.empty_like(one) for one in results], allow_unused=True)
    return noted.kernels


def _differentiable(value: Any) -> Any:
    made = stand_in(value)
    return made.requires_grad_(value.requires_grad) if isinstance(value, Tensor) else made


def _tensors(values: Any) -> list[Tensor]:
    return [one for one in compat.pytree.tree_leaves(values) if isinstance(one, Tensor)]
