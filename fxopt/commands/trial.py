"""One trial of `fxopt bisect` where the script has a factory: a training step, judged by the fp64 rule.

``python -m fxopt.commands.trial FILE.py:factory [OPTIONS]`` exits with 1 where the rule is broken.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fxopt.commands import UsageError, models
from fxopt.testing import errors
from fxopt.testing.compare import loss_of

__all__ = ["main"]


def main(target: str, options: Mapping[str, Any]) -> int:
    """0 where the compiled step is as near to fp64 as eager's, 1 where it is not."""
    torch.manual_seed(0)
    factory = models.factory_of(target)
    made, script = models.make(factory, target), vars(sys.modules[Path(target.partition(":")[0]).stem])
    given = {**script.get("OPTIONS", {}), **options}
    if not isinstance(made.model, torch.nn.Module):
        raise UsageError(f"{target} returned {type(made.model).__name__} as its model: it must be a torch.nn.Module")
    found = errors(made.model, _by_name(made), options=given, loss=script.get("loss", loss_of))
    print(found)
    return 0 if found.ok else 1


def _by_name(made: models.Subject) -> Mapping[str, Any]:
    """The inputs by the names that the model's forward has for them."""
    if isinstance(made.inputs, Mapping):
        return made.inputs
    forward: Any = getattr(made.model, "forward", made.model)
    return dict(zip(inspect.signature(forward).parameters, made.inputs, strict=False))


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1], json.loads(sys.argv[2]) if len(sys.argv) > 2 else {}))
    except UsageError as error:
        print(f"fxopt: {error}", file=sys.stderr)
        sys.exit(2)
