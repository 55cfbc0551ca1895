"""The subcommands of ``fxopt``, a module each, and what they share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rich.console import Console

from fxopt.errors import nearest

__all__ = ["UsageError", "check_name", "console", "positive"]


class UsageError(Exception):
    """A mistake in the arguments; the message says what to give instead."""


def check_name(what: str, name: str, names: Sequence[str], hint: str = "") -> None:
    """Raise UsageError, with the nearest of `names`, if `name` is none of them. hint: in place of listing all."""
    if name not in names:
        raise UsageError(f"no {what} {name!r}{nearest(name, names)}. {hint or 'There are: ' + ', '.join(names) + '.'}")


def console() -> Console:
    """Where tables go: as wide as the terminal, and where there is none, as wide as a table of sites wants."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=160)


def positive(text: str) -> int:
    """The type of flags that are counts."""
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)
