"""How tensors may lie in memory when an operator gets them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

FAR = 2**31 + 2**20
"""Elements between the first axis's parts in the layout "far": more than 32 bits can say. 4 GiB of bf16 for two."""


def _far(tensor: Tensor) -> Tensor:
    """The parts of the first axis so far apart that offsets need 64 bits; only for tensors of two parts."""
    if tensor.shape[0] != 2:
        raise ValueError(f"the layout is of two parts, not {tensor.shape[0]}")
    room = torch.empty(FAR + tensor[0].numel(), dtype=tensor.dtype, device=tensor.device)
    inner = torch.empty(tensor.shape[1:]).stride()
    placed = room.as_strided(tensor.shape, (FAR, *inner))
    placed.copy_(tensor)
    return placed


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "as drawn": lambda t: t,
    "contiguous": lambda t: t.contiguous(),
    "every other": lambda t: torch.stack((t, t), -1)[..., 0],
    "part of a whole": lambda t: torch.cat((t, t), -1)[..., t.shape[-1] :],
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
    "misaligned": lambda t: torch.cat((t[..., :1], t), -1)[..., 1:],
    "far": _far,
}
USUAL = tuple(name for name in LAYOUTS if name != "far")
