"""Residual add and norm, forward and backward: fxopt's op in the compiled graph, and what Inductor makes of it alone.

    python bench/norm.py
    python bench/norm.py --quick  two turns: to see that it works, not to quote

Both are compiled by Inductor, in one process, and take turns; a ratio is the median over turns of the ratio within a
turn. Above 1, the rule `norm` is right to leave the graph to Inductor on this device.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measure import alternate, begin, median_ratio, write_json
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import fxopt

SIZES = ((2048, 256), (2048, 2048))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SECONDS = 0.1  # of steps a turn, at least


class RMSNorm(nn.Module):
    """Llama's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [..., H] in fp32 and return to its dtype before the weight."""
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


NORMS: dict[str, Callable[[int], nn.Module]] = {"rms": RMSNorm, "layer": nn.LayerNorm}


class Block(nn.Module):
    """A residual add and a norm, as between the halves of a transformer layer."""

    def __init__(self, norm: str, width: int) -> None:
        super().__init__()
        self.norm = NORMS[norm](width)

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Return the norm of the sum, and the sum."""
        total = x + residual
        return self.norm(total), total


@dataclass
class Contender:
    """A block under one backend, with inputs and gradients to feed it."""

    run: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    inputs: tuple[Tensor, Tensor]
    upstream: list[Tensor]
    parameters: list[nn.Parameter]

    @classmethod
    def make(cls, backend: str, norm: str, rows: int, width: int, dtype: torch.dtype) -> "Contender":
        """Return a block [rows, width] under "inductor", or under "op": Inductor with every norm replaced."""
        torch.manual_seed(0)
        block = Block(norm, width).to(dtype)
        x, residual, *upstream = (torch.randn(rows, width, dtype=dtype) for _ in range(4))
        how: dict[str, Any] = {"backend": "fxopt", "options": {"force": ["norm"]}} if backend == "op" else {}
        inputs = (x.requires_grad_(), residual.requires_grad_())
        return cls(torch.compile(block, **how), inputs, upstream, list(block.parameters()))

    def step(self) -> list[Tensor]:
        """Run forward and backward once and return the gradients."""
        outputs = self.run(*self.inputs)
        return list(torch.autograd.grad(outputs, [*self.inputs, *self.parameters], self.upstream))

    def turn(self, steps: int) -> float:
        """Return the seconds of a step, over so many."""
        start = time.perf_counter()
        for _ in range(steps):
            self.step()
        return (time.perf_counter() - start) / steps


def measure_case(norm: str, rows: int, width: int, dtype: torch.dtype, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of a step for "inductor" and "op", one number a turn."""
    torch.compiler.reset()  # else the sizes become dynamic, and the recompile limit is met
    contenders = {name: Contender.make(name, norm, rows, width, dtype) for name in ("inductor", "op")}
    gradients = [one.step() for one in contenders.values()]
    for ours, theirs in zip(*gradients, strict=True):
        error = float((ours.double() - theirs.double()).norm() / theirs.double().norm())
        # Only against having measured another computation: 2048 rows are summed in another order.
        assert error < 32 * torch.finfo(dtype).eps, f"{norm}: the two compute different gradients ({error:.1e})"
    assert [item.rule for item in fxopt.reports()[-1].rewrites] == ["norm"], "the op was not measured"
    steps = max(1, round(SECONDS / contenders["inductor"].turn(3)))
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds):
        for name in alternate(list(contenders), turn):
            samples[name].append(contenders[name].turn(steps))
    return samples


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    about = (__doc__ or "").split("\n\n")
    parser = argparse.ArgumentParser(description=about[0], epilog=about[-1])
    parser.add_argument("--rounds", type=int, default=15, help="turns each gets (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="two turns: a check of the script")
    parser.add_argument("--json", type=Path, help="also write the raw numbers to this file")
    options = parser.parse_args(arguments)
    options.rounds = 2 if options.quick else options.rounds
    return options


def main() -> int:
    """Measure, print, write."""
    options = parse()
    console = Console()
    machine = begin(console, options.quick)
    table = Table(title="add + norm, forward + backward; ratio of the op to Inductor's own")
    for heading in ("norm", "size", "dtype", "inductor ms", "op ms", "ratio"):
        table.add_column(heading, justify="right")
    cases = [(norm, size, dtype) for norm in NORMS for size in SIZES for dtype in DTYPES]
    results = {}
    for norm, size, dtype in cases:
        samples = measure_case(norm, *size, DTYPES[dtype], options.rounds)
        ratio = median_ratio(samples["op"], samples["inductor"])
        shown = [f"{1000 * statistics.median(samples[name]):.2f}" for name in ("inductor", "op")]
        table.add_row(norm, f"{size[0]} x {size[1]}", dtype, *shown, f"{ratio:.2f}x")
        results[f"{norm} {size[0]}x{size[1]} {dtype}"] = {"samples": samples, "ratio": ratio}
    console.print(table)
    if options.json:
        write_json(options.json, machine, {"rounds": options.rounds, "cases": results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
