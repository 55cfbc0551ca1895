"""What an operator of fxopt's needs besides a cast when the dtypes of its inputs change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fxopt.ops.loss_costs import recomputes
from fxopt.ops.loss_spec import Wanted

__all__ = ["ALIKE", "CONSTANTS", "OUTPUT_DTYPE"]

ALIKE: Mapping[str, tuple[str, ...]] = {"fxopt::norm": ("x", "residual")}
"""Arguments that must share a dtype; each other tensor may have any."""

OUTPUT_DTYPE: Mapping[str, str] = {"fxopt::norm": "output"}
"""The constant that says the dtype of the first result, of operators that round to any at no cost."""


def _of_loss(given: Mapping[str, Any]) -> dict[str, Any]:
    """A kernel that is best for one dtype need not be for another."""
    wanted = Wanted(given["need_hidden"], given["need_weight"], given["need_bias"])
    hidden, weight, tokens = given["hidden"], given["weight"], given["target"].shape[0]
    return {"recompute": recomputes(hidden, weight, tokens, wanted, given["lowering"])}


CONSTANTS: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {"fxopt::linear_cross_entropy": _of_loss}
"""From the arguments by name, tensors as fake values of their new dtypes: the constants that follow from these."""
