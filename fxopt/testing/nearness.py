"""Whether results are as near to fp64 as eager's are: one rule for the laws and for the fuzz run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from fxopt.differential import relative_error, typical_entry

RATIO, FLOOR = 2.0, 8.0
"""Allowed: RATIO times the spelling's own error, plus FLOOR roundings of the coarsest dtype (a sum of few terms may
happen to be exact in one order and not in another), of the tensor and, as in `fxopt.testing.compare`, of one with the
gradients' typical entries: where a softmax is saturated, gradients by queries are differences that vanish."""

Named = Mapping[str, Tensor | None]


def too_far(exact: Named, eager: Sequence[Named], ours: Named, floor: float) -> str | None:
    """The first tensor of `ours` that is farther from `exact` than the rule allows, with the numbers; None if none is.

    eager: one run, or several, of which the farthest from the truth says how far one may be. Names that begin with
    "grad" are gradients. floor: relative error that is allowed in any case. NaN and infinities must be where the truth
    has them; where eager's are not, nothing can be said. Integers are left to the caller.
    """
    typical = typical_entry({name: value for name, value in exact.items() if name.startswith("grad")})
    for name, reference in exact.items():
        if reference is not None and not reference.is_floating_point():
            continue
        beside = typical if name.startswith("grad") else 0.0
        mine = relative_error(_wide(ours[name]), reference, beside)
        theirs = max(relative_error(_wide(one[name]), reference, beside) for one in eager)
        allowed = RATIO * theirs + floor
        if not mine <= allowed:
            return f"{name}: error {mine:.2e} against fp64, eager's is {theirs:.2e}, allowed {allowed:.2e}"
    return None


def _wide(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.double()
