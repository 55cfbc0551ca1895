"""``fxopt plan``: what a training step needs of a device, and how it would be planned, without the device."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from fxopt.commands import UsageError, console, models, options
from fxopt.commands.explain import failure, said
from fxopt.errors import BudgetError, OptionError
from fxopt.memory import fit, picture, summary
from fxopt.memory.plan import Plan, Trace
from fxopt.memory.rates import DEVICES, Device, device_named
from fxopt.memory.request import Request, parse_budget, parse_optimizer
from fxopt.memory.resident import OPTIMIZERS
from fxopt.memory.units import show_bytes
from fxopt.options import Options
from fxopt.report import Report

__all__ = ["add_to"]

HELP = "say what memory a training step needs, and how it would be planned, without a GPU"
DESCRIPTION = """\
Traces a training step on tensors without data, and plans it for a budget and a device that need not be there: what is
kept for the backward, what is made again, and what that costs.

exit code: 1 if no plan fits, or the model cannot be traced; 2 for a mistake in the arguments."""
EXAMPLES = """\
examples:
  fxopt plan --config llama --hidden 2048 --layers 16 --heads 32 --dtype bf16 --batch 4 --seq 4096 --device rtx4090
  fxopt plan --config llama --hidden 2048 --layers 16 --batch 4 --budget 24GiB --device rtx4090 --png step.png
  fxopt plan train.py:make --fake --budget 80% --device h100 --optimizer adamw8bit --accumulation
  fxopt plan --config llama --hidden 2048 --layers 16 --seq 4096 --device rtx4090 --fit batch
"""
MODEL_ERROR = "in small models from -20% to +25% of what the replayed code takes besides what is resident"
SEQ_STEP = 64
"""Tokens between the lengths that ``--fit seq`` tries."""


def add_to(subparsers: Any) -> None:
    """Add the command to argparse's subparsers."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = subparsers.add_parser("plan", help=HELP, description=DESCRIPTION, epilog=EXAMPLES, formatter_class=raw)
    models.add_flags(parser)
    options.add_flags(parser)
    group = parser.add_argument_group("the step")
    group.add_argument("--device", default="cpu", metavar="NAME", help=f"{', '.join(DEVICES)} (default: cpu)")
    group.add_argument("--budget", metavar="SIZE", help='"24GiB", or "80%%" of the card (default: all of it)')
    group.add_argument("--optimizer", default="adamw", help=f"{', '.join(OPTIMIZERS)}, or bytes a parameter")
    group.add_argument("--accumulation", action="store_true", help="gradients of earlier batches are held")
    group.add_argument("--offload", action="store_true", help="values may wait in the host's memory")
    group.add_argument("--fit", choices=("batch", "seq"), help="find the largest that fits")
    group.add_argument("--lower", action="store_true", help="lower each plan with Inductor, for exact peaks; slow")
    parser.add_argument("--png", metavar="PATH", help="write a picture of the step's memory")
    parser.add_argument("--json", action="store_true", help="print the plans as JSON, and no table")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """What the arguments say. Raises UsageError."""
    step = _step(arguments)
    outcome = _fitted(step) if arguments.fit else step.outcome()
    if outcome.error is not None:
        print(f"fxopt: {outcome.error}", file=sys.stderr)
    if arguments.json:
        print(json.dumps(_as_json(outcome, step), indent=1))
    elif outcome.plans:
        _show(outcome, step)
    if arguments.png and outcome.plans:
        _draw(outcome.plans, Path(arguments.png), step.title)
    return 0 if outcome.plans else 1


@dataclasses.dataclass(frozen=True)
class _Outcome:
    """Of one trace: the plan of each graph with a backward, and the smallest budget in bytes; or why there is none.

    fit: what was searched for, where something was.
    """

    plans: list[Plan]
    minimum: int
    error: str | None = None
    fit: fit.Fit | None = None


