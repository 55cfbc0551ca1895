"""Mixed precision: fxopt's explicit casts against autocast, in time, memory, casts and error.

    python bench/precision.py                        all five parts
    python bench/precision.py --part time --quick    two turns: to see that it works, not to quote

time    a step of the 4-layer Llama of cases.py: fxopt with precision="bf16", Inductor under autocast, Inductor in fp32;
        a process each, which take turns. Ratios are medians over turns of the ratio within a turn.
casts   nodes and bytes of floating casts in the joint graph that the partitioner gets, autocast's and fxopt's.
errors  loss and gradients against fp64, Inductor under autocast and fxopt, over seeds of weights and tokens: gradients
        by geometric mean; losses, which are one number each, by root mean square over more seeds, forward only. A ratio
        misses its target where all of its 95 % interval does.
readers the gradient of one activation that many products read: its error by how many there are, against autocast's.
curve   the demo's model, 200 steps, three seeds of its weights: losses in fp32 under Inductor and in bf16 under fxopt.

With --json a part is measured alone where the others are there already; each is kept with its own machine and commit.
"""

import argparse
import copy
import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from backends import compile_as
from measure import ROOT, Worker, alternate, begin, median_ratio, write_json
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy.stats import bootstrap
from small_models import MODELS, build
from torch import Tensor, fx, nn

import fxopt
from fxopt import backend as pipeline
from fxopt import compat
from fxopt.testing import Step, step, truth
from fxopt.testing.exact import Widen

CASE = "llama-4L"
OURS, AUTOCAST, FP32 = "fxopt+bf16", "inductor+autocast", "inductor"
PARTS = ("time", "casts", "errors", "readers", "curve")
TARGETS = {  # what it must reach: measure, against what, at most
    "time against autocast": 0.95,
    "memory against autocast": 0.75,
    "time against fp32": 0.65,
    "error against autocast": 1.00,
}
autocast = partial(torch.autocast, "cpu", torch.bfloat16)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options; `--quick` lowers counts."""
    about = (__doc__ or "").split("\n\n")
    parser = argparse.ArgumentParser(
        description=about[0], epilog="\n\n".join(about[1:]), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", action="append", choices=PARTS, help="a part, repeatable (default: all)")
    parser.add_argument("--rounds", type=int, default=9, help="turns a backend gets (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=8, help="seeds of the errors (default: %(default)s)")
    parser.add_argument("--losses", type=int, default=64, help="seeds of the losses' errors (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="steps of the curve (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="few turns, seeds and steps: a check of the script")
    parser.add_argument("--json", type=Path, help="also write the raw numbers to this file")
    options = parser.parse_args(arguments)
    options.part = options.part or list(PARTS)
    if options.quick:
        options.rounds, options.seeds, options.losses, options.steps = 2, 1, 2, 10
    return options


# --- time and memory ---------------------------------------------------------------------------------------------


def measure_time(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Samples of step ms and peak MiB by backend, and their ratios."""
    backends = [FP32, AUTOCAST, OURS]
    samples: dict[str, dict[str, list[float]]] = {name: {"step": [], "memory": []} for name in backends}
    with ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(CASE, name)) for name in backends}
        for name, worker in workers.items():
            with console.status(f"first step of {name}"):
                worker.ask("compile")
        for turn in track(range(options.rounds), "turns", console=console, transient=True):
            for name in alternate(backends, turn):
                samples[name]["step"].append(1000 * statistics.mean(workers[name].ask("steps", 2)))
        for turn in range(min(options.rounds, 3)):
            for name in alternate(backends, turn):
                samples[name]["memory"].append(workers[name].ask("memory"))
    ours, amp, wide = samples[OURS], samples[AUTOCAST], samples[FP32]
    ratios = {
        "time against autocast": median_ratio(ours["step"], amp["step"]),
        "memory against autocast": median_ratio(ours["memory"], amp["memory"]),
        "time against fp32": median_ratio(ours["step"], wide["step"]),
        "memory against fp32": median_ratio(ours["memory"], wide["memory"]),
    }
    return {"samples": samples, "ratios": ratios}


def show_time(found: dict[str, Any], console: Console) -> None:
    table = Table(title="4-layer Llama, hidden 256, vocabulary 32,000, 4 x 512: forward + backward")
    for heading in ("backend", "step ms", "peak MiB"):
        table.add_column(heading, justify="left" if heading == "backend" else "right")
    for name, samples in found["samples"].items():
        table.add_row(name, *(f"{statistics.median(samples[key]):.0f}" for key in ("step", "memory")))
    console.print(table)
    for name, ratio in found["ratios"].items():
        console.print(f"{name}: {ratio:.2f}x", highlight=False)


