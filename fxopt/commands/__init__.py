"""The subcommands of ``fxopt``, a module each, and what they share."""

from __future__ import annotations

from collections.abc import Sequence

from fxopt.errors import nearest

__all__ = ["UsageError", "check_name"]


class UsageError(Exception):
    """A mistake in the arguments; the message says what to give instead."""


def check_name(what: str, name: str, names: Sequence[str], hint: str = "") -> None:
    """Raise UsageError, with the nearest of `names`, if `name` is none of them. hint: in place of listing all."""
    if name not in names:
        raise UsageError(f"no {what} {name!r}{nearest(name, names)}. {hint or 'There are: ' + ', '.join(names) + '.'}")
