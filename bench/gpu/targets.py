"""What must be reached on a GPU (issue 4), put to the records: sentences, each with the numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gpu.kernels import case_of
from gpu.summary import Records, Timed, Trained, gigabytes_a_second, timed, trained

SDPA = ("sdpa flash", "sdpa cudnn", "sdpa efficient", "sdpa math")
LOSSES = ("loss: 8192 x 256000 x 2304", "loss: 8192 x 128256 x 4096")


@dataclass(frozen=True)
class Target:
    """A ratio that must be at least, or at most, `bound`."""

    name: str
    ratio: float
    bound: float
    at_most: bool = False

    @property
    def met(self) -> bool:
        """False for NaN."""
        return self.ratio <= self.bound if self.at_most else self.ratio >= self.bound

    def __str__(self) -> str:
        sign = "<=" if self.at_most else ">="
        return f"{'met   ' if self.met else 'MISSED'} {self.name}: {self.ratio:.2f} (target {sign} {self.bound:.2f})"


def of_kernels(records: Records) -> list[Target]:
    """Those that single operators must reach."""
    found = []
    for name, record in records.items():
        contenders = timed(record)
        if contenders["fxopt"].step_ms is not None:
            family = {"attention": _attention, "norm": _norm, "loss": _loss}[record["spec"]["family"]]
            found += list(family(name, record, contenders))
    return found


def _attention(name: str, record: Mapping[str, Any], by: Mapping[str, Timed]) -> Iterator[Target]:
    case, ours = case_of(record["spec"]), by["fxopt"].step_ms
    assert ours is not None
    best = min((ms for one in SDPA if one in by and (ms := by[one].step_ms) is not None), default=None)
    plain = case.mask in ("causal", "none") and case.score == "none" and not case.sink
    if best is not None:
        yield Target(f"{name}: speed over the best SDPA backend", best / ours, 0.9 if plain else 2.0)
    flex = by["flex"].step_ms if "flex" in by else None
    if flex is not None and not plain:
        yield Target(f"{name}: speed over FlexAttention", flex / ours, 1.0)


def _norm(name: str, record: Mapping[str, Any], by: Mapping[str, Timed]) -> Iterator[Target]:
    case, ours, copy = case_of(record["spec"]), by["fxopt"].step_ms, gigabytes_a_second(record)
    assert ours is not None
    if copy:
        # Forward: read x (and residual), write the result (and the sum). Backward: read the upstream gradients (of
        # both) and the sum, write one gradient.
        tensors = 8 if case.residual else 5
        moved = tensors * case.rows * case.width * 2 / 1e6
        yield Target(f"{name}: share of the copy's {copy:.0f} GB/s", moved / ours / copy, 0.85)
    inductor = by["inductor"].step_ms if "inductor" in by else None
    if inductor is not None:
        yield Target(f"{name}: speed over Inductor", inductor / ours, 1.0)


def _loss(name: str, record: Mapping[str, Any], by: Mapping[str, Timed]) -> Iterator[Target]:
    ours, base = by["fxopt"], by.get("inductor", Timed())
    if name not in LOSSES or ours.step_ms is None or base.step_ms is None:
        return
    yield Target(f"{name}: time over Inductor's", ours.step_ms / base.step_ms, 1.0, at_most=True)
    if ours.peak_mib is not None and base.peak_mib:
        yield Target(f"{name}: memory over Inductor's", ours.peak_mib / base.peak_mib, 0.08, at_most=True)


def of_steps(records: Records) -> list[Target]:
    """Those that training must reach."""
    return [target for case, by in trained(records).items() if "fxopt" in by for target in _steps(case, by)]


def _steps(case: str, by: Mapping[str, Trained]) -> Iterator[Target]:
    ours = by["fxopt"]
    if base := by.get("inductor"):
        yield Target(f"{case}: tokens/s over Inductor's", ours.tokens_s / base.tokens_s, 1.25)
        if ours.peak_mib and base.peak_mib:
            yield Target(f"{case}: peak memory over Inductor's", ours.peak_mib / base.peak_mib, 0.5, at_most=True)
    if liger := by.get("liger+inductor"):
        yield Target(f"{case}: tokens/s over Liger + Inductor's", ours.tokens_s / liger.tokens_s, 1.1)
