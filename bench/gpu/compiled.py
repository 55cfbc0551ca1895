"""A function of tensors under torch.compile, or replayed from a CUDA graph."""

from __future__ import annotations

from typing import Any

import torch

from gpu.problem import Function, Outputs, Tensors


def compiled_whole(function: Function) -> Function:
    """`function` under Inductor, without graph breaks."""
    made: Function = torch.compile(function, fullgraph=True)
    return made


def captured_in_graph(function: Function) -> Function:
    """`function` whose forward and backward are captured once in a CUDA graph and then replayed."""

    def replayed(tensors: Tensors) -> Outputs:
        wanted = [name for name, one in tensors.items() if one.requires_grad]
        plain = {name: one.detach() for name, one in tensors.items()}

        def call(*leaves: torch.Tensor) -> Outputs:
            return function(plain | dict(zip(wanted, leaves, strict=True)))

        samples = tuple(tensors[name].detach().clone().requires_grad_() for name in wanted)
        graphed: Any = torch.cuda.make_graphed_callables(call, samples)
        return tuple(graphed(*(tensors[name] for name in wanted)))

    return replayed
