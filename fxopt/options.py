"""The options of ``torch.compile(..., backend="fxopt", options={...})``: parsed once, at the edge."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from fxopt import compat
from fxopt.errors import OptionError, nearest
from fxopt.kernels.cards import TARGETS, Card
from fxopt.kernels.interpreter import interpreting
from fxopt.memory.request import (
    Budget,
    Infeasibility,
    Request,
    parse_accumulation,
    parse_budget,
    parse_infeasible,
    parse_offload,
    parse_optimizer,
)
from fxopt.ops.launch import LOWERINGS, Lowering
from fxopt.precision.policy import Policy
from fxopt.rule import Rule

Logits = Literal["deferred", "eager"]
Choosing = Literal["measure", "tune", "never"]


@dataclasses.dataclass(frozen=True)
class Options:
    """Every choice a user can make; part of every cache key.

    logits:   "deferred" returns logits that are computed when first read (training steps that never read them
              never hold them); "eager" computes them in the graph, and then their loss is not fused.
    rules:    changes to the rule set: "-name" removes a rule, a `Rule` object adds one (after the built-in ones).
              A plain "name" asks for that built-in rule, which is on already, and is only checked for spelling.
    force:    rule names whose *cost* objections are ignored ("Inductor does this as well"); objections of
              correctness never are.
    verify:   also compare every rewritten graph with the original in fp64, on the first inputs.
    dump:     directory for one runnable Python file a stage, and for each generated kernel, with the line of the model
              that its statements come from; ``FXOPT_DUMP`` sets the default.
    cards:    architectures ("sm_86") for which a dump compiles the kernels of the sites, without the card and once a
              machine, to say in the report what registers and memory each takes; on a CPU those that a card would run.
    kernels:  how fxopt's operators are computed: "auto" by generated Triton kernels on CUDA and by ATen elsewhere,
              "aten" by ATen everywhere, "interpret" by the Triton kernels under Triton's interpreter, on a CPU and very
              slowly (``TRITON_INTERPRET=1`` must be set before Python starts).
    precision: None leaves every dtype as it is. "bf16" or "fp16" computes products in 16 bits and sums, norms, softmax
              and losses in fp32, by explicit casts; ambient autocast is replaced. A dict says more: {"compute": "bf16",
              "residual": "fp32", "keep_fp32": ["lm_head", "*.router"], "ops": {"aten.silu": "fp32"}}
              (`fxopt.precision.policy`, docs/precision.md).
    choose:   "measure" times, at each site on CUDA and once for each kind of site on a machine, fxopt's kernel, torch's
              own and Inductor's code, and takes the best; "tune" measures every configuration of fxopt's kernels
              before that, which takes minutes the first time; "never" takes fxopt's wherever nothing is objected.
              Nothing is measured on other devices, nor for rules in `force`. A memory plan times products on any
              device, or with "never" models them.
    memory_budget: what a step may take of the device, parameters and optimizer included: bytes, "12GiB", "80%" of the
              card, or "auto", what is free now. A step that cannot be held to it is a `BudgetError` before the first.
              None plans nothing: torch decides what is kept for the backward (docs/memory.md).
    optimizer: whose state the budget has to hold: "adamw", "adamw8bit", "sgd", "sgd_momentum", or bytes a trained
              parameter. None looks for the optimizers of this process, and counts "adamw" where there is none.
    accumulation: whether gradients of earlier batches are held during a step.
    offload:  whether values may wait for the backward in the host's memory: False, True (the link's rate is the
              card's), or GB/s. There is nothing to offload to on a CPU and on cards that share the host's memory.
    infeasible: "error", or "minimum" to train with the lowest peak there is where no plan fits the budget.
    inductor: ``torch._inductor.config`` entries for this compilation, as ``torch.compile`` takes them.
    """

    logits: Logits = "deferred"
    rules: tuple[Any, ...] = ()
    force: tuple[str, ...] = ()
    verify: bool = False
    dump: Path | None = None
    cards: tuple[Card, ...] = ()
    kernels: Lowering = "auto"
    precision: Policy | None = None
    choose: Choosing = "measure"
    memory_budget: Budget | None = None
    optimizer: str | float | None = None
    accumulation: bool = False
    offload: bool | float = False
    infeasible: Infeasibility = "error"
    inductor: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def parse(cls, given: Mapping[str, Any] | Options | None) -> Options:
        """Return `given` as `Options`. Raises `OptionError` for an unknown key or a bad value."""
        if isinstance(given, Options):
            return given
        values = dict(given or {})
        names = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in names:
                raise OptionError(f"fxopt has no option {key!r}{nearest(key, names)}. Options: {', '.join(names)}.")
        if "dump" not in values and os.environ.get("FXOPT_DUMP"):
            values["dump"] = os.environ["FXOPT_DUMP"]
        found: dict[str, Any] = {key: _PARSERS[key](values[key]) for key in names if key in values}
        parsed = cls(**found)
        if parsed.cards and parsed.dump is None:
            raise OptionError("option cards is for the kernels of a dump: set dump to a directory, too.")
        known = [rule.name for rule in parsed.active_rules()]
        for name in parsed.force:
            if name not in known:
                raise OptionError(
                    f"option force: no rule {name!r}{nearest(str(name), known)}. Rules: {', '.join(known)}."
                )
        return parsed

    @property
    def memory(self) -> Request | None:
        """What is asked of the memory plan; None: nothing."""
        if self.memory_budget is None:
            return None
        measure = self.choose != "never"
        return Request(self.memory_budget, self.optimizer, self.accumulation, self.offload, self.infeasible, measure)

    def cache_key(self) -> str:
        """What these options and the rules' versions add to the keys of torch's caches."""
        rules = " ".join(f"{rule.name}={rule.version}" for rule in self.active_rules())
        computed = f"kernels={self.kernels} choose={self.choose} precision={self.precision!r}"
        return f"{rules} force={sorted(self.force)} logits={self.logits} {computed}"

    def active_rules(self) -> list[Rule]:
        """The rules these options leave in force, in the order they run."""
        from fxopt.passes import RULES

        removed = {item.removeprefix("-") for item in self.rules if isinstance(item, str) and item.startswith("-")}
        added = [item for item in self.rules if not isinstance(item, str)]
        return [rule for rule in (*RULES, *added) if rule.name not in removed]


def _one_of(name: str, choices: Sequence[str], value: Any) -> Any:
    if value not in choices:
        raise OptionError(f"option {name}={value!r}{nearest(value, list(choices))} is not one of {list(choices)}.")
    return value


def _logits(value: Any) -> Logits:
    return _one_of("logits", get_args(Logits), value)


def _kernels(value: Any) -> Lowering:
    if value == "interpret" and not interpreting():
        raise OptionError(
            'option kernels="interpret" runs kernels under Triton\'s interpreter, and triton was imported without it: '
            "set TRITON_INTERPRET=1 in the environment before Python starts."
        )
    return _one_of("kernels", LOWERINGS, value)


def _choose(value: Any) -> Choosing:
    return _one_of("choose", get_args(Choosing), value)


def _bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise OptionError(f"option verify={value!r} must be True or False.")
    return value


def _sequence(name: str, value: Any) -> tuple[Any, ...]:
    if isinstance(value, str) or not isinstance(value, list | tuple | set | frozenset):
        raise OptionError(f"option {name}={value!r} must be a list, for example {name}=[{value!r}].")
    return tuple(value)


def _rules(value: Any) -> tuple[Any, ...]:
    from fxopt.passes import RULES

    known = [rule.name for rule in RULES]
    for item in _sequence("rules", value):
        if isinstance(item, str):
            if item.removeprefix("-") not in known:
                near = nearest(item.removeprefix("-"), known)
                raise OptionError(f"option rules: no rule {item!r}{near}. Rules: {', '.join(known)}.")
        elif not isinstance(item, Rule):
            raise OptionError(f"option rules: {item!r} is neither a rule name nor an fxopt.Rule.")
    return tuple(value)


def _force(value: Any) -> tuple[str, ...]:
    return _sequence("force", value)


def _dump(value: Any) -> Path | None:
    if value is None:
        return None
    if not isinstance(value, str | os.PathLike):
        raise OptionError(f"option dump={value!r} must be a directory path.")
    path = Path(value).expanduser()
    if path.exists() and not path.is_dir():
        raise OptionError(f"option dump={str(path)!r} exists and is not a directory.")
    return path


def _cards(value: Any) -> tuple[Card, ...]:
    if interpreting():
        raise OptionError(
            "option cards compiles kernels, and TRITON_INTERPRET=1 is set: unset it before Python starts."
        )
    known = {card.name: card for card in TARGETS}
    return tuple(known[_one_of("cards", list(known), name)] for name in dict.fromkeys(_sequence("cards", value)))


def _inductor(value: Any) -> tuple[tuple[str, Any], ...]:
    if not isinstance(value, Mapping):
        raise OptionError(f"option inductor={value!r} must be a dict of torch._inductor.config entries.")
    known = compat.inductor_option_names()
    for key in value:
        if key.replace("-", "_") not in known:
            raise OptionError(f"option inductor: torch._inductor.config has no {key!r}{nearest(key, known)}.")
    return tuple(value.items())


_PARSERS = {
    "logits": _logits,
    "rules": _rules,
    "force": _force,
    "verify": _bool,
    "dump": _dump,
    "cards": _cards,
    "kernels": _kernels,
    "precision": Policy.parse,
    "choose": _choose,
    "memory_budget": parse_budget,
    "optimizer": parse_optimizer,
    "accumulation": parse_accumulation,
    "offload": parse_offload,
    "infeasible": parse_infeasible,
    "inductor": _inductor,
}
