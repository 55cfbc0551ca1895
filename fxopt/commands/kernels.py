"""``fxopt kernels``: compiles generated kernels for cards that need not be there, and shows their source."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.syntax import Syntax

from fxopt.commands import UsageError, check_name, positive
from fxopt.kernels.cards import CARDS, TARGETS, Card
from fxopt.kernels.catalog import FAMILIES, Shipped, catalog
from fxopt.kernels.configs import Config
from fxopt.kernels.farm import LIMIT, Outcome, compile_shown
from fxopt.kernels.interpreter import interpreting
from fxopt.kernels.offline import Job, Resources

__all__ = ["MOST_SPILLS", "Row", "add_to", "faults"]

MOST_SPILLS = 64
"""Bytes that a default configuration may spill: a few addresses outside of loops, which cost nothing."""

HELP = "compile the generated Triton kernels for every card, without one"
DESCRIPTION = f"""\
Compiles the default configuration of every representative kernel for every target, without a GPU, and prints its
registers, spills, shared memory, and whether it fits the card. What was compiled before is remembered.

exit code: 1 if a default configuration for an NVIDIA target does not compile, does not fit, or spills more than
{MOST_SPILLS} bytes; 2 for a mistake in the arguments."""
EXAMPLES = """\
examples:
  fxopt kernels --target sm_86,sm_120 --family norm
  fxopt kernels --all --json > kernels.json
  fxopt kernels --list
  fxopt kernels --source "linear_cross_entropy_forward bf16"
"""


@dataclass(frozen=True)
class Row:
    """One configuration of a shipped kernel, compiled for a card; default: the one that is launched without tuning."""

    name: str
    card: Card
    config: Config
    default: bool
    outcome: Outcome

    def to_json(self) -> dict[str, Any]:
        """As ``--json`` prints it; numbers are null where there is an "error"."""
        found = self.outcome if isinstance(self.outcome, Resources) else None
        launch = {"num_warps": self.config.num_warps, "num_stages": self.config.num_stages}
        return {
            "kernel": self.name,
            "target": self.card.name,
            "registers": found and found.registers,
            "spill_bytes": found and found.spill_bytes,
            "shared_bytes": found and found.shared_bytes,
            "fits": found is not None and found.fits,
            "config": dict(self.config.tiles) | launch,
            "default": self.default,
            "error": None if found else self.outcome,
        }


def add_to(subparsers: Any) -> None:
    """Add the command to argparse's subparsers."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = subparsers.add_parser("kernels", help=HELP, description=DESCRIPTION, epilog=EXAMPLES, formatter_class=raw)
    targets, families = (",".join(names) for names in ([card.name for card in TARGETS], FAMILIES))
    parser.add_argument("--target", default=targets, metavar="A,B", help="compile for these (default: %(default)s)")
    parser.add_argument("--family", default=families, metavar="A,B", help="of these families (default: %(default)s)")
    parser.add_argument(
        "--all", action="store_true", help="all candidates that tuning chooses from, not the defaults alone"
    )
    jobs = len(os.sched_getaffinity(0))
    parser.add_argument("--jobs", type=positive, default=jobs, metavar="N", help="processes (default: %(default)s)")
    parser.add_argument(
        "--limit", type=positive, default=int(LIMIT), metavar="S", help="seconds for one kernel (default: %(default)s)"
    )
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--json", action="store_true", help="print a list of objects, and no table")
    shown.add_argument("--list", action="store_true", help="print the kernels' names and compile nothing")
    shown.add_argument("--source", metavar="NAME", help="print a kernel's source and compile nothing")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """What the arguments say. Raises UsageError."""
    cards = [_card(name) for name in arguments.target.split(",")]
    families = tuple(arguments.family.split(","))
    for family in families:
        check_name("family", family, FAMILIES)
    if arguments.list:
        print("\n".join(dict.fromkeys(one.name for card in cards for one in catalog(card, families))))
        return 0
    if arguments.source is not None:
        return _show_source(arguments.source, list(catalog(cards[0], families)))
    if interpreting():
        raise UsageError("TRITON_INTERPRET=1 is set, and then triton compiles nothing: unset it")
    shipped = [(card, one) for card in cards for one in catalog(card, families)]
    rows = _compiled(shipped, arguments)
    print(json.dumps([row.to_json() for row in rows], indent=1)) if arguments.json else _print_table(rows)
    return _complain(rows)


