"""What devices do in a second, and hold: one table for planning, with or without the device."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import torch

from fxopt.errors import OptionError, nearest

__all__ = ["BY_ARCHITECTURE", "DEVICES", "Device", "device_named", "device_of"]


@dataclass(frozen=True)
class Device:
    """A device as a planner sees it.

    memory: bytes; 0 where it is the host's. flops, flops16: products of fp32 and of 16-bit numbers a second that
    libraries reach (TF32 off). bandwidth: bytes a second of its memory. link: bytes a second to pinned host memory,
    each way; 0 where there is nothing to offload to. reserve: bytes that the process takes besides tensors (context,
    libraries' workspaces). margin: share of the budget that the allocator may lose to fragmentation.
    granularity: bytes to a multiple of which it rounds.
    """

    name: str
    memory: int
    flops: float
    flops16: float
    bandwidth: float
    link: float = 0.0
    reserve: int = 0
    margin: float = 0.0
    granularity: int = 1

    def flops_of(self, dtype: torch.dtype) -> float:
        """Flops a second of products of `dtype`."""
        return self.flops16 if dtype.itemsize <= 2 else self.flops


CUDA_GRANULARITY = 512
"""Of CUDA's caching allocator (c10/cuda/CUDACachingAllocator.cpp, kMinBlockSize)."""


def _card(name: str, gib: float, fp32: float, fp16: float, bandwidth: float, link: float) -> Device:
    """From a data sheet: TFLOP/s (dense, fp32 accumulation), GB/s. Libraries reach 0.75, 0.7 and 0.85 of these."""
    memory, reserve = int(gib * 2**30), 512 * 2**20
    rates = (0.75e12 * fp32, 0.7e12 * fp16, 0.85e9 * bandwidth, 0.85e9 * link)
    return Device(name, memory, *rates, reserve, 0.02, CUDA_GRANULARITY)


CPU = Device("cpu", 0, 0.2e12, 0.2e12, 2e10, reserve=64 * 1024)
"""A few cores. Only the ratio of the two rates decides anything, and it is 10 flops a byte on most.

The reserve is for tensors that no graph shows: buffers that it does not read, numbers that autograd makes. In a model
of six layers they were 1 KiB at most.
"""

DEVICES = {
    device.name: device
    for device in (
        CPU,
        _card("rtx3060", 12, 12.7, 25.5, 360, 25),
        _card("rtx3090", 24, 35.6, 71, 936, 25),
        _card("rtx4060", 8, 15.1, 30, 272, 12.5),
        _card("rtx4090", 24, 82.6, 165, 1008, 25),
        _card("rtx5090", 32, 104.8, 210, 1792, 50),
        _card("l4", 24, 30.3, 121, 300, 25),
        _card("a100", 80, 19.5, 312, 2039, 25),
        _card("h100", 80, 67, 989, 3350, 50),
        _card("h200", 141, 67, 989, 4800, 50),
        _card("b200", 180, 75, 2250, 7700, 50),
        _card("mi300x", 192, 163, 1307, 5300, 50),
    )
}
"""From the makers' data sheets and white papers; GeForce halves 16-bit products with fp32 accumulation."""

BY_ARCHITECTURE = {
    arch: DEVICES[name]
    for arch, name in (
        (80, "a100"), (86, "rtx3090"), (89, "rtx4090"), (90, "h100"), (100, "b200"), (120, "rtx5090"), (942, "mi300x")
    )
}  # fmt: skip
"""The best known card of each, as `fxopt.kernels.cards` numbers them."""


def device_named(name: str) -> Device:
    """The device `name` of `DEVICES`. Raises OptionError."""
    key = name.lower().replace(" ", "").replace("-", "")
    if key not in DEVICES:
        known = ", ".join(DEVICES)
        raise OptionError(f"there is no device {name!r}{nearest(key, list(DEVICES))} in the table: {known}.")
    return DEVICES[key]


@functools.cache
def device_of(device: torch.device) -> Device:
    """`device` of this machine: by its name in the table, with the memory that it really has."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return CPU if device.type != "cuda" else DEVICES["a100"]
    properties = torch.cuda.get_device_properties(device)
    label = properties.name.lower().replace(" ", "")
    known = next((one for key, one in DEVICES.items() if key in label), DEVICES["rtx3090"])
    link = 0.0 if properties.is_integrated else known.link
    return dataclasses.replace(known, name=properties.name, memory=properties.total_memory, link=link)
