"""What a user's own mistake raises, which name may have been meant by another, and an error in one line."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from fxopt import compat

__all__ = ["BudgetError", "FxoptWarning", "OptionError", "ReportError", "brief", "nearest"]


class OptionError(compat.PassesThroughDynamo, ValueError):
    """An option the user gave cannot be honoured; the message names the value and the way out."""


class FxoptWarning(UserWarning):
    """Something inside fxopt failed and was left out; results are right, and slower or larger than they could be."""


class ReportError(ValueError):
    """A report that was written cannot be read; the message says which, why, and what to do."""


def brief(error: BaseException) -> str:
    """The kind and the first line of an error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[0][:300]}".removesuffix(": ")


def nearest(key: object, names: Sequence[str]) -> str:
    """What to add to a message about `key`, which is none of `names`: the one that may have been meant."""
    close = difflib.get_close_matches(str(key), names, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


class BudgetError(compat.PassesThroughDynamo, ValueError):
    """No plan holds a step within the memory budget; `minimum` is the smallest budget, in bytes, that would do."""

    def __init__(self, message: str, minimum: int):
        super().__init__(message)
        self.minimum = minimum
