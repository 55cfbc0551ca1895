"""The faults that break backends like this one (docs/reliability.md), what becomes of each, and which tests say so.

A test names the fault it is of: ``@pytest.mark.fault("retain_graph")``. Faults that no test can have here are refused,
with the sentence. ``python tests/faults.py`` rewrites the table in docs/reliability.md.
"""

from __future__ import annotations

import ast
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- faults:begin -->\n", "<!-- faults:end -->"


@dataclasses.dataclass(frozen=True)
class Fault:
    """A fault, what becomes of it, and where there is no test, why not."""

    name: str
    outcome: str
    refusal: str = ""


FAULTS: tuple[Fault, ...] = (
    Fault(
        "recompute of dropout", "a draw that a rewrite adds, drops or repeats is caught; random operators keep order"
    ),
    Fault("batch sizes 0 and 1", "as eager"),
    Fault("dims becoming dynamic", "one more graph, as without fxopt; no guard is added"),
    Fault("zero-size inputs and grid 0", "as eager; no kernel is launched on an empty grid"),
    Fault("non-unit last stride", "as eager"),
    Fault("expanded grad_output", "as eager, with strides of 0 too"),
    Fault("misaligned storage offset", "as eager"),
    Fault("offsets past 2^31", "kernels index by 64 bits"),
    Fault("output strides unlike eager's", "caught by verification: the site is left alone"),
    Fault("output aliasing an input", "caught by verification: the site is left alone"),
    Fault("a match across a mutation", "refused with the node that writes"),
    Fault("wildcarded constants", "constants are bound or compared; a softmax over another axis is another function"),
    Fault("fully masked rows", "what eager gives: zeros, NaN, or the mean, as the spelling says"),
    Fault("finfo.min masks", "read as masks where a row cannot be masked by two; else refused with the reason"),
    Fault("dropout active in eval", "not drawn in eval"),
    Fault("all labels ignored", "NaN as eager"),
    Fault("out-of-range targets", "raises, and trains on afterwards"),
    Fault("partly frozen or tied weights", "gradients for those that want them; tied ones add up"),
    Fault("autocast regions", "honoured; with a precision they are replaced by explicit casts"),
    Fault("elided bf16 round trips", "casts stay where they round"),
    Fault("checkpoint and autograd.Function bodies", "rewritten inside checkpoints; custom functions kept whole"),
    Fault("no_grad mid-graph", "refused where it concerns the site; gradients that it cuts stay cut"),
    Fault("graph break between head and loss", "trains as eager; the report says that there is no loss in the graph"),
    Fault(
        "DTensor and FSDP parameters",
        "not tested on this machine",
        "distributed training is an issue of its own; nothing here is claimed of it",
    ),
    Fault(
        "DDP bucketing with higher-order ops",
        "not tested on this machine",
        "distributed training is an issue of its own; nothing here is claimed of it",
    ),
    Fault("CUDA graphs with gradient accumulation", "sites are measured without CUDA graphs; the rest is torch's"),
    Fault("retain_graph", "works as under Inductor, also though the backward is compiled early"),
    Fault("concurrent compiles", "one thread's settings do not reach another's"),
    Fault("a cache key that lacks options and version", "options, rules' versions and fxopt's are part of every key"),
    Fault("the recompile limit", "no more graphs than without fxopt"),
    Fault(
        "a backward that fails to compile lazily", "it is compiled with the forward; the graph as it came is compiled"
    ),
    Fault(
        "triton/torch skew", "offline compilation needs Triton's own ptxas; private modules of torch are in one file"
    ),
    Fault(
        "a kernel that does not compile for the card",
        "its sites are reverted with one warning that names its source; in the middle of a step ATen computes instead",
    ),
    Fault("NaN/Inf inputs and GradScaler", "NaN stays in its row; scaled steps skip an overflow as eager's do"),
)


def named() -> Iterator[tuple[str, str]]:
    """(fault, test) for every marker in tests/, test as path::name."""
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef):
                for fault in _faults_of(node):
                    yield fault, f"{path.relative_to(ROOT).as_posix()}::{node.name}"


def _faults_of(function: ast.FunctionDef) -> Iterator[str]:
    for decorator in function.decorator_list:
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.fault":
            yield from (argument.value for argument in decorator.args if isinstance(argument, ast.Constant))


def table() -> str:
    """The table of docs/reliability.md."""
    tests: dict[str, list[str]] = {}
    for fault, test in named():
        tests.setdefault(fault, []).append(test)
    lines = ["| fault | what becomes of it | shown by |", "|---|---|---|"]
    for fault in FAULTS:
        shown = "<br>".join(f"`{test}`" for test in tests.get(fault.name, [])) or f"refused: {fault.refusal}"
        lines.append(f"| {fault.name} | {fault.outcome} | {shown} |")
    return "\n".join(lines) + "\n"


def page() -> str:
    """docs/reliability.md as it must be."""
    before, rest = PAGE.read_text().split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(page())
    sys.stdout.write(f"wrote {PAGE}: {len(FAULTS)} faults, {len(list(named()))} tests\n")
