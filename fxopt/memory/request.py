"""What a user asks of the memory plan: the options, and what they come to on a device."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

import torch

from fxopt.errors import OptionError, nearest
from fxopt.memory.rates import Device
from fxopt.memory.resident import OPTIMIZERS
from fxopt.memory.units import parse_bytes

__all__ = [
    "Budget",
    "Infeasibility",
    "Request",
    "parse_accumulation",
    "parse_budget",
    "parse_infeasible",
    "parse_offload",
    "parse_optimizer",
]

Infeasibility = Literal["error", "minimum"]
LEAST_BYTES = 2**20
"""A budget below is a slip: ``memory_budget=12`` was meant to be "12GiB"."""


@dataclasses.dataclass(frozen=True)
class Budget:
    """bytes: of the process on the device; or share: of the card's memory; or, with neither, what is free now."""

    bytes: int | None = None
    share: float | None = None

    def on(self, device: torch.device, known: Device) -> int:
        """The budget in bytes on `device`. Raises OptionError where only a card could say."""
        if self.bytes is not None:
            return self.bytes
        if device.type != "cuda" or not torch.cuda.is_available():
            given = "auto" if self.share is None else f"{100 * self.share:g}%"
            raise OptionError(
                f"option memory_budget={given!r} is a part of a card's memory, and the model is on {device}: "
                'write bytes, for example "12GiB".'
            )
        if self.share is not None:
            return int(self.share * known.memory)
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device))


def parse_budget(value: Any) -> Budget | None:
    """Option `memory_budget`. Raises OptionError."""
    if value is None or isinstance(value, Budget):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        found = value
    elif not isinstance(value, str):
        raise OptionError(f'option memory_budget={value!r} must be bytes, "12GiB", "80%" or "auto".')
    elif value.strip().lower() == "auto":
        return Budget()
    elif value.strip().endswith("%"):
        return _share(value)
    else:
        try:
            found = parse_bytes(value)
        except ValueError as error:
            raise OptionError(f'option memory_budget: {error} "80%" and "auto" are of the card.') from None
    if found < LEAST_BYTES:
        raise OptionError(
            f'option memory_budget={value!r} is {found} bytes: write the unit, for example "12GiB", or bytes in full.'
        )
    return Budget(bytes=found)


def _share(text: str) -> Budget:
    try:
        share = float(text.strip().removesuffix("%")) / 100
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise OptionError(f'option memory_budget={text!r} must be above 0% and at most 100%, for example "80%".')
    return Budget(share=share)


def parse_optimizer(value: Any) -> str | float | None:
    """Option `optimizer`. Raises OptionError."""
    if value is None or (isinstance(value, str) and value in OPTIMIZERS):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and value >= 0:
        return float(value)
    names = ", ".join(OPTIMIZERS)
    near = nearest(value, list(OPTIMIZERS)) if isinstance(value, str) else ""
    raise OptionError(
        f"option optimizer={value!r}{near} must be one of {names}, or the bytes of its state for each parameter (8 for "
        "AdamW in fp32)."
    )


def parse_accumulation(value: Any) -> bool:
    """Option `accumulation`. Raises OptionError."""
    if not isinstance(value, bool):
        raise OptionError(
            f"option accumulation={value!r} must be True (earlier batches' gradients are held during a step) or False."
        )
    return value


def parse_offload(value: Any) -> bool | float:
    """Option `offload`. Raises OptionError."""
    if isinstance(value, bool):
        return value
    if isinstance(value, int | float) and value > 0:
        return float(value)
    raise OptionError(
        f"option offload={value!r} must be True, False, or GB/s that the link to the host carries each way."
    )


def parse_infeasible(value: Any) -> Infeasibility:
    """Option `infeasible`. Raises OptionError."""
    if value not in get_args(Infeasibility):
        raise OptionError(
            f'option infeasible={value!r} must be "error", or "minimum" to train with the least memory there is.'
        )
    return value


@dataclasses.dataclass(frozen=True)
class Request:
    """The options that make a plan (`fxopt.Options` says what they mean), all part of cache keys.

    measure: whether products and attention are timed on the device.
    """

    budget: Budget
    optimizer: str | float | None = None
    accumulation: bool = False
    offload: bool | float = False
    infeasible: Infeasibility = "error"
    measure: bool = False

    def link(self, device: Device) -> float:
        """Bytes a second for offloading, each way; 0: none."""
        return device.link if self.offload is True else 1e9 * float(self.offload) if device.link else 0.0

    def link_on(self, device: Device, cuda_graphs: bool) -> tuple[float, str]:
        """The same, and why it is 0 although offloading was asked for, or "".

        cuda_graphs: whether steps are recorded, with the addresses of host memory that other steps may have by then.
        """
        link = self.link(device)
        if self.offload and not link:
            return 0.0, f"nothing is offloaded: {device.name} has no memory of its own, apart from the host's"
        if link and cuda_graphs:
            return 0.0, (
                "nothing is offloaded: CUDA graphs record copies with the addresses of one step. To offload, leave "
                'mode="reduce-overhead" and triton.cudagraphs out'
            )
        return link, ""
