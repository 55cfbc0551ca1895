"""What a training process holds besides the compiled step: parameters, optimizer state, gradients, workspaces."""

from __future__ import annotations

import collections
import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import fx

from fxopt import compat
from fxopt.effects import storage_of
from fxopt.fake import value_of
from fxopt.memory.cost import bytes_of, hint
from fxopt.memory.rates import Device

__all__ = ["OPTIMIZERS", "Inputs", "found_optimizer", "inputs_of", "optimizer_bytes", "resident_bytes"]

T = TypeVar("T")

OPTIMIZERS: Mapping[str, str] = {
    "adamw": "two moments in the parameters' dtype",
    "adamw8bit": "two moments of a byte each, and a fp32 scale for every 256 numbers of each",
    "sgd": "nothing",
    "sgd_momentum": "one buffer in the parameters' dtype",
}


@dataclass(frozen=True)
class Inputs:
    """Bytes and elements of a graph's inputs: those that are trained, those that stay besides, and the batch."""

    trained: int = 0
    elements: int = 0
    frozen: int = 0
    batch: int = 0

    def times(self, calls: int) -> Inputs:
        """Of `calls` modules that are called after one another, each with parameters of its own."""
        return Inputs(calls * self.trained, calls * self.elements, calls * self.frozen, self.batch)


def optimizer_bytes(optimizer: str | float, inputs: Inputs) -> int:
    """Bytes of the state of `optimizer`, a name in `OPTIMIZERS` or bytes a trained parameter."""
    if not isinstance(optimizer, str):
        return int(optimizer * inputs.elements)
    whole = {"adamw": 2, "sgd": 0, "sgd_momentum": 1}
    if optimizer in whole:
        return whole[optimizer] * inputs.trained
    return 2 * inputs.elements + 2 * 4 * -(-inputs.elements // 256)


def found_optimizer(shapes: Sequence[tuple[int, ...]]) -> float | None:
    """Bytes a parameter of the optimizers in this process that hold parameters of these shapes; None: there is none.

    By their state where they have made a step, by their class where they have not.
    """
    wanted = collections.Counter(shapes)
    elements = total = 0.0
    for optimizer in alive(torch.optim.Optimizer):
        parameters = [one for group in optimizer.param_groups for one in group["params"]]
        ours = [one for one in parameters if wanted[tuple(one.shape)] > 0]
        if not ours:
            continue
        elements += sum(one.numel() for one in ours)
        total += sum(_state_bytes(optimizer, one) for one in ours)
    return total / elements if elements else None


def alive(kind: type[T]) -> Iterator[T]:
    """Every object of the class `kind` in this process."""
    # By type: isinstance asks modules that warn, and weak references to objects that are gone, which raise.
    return (one for one in gc.get_objects() if issubclass(type(one), kind))


def _state_bytes(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> float:
    state = optimizer.state.get(parameter)
    if state:
        return sum(one.numel() * one.element_size() for one in state.values() if isinstance(one, torch.Tensor))
    kind, size = type(optimizer).__name__.lower(), parameter.numel() * parameter.element_size()
    if "8bit" in kind:
        return 2.0 * parameter.numel()
    if "sgd" in kind:
        return float(size) if any(group.get("momentum") for group in optimizer.param_groups) else 0.0
    return 2.0 * size  # Adam and its relatives; others hold no more


def resident_bytes(inputs: Inputs, optimizer: int, accumulation: bool, device: Device) -> dict[str, int]:
    """By what holds them; entries of 0 are left out."""
    found = {
        "parameters": inputs.trained + inputs.frozen,
        "optimizer": optimizer,
        "accumulated gradients": inputs.trained if accumulation else 0,
        "batch": inputs.batch,
        "libraries": device.reserve,
    }
    return {name: size for name, size in found.items() if size}


def inputs_of(graph: fx.Graph, static: Any, outputs: int) -> tuple[Inputs, list[tuple[int, ...]]]:
    """What the inputs of a joint graph take, and the shapes of those that are trained; an alias counts once.

    static: the inputs of static lifetime, parameters and buffers. outputs: how many of the outputs are the forward's.
    """
    primals = [node for node in graph.find_nodes(op="placeholder") if "tangents" not in node.name]
    returned = compat.pytree.arg_tree_leaves(*graph.output_node().args)[outputs:]
    trained = {node for node, gradient in zip(primals, returned, strict=False) if gradient is not None}
    sizes: dict[str, int] = collections.defaultdict(int)
    seen, elements, shapes = set[Any](), 0, list[tuple[int, ...]]()
    for node in primals:
        value = value_of(node)
        if not isinstance(value, torch.Tensor) or (storage := storage_of(value)) in seen:
            continue
        seen.add(storage)
        kind = "batch" if node not in static else "trained" if node in trained else "frozen"
        sizes[kind] += bytes_of(value)
        if kind == "trained":
            elements += bytes_of(value) // value.dtype.itemsize
            shapes.append(tuple(map(hint, value.shape)))
    return Inputs(**sizes, elements=elements), shapes
