"""What a fuzz case is: a random module, the options of fxopt, and how it is run; and how one is drawn."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

from fxopt.kernels.interpreter import interpreting
from fxopt.passes import RULES
from fxopt.rule import Draw
from fxopt.testing.random_modules import ModuleSpec, draw_module

__all__ = ["HOW", "OPTIONS", "Trial", "draw_options", "draw_trial", "judgeable", "together"]

NAMES = tuple(rule.name for rule in RULES)
OPTIONS: dict[str, tuple[Any, ...]] = {
    "precision": (None, None, None, "bf16"),
    "logits": ("deferred", "eager"),
    "rules": ([], [], *([f"-{name}"] for name in NAMES), [f"-{name}" for name in NAMES]),
    "force": ([], list(NAMES), *([name] for name in NAMES)),
    "verify": (False, True),
    "kernels": ("auto", "aten"),
}
"""Every option with what it is drawn from, the default first. ``kernels="interpret"`` joins where Triton interprets."""

HOW: dict[str, tuple[Any, ...]] = {
    "compiler": ("graph", "aot", "planned", "inductor", "inductor planned"),
    "dynamic": (None, True),
    "autocast": (False, True),
    "grad": (True, False),
    "read": (False, True),
    "resized": (False, True),
}
"""How a case is run.

compiler: what stands at the pipeline's end; "planned": the two halves of the plan with the lowest peak there is.
read:     whether the loss reads the other outputs.
resized:  whether a second call of other sizes follows.
"""

_UNCOMPILED = (*["graph"] * 14, "aot", "planned")


@dataclasses.dataclass(frozen=True)
class Trial:
    """A module, the options of fxopt, and how it is run: a choice for each key of `OPTIONS` and of `HOW`."""

    spec: ModuleSpec
    options: Mapping[str, Any]
    how: Mapping[str, Any]

    def key(self) -> str:
        """The case as JSON, equal for equal cases."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Trial:
        """The case of which `key` gave `text`. Raises ValueError or KeyError for text that is none."""
        data = json.loads(text)
        return cls(ModuleSpec.from_json(data["spec"]), data["options"], data["how"])

    def smaller(self) -> Iterator[Trial]:
        """Cases that are a step simpler: plainer options, a plainer way to run, a simpler module."""
        for name, choices in OPTIONS.items():
            if self.options[name] != choices[0]:
                yield dataclasses.replace(self, options={**self.options, name: choices[0]})
        for name, choices in HOW.items():
            if self.how[name] != choices[0]:
                yield dataclasses.replace(self, how={**self.how, name: choices[0]})
        for spec in self.spec.smaller():
            yield dataclasses.replace(self, spec=spec)


def draw_trial(draw: Draw, inductor: float = 0.0) -> Trial:
    """A case that can be judged. inductor: the share of cases that Inductor compiles, which take a second or more."""
    while True:
        how = {name: draw.choice(choices[0], choices[0], *choices) for name, choices in HOW.items()}
        by_inductor = draw.size(0, 999) < 1000 * inductor
        how["compiler"] = draw.choice(*(("inductor", "inductor planned") if by_inductor else _UNCOMPILED))
        trial = Trial(draw_module(draw), draw_options(draw), how)
        if judgeable(trial):
            return trial


def draw_options(draw: Draw) -> dict[str, Any]:
    """Options of fxopt, each on and off."""
    options = {name: draw.choice(*choices) for name, choices in OPTIONS.items()}
    options["force"] = [name for name in options["force"] if f"-{name}" not in options["rules"]]
    if interpreting():
        options["kernels"] = draw.choice("auto", "interpret")
    return options


def together(trial: Trial, draw: Draw, count: int) -> list[Trial]:
    """`trial` and others that Dynamo sees alike: other options, and outputs read or not. One, where it is compiled."""
    found = [trial]
    if trial.how["compiler"] != "graph" or trial.spec.draws:
        return found
    for _ in range(count - 1):
        how = {**trial.how, "read": draw.choice(*HOW["read"])}
        other = dataclasses.replace(trial, options=draw_options(draw), how=how)
        if judgeable(other) and other not in found:
            found.append(other)
    return found


def judgeable(trial: Trial) -> bool:
    """Whether something can be said of the case: of random numbers only where differences are derivatives."""
    spec, how = trial.spec, trial.how
    if spec.setting["dtype"] == "float64" and (trial.options["precision"] or how["autocast"]):
        return False  # both leave fp64 alone, or half of it
    if how["autocast"] and trial.options["precision"]:
        return False
    if not spec.draws:
        return True
    plain = spec.setting["dtype"] == "float64" and spec.setting["labels"] != "all ignored" and how["grad"]
    masks = {part.params.get("mask") for part in spec.parts}
    stops = any(part.kind in ("stop", "write") for part in spec.parts) or "by the scores" in masks
    return plain and not stops and not how["resized"] and spec.setting["batch"] > 0
