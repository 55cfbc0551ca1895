"""A norm by generated Triton kernels: what is launched, forward and backward.

Rows are numbered in the order in which x's lie in memory, so that the results of a dense x, however it is permuted, are
written where ``torch.empty_like(x)`` has them. A tensor whose rows are not evenly spaced in that order, or whose values
within a row are not adjacent, is copied first. Nothing here looks at values, so that the same code is traced by
AOTAutograd.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fxopt.kernels.cards import card_of, multiprocessors_of
from fxopt.kernels.configs import Config, config_for
from fxopt.kernels.norm import (
    NormKernelSpec,
    backward_kernel,
    configs,
    fitted,
    forward_kernel,
    most_programs,
    sums_kernel,
)
from fxopt.kernels.source import Kernel
from fxopt.ops.launch import count_blocks, launch, triton_dtype, uninitialized
from fxopt.ops.norm_formulas import NormSpec, sum_dtype

__all__ = ["backward_workspace", "can_compute", "forward", "forward_workspace", "gradients"]

Maybe = Tensor | None
_GRADIENTS = ("By_x", "By_weight", "By_bias", "By_gate")
_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})


def can_compute(x: Tensor, residual: Maybe, weight: Maybe, bias: Maybe, gate: Maybe, spec: NormSpec) -> bool:
    """Whether there are kernels for these: no fp64 anywhere, and rows that are not empty."""
    dtypes = {one.dtype for one in (x, residual, weight, bias, gate) if one is not None}
    return dtypes | {spec.normalized, spec.affine, spec.output} <= _DTYPES and (
        spec.compute == torch.float32 and x.shape[-1] > 0
    )


def forward(
    x: Tensor, residual: Maybe, weight: Maybe, bias: Maybe, gate: Maybe, spec: NormSpec
) -> tuple[Tensor, Maybe, Tensor, Maybe]:
    """The result and the new residual stream [..., H], rstd and mean [..., 1], as `fxopt.ops.norm_operator` has them.

    The first two have x's strides where x is dense.
    """
    rows = _Rows.of(x)
    total = sum_dtype(x, residual)
    generated = _kernel_spec(
        x, weight, bias, gate, spec, residual=residual is not None, x=triton_dtype(total), terms=_terms(x, residual)
    )
    made = {"Out": rows.new(rows.width, spec.output), "Rstd": rows.new(1, torch.float32)}
    if residual is not None:
        made["Stream"] = rows.new(rows.width, total)
    if spec.kind == "layer":
        made["Mean"] = rows.new(1, torch.float32)
    arguments = rows.read({"X": x, "Residual": residual, "Gate": gate}) | _vectors(weight, bias) | made
    _launch_by_rows(forward_kernel(generated), generated, rows, arguments)
    mean = rows.back(made["Mean"]).contiguous() if "Mean" in made else None
    stream = rows.back(made["Stream"]) if "Stream" in made else None
    return rows.back(made["Out"]), stream, rows.back(made["Rstd"]).contiguous(), mean


def gradients(
    upstream: Tensor,
    by_stream: Maybe,
    s: Tensor,
    weight: Maybe,
    bias: Maybe,
    gate: Maybe,
    rstd: Tensor,
    mean: Maybe,
    spec: NormSpec,
    wanted: Sequence[bool],
) -> list[Maybe]:
    """As `fxopt.ops.norm_formulas.gradients`; those by s and gate have s's strides where s is dense."""
    asked = _asked((s, weight, bias, gate), wanted)
    if not asked:
        return [None] * len(_GRADIENTS)
    rows = _Rows.of(s)
    generated = _gradient_spec(by_stream, s, weight, bias, gate, spec, asked)
    arguments = rows.read({"Upstream": upstream, "By_stream": by_stream, "X": s, "Gate": gate})
    arguments |= _vectors(weight, bias) | {"Rstd": rows.in_order(rstd)}
    arguments |= {} if mean is None else {"Mean": rows.in_order(mean)}
    if generated.long and generated.by_x:
        arguments |= _sums(generated, rows, arguments)
    found = _launch_backward(generated, rows, arguments, {name: one.dtype for name, one in asked.items()})
    return [found.get(name) for name in _GRADIENTS]


def _asked(inputs: Sequence[Maybe], wanted: Sequence[bool]) -> dict[str, Tensor]:
    """The inputs, in the order of `_GRADIENTS`, whose gradient is wanted, by the name of that."""
    pairs = zip(_GRADIENTS, inputs, wanted, strict=True)
    return {name: one for name, one, want in pairs if want and one is not None}


