"""Options of the backend as flags of a command."""

from __future__ import annotations

import argparse
import json
from typing import Any

from fxopt.commands import UsageError
from fxopt.errors import OptionError
from fxopt.options import Options

__all__ = ["add_flags", "given"]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add ``--options`` and the short form of those that are asked for most."""
    group = parser.add_argument_group("options of the backend")
    group.add_argument("--options", metavar="JSON", help="""as torch.compile takes them: '{"force": ["norm"]}'""")
    group.add_argument("--precision", metavar="DTYPE", help="bf16 or fp16: the option of that name")


def given(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options that `arguments` give, checked. Raises UsageError."""
    try:
        found = json.loads(arguments.options or "{}")
    except ValueError as error:
        raise UsageError(f"--options {arguments.options!r} is no JSON ({error}): quote it whole, names too") from error
    if not isinstance(found, dict):
        raise UsageError(f"""--options {arguments.options!r} is no JSON object, as '{{"verify": true}}' is""")
    if arguments.precision is not None:
        found["precision"] = arguments.precision
    try:
        Options.parse(found)
    except OptionError as error:
        raise UsageError(str(error)) from error
    return found
