"""Models, and reports of them, that the tests of the inspection commands share."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

import fxopt
from fxopt.report import Report

F = nn.functional


class Block(nn.Module):
    """A gated layer with its residual."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


class Gated(nn.Module):
    """Layers, a norm and a loss over 50 classes; [8, 16] and [8] give a scalar."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block() for _ in range(layers)])
        self.norm = nn.RMSNorm(16)
        self.head = nn.Linear(16, 50)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(self.norm(x)), labels)


def make() -> tuple[nn.Module, dict[str, Tensor]]:
    """What `fxopt explain` and `fxopt bisect` ask of a file."""
    torch.manual_seed(0)
    return Gated(), {"x": torch.randn(8, 16), "labels": torch.arange(8)}


@functools.cache
def report_json(force: bool = False, layers: int = 3) -> str:
    """The report of `Gated`, as JSON, so that no test can change another's."""
    inputs = {"x": torch.randn(8, 16), "labels": torch.arange(8)}
    return fxopt.explain(Gated(layers), options={"force": ["norm"] if force else []}, **inputs).to_json()


def report(force: bool = False, layers: int = 3) -> Report:
    """The report of `Gated`, made once."""
    return Report.from_json(report_json(force, layers))