@dataclasses.dataclass(frozen=True)
class _Step:
    """What is asked for, checked."""

    arguments: argparse.Namespace
    options: Options
    request: Request
    device: Device
    budget: int

    @property
    def title(self) -> str:
        """The step in a few words."""
        given = self.arguments
        size = f", {given.batch} x {given.seq}" if given.target is None else ""
        return f"{given.target or given.config}{size} on {self.device.name}"

    def shown(self, size: int) -> int:
        """A size as a user would give it."""
        return size * (SEQ_STEP if self.arguments.fit == "seq" else 1)

    def at(self, size: int) -> _Outcome:
        """The outcome with the batch or sequence that is fitted."""
        setattr(self.arguments, self.arguments.fit, self.shown(size))
        return self.outcome()

    def outcome(self) -> _Outcome:
        """Trace and plan."""
        from fxopt.outlook import Cut, Modelled, Planner, outlook  # it loads Inductor

        found = Planner(self.request, self.budget)
        subject = models.subject(self.arguments)
        args, kwargs = subject.arguments
        kind = Cut if self.arguments.lower else Modelled
        try:
            report = outlook(subject.model, args, kwargs, self.options, self.device, found, kind)
        except BudgetError as error:
            return _Outcome([], error.minimum, said(error))
        except OptionError as error:
            raise UsageError(said(error)) from error
        except Exception as error:
            return _Outcome([], 0, f"the model failed while it was traced, {failure(error)}")
        return _Outcome(report.plans, found.minimum, None if report.plans else _nothing(report))


def _nothing(report: Report) -> str:
    if not report.graphs:
        return "no graph came of the model (TORCH_LOGS=graph_breaks says why)"
    return "nothing is trained: no input of the graph requires a gradient"


def _step(arguments: argparse.Namespace) -> _Step:
    """Raises UsageError."""
    if arguments.lower and arguments.offload:
        raise UsageError("--lower replays code for a CPU, where nothing is offloaded: leave out one of the two")
    if arguments.fit and arguments.target is not None:
        raise UsageError("--fit needs a --config model, whose batch and sequence can be chosen: a file has its own")
    try:
        device = device_named(arguments.device)
        budget = _budget(arguments.budget, device)
        optimizer = parse_optimizer(_number(arguments.optimizer))
        chosen = Options.parse({"memory_budget": budget} | options.given(arguments)).memory
        assert chosen is not None
        request = dataclasses.replace(
            chosen, optimizer=optimizer, accumulation=arguments.accumulation, offload=arguments.offload
        )
        parsed = Options.parse(options.given(arguments))
    except OptionError as error:
        raise UsageError(str(error).replace("option memory_budget", "--budget")) from error
    return _Step(copy.copy(arguments), dataclasses.replace(parsed, memory_budget=None), request, device, budget)


