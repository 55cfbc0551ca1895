"""Records of the phases `kernels` and `step` as one number a measure: medians over turns."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gpu.kernels import ALIKE, UNCOMPILED

Records = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Timed:
    """What a contender took on a case; why: why there are no numbers, or what is wrong with them."""

    forward_ms: float | None = None
    step_ms: float | None = None
    peak_mib: float | None = None
    why: str = ""
    wrong: bool = False

    def __str__(self) -> str:
        if self.forward_ms is None or self.step_ms is None:
            return "-"
        memory = "" if self.peak_mib is None else f" {self.peak_mib:.0f}M"
        return f"{self.forward_ms:.2f} {self.step_ms:.2f}{memory}{' ?' if self.why else ''}"


def timed(record: Mapping[str, Any]) -> dict[str, Timed]:
    """By contender, from a record of `kernels`; our own is "fxopt" however it was called."""
    if "error" in record:
        return {"fxopt": Timed(why=record["error"], wrong=True)}
    found = {name: _one(name, said, record["samples"]) for name, said in record["prepared"].items()}
    if UNCOMPILED in found:
        direct = found.pop(UNCOMPILED)
        found["fxopt"] = Timed(direct.forward_ms, direct.step_ms, direct.peak_mib, found["fxopt"].why, wrong=True)
    return found


def _one(name: str, said: Mapping[str, Any], samples: list[dict[str, Any]]) -> Timed:
    """A contender that could not be prepared beside others may have been when it was measured."""
    said = dict(said)
    for sample in samples:
        said |= {key: value for key, value in sample.get(name, {}).items() if key in ("off", "skipped", "failed")}
    forward = [sample[name]["forward_ms"] for sample in samples if "forward_ms" in sample.get(name, {})]
    step = [sample[name]["step_ms"] for sample in samples if "step_ms" in sample.get(name, {})]
    if not forward:
        why = said.get("failed") or said.get("skipped") or "not measured"
        return Timed(why=why, wrong=name == "fxopt")
    peaks = [sample[name]["peak_mib"] for sample in samples if "peak_mib" in sample.get(name, {})]
    why = f"differs from fxopt by {said['off']:.1e}" if not said.get("off", 0.0) <= ALIKE else ""
    return Timed(statistics.median(forward), statistics.median(step), peaks[0] if peaks else None, why)


def gigabytes_a_second(record: Mapping[str, Any]) -> float | None:
    """Of a copy, measured beside a norm."""
    found = [sample["copy"]["gbs"] for sample in record.get("samples", []) if "copy" in sample]
    return statistics.median(found) if found else None


@dataclass(frozen=True)
class Trained:
    """What a backend took for a training step."""

    step_ms: float
    tokens_s: float
    peak_mib: float | None
    rest_mib: float | None
    compile_s: float
    loss: float
    grad_norm: float


def trained(records: Records) -> dict[str, dict[str, Trained]]:
    """By case and backend."""
    found: dict[str, dict[str, Trained]] = {}
    for name, record in records.items():
        case, backend = name.split(": ")
        samples = [one for one in record.get("samples", []) if "step_ms" in one]
        if samples:
            step = statistics.median(ms for one in samples for ms in one["step_ms"])
            numbers = {
                key: record["prepared"][key] for key in Trained.__dataclass_fields__ if key in record["prepared"]
            }
            found.setdefault(case, {})[backend] = Trained(step, 1000 * samples[0]["tokens"] / step, **numbers)
    return found
