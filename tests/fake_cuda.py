"""CUDA tensors without data on a machine without a card: what AOTAutograd makes of operators there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._functorch.aot_autograd import aot_export_joint_simple


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """A tensor on CUDA; within a FakeTensorMode."""
    return torch.empty(shape, dtype=dtype, device="cuda")


def traced(function: Callable[..., Any], *tensors: torch.Tensor) -> fx.GraphModule:
    """What AOTAutograd makes of `function`, without gradients; within a FakeTensorMode."""
    return aot_export_joint_simple(function, tensors, trace_joint=False)


def launches(graph: fx.GraphModule) -> list[str]:
    """Launches, by the tensors that they write to, and fxopt's operators that are left, by name."""
    found = []
    for node in graph.graph.nodes:
        if "triton_kernel_wrapper" in str(node.target):
            found.append(" ".join(sorted(node.kwargs["tensors_to_clone"])))
        elif str(node.target).startswith("fxopt"):
            found.append(str(node.target))
    return found