def _number(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


def _budget(text: str | None, device: Device) -> int:
    """Bytes. Raises UsageError and OptionError."""
    if text is None and device.memory:
        return device.memory
    if text is None:
        raise UsageError(f"{device.name} has the host's memory: say --budget 12GiB, or --device {_cards()}")
    found = parse_budget(int(text) if text.isdigit() else text)
    assert found is not None
    if found.bytes is not None:
        return found.bytes
    if found.share is None:
        raise UsageError("--budget auto is what is free on a card now, and none is asked: say --budget 24GiB or 80%")
    if not device.memory:
        raise UsageError(f"--budget {text} is a share of a card, and {device.name} is none: add --device {_cards()}")
    return int(found.share * device.memory)


def _cards() -> str:
    return ", ".join(name for name, device in DEVICES.items() if device.memory)


# --- the largest that fits ---------------------------------------------------------------------------------------


def _fitted(step: _Step) -> _Outcome:
    """The outcome with the largest that fits; each trial is told on stderr. Raises UsageError."""
    which = step.arguments.fit
    start = getattr(step.arguments, which) // (SEQ_STEP if which == "seq" else 1)
    outcomes: dict[int, _Outcome] = {}

    def minimum(size: int) -> int:
        with Console(stderr=True).status(f"fxopt: planning {which} {step.shown(size)}"):
            outcome = outcomes[size] = step.at(size)
        if not outcome.minimum:
            raise UsageError(f"--{which} {step.shown(size)}: {outcome.error}")
        words = "fits" if outcome.minimum <= step.budget else "does not fit"
        print(f"{which} {step.shown(size)} {words}: at least {show_bytes(outcome.minimum)}", file=sys.stderr)
        return outcome.minimum

    found = fit.largest(minimum, step.budget, start)
    if not found.size:
        least = min(size for size, _ in found.trials)
        error = f"not even {which} {step.shown(least)} fits. {outcomes[least].error}"
        return dataclasses.replace(outcomes[least], error=error, fit=found)
    setattr(step.arguments, which, step.shown(found.size))
    return dataclasses.replace(outcomes[found.size], fit=found)


# --- what is shown -----------------------------------------------------------------------------------------------


def _assumed(step: _Step) -> list[str]:
    """What a reader should know of how the numbers came about."""
    found = ["traced as for a CPU: where a rule decides otherwise on a card, so will its memory be"]
    if step.arguments.lower:
        return [*found, "peaks are those of the code that Inductor writes for a CPU, replayed"]
    return [*found, f"peaks are the model's, {MODEL_ERROR} (--lower replays the code)"]


def _verdict(plan: Plan, step: _Step) -> str:
    again = plan.recompute_seconds / plan.step_seconds if plan.step_seconds else 0.0
    cost = f"making values again adds {100 * again:.1f}% to a step" if again else "nothing need be made again"
    largest = f", the largest {step.arguments.fit} that fits" if step.arguments.fit else ""
    return (
        f"{step.title}{largest}: {show_bytes(plan.predicted)} of {show_bytes(plan.budget)}; {cost} "
        f"of {show_seconds(plan.step_seconds)} (modelled)"
    )


def show_seconds(seconds: float) -> str:
    """ "1.24 s" or "35.1 ms"."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.1f} ms"


def _show(outcome: _Outcome, step: _Step) -> None:
    out = console()
    if len(outcome.plans) > 1:
        out.print(f"{len(outcome.plans)} graphs are trained; each is planned by itself, as if the others held nothing")
    for plan in outcome.plans:
        out.print(Text(_verdict(plan, step), style="bold"), soft_wrap=True)
        if plan.default:
            out.print(Text(f"without a plan {show_bytes(plan.default)}; "), end="")
        out.print(f"the smallest budget that would do is {show_bytes(outcome.minimum)}\n")
        out.print(picture.in_text(plan))
        out.print(summary.table_of_parts(plan), summary.table_of_groups(plan))
        for note in [*plan.notes, *_assumed(step)]:
            out.print(Text(f"note: {note}"), soft_wrap=True)


def _as_json(outcome: _Outcome, step: _Step) -> dict[str, Any]:
    """Plans in full, bytes and seconds."""
    plans = [
        dataclasses.asdict(dataclasses.replace(plan, trace=Trace()))
        | {"groups": [dataclasses.asdict(group) for group in summary.groups(plan)]}
        for plan in outcome.plans
    ]
    return {
        "step": step.title, "fits": bool(outcome.plans), "error": outcome.error, "budget": step.budget,
        "minimum": outcome.minimum, "device": dataclasses.asdict(step.device), "assumed": _assumed(step),
        "plans": plans, "fit": None if outcome.fit is None else dataclasses.asdict(outcome.fit) | {
            "of": step.arguments.fit, "largest": step.shown(outcome.fit.size),
        },
    }  # fmt: skip


def _draw(plans: list[Plan], path: Path, title: str) -> None:
    """Raises UsageError."""
    try:
        print(f"wrote {picture.draw(plans, path, title)}", file=sys.stderr)
    except ImportError as error:
        raise UsageError(f"--png draws with matplotlib, which is not installed ({error}): pip install it") from error
    except OSError as error:
        raise UsageError(f"--png {path} cannot be written: {error.strerror or error}") from error
