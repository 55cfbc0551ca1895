"""``fxopt doctor``: what this machine has and what of fxopt works on it, by trying."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from rich.table import Table
from rich.text import Text

from fxopt import compat
from fxopt.commands import console
from fxopt.errors import brief
from fxopt.kernels.cards import CARDS
from fxopt.kernels.catalog import catalog
from fxopt.kernels.farm import compile_all
from fxopt.kernels.interpreter import interpreting
from fxopt.kernels.offline import Job, Resources
from fxopt.kernels.source import cache_directory
from fxopt.memory.units import mib
from fxopt.version import versions

__all__ = ["Finding", "add_to", "findings"]

HELP = "say what this machine has, and what of fxopt works on it"
DESCRIPTION = """\
Prints versions, devices, compilers and caches, and tries what fxopt needs: a training step through the whole backend,
and a Triton kernel compiled for a card that need not be there.

exit code: 1 if something that fxopt needs is missing or does not work."""

State = Literal["ok", "missing", "broken", "note"]
_STYLES = {"ok": "green", "missing": "yellow", "broken": "red", "note": ""}
TRITONS = ("3.6", "3.7", "3.8", "3.9")
"""Minor versions of Triton by which fxopt's kernels are known to compile (docs/kernels.md)."""
TORCHES = ("2.11", "2.12", "2.13")


@dataclass(frozen=True)
class Finding:
    """One line. "broken": fxopt needs it; "missing": it would be used; "note": a fact."""

    section: str
    what: str
    state: State
    says: str


def add_to(subparsers: Any) -> None:
    """Add the command to argparse's subparsers."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = subparsers.add_parser("doctor", help=HELP, description=DESCRIPTION, formatter_class=raw)
    parser.add_argument("--json", action="store_true", help="print a list of objects, and no table")
    parser.add_argument("--quick", action="store_true", help="look, and try nothing")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """What the arguments say."""
    found = list(findings(not arguments.quick))
    if arguments.json:
        print(json.dumps([asdict(one) for one in found], indent=1))
    else:
        _show(found)
    return 1 if any(one.state == "broken" for one in found) else 0


def findings(trying: bool = True) -> Iterator[Finding]:
    """All lines, in order."""
    yield from _versions()
    yield from _devices()
    yield from _tools()
    yield from _caches()
    if trying:
        yield _tried("training step", _training_step)
        yield _tried("offline kernel", _offline_kernel)


# --- looking -----------------------------------------------------------------------------------------------------


def _versions() -> Iterator[Finding]:
    for name, version in versions().items():
        yield Finding("versions", name, "broken" if version == "none" else "ok", version)
    yield _supported("torch", TORCHES)
    yield _pair()


def _supported(name: str, tested: tuple[str, ...]) -> Finding:
    version = versions()[name]
    known = ".".join(version.split(".")[:2]) in tested
    return Finding(
        "versions", f"{name} is tested", "ok" if known else "missing", f"{version}; tested with {', '.join(tested)}"
    )


def _pair() -> Finding:
    """Whether torch and triton belong together, as torch's own requirements say; the CPU build says nothing."""
    wanted = [one for one in metadata.requires("torch") or [] if one.startswith(("triton", "pytorch-triton"))]
    triton = versions()["triton"]
    if not wanted:
        known = ".".join(triton.split(".")[:2]) in TRITONS
        says = f"triton {triton}; this torch asks for none; tested with {', '.join(TRITONS)}"
        return Finding("versions", "torch and triton", "ok" if known else "missing", says)
    pinned = wanted[0].split(";")[0].strip()
    fits = pinned.split("==")[-1].strip() == triton if "==" in pinned else True
    return Finding(
        "versions", "torch and triton", "ok" if fits else "broken", f"torch asks for {pinned}, here: {triton}"
    )


def _devices() -> Iterator[Finding]:
    threads = f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    yield Finding("devices", f"CPU ({platform.machine()})", "ok", threads)
    if not torch.cuda.is_available():
        yield Finding("devices", "CUDA", "note", "none: fxopt's kernels are not launched, ATen computes its operators")
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        card = torch.cuda.get_device_properties(index)
        says = f"{card.name}, sm_{card.major}{card.minor}, {card.total_memory / 2**30:.0f} GiB"
        yield Finding("devices", f"CUDA {index}", "ok", says)


