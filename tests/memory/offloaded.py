"""What tests of offloading share: a model of blocks, graphs cut so that chosen values go to the host, streams."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxopt import compat
from fxopt.memory.joint import Joint
from fxopt.memory.offload import movable
from fxopt.memory.rates import device_of
from fxopt.memory.timing import ModelledTimes
from fxopt.passes.memory_plan import Cut, _Saved

CPU = torch.device("cpu")


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Deep(nn.Module):
    """Blocks and a head, to a scalar loss."""

    def __init__(self, depth: int = 4, width: int = 16):
        super().__init__()
        self.layers = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x).square().mean()


Choose = Callable[[Joint, list[str]], Sequence[str]]
"""Which of the names of movable values that are saved are to be offloaded."""


@dataclasses.dataclass
class Graphs:
    """forward, backward: as they were cut. cut: by what. offloaded: names."""

    forward: fx.GraphModule
    backward: fx.GraphModule
    cut: Cut
    offloaded: list[str]


def everything(_: Joint, names: list[str]) -> list[str]:
    return names


class Offloading:
    """A backend: AOTAutograd's graphs, uncompiled, in which what `choose` chooses is offloaded.

    change: what else is done to the graphs.
    """

    def __init__(self, choose: Choose = everything, change: Callable[[Graphs], None] = lambda _: None):
        self.choose, self.change = choose, change
        self.graphs: list[Graphs] = []

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        return compat.aot_backend_by(self.partition)(gm, inputs)

    def partition(self, gm: fx.GraphModule, inputs: Any, **how: Any) -> Any:
        """Torch's own choice of what is saved, part of it on the host."""
        found = split(Cut(gm, inputs, how, CPU, ModelledTimes(device_of(CPU))), self.choose)
        self.change(found)
        self.graphs.append(found)
        return found.forward, found.backward


def split(cut: Cut, choose: Choose) -> Graphs:
    """`cut` with torch's choice of what is saved, of which `choose` says what is offloaded."""
    joint = cut.joint
    stock = [at for at in cut.stock.nonzero()[0] if not joint.view[at]]
    may = [joint.forward[at].name for at in stock if joint.size[at] > 0 and movable(joint.forward[at])]
    chosen = list(choose(joint, may))
    kept = [joint.forward[at].name for at in stock if joint.forward[at].name not in chosen]
    return Graphs(*cut.by(_Saved(kept, chosen)), cut, chosen)


def gradients(model: nn.Module, call: Callable[..., Tensor], x: Tensor) -> list[Tensor]:
    """Of one step of `call`, which runs `model`."""
    model.zero_grad()
    call(x).backward()
    return [one.grad.clone() for one in model.parameters() if one.grad is not None]


class Late:
    """Streams on which a copy is made at the last moment: when somebody waits for it, or another must come after it."""

    def __init__(self) -> None:
        self.copies = 0
        self.begun: list[Any] = []

    def copy(self, direction: str, target: Tensor, source: Tensor, after: Sequence[Any]) -> Any:
        for one in after:
            self.wait(one)
        target.view(torch.uint8).fill_(255)  # not a number, for whoever reads too early
        self.begun.append([(target, source)])
        return self.begun[-1]

    def finish(self) -> None:
        """Make all copies that nobody waited for."""
        for one in self.begun:
            self.wait(one)

    def wait(self, event: Any) -> None:
        while event:
            target, source = event.pop()
            target.copy_(source)
            self.copies += 1

    def done(self, event: Any) -> bool:
        return not event
