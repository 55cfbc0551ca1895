"""What a node of a graph costs: flops, bytes and the seconds that follow from them on a device.

Sizes are taken by their hints: arithmetic on symbolic sizes in a planner would install guards.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx
from torch.utils.flop_counter import flop_registry

from fxopt import compat
from fxopt.fake import value_of
from fxopt.memory.rates import Device

__all__ = ["bytes_of", "flops_of", "hint", "seconds_of"]

UNKNOWN = 4096
"""What a size without a hint (data-dependent) is taken for."""


def hint(size: Any) -> int:
    """A size as the integer it was traced with."""
    found = compat.size_hint(size)
    return UNKNOWN if found is None else int(found)


def bytes_of(value: Any) -> int:
    """Bytes that a new tensor like `value` takes; of a tuple, the sum."""
    if isinstance(value, torch.Tensor):
        return math.prod(map(hint, value.shape)) * value.dtype.itemsize
    return sum(map(bytes_of, value)) if isinstance(value, tuple | list) else 0


def flops_of(node: fx.Node) -> int:
    """Flops by torch's registry, where fxopt's operators are too; 0 for operators that have no formula."""
    formula = flop_registry.get(getattr(node.target, "_overloadpacket", None))
    if formula is None:
        return _flash_on_cpu(node)
    args, kwargs = (_concrete(item) for item in (node.args, node.kwargs))
    return int(formula(*args, **kwargs, out_val=_concrete(value_of(node))))


def _flash_on_cpu(node: fx.Node) -> int:
    """Attention on a CPU, of which torch's registry knows neither direction."""
    name = str(node.target)
    if "_scaled_dot_product_flash_attention_for_cpu" not in name:
        return 0
    backward = "backward" in name
    q, k, v = (value_of(item) for item in node.args[backward : 3 + backward])
    batch, heads, queries, width = map(hint, q.shape)
    products = 3 * width + 2 * hint(v.shape[-1]) if backward else width + hint(v.shape[-1])
    return 2 * batch * heads * queries * hint(k.shape[2]) * products


def _concrete(value: Any) -> Any:
    """Nodes and symbolic sizes as tensors without data and as numbers."""
    if isinstance(value, fx.Node):
        return _concrete(value_of(value))
    if isinstance(value, torch.Tensor):
        return torch.empty([hint(size) for size in value.shape], dtype=value.dtype, device="meta")
    if isinstance(value, tuple | list):
        return type(value)([_concrete(item) for item in value])
    if isinstance(value, dict):
        return {key: _concrete(item) for key, item in value.items()}
    return compat.size_hint(value)


def seconds_of(node: fx.Node, flops: int, device: Device) -> float:
    """By the slower of arithmetic and memory (roofline; Williams et al., 2009)."""
    read = sum(bytes_of(value_of(item)) for item in node.all_input_nodes)
    moved = (read + bytes_of(value_of(node))) / device.bandwidth
    value = next((one for one in [value_of(node), *map(value_of, node.args)] if isinstance(one, torch.Tensor)), None)
    return max(moved, flops / device.flops_of(value.dtype if value is not None else torch.float32))
