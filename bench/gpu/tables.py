"""What is printed of the records: a table a phase, the targets, and sentences for what is wrong."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from gpu import targets
from gpu.summary import Records, Timed, Trained, timed, trained

MOST = 20
"""Failures that are spelled out; all are in the JSON."""

LOSS_ALIKE, GRADIENTS_ALIKE = 0.02, 0.05
"""Relative differences in bf16 above which two backends do not train alike."""


@dataclass(frozen=True)
class Shown:
    """Where to print. flags: of the command, for lines that repeat an item. judged: whether targets are held against
    the numbers."""

    console: Console
    flags: str = ""
    judged: bool = True

    def phase(self, phase: str, records: Records) -> list[str]:
        """Print the records of a phase; returns what is wrong, a sentence each."""
        shown = {"check": self._checks, "kernels": self._kernels, "step": self._steps, "tune": self._tuned}
        return shown[phase](records) if records else []

    def _checks(self, records: Records) -> list[str]:
        headings = ("operator", "cases", "right", "wrong", "no answer", "worst excess")
        table = _table("against fp64, forward and backward; excess: the worst error over what is allowed", headings)
        for family in dict.fromkeys(map(_family, records)):
            own = {name: one for name, one in records.items() if _family(name) == family}
            said = {name: one["prepared"] for name, one in own.items() if "prepared" in one}
            right = sum(one["ok"] for one in said.values())
            worst = max((one["excess"] for name, one in said.items() if "canary" not in name), default=0.0)
            counts = (len(own), right, len(said) - right, len(own) - len(said))
            table.add_row(family, *map(str, counts), f"{worst:.2f}")
        self.console.print(table)
        wrong = [name for name, one in records.items() if "error" in one or not one["prepared"]["ok"]]
        told = [self._failure(name, records[name]) for name in wrong[:MOST]]
        return told + ([f"and {len(wrong) - MOST} more"] if len(wrong) > MOST else [])

    def _failure(self, name: str, record: Mapping[str, Any]) -> str:
        reasons = [record["error"]] if "error" in record else record["prepared"]["problems"]
        told = "\n  ".join(map(str, reasons[:3]))
        again = f"python bench/gpu/run.py --phase check --only {name}{self.flags}"
        return f"{name}: {told}\n  {json.dumps(record['spec'])}\n  {again}"

    def _kernels(self, records: Records) -> list[str]:
        wrong: list[str] = []
        for family in dict.fromkeys(one["spec"]["family"] for one in records.values()):
            cases = {name: timed(one) for name, one in records.items() if one["spec"]["family"] == family}
            self._times(family, cases)
            wrong += [f"{name}: fxopt: {by['fxopt'].why}" for name, by in cases.items() if by["fxopt"].wrong]
        self._targets(targets.of_kernels(records))
        return wrong

    def _times(self, family: str, cases: dict[str, dict[str, Timed]]) -> None:
        contenders = list(dict.fromkeys(one for by in cases.values() for one in by))
        title = f"{family}: ms of the forward, ms of forward and backward, MiB over the inputs; ?: see below"
        table = _table(title, ("case", *contenders))
        for name, by in cases.items():
            table.add_row(name.split(": ", 1)[1], *(str(by.get(one, "-")) for one in contenders))
        self.console.print(table)
        why = {f"{one}: {said.why}" for by in cases.values() for one, said in by.items() if said.why and not said.wrong}
        self._say(sorted(why))

    def _steps(self, records: Records) -> list[str]:
        headings = ("case", "backend", "tokens/s", "step ms", "peak MiB", "rest MiB", "compile s")
        table = _table("training steps: forward, backward, AdamW; rest: allocated between steps", headings)
        cases = trained(records)
        for case, by in cases.items():
            for at, (backend, one) in enumerate(by.items()):
                memory = ("-" if mib is None else f"{mib:.0f}" for mib in (one.peak_mib, one.rest_mib))
                times = (f"{one.tokens_s:.0f}", f"{one.step_ms:.1f}")
                table.add_row("" if at else case, backend, *times, *memory, f"{one.compile_s:.1f}")
        self.console.print(table)
        failed = [f"{name}: {one['error']}" for name, one in records.items() if "error" in one]
        ours = [one for one in failed if ": fxopt:" in one]
        self._say(one for one in failed if one not in ours)
        self._targets(targets.of_steps(records))
        unlike = [sentence for case, by in cases.items() for sentence in _unlike(case, by)]
        return ours + unlike + _without_rewrites(records)

    def _tuned(self, records: Records) -> list[str]:
        title = "ms of forward and backward with the default configuration of a kernel and with the best"
        table = _table(title, ("case", "kernel", "default", "default ms", "best", "best ms"))
        for name, one in records.items():
            found = [kernel for sample in one.get("samples", []) for kernel in sample.get("kernels", [])]
            for at, kernel in enumerate(found):
                default, best = next(iter(kernel["times"])), kernel["best"]
                shown = (default, _ms(kernel["times"][default]), best, _ms(kernel["times"][best]))
                table.add_row("" if at else name, kernel["kernel"], *shown)
        self.console.print(table)
        return [f"{name}: {one['error']}" for name, one in records.items() if "error" in one]

    def _targets(self, found: Iterable[targets.Target]) -> None:
        for target in found if self.judged else ():
            style = "green" if target.met else "red"
            self.console.print(str(target), style=style, highlight=False, soft_wrap=True, markup=False)

    def _say(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.console.print(line, highlight=False, soft_wrap=True, markup=False)


def _table(title: str, headings: Iterable[str]) -> Table:
    """Numbers to the right."""
    table = Table(title=title, title_justify="left")
    for heading in headings:
        words = heading in ("operator", "case", "backend", "kernel", "default", "best")
        table.add_column(heading, justify="left" if words else "right")
    return table


def _family(name: str) -> str:
    return name.split("-")[0]


def _ms(milliseconds: float | None) -> str:
    return "-" if milliseconds is None else f"{milliseconds:.3f}"


def _unlike(case: str, by: Mapping[str, Trained]) -> list[str]:
    """Of backends that did not compute what most did."""
    found = []
    for name, allowed in (("loss", LOSS_ALIKE), ("grad_norm", GRADIENTS_ALIKE)):
        usual = statistics.median_low(getattr(one, name) for one in by.values())
        found += [
            f"{case}: {name} is {getattr(one, name)!r} under {backend}, {usual!r} under others"
            for backend, one in by.items()
            if not abs(getattr(one, name) - usual) <= allowed * abs(usual)
        ]
    return found


def _without_rewrites(records: Records) -> list[str]:
    reports = {name: one["prepared"].get("report") for name, one in records.items() if "prepared" in one}
    return [
        f"{name}: fxopt rewrote nothing: {said['verdict']}"
        for name, said in reports.items()
        if said and not said["rewrites"]
    ]
