"""Inputs for rules from a seed: what benchmarks and the matcher use where tests use hypothesis."""

from __future__ import annotations

import random
from typing import Any

import torch


class SeededDraw:
    """A `fxopt.rule.Draw` that draws from one seed."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def size(self, low: int, high: int) -> int:
        """An integer in [low, high]."""
        return self.random.randint(low, high)

    def choice(self, *options: Any) -> Any:
        """One of `options`."""
        return self.random.choice(options)

    def tensor(self, *shape: int, dtype: torch.dtype, requires_grad: bool = True) -> torch.Tensor:
        """A contiguous tensor of normal values."""
        return torch.randn(*shape, generator=self.generator).to(dtype).requires_grad_(requires_grad)

    def integers(self, low: int, high: int, *shape: int) -> torch.Tensor:
        """An int64 tensor of values in [low, high)."""
        return torch.randint(low, high, shape, generator=self.generator)
