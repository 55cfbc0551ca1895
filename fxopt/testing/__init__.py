"""What fxopt tests itself with, for users' own models, rules and passes (docs/writing-a-rule.md).

`assert_close_to_fp64` judges a model, `check_rule` a rule, `check_pass` a pass over canonical graphs. `strategies`,
`interval_masks` and `programs` draw what they work on. Those that draw need hypothesis: ``pip install "fxopt[test]"``.
"""

from __future__ import annotations

import importlib
from typing import Any

from fxopt.testing.compare import Comparison, Error, Step, assert_close_to_fp64, compare, errors, step, truth

_LATER = {
    "captured": "graphs",
    "targets": "graphs",
    "check_laws": "laws",
    "check_symbolic": "laws",
    "check_pass": "checks",
    "check_pass_on": "checks",
    "check_rule": "checks",
    "check_spelling": "checks",
    "ModuleSpec": "random_modules",
    "made": "layouts",
    "literal": "layouts",
    "modules": "strategies",
    "tensors": "strategies",
    "drawn_inputs": "strategies",
    "score_programs": "programs",
}
"""Where the rest is: imported when asked for, since some of it needs hypothesis and all of it takes a while."""

__all__ = [
    "Comparison", "Error", "ModuleSpec", "Step", "assert_close_to_fp64", "captured", "check_laws", "check_pass",
    "check_pass_on", "check_rule", "check_spelling", "check_symbolic", "compare", "drawn_inputs", "errors", "literal",
    "made", "modules", "score_programs", "step", "targets", "tensors", "truth",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"{__name__}.{_LATER[name]}")
    except ModuleNotFoundError as error:
        if error.name != "hypothesis":
            raise
        raise ImportError(f'fxopt.testing.{name} needs hypothesis: pip install "fxopt[test]"') from error
    return getattr(module, name)