# --- casts -------------------------------------------------------------------------------------------------------


@dataclass
class Casts:
    """Casts from one floating dtype to another: nodes, and bytes written."""

    nodes: int = 0
    bytes: int = 0

    def add(self, joint: fx.GraphModule) -> None:
        for node in joint.graph.nodes:
            after = node.meta.get("val")
            source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
            before = None if source is None else source.meta.get("val")
            if "_to_copy" not in str(node.target) or not isinstance(before, torch.Tensor):
                continue
            if before.is_floating_point() and after.is_floating_point() and after.dtype != before.dtype:
                self.nodes += 1
                self.bytes += after.numel() * after.itemsize


def joint_casts(model: nn.Module, inputs: dict[str, Any], options: dict[str, Any] | None) -> Casts:
    """Those in the joint graphs of one step: under autocast where `options` is None, else as fxopt makes them."""
    found = Casts()
    eager = compat.aot_backend(found.add)

    def ours(gm: fx.GraphModule, given: Sequence[Any]) -> Callable[..., Any]:
        return pipeline.run(gm, given, fxopt.Options.parse(options), eager)[1]

    torch.compiler.reset()
    with autocast(enabled=options is None):
        loss = torch.compile(model, backend=eager if options is None else ours)(**inputs).loss
    loss.backward()
    torch.compiler.reset()
    return found