def _sums(generated: NormKernelSpec, rows: _Rows, arguments: dict[str, Any]) -> dict[str, Tensor]:
    """What the gradient by a long row needs of all of it."""
    names = ("Along", "Middle") if generated.kind == "layer" else ("Along",)
    made = {name: rows.new(1, torch.float32) for name in names}
    _launch_by_rows(sums_kernel(generated), generated, rows, arguments | made)
    return made


def _launch_backward(
    generated: NormKernelSpec, rows: _Rows, arguments: dict[str, Any], dtypes: Mapping[str, torch.dtype]
) -> dict[str, Tensor]:
    """The gradients that `dtypes` names. Those by weight and bias are fp32 sums over programs, in a fixed order."""
    kernel = backward_kernel(generated)
    config = _config(kernel, generated, rows.like)
    across = count_blocks(rows.width, config.tile("COLUMNS"))
    programs = _programs(generated, rows, config, across)
    summed = [name for name in ("By_weight", "By_bias") if name in dtypes]
    made = {name: uninitialized((programs, rows.width), torch.float32, rows.like) for name in summed}
    made |= {name: rows.new(rows.width, dtype) for name, dtype in dtypes.items() if name not in summed}
    launch(kernel, programs * across, arguments | made, config)
    return {
        name: made[name].sum(0).to(dtype) if name in summed else rows.back(made[name]) for name, dtype in dtypes.items()
    }


