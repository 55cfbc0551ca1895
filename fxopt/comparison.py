"""Two reports of one model, compared: what is worse, what is better, what is merely otherwise."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal

from fxopt.errors import ReportError
from fxopt.memory.units import mib
from fxopt.report import Report
from fxopt.rule import Refusal, Rewrite

__all__ = ["Difference", "compare"]

Verdict = Literal["worse", "better", "changed"]
Key = tuple[str, str, str]


@dataclasses.dataclass(frozen=True)
class Difference:
    """One thing that the reports say differently. section: "site", "cast", "saved", "peak", "kernel", ...

    before, after: what each says, "" where it says nothing.
    """

    section: str
    what: str
    before: str
    after: str
    verdict: Verdict


def compare(before: Report, after: Report, tolerance: float = 0.01, anyway: bool = False) -> list[Difference]:
    """What changed from `before` to `after`, in the order of the sections; a section that one lacks is left out.

    tolerance: by how much bytes and registers may grow before that is worse, as a fraction.
    Raises `ReportError` where the reports are not of one model, or one is empty; anyway: compare them nevertheless.
    """
    for name, report in (("first", before), ("second", after)):
        if not report.graphs:
            raise ReportError(f"the {name} report is empty: no graph was compiled in that run")
    if not anyway:
        _of_one_model(before, after)
    return [
        *_graphs(before, after), *_sites(before, after), *_failures(before, after), *_deferred(before, after),
        *_casts(before, after, tolerance), *_saved(before, after), *_peaks(before, after, tolerance),
        *_kernels(before, after, tolerance),
    ]  # fmt: skip


def _of_one_model(before: Report, after: Report) -> None:
    if before.model and after.model and before.model != after.model:
        raise ReportError(
            f"these are reports of two models, {before.model} and {after.model}: explain the same one twice, or say "
            "--anyway"
        )
    one, other = (collections.Counter(_inputs(report)) for report in (before, after))
    if one and other and one != other:
        raise ReportError(
            f"these reports are of different graphs: only the first takes {_most(one - other)}, only the second "
            f"{_most(other - one)}. Explain the same model and inputs twice, or say --anyway"
        )


def _most(kinds: collections.Counter[str]) -> str:
    return ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common(3)) or "nothing"


def _inputs(report: Report) -> dict[str, int]:
    total: collections.Counter[str] = collections.Counter()
    for graph in report.graphs:
        total.update(graph.inputs)
    return dict(total)


# --- section by section ------------------------------------------------------------------------------------------


def _graphs(before: Report, after: Report) -> Iterator[Difference]:
    one, other = len(before.graphs), len(after.graphs)
    if one != other:
        yield Difference(
            "graphs", "graphs that Dynamo made", str(one), str(other), "worse" if other > one else "better"
        )


def _sites(before: Report, after: Report) -> Iterator[Difference]:
    """By rule, module and code, not by line: lines move when a file is edited."""
    one, other = (dict(_sites_of(report)) for report in (before, after))
    for key in dict.fromkeys([*one, *other]):
        (was, then), (now, how) = (found.get(key, (False, "")) for found in (one, other))
        if (was, then) == (now, how):
            continue
        verdict: Verdict = "changed" if was == now else ("worse" if was else "better")
        yield Difference("site", " ".join(part for part in key if part), _state(was, then), _state(now, how), verdict)


def _sites_of(report: Report) -> Iterator[tuple[Key, tuple[bool, str]]]:
    seen: collections.Counter[tuple[str, str]] = collections.Counter()
    done: list[tuple[Rewrite | Refusal, bool, str]] = [(one, True, one.detail) for one in report.rewrites]
    left: list[tuple[Rewrite | Refusal, bool, str]] = [(one, False, "; ".join(one.reasons)) for one in report.refusals]
    for item, rewritten, words in (*done, *left):
        where = item.place.module or item.place.code
        seen[item.rule, where] += 1
        count = seen[item.rule, where]
        yield (item.rule, where, f"#{count}" if count > 1 else ""), (rewritten, words)


def _state(rewritten: bool, words: str) -> str:
    if rewritten:
        return f"rewritten: {words}"
    return f"left alone: {words}" if words else ""


def _failures(before: Report, after: Report) -> Iterator[Difference]:
    """Stages and rules that fell back, and checks that failed."""
    one, other = (set(_failures_of(report)) for report in (before, after))
    yield from (Difference("failure", item, "", "failed", "worse") for item in sorted(other - one))
    yield from (Difference("failure", item, "failed", "", "better") for item in sorted(one - other))


def _failures_of(report: Report) -> Iterator[str]:
    yield from (note for note in report.notes if " failed (" in note)
    for graph in report.graphs:
        yield from (f"{check.part}: {check.what}: {check.failure}" for check in graph.checks if check.failure)


def _deferred(before: Report, after: Report) -> Iterator[Difference]:
    one, other = len(before.deferred), len(after.deferred)
    if one != other:
        yield Difference("deferred", "outputs", str(one), str(other), "worse" if other < one else "better")


def _casts(before: Report, after: Report, tolerance: float) -> Iterator[Difference]:
    one, other = (_bytes_of_casts(report) for report in (before, after))
    for key in dict.fromkeys([*one, *other]):
        (count, size), (now, grown) = (found.get(key, (0, 0)) for found in (one, other))
        if (count, size) != (now, grown):
            yield Difference("cast", key, _cast(count, size), _cast(now, grown), _grown(size, grown, tolerance))


def _bytes_of_casts(report: Report) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    for cast in report.casts:
        key = f"{cast.before} to {cast.after}"
        count, size = found.get(key, (0, 0))
        found[key] = count + 1, size + cast.bytes
    return found


def _cast(count: int, size: int) -> str:
    return f"{count} casts, {mib(size)}" if count else ""


def _saved(before: Report, after: Report) -> Iterator[Difference]:
    """Tensors whose decision changed: what is saved for the backward, recomputed or offloaded."""
    if any(graph.plan is None for report in (before, after) for graph in report.graphs):
        return
    one, other = (_decisions(report) for report in (before, after))
    for name in dict.fromkeys([*one, *other]):
        was, now = one.get(name, ""), other.get(name, "")
        if was != now:
            yield Difference("saved", name, was, now, "changed")


def _decisions(report: Report) -> dict[str, str]:
    return {
        f"{row.name} of {graph.name}": f"{row.decision}, {mib(row.bytes)}"
        for graph in report.graphs
        if graph.plan is not None
        for row in graph.plan.rows
    }


def _peaks(before: Report, after: Report, tolerance: float) -> Iterator[Difference]:
    for which in ("predicted", "measured"):
        one, other = (_highest(report, which) for report in (before, after))
        if one is not None and other is not None and one != other:
            verdict = _grown(one, other, tolerance)
            yield Difference("peak", f"{which} peak", mib(one), mib(other), verdict)


def _highest(report: Report, which: str) -> int | None:
    found = [getattr(plan, which) for plan in report.plans]
    return max((one for one in found if one is not None), default=None)


def _kernels(before: Report, after: Report, tolerance: float) -> Iterator[Difference]:
    one, other = (_kernels_of(report) for report in (before, after))
    if not one or not other:
        return  # kernels are in the report where a dump was asked for
    for key in dict.fromkeys([*one, *other]):
        was, now = one.get(key), other.get(key)
        if was is None or now is None:
            words = ["" if found is None else "launched" for found in (was, now)]
            yield Difference("kernel", key, words[0], words[1], "changed")
            continue
        for card in sorted(was.keys() & now.keys()):
            yield from _resources(f"{key} on {card}", was[card], now[card], tolerance)


def _kernels_of(report: Report) -> dict[str, dict[str, Mapping[str, int]]]:
    """Resources by card of each kernel of a site; a card may have a text of its own of the same kernel."""
    found: dict[str, dict[str, Mapping[str, int]]] = collections.defaultdict(dict)
    for item in report.kernels:
        found[f"{item.kernel} of {item.site}"] |= item.resources
    return found


def _resources(what: str, was: Mapping[str, int], now: Mapping[str, int], tolerance: float) -> Iterator[Difference]:
    for name in was:
        if was[name] != now.get(name, was[name]):
            fits: Verdict = "better" if now[name] else "worse"
            verdict = fits if name == "fits" else _grown(was[name], now[name], tolerance)
            yield Difference("kernel", f"{what}: {name.replace('_', ' ')}", str(was[name]), str(now[name]), verdict)


def _grown(before: int, after: int, tolerance: float) -> Verdict:
    if after > before * (1 + tolerance):
        return "worse"
    return "better" if after < before * (1 - tolerance) else "changed"


def worse(differences: Iterable[Difference]) -> list[Difference]:
    """Those that a CI should fail for."""
    return [one for one in differences if one.verdict == "worse"]
