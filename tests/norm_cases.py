"""Norms to test with: inputs of any layout, and one step by the operator or the formulas as a model writes them."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from gpu.norm_problem import NAMES
from gpu.norm_problem import formula as eager
from hypothesis import strategies as st
from torch import Tensor

from fxopt.ops.norm import NormSpec, norm
from fxopt.testing.compare import Step, compare
from fxopt.testing.layouts import LAYOUTS

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
Tensors = dict[str, Tensor]


def plain(dtype: torch.dtype = F32, kind: str = "rms", **changes: Any) -> NormSpec:
    """A norm without casts of an x of `dtype`."""
    wide = torch.promote_types(dtype, F32)
    return dataclasses.replace(NormSpec(kind, 1e-5, "square", wide, dtype, False, 0.0, dtype, dtype), **changes)


def ours(tensors: Tensors, spec: NormSpec, lowering: str = "auto") -> tuple[Tensor, ...]:
    """The operator."""
    named = {name: tensors.get(name) for name in NAMES}
    return tuple(one for one in norm(**named, spec=spec, lowering=lowering) if one is not None)  # type: ignore[arg-type]


def interpreted(tensors: Tensors, spec: NormSpec) -> tuple[Tensor, ...]:
    """The operator by Triton kernels."""
    return ours(tensors, spec, "interpret")


def draw(
    shape: tuple[int, ...], dtype: torch.dtype, parts: str = "", seed: int = 0, layout: str = "contiguous"
) -> Tensors:
    """x and those of residual, weight, bias and gate whose initials are in `parts`, all requiring gradients."""
    generator = torch.Generator().manual_seed(seed)
    made: Tensors = {}
    for name in NAMES:
        if name == "x" or name[0] in parts:
            value = torch.randn(shape[-1:] if name in ("weight", "bias") else shape, generator=generator).to(dtype)
            made[name] = LAYOUTS[layout](value).requires_grad_()
    return made


def step(function: Any, tensors: Tensors, spec: NormSpec, dtype: torch.dtype | None = None) -> Step:
    """Results and gradients of a fixed uneven sum of the results; inputs in `dtype` if given, strides kept."""
    leaves = {n: t.detach().to(dtype or t.dtype).requires_grad_(t.requires_grad) for n, t in tensors.items()}
    outputs = function(leaves, spec)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(one.shape, generator=generator).to(spec.output) for one in outputs]
    total = sum((one.double() * up.double()).sum() for one, up in zip(outputs, upstream, strict=True))
    assert isinstance(total, Tensor)
    if total.requires_grad:
        total.backward()
    named = {str(index): one.detach() for index, one in enumerate(outputs)}
    dtypes = (spec.normalized, spec.affine, spec.output, *(t.dtype for t in tensors.values()))
    eps = max(torch.finfo(one).eps for one in dtypes)
    return Step(torch.zeros(()), named, {name: leaf.grad for name, leaf in leaves.items()}, eps)


def check(tensors: Tensors, spec: NormSpec, function: Any = ours) -> Step:
    """Run the operator, eager and eager in fp64; apply the rule, and return the operator's step."""
    wide = dataclasses.replace(spec, compute=F64, normalized=F64, affine=F64, output=F64)
    if spec.eps is None:
        wide = dataclasses.replace(wide, eps=torch.finfo(spec.compute).eps)
    found = step(function, tensors, spec)
    compare(found, step(eager, tensors, spec), step(eager, tensors, wide, F64)).check()
    return found


@st.composite
def problems(draw_from: st.DrawFn, widths: tuple[int, ...] = (8, 9, 11, 16, 33)) -> tuple[Tensors, NormSpec]:
    """Inputs of any kind, size, layout and dtype, rows as wide as any of `widths`, and a norm that casts anywhere.

    Rows have 8 values or more: in a row of one, the gradient is a difference of equals, and all of it rounding.
    """
    dtype = draw_from(st.sampled_from((F32, BF16, F16)))
    dtypes = st.sampled_from(sorted({dtype, F32}, key=str))
    rows = draw_from(st.sampled_from(((), (3,), (1, 1), (2, 3), (4, 1), (2, 1, 2))))
    shape = (*rows, draw_from(st.sampled_from(widths)))
    parts = "".join(draw_from(st.lists(st.sampled_from("rwbg"), unique=True)))
    layout = draw_from(st.sampled_from(("contiguous", "first axes swapped", "strided")))
    spec = NormSpec(
        draw_from(st.sampled_from(("rms", "layer"))),
        draw_from(st.sampled_from((1e-6, 1e-2, 0.5, None))),
        draw_from(st.sampled_from(("square", "root", "floor"))),
        F32,
        draw_from(dtypes),
        draw_from(st.booleans()),
        draw_from(st.sampled_from((0.0, 1.0))),
        draw_from(dtypes),
        draw_from(dtypes),
    )
    tensors = draw(shape, dtype, parts, draw_from(st.integers(0, 99)), layout)
    for name in tensors:
        tensors[name].requires_grad_(draw_from(st.booleans()))
    return tensors, spec