def _programs(generated: NormKernelSpec, rows: _Rows, config: Config, across: int) -> int:
    """Programs that share the rows; with gradients to sum no more than run at a time, each leaving a part."""
    blocks = count_blocks(rows.count, config.tile("ROWS"))
    if not generated.walks:
        return blocks
    device = rows.like.device
    room = most_programs(generated, config, card_of(device)) * multiprocessors_of(device)
    return torch.sym_min(blocks, max(room // across, 1))  # `min` of a symbolic size would be a guard


def _launch_by_rows(kernel: Kernel, generated: NormKernelSpec, rows: _Rows, arguments: Mapping[str, Any]) -> None:
    config = _config(kernel, generated, rows.like)
    launch(kernel, count_blocks(rows.count, config.tile("ROWS")), arguments, config)


def _config(kernel: Kernel, generated: NormKernelSpec, like: Tensor) -> Config:
    card = card_of(like.device)
    return config_for(kernel, configs(kernel, generated, card), card)


def _kernel_spec(
    like: Tensor, weight: Maybe, bias: Maybe, gate: Maybe, spec: NormSpec, residual: bool, **flags: Any
) -> NormKernelSpec:
    generated = NormKernelSpec(
        width=like.shape[-1], long=False, kind=spec.kind, eps=spec.epsilon, eps_at=spec.eps_at,
        normalized=triton_dtype(spec.normalized), rounded_rstd=spec.rounded_rstd, offset=spec.offset,
        affine=triton_dtype(spec.affine), output=triton_dtype(spec.output), x=triton_dtype(like.dtype),
        weight=_dtype(weight), bias=_dtype(bias), gate=_dtype(gate), residual=residual,
    )  # fmt: skip
    return fitted(replace(generated, **flags), card_of(like.device))


def _gradient_spec(
    by_stream: Maybe, s: Tensor, weight: Maybe, bias: Maybe, gate: Maybe, spec: NormSpec, asked: Iterable[str]
) -> NormKernelSpec:
    """asked: the gradients that are wanted, by argument: "By_x" say."""
    flags = {name.lower(): True for name in asked}
    return _kernel_spec(s, weight, bias, gate, spec, residual=by_stream is not None, **flags)


def _terms(x: Tensor, residual: Maybe) -> tuple[str, str] | None:
    if residual is None or residual.dtype == x.dtype:
        return None
    return triton_dtype(x.dtype), triton_dtype(residual.dtype)


def _dtype(tensor: Maybe) -> str:
    return "" if tensor is None else triton_dtype(tensor.dtype)


def _vectors(weight: Maybe, bias: Maybe) -> dict[str, Tensor]:
    return {name: one.contiguous() for name, one in (("Weight", weight), ("Bias", bias)) if one is not None}


def _permuted(tensor: Tensor, axes: Sequence[int]) -> Tensor:
    return tensor if list(axes) == sorted(axes) else tensor.permute(*axes, -1)


# --- bytes -------------------------------------------------------------------------------------------------------


def forward_workspace(x: Tensor, residual: Maybe, gate: Maybe, spec: NormSpec) -> int:
    """Bytes that `forward` and bringing its results to x's layout hold at their peak, less the results: copies.

    None of what is dense and lies as x does. (Vectors [H] and statistics are not counted.)
    """
    largest = x.numel() * max(spec.output.itemsize, sum_dtype(x, residual).itemsize * (residual is not None))
    return max(_copied_bytes(_Rows.of(x), (x, residual, gate)), 0 if _is_dense(x) else largest)


def backward_workspace(
    upstream: Tensor,
    by_stream: Maybe,
    s: Tensor,
    weight: Maybe,
    bias: Maybe,
    gate: Maybe,
    spec: NormSpec,
    wanted: Sequence[bool],
) -> int:
    """The same of `gradients`: copies, what long rows need summed first, and each program's part of sums over rows."""
    asked = _asked((s, weight, bias, gate), wanted)
    if not asked:
        return 0
    rows, generated = _Rows.of(s), _gradient_spec(by_stream, s, weight, bias, gate, spec, asked)
    config = _config(backward_kernel(generated), generated, s)
    programs = _programs(generated, rows, config, count_blocks(rows.width, config.tile("COLUMNS")))
    numbers = (generated.by_weight + generated.by_bias) * programs * rows.width
    if generated.long and generated.by_x:
        numbers += rows.count * (2 if generated.kind == "layer" else 1)
    largest = max([s.nbytes * generated.by_x, 0 if gate is None else gate.nbytes * generated.by_gate])
    held = 4 * numbers + _copied_bytes(rows, (upstream, by_stream, s, gate))
    return max(held, 0 if _is_dense(s) else largest)


def _copied_bytes(rows: _Rows, tensors: Iterable[Maybe]) -> int:
    return sum(one.nbytes for one in tensors if one is not None and rows.spacing(one) is None)


def _is_dense(tensor: Tensor) -> bool:
    """Whether results that are written in the order of its rows have the strides of ``torch.empty_like`` of it."""
    rows = _Rows.of(tensor)
    made = torch.empty((*rows.sizes, rows.width), device="meta")
    return rows.back(made).stride() == torch.empty_like(tensor, device="meta").stride()


@dataclass(frozen=True)
class _Rows:
    """The rows of tensors of one shape [..., H], numbered as those of `like` lie in memory.

    order: the axes before the last, that of the largest stride first.
    """

    like: Tensor
    order: tuple[int, ...]

    @classmethod
    def of(cls, like: Tensor) -> _Rows:
        axes, strides = range(like.dim() - 1), like.stride()
        return cls(like, tuple(axes if like.is_contiguous() else sorted(axes, key=strides.__getitem__, reverse=True)))

    @property
    def width(self) -> int:
        return self.like.shape[-1]

    @property
    def sizes(self) -> list[int]:
        """Of the axes before the last, in order."""
        return [self.like.shape[axis] for axis in self.order]

    @property
    def count(self) -> int:
        return math.prod(self.sizes)

    def new(self, width: int, dtype: torch.dtype) -> Tensor:
        """An uninitialized tensor of `width` values a row, its axes in order."""
        return uninitialized((*self.sizes, width), dtype, self.like)

    def back(self, tensor: Tensor) -> Tensor:
        """A tensor made by `new` with its axes as `like` has them."""
        return _permuted(tensor, sorted(range(len(self.order)), key=self.order.__getitem__))

    def in_order(self, tensor: Tensor) -> Tensor:
        """A dense copy with its axes in order, or the tensor itself where it is one."""
        return _permuted(tensor, self.order).contiguous()

    def read(self, tensors: Mapping[str, Maybe]) -> dict[str, Any]:
        """Those that there are, or copies, by name, and the distances between their rows; the number of rows."""
        found: dict[str, Any] = {"rows": self.count}
        for name, tensor in tensors.items():
            if tensor is not None:
                spaced = self.spacing(tensor)
                found[name] = tensor if spaced is not None else self.in_order(tensor)
                found[f"{name.lower()}_stride"] = self.width if spaced is None else spaced
        return found

    def spacing(self, tensor: Tensor) -> int | None:
        """The distance between rows, where it is one number and the values of a row are adjacent."""
        if self.width > 1 and tensor.stride(-1) != 1:
            return None
        axes = [axis for axis in self.order if tensor.shape[axis] != 1]
        for outer, inner in itertools.pairwise(axes):
            if tensor.stride(outer) != tensor.stride(inner) * tensor.shape[inner]:
                return None
        return tensor.stride(axes[-1]) if axes else self.width
