"""Triton source of RMS and layer norm over rows of H values, with the residual add before and the gate after.

    norm_forward          a tile holds whole rows, which are read once
    norm_forward_long     rows too long for that: read for each statistic and the result, a tile at a time
    norm_backward         gradients; of weight and bias the part of each program, which takes rows in turns
    norm_backward_sums    before it, for long rows: two sums along each row

What is computed, and where it is rounded, is said in `fxopt.ops.norm_formulas`; everything between roundings is fp32.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from fxopt.kernels.cards import INTERPRETER, Card
from fxopt.kernels.catalog import Shipped
from fxopt.kernels.configs import Config
from fxopt.kernels.source import TRITON_DTYPES, Kernel, generate, render

__all__ = [
    "NormKernelSpec",
    "backward_kernel",
    "configs",
    "fitted",
    "forward_kernel",
    "most_programs",
    "shipped",
    "sums_kernel",
]


@dataclass(frozen=True)
class NormKernelSpec:
    """What the kernels of a norm are generated for; dtypes are "bf16", "fp16" or "fp32".

    width: H. long: whether a row takes several tiles.
    kind, eps, eps_at, normalized, rounded_rstd, offset, affine, output: as in `NormSpec`, whose `compute` is fp32.
    x, weight, bias, gate: dtypes, "" for what there is not; x's is that of what is normalised, the sum or x itself.
    terms: forward: the dtypes of x and residual, where those are not both the sum's.
    residual: forward: whether one is added; backward: whether the sum has a gradient of its own.
    by_x, by_weight, by_bias, by_gate: the gradients that are wanted.
    """

    width: int
    long: bool
    kind: str
    eps: float
    eps_at: str
    normalized: str
    rounded_rstd: bool
    offset: float
    affine: str
    output: str
    x: str
    weight: str = ""
    bias: str = ""
    gate: str = ""
    residual: bool = False
    terms: tuple[str, str] | None = None
    by_x: bool = False
    by_weight: bool = False
    by_bias: bool = False
    by_gate: bool = False

    @property
    def masked(self) -> bool:
        """Whether tiles, which are powers of two wide, may reach past the end of a row."""
        return self.width & (self.width - 1) != 0

    @property
    def backward(self) -> bool:
        """Whether gradients are wanted."""
        return self.by_x or self.by_weight or self.by_bias or self.by_gate

    @property
    def walks(self) -> bool:
        """Whether a program of the backward goes on from rows to rows, since it sums over them."""
        return self.by_weight or self.by_bias


@functools.lru_cache(512)
def forward_kernel(spec: NormKernelSpec) -> Kernel:
    """Out and Rstd, for "layer" Mean, with a residual Stream; a program ROWS of rows."""
    return _rendered("norm_forward_long" if spec.long else "norm_forward", spec)


@functools.lru_cache(512)
def backward_kernel(spec: NormKernelSpec) -> Kernel:
    """The gradients that are wanted; By_weight and By_bias [programs, H].

    Programs are any number that goes on until there are no rows; for long rows, times the tiles of a row.
    """
    return _rendered("norm_backward", spec)


@functools.lru_cache(512)
def sums_kernel(spec: NormKernelSpec) -> Kernel:
    """Along, for "layer" Middle: what `backward_kernel` needs of long rows for the gradient by x."""
    return _rendered("norm_backward_sums", replace(spec, by_weight=False, by_bias=False, by_gate=False, residual=False))


def _rendered(name: str, spec: NormKernelSpec) -> Kernel:
    body = render(f"{name}.py.jinja", {"s": spec, "triton": TRITON_DTYPES})
    return generate(name, [one for one in _arguments(spec) if re.search(rf"\b{one[0]}\b", body)], body)


def _arguments(spec: NormKernelSpec) -> list[tuple[str, str]]:
    """All that a kernel may have; it has those that it names."""
    x, weight, bias, gate = (f"*{one}" for one in (spec.x, spec.weight, spec.bias, spec.gate))
    first, second = (x, x) if spec.terms is None else (f"*{one}" for one in spec.terms)
    pointers = {
        "Upstream": f"*{spec.output}", "By_stream": x, "X": first, "Residual": second, "Weight": weight, "Bias": bias,
        "Gate": gate, "Out": f"*{spec.output}", "Stream": x, "Rstd": "*fp32", "Mean": "*fp32", "Along": "*fp32",
        "Middle": "*fp32", "By_x": x, "By_weight": "*fp32", "By_bias": "*fp32", "By_gate": gate,
    }  # fmt: skip
    strides = [(f"{name.lower()}_stride", "i32") for name in ("Upstream", "By_stream", "X", "Residual", "Gate")]
    return [
        *pointers.items(),
        ("rows", "i32"),
        *strides,
        *((name, "constexpr") for name in ("ROWS", "COLUMNS", "STAGES")),
    ]


# --- how they are launched ---------------------------------------------------------------------------------------

_SHORT_TILE = 1024
"""Elements of a tile of short rows: 8 KiB of the two tensors that a backward in bf16 reads at a time."""
_LONG_TILE = 4096
_SMALL_TILE = 32
"""While interpreting, where 33 columns are a long row."""


def fitted(spec: NormKernelSpec, card: Card) -> NormKernelSpec:
    """`spec` for rows of one tile, or where a tile that wide would spill, for long ones."""
    return replace(spec, long=not _candidates(replace(spec, long=False), card))


def configs(kernel: Kernel, spec: NormKernelSpec, card: Card) -> tuple[Config, ...]:
    """Candidates for a `kernel` of `spec`, the default first.

    The default has 16 elements a thread, in the backward 8, where twice as many tensors are held: a multiprocessor
    then has room for 24 to 48 warps.
    """
    found = [_config(kernel, tiles, warps) for tiles, warps in _candidates(spec, card)]
    return tuple(dict.fromkeys(found))


def _config(kernel: Kernel, tiles: Mapping[str, int], warps: int) -> Config:
    return Config(tuple((name, tiles[name]) for name in kernel.tiles), warps, 1)


def _candidates(spec: NormKernelSpec, card: Card) -> list[tuple[dict[str, int], int]]:
    """Tiles and warps. Loops without a product are pipelined only where they ask for it, as by STAGES."""
    whole = 1 << (spec.width - 1).bit_length()
    if card == INTERPRETER:
        columns = min(whole, _SMALL_TILE // 2) if spec.long else whole
        return [({"ROWS": 2, "COLUMNS": columns, "STAGES": 1}, 4)] if columns <= _SMALL_TILE else []
    columns = min(whole, _LONG_TILE) if spec.long else whole
    size = max(columns, _SHORT_TILE)
    found = []
    for each in (8, 16, 4, 32) if spec.backward else (16, 8, 32):
        for stages in (1, 2) if spec.walks else (1,):
            if _fits(spec, size, each, stages, card):
                tiles = {"ROWS": size // columns, "COLUMNS": columns, "STAGES": stages}
                found.append((tiles, size // (32 * each)))
    return found


def _fits(spec: NormKernelSpec, size: int, each: int, stages: int, card: Card) -> bool:
    """Whether tiles of `size` elements, so many of them `each` thread's, spill no registers and fit shared memory."""
    warps = size // (32 * each)
    room = min(255, card.registers // (32 * max(warps, 1)))
    return 1 <= warps <= 16 and _registers(spec, each) <= room and _shared_bytes(spec, size, stages) <= card.shared


def most_programs(spec: NormKernelSpec, config: Config, card: Card) -> int:
    """How many programs of the backward a multiprocessor runs at a time, by what registers and shared memory hold."""
    if card == INTERPRETER:
        return 3
    tiles, threads = dict(config.tiles), 32 * config.num_warps
    size = tiles["ROWS"] * tiles["COLUMNS"]
    by_registers = card.registers // (_registers(spec, size // threads) * threads)
    by_shared = card.shared // max(_shared_bytes(spec, size, tiles["STAGES"]), 1)
    return max(min(by_registers, by_shared), 1)


def _registers(spec: NormKernelSpec, each: int) -> int:
    """Of a thread with `each` elements of a tile: fp32 values that live at a time, fitted to what ptxas says."""
    if spec.backward:
        return 24 + each * (3 + spec.by_weight + 2 * (spec.by_bias or spec.kind == "layer") + 4 * bool(spec.gate))
    return 24 + each * (2 + bool(spec.gate))


def _shared_bytes(spec: NormKernelSpec, size: int, stages: int) -> int:
    """Of the tiles that are loaded ahead."""
    tensors = 2 + spec.residual + bool(spec.gate)
    return size * tensors * (4 if spec.x == "fp32" else 2) * (stages - 1)


def shipped(card: Card) -> Iterator[Shipped]:
    """What ``fxopt kernels`` compiles: Llama's norm, torch's layer norm, and everything at a time; short to long."""
    for dtype in TRITON_DTYPES:
        llama = NormKernelSpec(0, False, "rms", 1e-6, "square", dtype, False, 0.0, dtype, dtype, dtype, dtype)
        layer = replace(llama, kind="layer", normalized="fp32", affine="fp32", bias=dtype)
        gated = replace(layer, eps_at="root", offset=1.0, gate=dtype, residual=True)
        specs = {"rms": llama, "add, rms": replace(llama, residual=True), "layer": layer, "gated layer": gated}
        for (name, spec), width in itertools.product(specs.items(), _WIDTHS):
            yield from _of_spec(f"{name} {width} {dtype}", replace(spec, width=width), card)


_WIDTHS = (128, 768, 2048, 4096, 8192, 16384, 65536)


def _of_spec(name: str, spec: NormKernelSpec, card: Card) -> Iterator[Shipped]:
    forward = fitted(spec, card)
    wanted = replace(spec, by_x=True, by_weight=True, by_bias=bool(spec.bias), by_gate=bool(spec.gate))
    backward = fitted(wanted, card)
    pairs = [(forward_kernel(forward), forward), (backward_kernel(backward), backward)]
    for kernel, one in [*pairs, *([(sums_kernel(backward), backward)] if backward.long else [])]:
        aligned = tuple(item for item, kind in kernel.signature if kind[0] == "*" or item.endswith("_stride"))
        yield Shipped(f"{kernel.name} {name}", kernel, configs(kernel, one, card), aligned)
