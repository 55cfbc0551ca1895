"""Rewrite what the README and the pages of docs/ say was measured, from the JSON of the last benchmark runs.

python bench/readme.py           rewrite the text between the markers
python bench/readme.py --check   only say whether it is what the JSON says
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from typing import Any

import explain
import memory
from measure import RESULTS, ROOT, busy_warning, machine_line
from precision import AUTOCAST, FP32, OURS, TARGETS, curve_summary, error_cells

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


def load(name: str) -> dict[str, Any]:
    """Return the result called `name` of the last run on a CPU."""
    result: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return result


def amount(numbers: list[float], digits: int, ratio: float | None, target: float | None) -> str:
    """Return a median, with its ratio to Inductor where there is one, and the target where it is fxopt's."""
    if not numbers:
        return "-"
    text = f"{statistics.median(numbers):,.{digits}f}"
    if ratio is None:
        return text
    return f"{text} ({ratio:.2f}x)" if target is None else f"{text} ({ratio:.2f}x, target {target:.2f}x)"


def step_table(result: dict[str, Any]) -> list[str]:
    """Return the table of steps in Markdown, a line for every case and backend."""
    lines = ["| model | backend | step, ms | peak memory over rest, MiB | compile, s |", "|---|---|--:|--:|--:|"]
    for measured in result["cases"].values():
        for number, (backend, samples) in enumerate(measured["samples"].items()):
            ratio = measured["ratios"].get(backend, {})
            target = measured.get("targets", {}) if backend == "fxopt" else {}
            numbers = [
                amount(samples[name], digits, ratio.get(name), target.get(name))
                for name, digits in (("step", 0), ("memory", 0), ("compile", 1))
            ]
            lines.append(f"| {measured['about'] if number == 0 else ''} | {backend} | {' | '.join(numbers)} |")
    return lines


def share_line(result: dict[str, Any]) -> str:
    """Return the shares of compile time in a sentence."""
    shares = [
        f"{statistics.median(one['share'] for one in samples):.1%} at {layers} layers"
        for layers, samples in result["layers"].items()
    ]
    commit = result["machine"]["commit"][:10]
    return f"fxopt's own stages take {', '.join(shares)} of compile time (commit {commit})."


def measured_text() -> str:
    """Return what stands between the markers."""
    step = load("step")
    machine, turns = step["machine"], step["rounds"]
    warning = busy_warning(machine)
    lines = [
        "Forward and backward of 4 layers, hidden 256, vocabulary 32,000; batch 4 x 512 and SDPA attention unless the",
        f"table says otherwise. In brackets the ratio to Inductor in the same call; medians of {turns} turns.",
        f"Measured by `bench/step.py` on {machine['date'][:10]}, on {machine_line(machine)}.",
        *([warning] if warning else []),
        "",
        *step_table(step),
        "",
        share_line(load("compile_time")),
        "",
        precision_line(load("precision")),
    ]
    return "\n".join(lines)


def precision_line(result: dict[str, Any]) -> str:
    """Return what a mixed-precision step takes in a sentence."""
    ratios = result["time"]["ratios"]
    return (
        'In mixed precision, `options={"precision": "bf16"}`, a step of the same Llama takes '
        f"{ratios['time against autocast']:.2f}x the time and {ratios['memory against autocast']:.2f}x the memory of "
        f"Inductor under autocast, and {ratios['time against fp32']:.2f}x the time of Inductor in fp32 "
        f"([docs/precision.md](docs/precision.md#measured); {machine_line(machine_of('time', result))})."
    )


def machine_of(part: str, result: dict[str, Any]) -> dict[str, Any]:
    """Return on what `part` of a result was measured, where parts are measured alone."""
    found: dict[str, Any] = result.get("machines", {}).get(part, result["machine"])
    return found


def precision_text() -> str:
    """Return what stands between the markers of docs/precision.md."""
    result = load("precision")
    lines = []
    for part, (heading, text) in PRECISION_PARTS.items():
        machine = machine_of(part, result)
        warning = busy_warning(machine) if part == "time" else ""
        where = f"{machine['date'][:10]}, {machine_line(machine)}"
        if part in result:
            lines += [f"**{heading}** (`bench/precision.py --part {part}`, {where})", *([warning] if warning else [])]
            lines += ["", *text(result[part]), ""]
        else:
            lines += [f"**{heading}**: not measured.", ""]
    return "\n".join(lines).rstrip()


