"""``fxopt diff``: two reports of one model, for people and for CI."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from fxopt.commands import UsageError, console
from fxopt.comparison import Difference, compare, worse
from fxopt.errors import ReportError
from fxopt.report import Report

__all__ = ["add_to"]

HELP = "compare two reports of one model, and fail on a regression"
DESCRIPTION = """\
Compares two JSON reports, of `fxopt explain --json` or of the option dump: sites, fallbacks, deferred outputs, casts,
what is saved, peaks and kernels' resources. Sites are told by rule, module and code, so that moved lines are no
difference.

exit code: 1 if anything is worse in the second report; 2 if a report cannot be read, or they are not of one model."""
EXAMPLES = """\
examples:
  fxopt explain train.py:make --json > after.json && fxopt diff before.json after.json
  fxopt diff before.json after.json --json --tolerance 0.05
"""
_STYLES = {"worse": "red", "better": "green", "changed": ""}


def add_to(subparsers: Any) -> None:
    """Add the command to argparse's subparsers."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = subparsers.add_parser("diff", help=HELP, description=DESCRIPTION, epilog=EXAMPLES, formatter_class=raw)
    parser.add_argument("before", metavar="A.json")
    parser.add_argument("after", metavar="B.json")
    parser.add_argument("--json", action="store_true", help="print a list of objects, and no table")
    parser.add_argument("--anyway", action="store_true", help="compare reports of different models or inputs, too")
    parser.add_argument(
        "--tolerance", type=float, default=0.01, metavar="F", help="growth that is no regression (default: %(default)s)"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """What the arguments say. Raises UsageError."""
    before, after = read(arguments.before), read(arguments.after)
    try:
        found = compare(before, after, arguments.tolerance, arguments.anyway)
    except ReportError as error:
        raise UsageError(str(error)) from error
    if arguments.json:
        print(json.dumps([dataclasses.asdict(one) for one in found], indent=1))
    else:
        _show(before, after, found)
    regressions = worse(found)
    print(f"{len(found)} differences, {len(regressions)} of them worse", file=sys.stderr)
    return 1 if regressions else 0


def read(path: str) -> Report:
    """The report in a file. Raises UsageError naming the file."""
    try:
        return Report.from_json(Path(path).read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    except ReportError as error:
        raise UsageError(f"{path}: {error}") from error


def _show(before: Report, after: Report, found: Sequence[Difference]) -> None:
    out = console()
    for name, report in (("before", before), ("after ", after)):
        out.print(Text(f"{name} {report.verdict}"), soft_wrap=True)
    for one in sorted({*before.versions, *after.versions}):
        was, now = (report.versions.get(one, "none") for report in (before, after))
        if was != now:
            out.print(Text(f"{one} {was} -> {now}"), soft_wrap=True)
    if not found:
        return
    table = Table("", "what", "before", "after", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for (verdict, section, was, now), items in _alike(found).items():
        what = f"{section}: " + "\n".join(item.what for item in items)
        table.add_row(*map(Text, (verdict, what, was or "-", now or "-")), style=_STYLES[verdict])
    out.print(table)


def _alike(found: Sequence[Difference]) -> dict[tuple[str, str, str, str], list[Difference]]:
    """Differences that differ in nothing but what they are of: layers repeat."""
    groups: dict[tuple[str, str, str, str], list[Difference]] = collections.defaultdict(list)
    for one in found:
        groups[one.verdict, one.section, one.before, one.after].append(one)
    return groups