def measure_casts(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Casts by model, autocast's and fxopt's."""
    found = {}
    for name in track(MODELS, "casts", console=console, transient=True):
        model, inputs = build(name)
        ours = joint_casts(copy.deepcopy(model), inputs, {"precision": "bf16"})
        found[name] = {"autocast": asdict(joint_casts(model, inputs, None)), "fxopt": asdict(ours)}
    return found


def show_casts(found: dict[str, Any], console: Console) -> None:
    table = Table(title="casts between floating dtypes in the joint graph")
    for heading in ("model", "autocast", "fxopt", "autocast MiB", "fxopt MiB"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for name, one in found.items():
        both = one["autocast"], one["fxopt"]
        table.add_row(name, *(str(x["nodes"]) for x in both), *(f"{x['bytes'] / 2**20:.1f}" for x in both))
    console.print(table)


# --- errors ------------------------------------------------------------------------------------------------------


def gradient_error(found: Step, exact: Step) -> float:
    """||gradients - exact|| / ||exact|| over all parameters together."""
    off = whole = 0.0
    for name, right in exact.gradients.items():
        ours = found.gradients[name]
        if right is not None and ours is not None:
            off, whole = off + float((ours.double() - right).square().sum()), whole + float(right.square().sum())
    return math.sqrt(off / whole)


def loss_error(found: Tensor, exact: Tensor) -> float:
    return float(abs(found - exact) / abs(exact))


class Subject:
    """A model under a backend, compiled once, whose weights change."""

    def __init__(self, name: str, backend: str):
        self.model, _ = build(name)
        self.call = compile_as(self.model, backend)

    def errors(self, weights: nn.Module, inputs: dict[str, Any], exact: Step | Tensor) -> dict[str, float]:
        """Of the loss and, where `exact` is a whole step, of all gradients together, with the weights of `weights`."""
        self.model.load_state_dict(weights.state_dict())
        if isinstance(exact, Tensor):
            return {"loss": loss_error(self.call(**inputs).loss.detach(), exact)}
        found = step(self.call, inputs, parameters=self.model)
        return {"gradients": gradient_error(found, exact), "loss": loss_error(found.loss, exact.loss)}


def true_loss(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """The loss in fp64; `fxopt.testing.truth` without the backward."""
    with Widen(), torch.no_grad():
        found: Tensor = copy.deepcopy(model).double()(**inputs).loss
    return found


def measure_errors(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """By model and backend, the errors over seeds of weights and tokens: of whole steps, and then of losses alone."""
    found: dict[str, Any] = {}
    for name in track(MODELS, "errors", console=console, transient=True):
        torch.compiler.reset()
        subjects = {"autocast": Subject(name, AUTOCAST), "fxopt": Subject(name, OURS)}
        found[name] = {who: [] for who in subjects}
        for seed in range(max(options.seeds, options.losses)):
            model, inputs = build(name, seed)
            exact = truth(model, inputs) if seed < options.seeds else true_loss(model, inputs)
            for who, subject in subjects.items():
                found[name][who].append(subject.errors(model, inputs, exact))
    return found


def mean_error(errors: Sequence[dict[str, float]], what: str) -> float:
    """Gradients: geometric mean. Loss: root mean square, since one loss may be right by luck."""
    values = [error[what] for error in errors if what in error]
    if what == "loss":
        return math.sqrt(statistics.fmean(value * value for value in values))
    return statistics.geometric_mean(values)


@dataclass(frozen=True)
class Ratio:
    """fxopt's mean error over autocast's, and where it would lie in 95 of 100 repetitions with other seeds."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f}x, {self.low:.2f} to {self.high:.2f}"


def error_ratio(one: dict[str, list[dict[str, float]]], what: str) -> Ratio:
    """Of the errors of a model: seeds are drawn anew, with what both made of them (bootstrap, 95 %)."""
    pairs = [
        (ours, base) for ours, base in zip(one["fxopt"], one["autocast"], strict=True) if what in ours and what in base
    ]

    def ratio(which: Sequence[int]) -> float:
        ours, base = ([pairs[at][side] for at in which] for side in (0, 1))
        return mean_error(ours, what) / mean_error(base, what)

    value, every = ratio(range(len(pairs))), range(len(pairs))
    if len(pairs) < 2:
        return Ratio(value, value, value)
    spread = bootstrap((every,), ratio, vectorized=False, n_resamples=2000, method="percentile", rng=0)
    return Ratio(value, *map(float, spread.confidence_interval))


def error_cells(one: dict[str, list[dict[str, float]]]) -> list[str]:
    """A model's row of the table: of gradients and of the loss autocast's error and fxopt's."""
    cells = []
    for what in ("gradients", "loss"):
        base, ours = (mean_error(one[who], what) for who in ("autocast", "fxopt"))
        cells += [f"{base:.2e}", f"{ours:.2e} ({error_ratio(one, what)})"]
    return cells


def show_errors(found: dict[str, Any], console: Console) -> None:
    table = Table(title="error against fp64, relative; fxopt as a multiple of Inductor's under autocast")
    for heading in ("model", "gradients, autocast", "fxopt", "loss, autocast", "fxopt"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for name, one in found.items():
        table.add_row(name, *error_cells(one))
    console.print(table)


# --- curve -------------------------------------------------------------------------------------------------------


def measure_curve(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Losses by backend and seed of the demo's model on the demo's text."""
    sys.path.insert(0, str(ROOT / "examples"))
    from corpus import batches, prepare
    from train_llama import BATCH, CACHE, LENGTH, VOCAB, make_model

    with console.status("tokens of Python's standard library"):
        tokens = prepare(CACHE, VOCAB, options.steps * BATCH * LENGTH)
    found: dict[str, list[list[float]]] = {FP32: [], OURS: []}
    for seed in range(1 if options.quick else 3):
        for name, curves in found.items():
            torch.compiler.reset()
            model = make_model(4, seed)
            run, losses = compile_as(model, name), list[float]()
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
            data = batches(tokens, BATCH, LENGTH)
            for batch in track(list(data), f"{name}, seed {seed}", console=console, transient=True):
                loss = run(input_ids=batch, labels=batch).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
            curves.append(losses)
    return found


def curve_summary(found: dict[str, list[list[float]]]) -> dict[str, float]:
    """Over the last half of the steps, means: how far bf16 is from fp32 of its seed, and fp32 of a seed from another's;
    and the most of both, which with three seeds say little."""
    half = len(found[FP32][0]) // 2
    late = {name: [torch.tensor(curve[half:]) for curve in curves] for name, curves in found.items()}
    apart = [float((ours - wide).abs().mean()) for ours, wide in zip(late[OURS], late[FP32], strict=True)]
    pairs = [(a, b) for at, a in enumerate(late[FP32]) for b in late[FP32][:at]]
    spread = [float((a - b).abs().mean()) for a, b in pairs] or [math.nan]
    return {
        "bf16 from fp32": statistics.mean(apart),
        "fp32 between seeds": statistics.mean(spread),
        "bf16 from fp32, the most": max(apart),
        "fp32 between seeds, the most": max(spread),
    }


def show_curve(found: dict[str, Any], console: Console) -> None:
    for name, value in curve_summary(found).items():
        console.print(f"mean difference of losses, {name}: {value:.4f}", highlight=False)


# --- readers -----------------------------------------------------------------------------------------------------


class Readers(nn.Module):
    """`count` products that all read one activation, which is made of the parameter x."""

    def __init__(self, count: int, width: int = 64):
        super().__init__()
        self.x = nn.Parameter(torch.randn(32, width))
        self.weights = nn.Parameter(torch.randn(count, width, width) / 8)

    def forward(self) -> Tensor:
        """Return a scalar."""
        shared = torch.tanh(self.x)
        return torch.stack([torch.tanh(nn.functional.linear(shared, one)).sum() for one in self.weights]).sum()


def measure_readers(options: argparse.Namespace, console: Console) -> dict[str, list[float]]:
    """By number of readers, the error of the gradient of x over autocast's, a ratio a seed."""
    found: dict[str, list[float]] = {}
    for count in track((1, 3, 8, 32), "readers", console=console, transient=True):
        for seed in range(1 if options.quick else 3):
            torch.manual_seed(seed)
            model = Readers(count)
            exact = x_gradient(copy.deepcopy(model).double(), "eager").double()
            ours, amp = (float((x_gradient(model, name).double() - exact).norm()) for name in (OURS, AUTOCAST))
            found.setdefault(str(count), []).append(ours / amp)
    return found


def x_gradient(model: Readers, backend: str) -> Tensor:
    torch.compiler.reset()
    model.zero_grad()
    compile_as(model, backend)().backward()
    assert model.x.grad is not None
    return model.x.grad


def show_readers(found: dict[str, list[float]], console: Console) -> None:
    for count, ratios in found.items():
        console.print(f"{count} readers: {statistics.mean(ratios):.2f}x autocast's error", highlight=False)


# --- all of it ---------------------------------------------------------------------------------------------------

MEASURES = {
    "time": measure_time, "casts": measure_casts, "errors": measure_errors, "readers": measure_readers,
    "curve": measure_curve,
}  # fmt: skip
SHOW = {
    "time": show_time, "casts": show_casts, "errors": show_errors, "readers": show_readers, "curve": show_curve
}  # fmt: skip


def measured_before(path: Path | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The parts that `path` holds already, and the machine of each."""
    if path is None or not path.exists():
        return {}, {}
    found: dict[str, Any] = json.loads(path.read_text())
    there = {part: found[part] for part in PARTS if part in found}
    return there, {part: found.get("machines", {}).get(part, found["machine"]) for part in there}


def problems(results: dict[str, Any]) -> list[str]:
    """What misses its target, a sentence each."""
    wrong = []
    for name, ratio in results.get("time", {}).get("ratios", {}).items():
        if name in TARGETS and ratio > TARGETS[name]:
            wrong.append(f"{name} is {ratio:.2f}x, target {TARGETS[name]:.2f}x")
    for name, one in results.get("casts", {}).items():
        for what in ("nodes", "bytes"):
            if one["fxopt"][what] >= one["autocast"][what]:
                wrong.append(f"{name}: {one['fxopt'][what]} cast {what}, autocast has {one['autocast'][what]}")
    for name, one in results.get("errors", {}).items():
        for what in ("gradients", "loss"):
            ratio = error_ratio(one, what)
            if ratio.low > TARGETS["error against autocast"]:
                wrong.append(f"{name}: error of {what} is {ratio} autocast's")
    if "curve" in results:
        apart, spread, *_ = curve_summary(results["curve"]).values()
        if apart > spread:
            wrong.append(f"curve: bf16 is {apart:.4f} from fp32, seeds only {spread:.4f}")
    return wrong


def main() -> int:
    """Measure, print, write; return 1 where a target is missed."""
    options = parse()
    console = Console(width=None if sys.stdout.isatty() else 120)
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        console.print("this processor has no bf16 products: time says nothing about one that has", style="red")
    machine = begin(console, options.quick)
    results, machines = measured_before(options.json)
    for part in options.part:
        results[part], machines[part] = MEASURES[part](options, console), machine
        SHOW[part](results[part], console)
        if options.json:
            write_json(options.json, machine, {"machines": machines, **results})
    wrong = problems({part: results[part] for part in options.part})
    for sentence in wrong:
        console.print(sentence, style="red", highlight=False, soft_wrap=True)
    return 1 if wrong and not options.quick else 0


if __name__ == "__main__":
    sys.exit(main())
