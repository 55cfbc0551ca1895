"""Options of the backend as flags of a command."""

from __future__ import annotations

import argparse
import json
from typing import Any

from fxopt.commands import UsageError
from fxopt.errors import OptionError
from fxopt.options import Options

__all__ = ["add_flags", "given"]


SHORT = {
    "precision": ("DTYPE", "bf16 or fp16: the option of that name"),
    "dump": ("DIR", "write the graphs and kernels there: the option of that name"),
    "cards": ("A,B", "compile the dump's kernels for these (sm_86,sm_120): the option of that name"),
}
"""The options that have a flag of their own."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add ``--options`` and the short form of those that are asked for most."""
    group = parser.add_argument_group("options of the backend")
    group.add_argument("--options", metavar="JSON", help="""as torch.compile takes them: '{"force": ["norm"]}'""")
    for name, (metavar, text) in SHORT.items():
        group.add_argument(f"--{name}", metavar=metavar, help=text)


def given(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options that `arguments` give, checked. Raises UsageError."""
    try:
        found = json.loads(arguments.options or "{}")
    except ValueError as error:
        raise UsageError(f"--options {arguments.options!r} is no JSON ({error}): quote it whole, names too") from error
    if not isinstance(found, dict):
        raise UsageError(f"""--options {arguments.options!r} is no JSON object, as '{{"verify": true}}' is""")
    for name in SHORT:
        value = getattr(arguments, name)
        if value is not None:
            found[name] = value.split(",") if name == "cards" else value
    try:
        Options.parse(found)
    except OptionError as error:
        raise UsageError(str(error)) from error
    return found
