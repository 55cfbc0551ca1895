"""Tables in docs/ that are made from the code: FXOPT_WRITE_DOCS=1 rewrites them."""

from __future__ import annotations

import inspect
import os
import re
import runpy
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from graphs import LargestDraw, captured
from torch import Tensor

from fxopt import dump_kernels
from fxopt.capture import trace
from fxopt.kernels.cards import CARDS
from fxopt.kernels.catalog import catalog
from fxopt.passes.attention import RULE
from fxopt.rewrite import apply_rule

EXCERPT = re.compile(r'(<!-- source:(.+?)(?: from "(.+)" to "(.+)")? -->\n).*?(<!-- source:end -->)', re.DOTALL)
EXAMPLE = re.compile(r"<!-- example:(.+?) -->\n```python\n(.*?)```\n<!-- example:end -->", re.DOTALL)
DUMPED = re.compile(r'(<!-- dumped:(.+?) from "(.+)" to "(.+)" -->\n).*?(<!-- dumped:end -->)', re.DOTALL)
DOCS = Path(__file__).resolve().parent.parent / "docs"


def rows_of_attention() -> Iterator[str]:
    yield "| spelling | in the style of | mask | program | lowering |"
    yield "|---|---|---|---|---|"
    for spelling in RULE.spellings:
        mask, program, lowering = found_in(spelling)
        about = " ".join((spelling.__doc__ or "").split()).rstrip(".")
        yield f"| `{spelling.__name__}` | {about} | `{mask}` | {program} | {lowering} |"


def found_in(spelling: Callable[..., Tensor]) -> tuple[str, str, str]:
    """Mask, program and lowering, as the report has them."""
    values = RULE.inputs(LargestDraw(3))
    outcome = apply_rule(RULE, trace(spelling, {name: values[name] for name in inspect.signature(spelling).parameters}))
    (done,) = outcome.rewrites
    what, lowering = done.detail.split(": ", 1)[1].split("; ", 1)
    mask, *program = what.split(", ", 1)
    return mask, f"`{program[0].removeprefix('score ')}`" if program else "", lowering


def test_table_of_spellings_is_what_the_rule_finds() -> None:
    path = DOCS / "attention.md"
    begin, end = "<!-- spellings:begin -->\n", "<!-- spellings:end -->"
    text = path.read_text()
    before, rest = text.split(begin)
    written, after = rest.split(end)
    table = "\n".join(rows_of_attention()) + "\n"
    if os.environ.get("FXOPT_WRITE_DOCS"):
        path.write_text(before + begin + table + end + after)
    else:
        assert written == table, "docs/attention.md is out of date: run this test with FXOPT_WRITE_DOCS=1"


def test_kernels_are_shown_as_they_are_generated() -> None:
    path = DOCS / "kernels.md"
    written = path.read_text()
    assert len(EXCERPT.findall(written)) == 2
    shown = EXCERPT.sub(excerpt, written)
    if os.environ.get("FXOPT_WRITE_DOCS"):
        path.write_text(shown)
    else:
        assert written == shown, "docs/kernels.md is out of date: run this test with FXOPT_WRITE_DOCS=1"


def test_dumped_kernel_of_the_example_is_shown_as_it_is(tmp_path: Path) -> None:
    path = DOCS / "kernels.md"
    written = path.read_text()
    (example,) = EXAMPLE.findall(written)
    kernels = dumped(*example, tmp_path)

    def shown(found: re.Match[str]) -> str:
        before, name, first, last, after = found.groups()
        return f"{before}{listing(kernels[name], first, last)}{after}"

    assert len(DUMPED.findall(written)) == 1
    if os.environ.get("FXOPT_WRITE_DOCS"):
        path.write_text(DUMPED.sub(shown, written))
    else:
        assert written == DUMPED.sub(shown, written), "docs/kernels.md: run this test with FXOPT_WRITE_DOCS=1"


def dumped(name: str, code: str, directory: Path) -> dict[str, str]:
    """By name, the kernels in the dump of the one function `attention` of a file."""
    (directory / name).write_text(code)
    attention = runpy.run_path(str(directory / name))["attention"]
    tensors = [torch.randn(1, 2, 64, 64, requires_grad=True) for _ in range(3)]
    outcome = apply_rule(RULE, captured(attention, *tensors).module, lowering="interpret")
    return {one.kernel: one.path.read_text() for one in dump_kernels.write(outcome.module, directory)[0]}


def excerpt(found: re.Match[str]) -> str:
    """The source of the kernel that a marker names, or its lines from one that is given to another."""
    before, name, first, last, after = found.groups()
    source = next(one.kernel.source for one in catalog(CARDS[0]) if one.name == name)
    return f"{before}{listing(source, first, last)}{after}"


def listing(source: str, first: str | None, last: str | None) -> str:
    """The lines of `source` from `first` to before `last`, or all but the imports, as a block of Markdown."""
    lines = source.splitlines()
    start, stop = (lines.index(first), lines.index(last or "")) if first else (lines.index("@triton.jit"), len(lines))
    text = textwrap.dedent("\n".join(lines[start:stop]))
    return f"```python\n{text}\n```\n"