def _card(name: str) -> Card:
    check_name("target", name, [card.name for card in TARGETS])
    return next(card for card in TARGETS if card.name == name)


# --- compiling ---------------------------------------------------------------------------------------------------


def _compiled(shipped: Sequence[tuple[Card, Shipped]], arguments: argparse.Namespace) -> list[Row]:
    """Every configuration asked for, in the order of the catalog."""
    asked = [
        (one.name, Job(one.kernel, config, card, one.aligned), at == 0)
        for card, one in shipped
        for at, config in enumerate(one.configs if arguments.all else one.configs[:1])
    ]
    found = compile_shown([job for _, job, _ in asked], arguments.jobs, arguments.limit)
    return [Row(name, job.card, job.config, default, found[job]) for name, job, default in asked]


def faults(rows: Iterable[Row]) -> list[str]:
    """A sentence for each default configuration on an NVIDIA card that does not compile, does not fit, or spills."""
    return [
        f"{row.name} on {row.card.name} ({row.config}) {fault}"
        for row in rows
        if row.default and row.card in CARDS and (fault := _fault(row))
    ]


def _fault(row: Row) -> str:
    found = row.outcome
    if not isinstance(found, Resources):
        return f"does not compile: {found}"
    if not found.fits:
        return f"does not fit: it takes {found.shared_bytes:,} bytes of shared memory of {row.card.shared:,}"
    spills = found.spill_bytes > MOST_SPILLS
    return f"spills {found.spill_bytes:,} bytes, more than {MOST_SPILLS}" if spills else ""


# --- showing -----------------------------------------------------------------------------------------------------


def _print_table(rows: Sequence[Row]) -> None:
    """A paragraph for each kernel; the configuration comes last, since it is as long as its kernel has tiles."""
    console = Console(highlight=False)
    console.print(
        f"  {'target':8}{'registers':>9}{'spills, B':>11}{'shared, B':>11}  fits  configuration", soft_wrap=True
    )
    for name, group in itertools.groupby(sorted(rows, key=lambda row: row.name), key=lambda row: row.name):
        console.print(f"[bold]{name}[/]", soft_wrap=True)
        for row in group:
            console.print(f"  {_line(row)}", style="red" if _fault(row) else "", soft_wrap=True, markup=False)


def _line(row: Row) -> str:
    found = row.outcome
    if not isinstance(found, Resources):
        return f"{row.card.name:8}{row.config}: {found}"
    fits = "yes" if found.fits else "no"
    numbers = f"{found.registers:9}{found.spill_bytes:11,}{found.shared_bytes:11,}  {fits:4}"
    return f"{row.card.name:8}{numbers}  {row.config}{'' if row.default else ' (candidate)'}"


def _complain(rows: Sequence[Row]) -> int:
    """Say what is wrong, on stderr, so that what ``--json`` prints is JSON."""
    found = faults(rows)
    for fault in found:
        print(fault, file=sys.stderr)
    summary = f"{len(rows)} configurations, {len(found)} of them defaults with a fault"
    print(summary, file=sys.stderr)
    return 1 if found else 0


def _show_source(name: str, shipped: Sequence[Shipped]) -> int:
    check_name("kernel", name, [one.name for one in shipped], "`fxopt kernels --list` prints their names.")
    kernel = next(one.kernel for one in shipped if one.name == name)
    if sys.stdout.isatty():
        Console().print(Syntax(kernel.source, "python", theme="ansi_dark", word_wrap=True))
    else:
        print(kernel.source, end="")
    return 0
