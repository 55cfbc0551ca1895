"""How the scripts name what they compare: a backend of torch.compile, and behind a "+" the precision."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def compile_as(model: nn.Module, name: str) -> Callable[..., Any]:
    """Return `model` under backend `name`: "eager", "inductor", "fxopt", "inductor+autocast" or "fxopt+bf16".

    "+autocast" is bf16 autocast around the forward on a CPU; what else stands behind the "+" is fxopt's option.
    """
    backend, _, precision = name.partition("+")
    options: dict[str, Any] = {"options": {"precision": precision}} if precision not in ("", "autocast") else {}
    run = model if backend == "eager" else torch.compile(model, backend=backend, **options)
    if precision != "autocast":
        return run

    def under_autocast(**inputs: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return run(**inputs)

    return under_autocast
