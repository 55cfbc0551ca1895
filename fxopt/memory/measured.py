"""The peak of steps that have run, beside the predicted one. Only CUDA counts; the process's counter is not reset."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fxopt.memory.plan import Plan

__all__ = ["watched"]


def watched(run: Callable[..., Any], plan: Plan, device: torch.device) -> Callable[..., Any]:
    """`run`, the forward of a planned graph, which notes in `plan.measured` the peak of the step before each call.

    The peak is known only where it is above all that came before the first call (the user may watch the counter, so
    it is not reset): it is then that of a step, optimizer included.
    """
    if device.type != "cuda":
        return run
    before: list[int] = []

    def call(*args: Any, **kwargs: Any) -> Any:
        most = torch.cuda.max_memory_allocated(device)
        if before and most > before[0]:
            plan.measured = most
        if not before:
            before.append(most)
        return run(*args, **kwargs)

    return call
