"""A call of one of fxopt's operators on drawn inputs, and the same in plain PyTorch; run three ways, put to fp64."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from fxopt.testing.compare import Comparison, Step, compare

FEW = 64
"""Numbers in a tensor below which eager PyTorch is right by luck now and then, so that nobody can be half as good."""

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}
Tensors = dict[str, Tensor]
Outputs = tuple[Tensor, ...]
Function = Callable[[Tensors], Outputs]


class Problem(Protocol):
    """tensors: inputs by name, `requires_grad` where a gradient is asked for. dtype: the coarsest that takes part."""

    tensors: Tensors
    dtype: torch.dtype

    def ours(self, tensors: Tensors) -> Outputs:
        """The operator."""

    def eager(self, tensors: Tensors) -> Outputs:
        """The formula in the inputs' dtype."""

    def exact(self, tensors: Tensors) -> Outputs:
        """The formula in fp64, for inputs that are."""


def normal(shape: Sequence[int], seed: int, dtype: torch.dtype, device: str) -> Tensor:
    """Standard normal numbers, the same on every call on a device."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator, device=device).to(dtype)


def leaves_of(tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> Tensors:
    """Detached inputs with `requires_grad` as it was, floats in `dtype` if given; strides are kept."""

    def leaf(one: Tensor) -> Tensor:
        if not one.is_floating_point():
            return one
        return one.detach().to(dtype or one.dtype).requires_grad_(one.requires_grad)

    return {name: leaf(one) for name, one in tensors.items()}


def upstreams(outputs: Outputs, dtype: torch.dtype) -> list[Tensor]:
    """A gradient for each output, of numbers that `dtype` has, so that every run gets the same."""
    drawn = [normal(one.shape, 101 + at, dtype, one.device.type) for at, one in enumerate(outputs)]
    return [value.to(one.dtype) for value, one in zip(drawn, outputs, strict=True)]


def run(problem: Problem, function: Function, dtype: torch.dtype | None = None) -> Step:
    """Results and gradients of `function`, inputs in `dtype` if given."""
    leaves = leaves_of(problem.tensors, dtype)
    outputs = function(leaves)
    if any(one.requires_grad for one in outputs):
        torch.autograd.backward(outputs, upstreams(outputs, problem.dtype))
    named = {str(at): one.detach() for at, one in enumerate(outputs)}
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.is_floating_point()}
    return Step(torch.zeros(()), named, gradients, torch.finfo(problem.dtype).eps)


def compared(problem: Problem, ours: Step) -> Comparison:
    """`ours` by the rule of `fxopt.testing.compare`."""
    return compare(ours, run(problem, problem.eager), run(problem, problem.exact, torch.float64))


def sizes(step: Step) -> dict[str, int]:
    """How many numbers each tensor of a step has."""
    return {name: one.numel() for name, one in step.named().items() if one is not None}


def differing(first: Step, second: Step) -> list[str]:
    """The names of tensors whose bits differ between two runs."""
    found = second.named()
    return [
        name
        for name, one in first.named().items()
        if one is not None and not torch.equal(_bits(one), _bits(found[name]))
    ]


def _bits(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.flatten().contiguous().view(torch.uint8)  # NaN equals itself here