def time_table(found: dict[str, Any]) -> list[str]:
    """Return steps and memory of the 4-layer Llama in Markdown."""
    about = {
        FP32: "Inductor, fp32",
        AUTOCAST: "Inductor under bf16 autocast",
        OURS: 'fxopt, `precision="bf16"`',
    }
    lines = ["| 4-layer Llama, 4 x 512 | step, ms | peak memory over rest, MiB |", "|---|--:|--:|"]
    for name, samples in found["samples"].items():
        step, memory = (statistics.median(samples[key]) for key in ("step", "memory"))
        lines.append(f"| {about[name]} | {step:,.0f} | {memory:,.0f} |")
    said = [
        f"{name} {ratio:.2f}x" + (f" (target {TARGETS[name]:.2f}x)" if name in TARGETS else "")
        for name, ratio in found["ratios"].items()
    ]
    return [*lines, "", f"Ratios, medians over turns: {', '.join(said)}."]


def casts_table(found: dict[str, Any]) -> list[str]:
    """Return casts by model in Markdown."""
    lines = ["| model | autocast | fxopt | autocast, MiB | fxopt, MiB |", "|---|--:|--:|--:|--:|"]
    for name, one in found.items():
        both = one["autocast"], one["fxopt"]
        cells = [*(str(x["nodes"]) for x in both), *(f"{x['bytes'] / 2**20:.1f}" for x in both)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def errors_line(found: dict[str, Any]) -> str:
    """Return in a sentence what the table of errors shows, with how many seeds there were of each."""
    each = next(iter(found.values()))["fxopt"]
    seeds = {what: sum(what in one for one in each) for what in ("gradients", "loss")}
    return (
        "Relative error against fp64 under Inductor: of all gradients together (geometric mean over "
        f"{seeds['gradients']} seeds) and of the loss (root mean square over {seeds['loss']}). In brackets the ratio "
        "to autocast's and its 95 % interval (bootstrap over seeds):"
    )


def errors_table(found: dict[str, Any]) -> list[str]:
    """Return errors by model in Markdown, fxopt's with its ratio to autocast's."""
    lines = ["| model | gradients, autocast | fxopt | loss, autocast | fxopt |", "|---|--:|--:|--:|--:|"]
    for name, one in found.items():
        lines.append(f"| {name} | {' | '.join(error_cells(one))} |")
    return lines


def curve_line(found: dict[str, Any]) -> str:
    """Return how far training in bf16 is from fp32 in a sentence."""
    apart, spread, most, widest = curve_summary(found).values()
    seeds, steps = len(found[FP32]), len(found[FP32][0])
    return (
        f"Training the demo's model for {steps} steps from {seeds} seeds: over the last half the loss in bf16 is on "
        f"average {apart:.3f} from that in fp32 of its seed ({most:.3f} for the worst), and that of two seeds in fp32 "
        f"{spread:.3f} ({widest:.3f} for the two farthest)."
    )


def errors_text(found: dict[str, Any]) -> list[str]:
    """Return errors by model in Markdown, with what they are of."""
    return [errors_line(found), "", *errors_table(found)]


def readers_text(found: dict[str, list[float]]) -> list[str]:
    """Return in a sentence what becomes of a gradient that many products add to."""
    each = ", ".join(f"{statistics.mean(ratios):.2f}x with {count}" for count, ratios in found.items())
    seeds = len(next(iter(found.values())))
    return [f"Error of the gradient of an activation over autocast's, by its readers (mean of {seeds} seeds): {each}."]


PRECISION_PARTS: dict[str, tuple[str, Callable[[Any], list[str]]]] = {
    "time": ("Time and memory", time_table),
    "casts": ("Casts between floating dtypes in the joint graph that the partitioner gets", casts_table),
    "errors": ("Errors", errors_text),
    "readers": ("Activations with many readers", readers_text),
    "curve": ("A longer training", lambda found: [curve_line(found)]),
}


def memory_text() -> str:
    """Return what stands between the markers of docs/memory.md."""
    result, timed = load("memory"), load("memory_time")
    lines = [
        f"Measured by `bench/memory.py` on {result['machine']['date'][:10]}, on {machine_line(result['machine'])}.",
        "",
        f"Models of {memory.LAYERS} layers, hidden {memory.HIDDEN}, vocabulary {memory.VOCAB}, {memory.BATCH} x "
        f"{memory.LENGTH} tokens, fp32; gpt2 with dropout. In MiB. Gradients: how much they differ from "
        "those without a plan.",
        "",
        "| case | budget | measured peak | used | predicted | recomputed, share of modelled time | gradients |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for case, rows in result.get("budgets", {}).items():
        lines += [budget_row(case if at == 0 else "", row) for at, row in enumerate(rows)]
    warning = busy_warning(timed["machine"])  # of the times alone: bytes are the same on a busy machine
    lines += ["", f"Times, on {machine_line(timed['machine'])}.", *([warning] if warning else []), ""]
    return "\n".join([*lines, *plan_times(timed["time"])])


def budget_row(case: str, row: dict[str, Any]) -> str:
    """Return a budget and what came of it as a line of a table."""
    budget, measured, predicted = (row[name] / memory.MIB for name in ("budget", "measured", "predicted"))
    error, share = 100 * (predicted / measured - 1), 100 * row["recompute_share"]
    cells = [f"{budget:.1f}", f"{measured:.1f}", f"{100 * measured / budget:.1f}%", f"{error:+.2f}%", f"{share:.1f}%"]
    gradients = "the same bits" if row["gradients"] == 0 else f"{row['gradients']:.0e}"
    return f"| {case} | {' | '.join(cells)} | {gradients} |"


def plan_times(times: dict[str, Any]) -> list[str]:
    """Return the table of times in Markdown."""
    names = {
        "default": "no budget",
        "full": "no budget, every layer checkpointed",
        "checkpointing": "a budget of that one's peak",
        "half": "half of the default's activations",
        "30%": "30% of them",
    }
    for name, wanted in times["wanted"].items():
        if wanted < times["budgets"][name]:
            names[name] += f" ({wanted / memory.MIB:.1f} MiB), or rather the smallest that can be kept"
    lines = ["| six-layer Llama | peak, MiB | step, ms | ratio |", "|---|--:|--:|--:|"]
    for name, about in names.items():
        base = "checkpointed" if name == "checkpointing" else "no budget"
        ratio = (
            f"{times['ratios'][name]:.2f}x {base}, target {memory.TARGETS[name]:.2f}x"
            if name in times["ratios"]
            else ""
        )
        milliseconds = 1000 * statistics.median(times["seconds"][name])
        lines.append(f"| {about} | {times['peaks'][name] / memory.MIB:.1f} | {milliseconds:,.0f} | {ratio} |")
    least, checkpointing = times["least"] / memory.MIB, times["wanted"]["checkpointing"] / memory.MIB
    smallest = f"The smallest budget that can be kept: {least:.1f} MiB, {least / checkpointing:.2f}x checkpointed."
    return [*lines, "", smallest]


def model_text() -> str:
    """Return what stands between the markers of docs/plan.md."""
    result = load("memory_model")
    nodes, seconds, shares = result["nodes"], result["seconds"]["both"], result["recomputed_flops_share"]
    peak = result["peak_mib"]["full checkpointing"] / 1024
    return (
        f"`bench/memory_model.py` (2 x 4096 tokens, bf16, 32 layers), on {machine_line(result['machine'])}: reading "
        f"{nodes['forward']:,} forward and {nodes['backward']:,} backward nodes and solving takes {seconds:.1f} s "
        f"of CPU time. At the modelled peak of full checkpointing, {peak:.1f} GiB without parameters, the plan makes "
        f"{shares['plan']:.1%} of the step's flops again, against {shares['full checkpointing']:.1%}."
    )


def explain_text() -> str:
    """Return what stands between the markers of docs/inspection.md."""
    result = load("explain")
    found, layers = explain.summary(result["samples"]), result["layers"]
    opens = f"opens in {found['open_s']:.1f} s in Chromium" if "open_s" in found else "was not opened in a browser"
    return (
        f"`bench/explain.py`, on {machine_line(result['machine'])}: explaining a Llama of {layers} layers takes "
        f"{found['explain_s']:.1f} s and its page {found['html_s']:.1f} s, {found['ratio']:.2f}x of the "
        f"{found['compile_s']:.0f} s that compiling it takes. The page has {found['mib']:.1f} MiB and {opens}."
    )


def fuzz_text() -> str:
    """Return what stands between the markers of docs/reliability.md."""
    result = load("fuzz")
    failures = len(result["failures"]) or "none"
    return (
        f"`bench/fuzz.py`, on {machine_line(result['machine'])}: {result['cases']:,} cases in {result['processes']} "
        f"processes took {result['minutes']:.0f} minutes; wrong results or uncaught exceptions: {failures}."
    )


PAGES = {
    "docs/reliability.md": fuzz_text,
    "docs/inspection.md": explain_text,
    "README.md": measured_text,
    "docs/precision.md": precision_text,
    "docs/memory.md": memory_text,
    "docs/plan.md": model_text,
}


def replaced(readme: str, text: str) -> str:
    """Return `readme` with `text` between the markers; ValueError where they are not there once, in order."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise ValueError(f"the page must hold {BEGIN} and then {END}, once each")
    before, _, rest = readme.partition(BEGIN)
    return f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}"


def main() -> int:
    """Rewrite or check; return 1 where the check finds a difference."""
    about = (__doc__ or "").split("\n\n")[0]
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--check", action="store_true", help="write nothing, return 1 on a difference")
    options = parser.parse_args()
    stale = []
    for name, text in PAGES.items():
        path = ROOT / name
        old = path.read_text()
        new = replaced(old, text())
        if not options.check:
            path.write_text(new)
        elif new != old:
            stale.append(name)
    if stale:
        print(f"{', '.join(stale)}: not what bench/results says; run python bench/readme.py")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
