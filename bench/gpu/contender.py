"""One way to compute a problem, to be timed against others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gpu.problem import Outputs, Problem, Tensors, leaves_of, upstreams

SAMPLE = 4096
"""Numbers of each result that are compared between contenders."""


class Skipped(Exception):
    """This contender cannot take this case; the message says why."""


Maker = Callable[[], Callable[[Tensors], Outputs]]
"""Makes the function; raises `Skipped`, or whatever a library raises that does not fit."""


@dataclass
class Contender:
    """A function at work on its own leaves."""

    function: Callable[[Tensors], Outputs]
    leaves: Tensors
    upstream: list[Tensor]

    @classmethod
    def of(cls, problem: Problem, function: Callable[[Tensors], Outputs]) -> Contender:
        """Run once to learn the results' shapes, as in training: without gradients another graph would be compiled."""
        leaves = leaves_of(problem.tensors)
        outputs = tuple(one.detach() for one in function(leaves))
        return cls(function, leaves, upstreams(outputs, problem.dtype))

    def forward(self) -> Outputs:
        """As in training: what the backward needs is kept."""
        return self.function(self.leaves)

    def both(self) -> list[Tensor]:
        """Forward and backward; the results and the gradients."""
        outputs = self.forward()
        wanted = [one for one in self.leaves.values() if one.requires_grad]
        return [*(one.detach() for one in outputs), *torch.autograd.grad(outputs, wanted, self.upstream)]

    def sample(self) -> list[Tensor]:
        """Some numbers of each of `both`, in fp32 on the CPU, which other contenders must have too."""
        return [one.flatten()[:: max(1, one.numel() // SAMPLE)][:SAMPLE].float().cpu() for one in self.both()]


def distance(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest relative difference of two samples: about eps where both compute the same."""
    return max(
        float((a - b).norm() / b.norm().clamp_min(torch.finfo(b.dtype).tiny)) for a, b in zip(ours, theirs, strict=True)
    )
