"""Phase `check`: every operator on drawn cases, forward and backward, by the fp64 rule of `fxopt.testing.compare`.

A case passes if the results obey the rule, a second run gives the same bits, and nothing was left unwritten (memory
that is allocated for our operator holds NaN). Where only tensors of fewer than `problem.FEW` numbers break the rule,
the case is drawn again with other numbers, twice at most: eager may be right by luck, wrong kernels are always wrong.
Canaries are results that were spoiled on purpose: they pass if the rule catches them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fxopt.testing.compare import Comparison, Step
from gpu import attention_problem, loss_problem, norm_problem
from gpu.attention_problem import AttentionCase, AttentionProblem
from gpu.compiled import captured_in_graph, compiled_whole
from gpu.item import Answer, Item, Settings
from gpu.loss_problem import LossCase, LossProblem
from gpu.norm_problem import NormCase, NormProblem
from gpu.problem import FEW, Function, Problem, compared, differing, run, sizes

DRAWS = 3


@dataclass(frozen=True)
class Family:
    """An operator: its cases, what makes a problem of one, and the case of a number (by seed, and whether tiny)."""

    case: Callable[..., Any]
    problem: Callable[[Any, str, str], Problem]
    drawn: Callable[[int, int, bool], Any]
    seconds: float


FAMILIES = {
    "attention": Family(AttentionCase, AttentionProblem, attention_problem.drawn, 12),
    "norm": Family(NormCase, NormProblem, norm_problem.drawn, 5),
    "loss": Family(LossCase, LossProblem, loss_problem.drawn, 8),
}
SHARES = {"attention": 4, "norm": 2, "loss": 2}
"""Of each family among the drawn cases; taken in turn, so that a run that is cut short has all of them."""

WAYS: dict[str, Callable[[Function], Function]] = {
    "direct": lambda function: function,
    "compiled": compiled_whole,
    "graph": captured_in_graph,
}
"""How the operator is called: by itself, within torch.compile, in a CUDA graph."""

FAR = {
    "attention": {"batch": 2, "queries": 200, "keys": 200, "heads": 2, "key_heads": 1},
    "norm": {"rows": 2, "width": 2048},
    "loss": {"rows": 2, "width": 512},
}
"""Changes for a case whose offsets are past 2^31."""

FAR_GIB = {"attention": 16.0, "norm": 7.0, "loss": 7.0}
"""4 for each tensor that lies so."""


def items(settings: Settings, count: int) -> list[Item]:
    """Canaries, then the cases that are no draws, then `count` drawn ones."""
    found = [_item(settings, family, f"canary-{kind}", 0, canary=kind) for family in FAMILIES
             for kind in ("result", "gradient")]  # fmt: skip
    for family in FAMILIES:
        found.append(_item(settings, family, "compiled", 1, way="compiled"))
        if not settings.interpret:
            found.append(_item(settings, family, "graph", 1, way="graph"))
        gib = 2.5 if settings.interpret else FAR_GIB[family]  # a CPU's memory is not there until it is written to
        found.append(_item(settings, family, "far", 1, gib=gib, changes=FAR[family] | {"layout": "far"}))
    turns = [name for name, share in SHARES.items() for _ in range(share)]
    numbers = dict.fromkeys(FAMILIES, 0)
    for at in range(count):
        family = turns[at % len(turns)]
        found.append(_item(settings, family, f"{numbers[family]:03d}", numbers[family]))
        numbers[family] += 1
    return found


def _item(
    settings: Settings, family: str, name: str, number: int, *, way: str = "direct", canary: str = "",
    gib: float = 2.5, changes: dict[str, Any] | None = None,
) -> Item:  # fmt: skip
    """A case that is no draw is the family's default; canaries are fp32, in which a spoiled result is beyond doubt."""
    if name.isdigit():
        case = FAMILIES[family].drawn(number, settings.seed, settings.tiny)
    else:
        dtype = {"dtype": "float32"} if canary else {}
        case = FAMILIES[family].case(**dtype | _small(family, settings) | (changes or {}))
    spec = {"family": family, "case": dataclasses.asdict(case), "way": way, "canary": canary}
    return Item("check", f"{family}-{name}", spec, seconds=FAMILIES[family].seconds, gib=gib)


def _small(family: str, settings: Settings) -> dict[str, Any]:
    if not settings.tiny:
        return {}
    return {
        "attention": {"heads": 2, "key_heads": 1, "queries": 33, "keys": 33, "depth": 16, "width": 16},
        "norm": {"rows": 9, "width": 40},
        "loss": {"rows": 33, "width": 24, "classes": 100},
    }[family]


class Check:
    """One case, all of whose work is done when preparing."""

    def __init__(self, item: Item, settings: Settings) -> None:
        self.spec, self.settings = item.spec, settings
        self.family = FAMILIES[item.spec["family"]]
        self.case = self.family.case(**item.spec["case"])

    def prepare(self) -> Answer:
        """The verdict: "ok", the sentences that say what is wrong, and the worst tensor."""
        for draw in range(DRAWS):
            problem = self.family.problem(
                dataclasses.replace(self.case, seed=self.case.seed + draw), self.settings.device, self.settings.lowering
            )  # fmt: skip
            function = WAYS[self.spec["way"]](problem.ours)
            with poisoned():
                ours, again = run(problem, function), run(problem, function)
            unlike = differing(ours, again)
            comparison = compared(problem, spoiled(ours, self.spec["canary"]))
            if not only_few_break(comparison, ours):
                break
        return self._verdict(comparison, unlike, draw + 1)

    def measure(self, turn: int) -> Answer:
        """Nothing: no time is taken."""
        raise NotImplementedError("a check is not measured")

    def _verdict(self, comparison: Comparison, unlike: list[str], draws: int) -> Answer:
        found = [str(one) for one in comparison.errors if not one.ok] + list(comparison.differences)
        found += [f"{name}: two runs differ" for name in unlike]
        if self.spec["canary"]:
            found = [] if found else ["a spoiled result was let through"]
        worst = comparison.errors[0]
        return {"ok": not found, "problems": found, "worst": worst.name, "excess": worst.excess, "draws": draws}


def only_few_break(comparison: Comparison, step: Step) -> bool:
    """Whether the rule is broken, but by tensors of few numbers only."""
    broken, size = [one.name for one in comparison.errors if not one.ok], sizes(step)
    return bool(broken) and not comparison.differences and all(size[name] < FEW for name in broken)


def spoiled(step: Step, kind: str) -> Step:
    """The step with a "result" of which one in 64 numbers is 0, or a first "gradient" that is 3% too large."""
    if kind == "result":
        first = step.outputs["0"]
        numbers = first.flatten().clone()
        numbers[::64] = 0
        return dataclasses.replace(step, outputs={**step.outputs, "0": numbers.reshape(first.shape)})
    if kind == "gradient":
        name, one = next((name, one) for name, one in step.gradients.items() if one is not None)
        return dataclasses.replace(step, gradients={**step.gradients, name: one * 1.03})
    return step


class poisoned:
    """Within, `torch.empty` gives NaN on CUDA, and the largest integers, so that what is not written shows."""

    def __enter__(self) -> None:
        torch.use_deterministic_algorithms(True, warn_only=True)

    def __exit__(self, *reason: object) -> None:
        torch.use_deterministic_algorithms(False)
