"""The subcommands of ``fxopt``, a module each, and what they share."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

__all__ = ["UsageError", "check_name"]


class UsageError(Exception):
    """A mistake in the arguments; the message says what to give instead."""


def check_name(what: str, name: str, names: Sequence[str], hint: str = "") -> None:
    """Raise UsageError, with the nearest of `names`, if `name` is none of them. hint: in place of listing all."""
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
        nearest = f" (did you mean {close[0]!r}?)" if close else ""
        raise UsageError(f"no {what} {name!r}{nearest}. {hint or 'There are: ' + ', '.join(names) + '.'}")
