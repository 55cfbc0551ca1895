"""Whether this machine computes a product in a 16-bit dtype: asked by doing a small one, forward and backward.

A CPU has kernels for some operators and dtypes and raises for others, and fake tensors do not tell which.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from fxopt import compat

__all__ = ["lacks"]

aten = torch.ops.aten
Make = Callable[..., Tensor]


@functools.cache
def lacks(name: str, dtype: torch.dtype) -> bool:
    """Whether a CPU has no kernel for operator `name` ("aten::linear") in `dtype`, or none for its gradients.

    False for an operator of which nothing is known here.
    """
    small = _PRODUCTS.get(name)
    if small is None:
        return False

    def make(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype, requires_grad=True)

    with compat.outside_dispatch_modes(), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        try:
            small(make).sum().backward()
        except RuntimeError:  # NotImplementedError is one
            return True
    return False


def _convolution(axes: int, transposed: bool) -> Callable[[Make], Tensor]:
    sizes, ones, zeros = (4,) * axes, [1] * axes, [0] * axes

    def small(make: Make) -> Tensor:
        x, weight, bias = make(1, 2, *sizes), make(2, 2, *([3] * axes)), make(2)
        return aten.convolution.default(x, weight, bias, ones, ones, ones, transposed, zeros, 1)

    return small


_PRODUCTS: dict[str, Callable[[Make], Tensor]] = {
    "aten::linear": lambda make: aten.linear.default(make(2, 4), make(3, 4), make(3)),
    "aten::matmul": lambda make: aten.matmul.default(make(2, 3, 4), make(4, 5)),
    "aten::mm": lambda make: aten.mm.default(make(2, 4), make(4, 3)),
    "aten::mv": lambda make: aten.mv.default(make(2, 4), make(4)),
    "aten::bmm": lambda make: aten.bmm.default(make(2, 3, 4), make(2, 4, 5)),
    "aten::addmm": lambda make: aten.addmm.default(make(2, 3), make(2, 4), make(4, 3)),
    "aten::addmv": lambda make: aten.addmv.default(make(2), make(2, 4), make(4)),
    "aten::addbmm": lambda make: aten.addbmm.default(make(3, 5), make(2, 3, 4), make(2, 4, 5)),
    "aten::baddbmm": lambda make: aten.baddbmm.default(make(2, 3, 5), make(2, 3, 4), make(2, 4, 5)),
    "aten::einsum": lambda make: aten.einsum.default("bij,bjk->bik", [make(2, 3, 4), make(2, 4, 5)]),
    "aten::bilinear": lambda make: aten.bilinear.default(make(2, 3), make(2, 4), make(5, 3, 4), None),
    **{f"aten::conv{axes}d": _convolution(axes, False) for axes in (1, 2, 3)},
    **{f"aten::conv_transpose{axes}d": _convolution(axes, True) for axes in (1, 2, 3)},
    "aten::convolution": _convolution(2, False),
    "aten::scaled_dot_product_attention": lambda make: aten.scaled_dot_product_attention.default(
        make(1, 1, 4, 8), make(1, 1, 4, 8), make(1, 1, 4, 8)
    ),
}
"""A small call of each product."""
