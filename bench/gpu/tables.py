"""What is printed of the records: a table a phase, the targets, and sentences for what is wrong."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from gpu import targets
from gpu.summary import Records, Trained, timed, trained

MOST = 20
"""Failures that are spelled out; all are in the JSON."""

LOSS_ALIKE, GRADIENTS_ALIKE = 0.02, 0.05
"""Relative differences in bf16 above which two backends do not train alike."""


def show(phase: str, records: Records, console: Console) -> list[str]:
    """Print a phase; returns what is wrong, a sentence each."""
    shown: dict[str, Callable[[Records, Console], list[str]]] = {
        "check": _checks, "kernels": _kernels, "step": _steps, "tune": _tuned
    }  # fmt: skip
    return shown[phase](records, console) if records else []


def _checks(records: Records, console: Console) -> list[str]:
    table = Table(title="forward and backward against fp64, of drawn cases; excess: the worst error over what is allowed")
    for heading in ("operator", "cases", "right", "wrong", "no answer", "worst excess"):
        table.add_column(heading, justify="left" if heading == "operator" else "right")
    for family in dict.fromkeys(name.split("-")[0] for name in records):
        own = {name: one for name, one in records.items() if name.split("-")[0] == family}
        said = [one["prepared"] for one in own.values() if "prepared" in one]
        right = sum(one["ok"] for one in said)
        worst = max((one["prepared"]["excess"] for name, one in own.items()
                     if "prepared" in one and "canary" not in name), default=0.0)  # fmt: skip
        table.add_row(family, *map(str, (len(own), right, len(said) - right, len(own) - len(said))), f"{worst:.2f}")
    console.print(table)
    wrong = [_failure(name, one) for name, one in records.items() if "error" in one or not one["prepared"]["ok"]]
    return wrong[:MOST] + ([f"and {len(wrong) - MOST} more"] if len(wrong) > MOST else [])


def _failure(name: str, record: dict[str, object] | object) -> str:
    assert isinstance(record, dict)
    reasons = [record["error"]] if "error" in record else record["prepared"]["problems"]
    told = "\n  ".join(str(one) for one in reasons[:3])
    return f"{name}: {told}\n  {json.dumps(record['spec'])}\n  python bench/gpu/run.py --phase check --only {name}"


def _kernels(records: Records, console: Console) -> list[str]:
    wrong: list[str] = []
    for family in ("attention", "norm", "loss"):
        cases = {name: timed(one) for name, one in records.items() if one["spec"]["family"] == family}
        contenders = list(dict.fromkeys(one for by in cases.values() for one in by))
        table = Table(title=f"{family}: ms forward, ms forward + backward, MiB over the inputs")
        for heading in ("case", *contenders):
            table.add_column(heading, justify="left" if heading == "case" else "right")
        for name, by in cases.items():
            table.add_row(name.split(": ", 1)[1], *(str(by.get(one, "-")) for one in contenders))
        if cases:
            console.print(table)
        ours = {name: by["fxopt"] for name, by in cases.items()}
        wrong += [f"{name}: fxopt: {one.why}" for name, one in ours.items() if one.wrong]
        left = {(one, said.why) for by in cases.values() for one, said in by.items() if said.why and not said.wrong}
        for contender, why in sorted(left):
            console.print(f"{contender}: {why}", highlight=False, soft_wrap=True, markup=False)
    _targets(targets.of_kernels(records), console)
    return wrong


def _steps(records: Records, console: Console) -> list[str]:
    table = Table(title="training steps: forward, backward, AdamW; rest: allocated between steps")
    for heading in ("case", "backend", "tokens/s", "step ms", "peak MiB", "rest MiB", "compile s"):
        table.add_column(heading, justify="left" if heading in ("case", "backend") else "right")
    for case, by in trained(records).items():
        for at, (backend, one) in enumerate(by.items()):
            memory = ("-" if mib is None else f"{mib:.0f}" for mib in (one.peak_mib, one.rest_mib))
            table.add_row(
                "" if at else case, backend, f"{one.tokens_s:.0f}", f"{one.step_ms:.1f}", *memory, f"{one.compile_s:.1f}"
            )
    console.print(table)
    _targets(targets.of_steps(records), console)
    failed = [f"{name}: {one['error']}" for name, one in records.items() if "error" in one]
    for sentence in (one for one in failed if "liger" in one):
        console.print(sentence, highlight=False, soft_wrap=True, markup=False)
    unlike = [sentence for case, by in trained(records).items() for sentence in _unlike(case, by)]
    return [one for one in failed if ": fxopt:" in one] + unlike + _idle(records)


def _unlike(case: str, by: dict[str, Trained]) -> list[str]:
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


def _idle(records: Records) -> list[str]:
    reports = {name: one["prepared"].get("report") for name, one in records.items() if "prepared" in one}
    return [f"{name}: fxopt rewrote nothing: {said['verdict']}" for name, said in reports.items()
            if said and not said["rewrites"]]  # fmt: skip


def _tuned(records: Records, console: Console) -> list[str]:
    table = Table(title="fastest configurations")
    for heading in ("case", "kernel", "configuration", "ms", "default ms"):
        table.add_column(heading)
    for name, one in records.items():
        for kernel in one.get("prepared", {}).get("kernels", []):
            table.add_row(name, *map(str, kernel.values()))
    console.print(table)
    return [f"{name}: {one['error']}" for name, one in records.items() if "error" in one]


def _targets(found: list[targets.Target], console: Console) -> None:
    for target in found:
        style = "green" if target.met else "red"
        console.print(str(target), style=style, highlight=False, soft_wrap=True, markup=False)
