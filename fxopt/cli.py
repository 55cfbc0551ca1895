"""The command ``fxopt``: one function a subcommand, in `COMMANDS`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import fxopt
from fxopt.commands import UsageError, bisect, diff, doctor, explain, kernels, plan

__all__ = ["COMMANDS", "main"]

COMMANDS: tuple[Callable[[Any], None], ...] = tuple(
    one.add_to for one in (explain, plan, diff, bisect, doctor, kernels)
)
"""Each adds its parser to argparse's subparsers and sets its default `run`: from arguments to an exit code."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 if all is well, 1 if what was looked at is not, 2 for a mistake in `arguments`."""
    given = _parser().parse_args(arguments)
    try:
        code = int(given.run(given))
        sys.stdout.flush()
    except UsageError as error:
        print(f"fxopt: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # of `fxopt kernels --list | head`; Python would flush once more when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fxopt", description="Looks into fxopt, a torch.compile backend for training."
    )
    parser.add_argument("--version", action="version", version=f"fxopt {fxopt.__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add_to in COMMANDS:
        add_to(subparsers)
    return parser
