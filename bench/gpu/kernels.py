"""Phase `kernels`: milliseconds and memory of one operator, forward and backward, against whoever else computes it."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from measure import alternate

from fxopt.errors import brief
from fxopt.metering import release
from gpu import attention_peers, row_peers
from gpu.attention_problem import AttentionCase, AttentionProblem
from gpu.contender import Contender, Maker, Skipped, distance
from gpu.item import Answer, Item, Settings
from gpu.loss_problem import LossCase, LossProblem
from gpu.norm_problem import NormCase, NormProblem
from gpu.problem import Problem
from gpu.shapes import ATTENTION, LOSS, NORM, TINY
from gpu.timing import milliseconds, peak_mib

TURNS = 2
UNCOMPILED = "fxopt, uncompiled"
"""Our operator called by itself; timed only where it does not compile."""

ESTIMATES = {"attention": (30.0, 2.0), "norm": (15.0, 1.0), "loss": (30.0, 2.5)}
"""Seconds of preparing all contenders, and of a turn."""

SCORE_BYTES = 3
"""Held at once of every score or logit while contenders are prepared, at times 14 by the most wasteful one: two of
those that meet may find no memory, and are tried again when they are alone."""

ALIKE = 0.05
"""Relative difference of results and gradients in bf16 above which two contenders do not compute the same."""

CASES: dict[str, tuple[dict[str, Any], Any, Any]] = {
    "attention": (ATTENTION, AttentionProblem, attention_peers.makers),
    "norm": (NORM, NormProblem, row_peers.norm_makers),
    "loss": (LOSS, LossProblem, row_peers.loss_makers),
}


def items(settings: Settings) -> list[Item]:
    """The families in turn, each by the value of its cases."""
    lists = [
        [_item(family, name, case, settings) for name, case in cases.items()] for family, (cases, *_) in CASES.items()
    ]
    if settings.tiny:
        lists = [each[: TINY[family]] for family, each in zip(CASES, lists, strict=True)]
    return [each[at] for at in range(max(map(len, lists))) for each in lists if at < len(each)]


def _item(family: str, name: str, case: Any, settings: Settings) -> Item:
    case = shrunk(case) if settings.tiny else case
    spec, (seconds, turn_seconds) = {"family": family, "case": dataclasses.asdict(case)}, ESTIMATES[family]
    return Item(
        "kernels", f"{family}: {name}", spec, seconds=seconds, gib=gib_of(case), turns=TURNS, turn_seconds=turn_seconds,
        rest_gib=gib_of(case, held=True),
    )  # fmt: skip


def case_of(spec: dict[str, Any]) -> Any:
    """The case of an item's spec."""
    kinds = {"attention": AttentionCase, "norm": NormCase, "loss": LossCase}
    return kinds[spec["family"]](**spec["case"])


def problem_of(spec: dict[str, Any], settings: Settings) -> Problem:
    """The case's tensors, and ways to compute it."""
    made: Problem = CASES[spec["family"]][1](case_of(spec), settings.device, settings.lowering)
    return made


def shrunk(case: Any) -> Any:
    """The same for a dry run."""
    if isinstance(case, AttentionCase):
        group = min(2, case.heads // case.key_heads)
        return dataclasses.replace(
            case, batch=1, heads=2, key_heads=2 // group, queries=40, keys=40, depth=16, width=16, window=8
        )  # fmt: skip
    if isinstance(case, NormCase):
        return dataclasses.replace(case, rows=9, width=40)
    return dataclasses.replace(case, rows=33, width=24, classes=100)


def gib_of(case: Any, held: bool = False) -> float:
    """What the most wasteful contender holds at once, and, `held`, what stays between turns; the context included."""
    if isinstance(case, AttentionCase):
        tensors = case.batch * (case.heads + 2 * case.key_heads) * case.keys * (case.depth + case.width)
        scores = case.batch * case.heads * case.queries * case.keys
    elif isinstance(case, NormCase):
        tensors, scores = 4 * case.rows * case.width, 4 * case.rows * case.width
    else:
        tensors, scores = 2 * case.classes * case.width, case.rows * case.classes
    return 1.0 + (4 * tensors + (0 if held else SCORE_BYTES * scores)) / 2**30


class Kernels:
    """One case and everybody who computes it."""

    def __init__(self, item: Item, settings: Settings) -> None:
        self.settings, self.case = settings, case_of(item.spec)
        self.problem = problem_of(item.spec, settings)
        self.makers: dict[str, Maker] = CASES[item.spec["family"]][2](self.problem, settings)
        self.contenders: dict[str, Contender] = {}
        self.too_large: list[str] = []
        self.expected: list[torch.Tensor] | None = None

    def prepare(self) -> Answer:
        """Compile and warm up; per contender how far its results are from ours, or why it is left out."""
        answers = {name: self._warmed(name, make) for name, make in self.makers.items()}
        if "fxopt" not in self.contenders:
            answers[UNCOMPILED] = self._warmed(UNCOMPILED, lambda: self.problem.ours)
        return answers

    def _warmed(self, name: str, make: Maker) -> Answer:
        try:
            contender = Contender.of(self.problem, make())
            sample = contender.sample()
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError):
                self.too_large.append(name)
            return {"skipped" if isinstance(error, (Skipped, ImportError)) else "failed": brief(error)}
        finally:
            release()
        self.contenders[name] = contender
        self.expected = sample if self.expected is None else self.expected
        return {"off": distance(sample, self.expected)}

    def measure(self, turn: int) -> Answer:
        """Per contender milliseconds of the forward and of both, and MiB of both over the inputs.

        Those that had no room beside others get a second chance: now they are alone.
        """
        answers: Answer = {name: self._warmed(name, self.makers[name]) for name in self.too_large if turn == 0}
        self.too_large = []
        for name in alternate(list(self.contenders), turn):
            answers[name] = answers.get(name, {}) | self._timed(self.contenders[name], turn)
            release()
        if isinstance(self.case, NormCase):
            answers["copy"] = {"gbs": copy_speed(self.case, self.settings)}
        return answers

    def _timed(self, contender: Contender, turn: int) -> Answer:
        try:
            found: Answer = {
                "forward_ms": milliseconds(contender.forward, self.settings),
                "step_ms": milliseconds(contender.both, self.settings),
            }
            return found if turn else found | {"peak_mib": peak_mib(contender.both, self.settings)}
        except torch.OutOfMemoryError as error:
            return {"failed": brief(error)}


def copy_speed(case: NormCase, settings: Settings) -> float:
    """GB/s, read and written, of copying a tensor of the case's size."""
    source = torch.empty(case.rows, case.width, dtype=torch.bfloat16, device=settings.device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / 1e6 / milliseconds(lambda: target.copy_(source), settings)
