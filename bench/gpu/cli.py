"""The command: options, phases, tables."""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measure import ROOT
from rich.console import Console

from gpu import run as script
from gpu import turns
from gpu.batch import Runner
from gpu.card import NoGpu, describe, slug
from gpu.item import Item, Settings
from gpu.process import Processes
from gpu.room import Room
from gpu.session import SHARES, Clock, Session
from gpu.store import Store

RESULTS = ROOT / "bench" / "results"
DRY = ROOT / "out" / "bench-gpu"
DEFAULT_PHASES = "check,kernels,step"
CONTEXT_GIB = 3.0  # of the card's memory, that what the driver and idle workers hold may take


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; exits with a message where they do not fit."""
    about = (script.__doc__ or "").split("\n\n")
    parser = argparse.ArgumentParser(
        description=about[0], epilog="\n".join(about[1:]), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--phase", default=DEFAULT_PHASES, help=f"of {', '.join(SHARES)} (default: %(default)s)")
    parser.add_argument("--budget-minutes", type=float, default=9.0, help="for all of it (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="leave out what was answered for this commit and card")
    parser.add_argument("--only", default="", help="items whose name has this in it")
    parser.add_argument("--specs", type=int, help="drawn cases of check (default: 320; 12 if tiny)")
    parser.add_argument("--seed", type=int, default=0, help="of the drawn cases (default: %(default)s)")
    parser.add_argument(
        "--jobs", type=int, default=min(16, len(os.sched_getaffinity(0))), help="workers (default: cores)"
    )
    parser.add_argument("--commit", default="", help="what is measured, where the tree is a copy without git")
    parser.add_argument("--out", type=Path, help="folder of the JSON (default: bench/results/CARD)")
    parser.add_argument("--interpret", action="store_true", help="on this CPU, kernels interpreted; needs --tiny")
    parser.add_argument("--tiny", action="store_true", help="few and small shapes: a check of the code")
    options = parser.parse_args(arguments)
    options.phase = options.phase.split(",")
    for phase in options.phase:
        if phase not in SHARES:
            parser.error(f"--phase {phase}: there are {', '.join(SHARES)}")
    if options.interpret and not options.tiny:
        parser.error("--interpret needs --tiny: the interpreter would take days for full shapes")
    if options.tiny and options.out and options.out.resolve().is_relative_to(RESULTS):
        parser.error(f"--out {options.out}: numbers of a dry run do not belong under bench/results")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; 1 if a check failed or an operator of ours did not run, 2 without a GPU."""
    options = parse(arguments)
    console = Console(width=None if sys.stdout.isatty() else 150)
    clock = Clock(options.budget_minutes)
    settings = Settings(options.interpret, options.tiny, options.seed)
    set_environment(settings, options.jobs)
    try:
        machine = describe(options.commit, options.interpret)
    except NoGpu as error:
        console.print(str(error), style="red", highlight=False, soft_wrap=True)
        return 2
    console.print(", ".join(f"{name} {value}" for name, value in machine.items()), highlight=False, soft_wrap=True)
    store = store_for(options, machine)
    phases = {phase: chosen(phase, options, settings, store) for phase in options.phase}
    with turns.among_workers(), Processes(settings) as processes:
        room = Room(max(1.0, machine["gib"] - CONTEXT_GIB))
        said = functools.partial(console.print, highlight=False, soft_wrap=True, markup=False)
        session = Session(Runner(processes, room, options.jobs, clock.left), store, clock, said)
        session.go(phases)
    return report(options, store, session.skipped, console)


def set_environment(settings: Settings, jobs: int) -> None:
    """For the workers, which read it when they import triton and torch."""
    cores = len(os.sched_getaffinity(0))
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = str(max(1, cores // 8))  # of many processes that compile at once
    os.environ["PYTHONPATH"] = os.pathsep.join([*script.PATHS, *filter(None, [os.environ.get("PYTHONPATH")])])
    if settings.interpret:
        os.environ |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "FXOPT_CACHE": str(DRY / "cache")}


def store_for(options: argparse.Namespace, machine: dict[str, Any]) -> Store:
    """Where results go; the folder of the card is read first where they go elsewhere."""
    usual = DRY if options.tiny else RESULTS / slug(machine["card"])
    folder = options.out or usual
    return Store(folder, machine, [usual] if folder != usual and not options.tiny else [])


def chosen(phase: str, options: argparse.Namespace, settings: Settings, store: Store) -> list[Item]:
    """The items of a phase that are to be run, by value."""
    answered = store.phase(phase) if options.resume else {}
    return [one for one in items(phase, options, settings) if options.only in one.name and one.name not in answered]


def items(phase: str, options: argparse.Namespace, settings: Settings) -> list[Item]:
    """All items of a phase."""
    from gpu import check, kernels, step, tune  # here: --help need not wait for torch

    if phase == "check":
        return check.items(settings, options.specs or (12 if settings.tiny else 320))
    return {"kernels": kernels.items, "step": step.items, "tune": tune.items}[phase](settings)


def report(options: argparse.Namespace, store: Store, skipped: dict[str, list[str]], console: Console) -> int:
    """Print what is known of this commit on this card; 1 where something is wrong."""
    from gpu import tables

    flags = f" --seed {options.seed}" + " --interpret" * options.interpret + " --tiny" * options.tiny
    shown = tables.Shown(console, flags, judged=not options.tiny)
    wrong = [sentence for phase in options.phase for sentence in shown.phase(phase, store.phase(phase))]
    for phase, names in skipped.items():
        if names:
            console.print(
                f"{phase}: no time for {len(names)} items (--resume): {', '.join(names[:12])}", soft_wrap=True
            )
    for sentence in wrong:
        console.print(sentence, style="red", highlight=False, soft_wrap=True, markup=False)
    console.print(f"written to {store.folder}", highlight=False, soft_wrap=True)
    return 1 if wrong else 0
