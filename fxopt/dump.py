"""Graphs as Python that runs: one file a stage, with source lines and the rule that made each node.

The file defines the graph as a module, draws inputs of the recorded shapes, and runs forward and backward.
"""

from __future__ import annotations

import keyword
import operator
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import fx

from fxopt import compat
from fxopt.fake import value_of
from fxopt.outline import kind_of
from fxopt.rewrite import copy_module
from fxopt.rule import Place

HEADER = '''"""{title}

Written by fxopt; run it with Python to execute the graph on random inputs.
"""

import torch
from math import inf, nan
from torch import device, fx
import fxopt.ops  # registers fxopt's operators

'''

_INPUTS = '''

def inputs():
    """Random inputs of the recorded shapes, dtypes and strides."""
    torch.manual_seed(0)
    return [
{inputs}
    ]
'''

_RUN = """

if __name__ == "__main__":
    results = {root}()(*inputs())
    results = results if isinstance(results, (tuple, list)) else (results,)
    for index, result in enumerate(results):
        print(index, tuple(result.shape) if isinstance(result, torch.Tensor) else result)
    losses = [r.double().sum() for r in results if isinstance(r, torch.Tensor) and r.requires_grad]
    if losses:
        sum(losses).backward()
        print("backward ran")
"""


def to_source(gm: fx.GraphModule, title: str, epilogue: str = "") -> str:
    """`gm`, whose nodes carry fake values, as a runnable Python file."""
    gm = _with_short_names(copy_module(gm))
    classes: list[str] = []
    root = class_source(gm, "Graph", classes)
    written = "\n\n".join(classes)
    return HEADER.format(title=title) + written + inputs_source(gm) + _RUN.format(root=root) + epilogue


def inputs_source(gm: fx.GraphModule) -> str:
    """A function `inputs()` that draws what `gm` takes."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    return _INPUTS.format(
        inputs="\n".join(f"        {_input_source(value_of(node))},  # {node.name}" for node in placeholders)
    )


def _with_short_names(gm: fx.GraphModule) -> fx.GraphModule:
    """Inputs named as a reader would: Dynamo's ``L_self_modules_lm_head_parameters_weight_`` is ``lm_head_weight``."""
    taken = {node.name for node in gm.graph.nodes if node.op != "placeholder"}
    for node in gm.graph.find_nodes(op="placeholder"):
        short = re.sub(r"^L_(self_|kwargs_|args_)*|_?(modules|parameters|buffers)(?=_)|_$", "", str(node.target)).strip(
            "_"
        )
        name = short if short.isidentifier() and not keyword.iskeyword(short) else node.name
        while name in taken:
            name += "_"
        taken.add(name)
        node.name = node.target = name
    gm.recompile()
    return gm


def write(gm: fx.GraphModule, path: Path, title: str, epilogue: str = "") -> Path:
    """Write `to_source` to `path`, making its directory. Returns `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_source(gm, title, epilogue))
    return path


def class_source(gm: fx.GraphModule, name: str, classes: list[str]) -> str:
    """Add a module `name` that computes `gm` to `classes`, after those of its bodies. Returns `name`."""
    made = []
    for target in dict.fromkeys(str(node.target) for node in gm.graph.nodes if node.op in ("get_attr", "call_module")):
        value = operator.attrgetter(target)(gm)
        made.append(f"        self.{target} = {_attribute_source(value, f'{name}_{target}', classes)}")
    body = "\n".join(_annotated(gm))
    setup = "    def __init__(self):\n        super().__init__()\n" + "\n".join(made) + "\n\n"
    classes.append(f"class {name}(torch.nn.Module):\n{setup}{body}\n")
    return name


def _attribute_source(value: Any, name: str, classes: list[str]) -> str:
    if isinstance(value, fx.GraphModule):
        # A higher-order operator interprets its body, so it must be a graph again.
        return f"fx.symbolic_trace({class_source(value, name, classes)}())"
    if isinstance(value, torch.Tensor):
        if value.numel() <= 64 and not _is_fake(value):
            return f"torch.tensor({value.tolist()!r}, dtype={value.dtype})"
        return f"torch.zeros({tuple(value.shape)!r}, dtype={value.dtype})  # the values were not kept"
    return f"{type(value).__module__}.{type(value).__qualname__}()  # a module that fxopt did not enter"


def _is_fake(value: torch.Tensor) -> bool:
    return isinstance(value, compat.FakeTensor)


def _annotated(gm: fx.GraphModule) -> Iterator[str]:
    """fx's code for `gm`, with a comment wherever the source line or the rule changes, and each value's type."""
    nodes = {node.name: node for node in gm.graph.nodes}
    last: tuple[str, str] | None = None
    for line in gm.graph.python_code("self").src.strip().splitlines():
        if line.startswith("def forward"):
            line = _wrapped_signature(gm)
        match = re.match(r"\s+(\w+)(?: : [^=]+)? = ", line)
        node = nodes.get(match.group(1)) if match else None
        if node is not None and node.op not in ("placeholder", "get_attr"):
            where = _comment(node)
            if where != last and any(where):
                yield f"        # {' '.join(part for part in where if part)}"
            last = where
            line = f"{line.split(';')[0]}  # {kind_of(value_of(node))}"
        yield f"    {line}"


def _wrapped_signature(gm: fx.GraphModule) -> str:
    """One argument a line, with its type: a model has hundreds."""
    arguments = [
        f"        {node.target},  # {kind_of(value_of(node))}" for node in gm.graph.find_nodes(op="placeholder")
    ]
    return "\n".join(["def forward(", "        self,", *arguments, "    ):"])


def _comment(node: fx.Node) -> tuple[str, str]:
    place = Place.of(node)
    rule = f"[made by rule {node.meta['rule']}]" if "rule" in node.meta else ""
    return f"{place}: {place.code}" if place.source else "", rule


def _input_source(value: Any) -> str:
    """An expression that draws an input like `value`; symbolic sizes become the sizes they were traced with."""
    if not isinstance(value, torch.Tensor):
        return repr(compat.size_hint(value))
    shape, stride = ([compat.size_hint(item) for item in given] for given in (value.shape, value.stride()))
    storage = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) if all(shape) else 0
    drawn = (
        f"torch.randn({storage}).to({value.dtype})"
        if value.dtype.is_floating_point
        else f"torch.randint(0, 2, ({storage},)).to({value.dtype})"
    )
    grad = ".requires_grad_()" if value.requires_grad and value.is_leaf else ""
    return f"{drawn}.as_strided({tuple(shape)}, {tuple(stride)}).clone(memory_format=torch.preserve_format){grad}"
