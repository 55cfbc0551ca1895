"""Seconds of products and attention on the device that is there, each measured once a machine and remembered.

Flops and bytes say within a factor of two or three what a kernel takes: libraries reach different rates with different
shapes. What decides between keeping and making again is the ratio of such times, so where they can be had they are.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch
from torch import Tensor, fx

from fxopt import compat
from fxopt.choice import Measured
from fxopt.compat import pytree
from fxopt.fake import stand_in, value_of
from fxopt.memory.cost import bytes_of, seconds_of
from fxopt.memory.rates import Device
from fxopt.memory.units import MIB
from fxopt.metering import machine_of, release, seconds, undisturbed
from fxopt.remembering import Key, recall, remember

__all__ = ["MeasuredTimes", "ModelledTimes"]

LEAST_SECONDS = 100e-6
"""ModelledTimes: below it a call is launching more than computing, and decides nothing."""
PATIENCE = 3.0
"""Seconds a graph spent on measuring, after which what is not measured is modelled."""
MOST_BYTES = 1024 * MIB
"""Of operands and results: a measurement must not be what does not fit."""
COPIED = 64 * MIB
"""More than the last cache of most processors and cards."""


@dataclasses.dataclass
class ModelledTimes:
    """Seconds of nodes on `device`, which need not be there."""

    device: Device

    def __call__(self, node: fx.Node, flops: int) -> float:
        """By the slower of arithmetic and memory."""
        return seconds_of(node, flops, self.device)


class MeasuredTimes(ModelledTimes):
    """Seconds of nodes on `on`, a device of this machine, of which `known` is the table's row.

    device: `known` with the bandwidth that a copy reaches. Products and attention that cannot be measured, or no more,
    take as many times the modelled seconds as those did that were.
    """

    def __init__(self, on: torch.device, known: Device):
        self.on, self.machine = on, machine_of(on)
        self.spent = 0.0
        self.measured = self.modelled = 0.0
        self.found: dict[str, float | None] = {}
        copied = self._remembered(f"copy of {COPIED} bytes", self._copy)
        super().__init__(known if copied is None else dataclasses.replace(known, bandwidth=2 * COPIED / copied))

    def __call__(self, node: fx.Node, flops: int) -> float:
        """Measured for products and attention of some size, modelled for all else."""
        modelled = super().__call__(node, flops)
        if not flops or modelled < LEAST_SECONDS:
            return modelled
        spec = _described(node)
        if spec not in self.found:
            found = self.found[spec] = self._remembered(spec, lambda: self._run(node)) if _can_run(node) else None
            if found is not None:
                self.measured, self.modelled = self.measured + found, self.modelled + modelled
        found = self.found[spec]
        return found if found is not None else modelled * (self.measured / self.modelled if self.modelled else 1.0)

    def _remembered(self, spec: str, run: Any) -> float | None:
        """Seconds of ``run()``, which are measured now if they never were and there is time; none without a card."""
        if not self.machine:
            return None
        key = Key("seconds", spec, self.machine)
        known = recall(key)
        if not known:
            if self.spent > PATIENCE:
                return None
            begun = time.perf_counter()
            try:
                with compat.apart(), undisturbed(self.on), torch.no_grad():
                    known = (Measured("alone", 1e3 * run()),)
            except Exception as error:  # a time is never worth a training run
                known = (Measured("alone", None, failure=type(error).__name__),)
            finally:
                release()
                self.spent += time.perf_counter() - begun
            remember(key, known)
        milliseconds = known[0].milliseconds
        return milliseconds / 1e3 if milliseconds else None

    def _copy(self) -> float:
        source = torch.ones(COPIED // 4, device=self.on)
        target = torch.empty_like(source)
        return seconds(lambda: target.copy_(source), self.on)

    def _run(self, node: fx.Node) -> float:
        args, kwargs = pytree.tree_map(_drawn, fx.node.map_arg((node.args, node.kwargs), value_of))
        return seconds(lambda: node.target(*args, **kwargs), self.on)  # type: ignore[operator]


def _can_run(node: fx.Node) -> bool:
    """Whether a call by itself, on made-up numbers, takes the time of the real one, and changes nothing.

    Integers may be lengths and documents, which say how much there is to do.
    """
    inputs = [value_of(item) for item in node.all_input_nodes]
    tensors = [one for one in inputs if isinstance(one, Tensor)]
    return (
        isinstance(node.target, compat.OpOverload)
        and not node.target._schema.is_mutable
        and all(one.dtype.is_floating_point for one in tensors)
        and sum(map(bytes_of, tensors)) + bytes_of(value_of(node)) <= MOST_BYTES
    )


def _drawn(value: Any) -> Any:
    """A tensor like `value`, of ones: zeros would not be in memory, and what is there may be slow to compute with."""
    made = stand_in(value)
    return made.fill_(1.0) if isinstance(made, Tensor) else made


def _described(node: fx.Node) -> str:
    """All of a call that its time depends on: operator, sizes, strides, dtypes, numbers."""

    def leaf(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return compat.size_hint(value)
        sizes, strides = (tuple(map(compat.size_hint, many)) for many in (value.shape, value.stride()))
        return f"{value.dtype}{sizes}{strides}"

    values = pytree.tree_map(leaf, fx.node.map_arg((node.args, dict(node.kwargs)), value_of))
    return f"{node.target} {values}"