def _tools() -> Iterator[Finding]:
    compiler = os.environ.get("CXX", "g++")
    path = shutil.which(compiler)
    if path is None:
        yield Finding("tools", compiler, "broken", "not found; Inductor compiles C++ with it: install it, or set CXX")
    else:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
        yield Finding("tools", compiler, "ok", (done.stdout.splitlines() or ["it says no version"])[0])
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    says = str(header) if header.exists() else f"no {header}: install Python's headers (python3-dev)"
    yield Finding("tools", "Python.h", "ok" if header.exists() else "broken", says)
    if interpreting():
        yield Finding(
            "tools", "TRITON_INTERPRET", "note", "set: Triton interprets in this process and compiles nothing"
        )


def _caches() -> Iterator[Finding]:
    triton = os.environ.get("TRITON_CACHE_DIR") or str(Path.home() / ".triton" / "cache")
    places = {"fxopt": cache_directory(), "Inductor": Path(compat.inductor_cache_directory()), "Triton": Path(triton)}
    for name, path in places.items():
        sizes = [one.stat().st_size for one in _files(path)]
        held = f"{len(sizes):,} files, {mib(sum(sizes))}" if sizes else "empty"
        writable = os.access(_existing(path), os.W_OK)
        says = f"{path}: {held}" + ("" if writable else "; not writable")
        yield Finding("caches", name, "ok" if writable else "broken", says)


def _files(path: Path) -> Iterator[Path]:
    """Files below `path`; another process may be adding and removing some."""
    for folder, _, names in os.walk(path):
        yield from (file for name in names if (file := Path(folder, name)).is_file())


def _existing(path: Path) -> Path:
    return path if path.exists() or path == path.parent else _existing(path.parent)


# --- trying ------------------------------------------------------------------------------------------------------


def _tried(what: str, attempt: Callable[[], str]) -> Finding:
    start = time.perf_counter()
    try:
        says = attempt()
    except Exception as error:
        return Finding("tried", what, "broken", brief(error))
    return Finding("tried", what, "ok", f"{says}; {time.perf_counter() - start:.1f} s")


def _training_step() -> str:
    """A linear layer with its loss through the whole backend, judged by fp64. Raises if a rule does not fire."""
    from fxopt import reports
    from fxopt.testing import assert_close_to_fp64

    class Tiny(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Linear(16, 50)

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.cross_entropy(self.head(x), labels)

    held = reports()
    worst = assert_close_to_fp64(Tiny(), {"x": torch.randn(8, 16), "labels": torch.arange(8)}).errors[0]
    done = reports()[len(held)].rewrites
    if not done:
        raise RuntimeError("it compiled, and the loss was not rewritten")
    return (
        f"compiled, {len(done)} site rewritten, {worst.name} off by {worst.compiled:.0e} (allowed {worst.allowed:.0e})"
    )


def _offline_kernel() -> str:
    """The first kernel of the catalog for a card. Raises RuntimeError with the reason where it does not compile."""
    if interpreting():
        return "left out: TRITON_INTERPRET is set"
    shipped = next(iter(catalog(CARDS[0], ("norm",))))
    job = Job(shipped.kernel, shipped.configs[0], CARDS[0], shipped.aligned)
    ((_, outcome),) = compile_all([job], 1)
    if not isinstance(outcome, Resources):
        raise RuntimeError(outcome)
    return f"{shipped.name} for {CARDS[0].name}: {outcome.registers} registers, {outcome.spill_bytes} bytes spilled"


def _show(found: list[Finding]) -> None:
    table = Table("", "what", "", box=None, pad_edge=False, show_header=False)
    for one in found:
        table.add_row(Text(one.state, style=_STYLES[one.state]), f"{one.section}: {one.what}", Text(one.says))
    console().print(table)
    broken = [one.what for one in found if one.state == "broken"]
    print(f"does not work: {', '.join(broken)}" if broken else "all that fxopt needs is here", file=sys.stderr)
