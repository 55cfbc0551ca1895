"""RMS and layer norm over the last axis in ATen, for any device: what `fxopt::norm` computes, in words and in code.

With s = x + residual and c = s in `compute`, for each row of width H, all of it in `compute`:

    m    = mean(c) for "layer", 0 for "rms";  d = c - m;  v = mean(d * d)
    rstd = 1 / sqrt(v + eps)  |  1 / (sqrt(v) + eps)  |  1 / max(sqrt(v), eps)     for eps_at square | root | floor
    n    = d * rstd, rounded to `normalized`  (`rounded_rstd`: both factors are rounded first)
    a    = n * (weight + offset) + bias, in `affine`
    out  = a * silu(gate), the product in at least `compute`, rounded to `output`

The gradient by c, with g that by n, k = 1 for square, sqrt(v) + eps over sqrt(v) for root, sqrt(v) >= eps for floor:

    rstd * (g - [mean(g)] - d * rstd * mean(g * d * rstd) * k)                     mean(g) for "layer" only

which for "square" is Zhang and Sennrich's (2019, arXiv:1910.07467) and Ba et al.'s (2016, arXiv:1607.06450). It holds
for any eps, for d * rstd is not assumed to have unit variance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("rms", "layer")
EPS_AT = ("square", "root", "floor")


@dataclass(frozen=True)
class NormSpec:
    """The constants of a norm, in the order in which the operator takes them; formulas above.

    kind: "rms" or "layer". eps: a number, or None for the machine epsilon of `compute` (as ``F.rms_norm``).
    compute: fp32 or fp64, of the statistics. normalized, affine, output: floating dtypes of the steps after.
    """

    kind: str
    eps: float | None
    eps_at: str
    compute: torch.dtype
    normalized: torch.dtype
    rounded_rstd: bool
    offset: float
    affine: torch.dtype
    output: torch.dtype

    @property
    def gated(self) -> torch.dtype:
        """The dtype of the product with the gate."""
        return torch.promote_types(self.compute, self.affine)

    @property
    def backward(self) -> torch.dtype:
        """The dtype of all arithmetic in the backward: fp64 where any step of the forward is, else fp32."""
        wide = torch.promote_types(torch.promote_types(self.compute, self.affine), self.output)
        return torch.promote_types(torch.float32, wide)

    @property
    def epsilon(self) -> float:
        """`eps` as a number."""
        return torch.finfo(self.compute).eps if self.eps is None else self.eps


def sum_dtype(x: Tensor, residual: Tensor | None) -> torch.dtype:
    """The dtype of ``x + residual``, or of x: of the residual stream after this norm's add."""
    return x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)


def forward(
    s: Tensor, weight: Tensor | None, bias: Tensor | None, gate: Tensor | None, spec: NormSpec
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The result [..., H] in `output`, and rstd and mean [..., 1] in `compute` (no mean for "rms").

    s [..., H] of any floating dtype, weight and bias [H] or None, gate as s or None.
    """
    c = s.to(spec.compute)
    mean = c.mean(-1, keepdim=True) if spec.kind == "layer" else None
    d = c if mean is None else c - mean
    del c  # tensors of x's size are let go of as early as can be: the planner counts them
    rstd = _inverse_scale(_mean_square(d), spec)
    n = _normalized(d, rstd, spec)
    del d
    a = _affine(n, weight, bias, spec)
    del n
    if gate is not None:
        a = a.to(spec.gated) * torch.nn.functional.silu(gate.to(spec.gated))
    return a.to(spec.output), rstd, mean


def gradients(
    upstream: Tensor,
    stream: Tensor | None,
    s: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    rstd: Tensor,
    mean: Tensor | None,
    spec: NormSpec,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients by s, weight, bias and gate, in the dtype of each; None where not `wanted`, or there is no such input.

    upstream, stream: gradients of the result and of s itself (or None), both [..., H]. The normalised values are
    computed again from s. Sums over rows are fp32 (fp64 for fp64) and rounded once.
    """
    dtype, found = spec.backward, [None, None, None, None]  # type: tuple[torch.dtype, list[Tensor | None]]
    g, d = upstream.to(dtype), s.to(spec.compute) if mean is None else s.to(spec.compute) - mean
    follows, unit = _sensitivity(d, rstd, spec), d * rstd
    n = _normalized(d, rstd, spec) if spec.rounded_rstd else unit.to(spec.normalized)
    del d
    if gate is not None:
        slope, silu = _silu(gate.to(dtype))
        if wanted[3]:
            found[3] = (g * _affine(n, weight, bias, spec) * slope).to(gate.dtype)
        g = g * silu
        del slope, silu
    if bias is not None and wanted[2]:
        found[2] = _over_rows(g).to(bias.dtype)
    if weight is not None and wanted[1]:
        found[1] = _over_rows(g * n).to(weight.dtype)
    del n
    if wanted[0]:
        g = g if weight is None else g * _scale(weight, spec).to(dtype)
        found[0] = _by_s(g, unit.to(dtype), follows, rstd.to(dtype), stream, spec).to(s.dtype)
    return found


def _by_s(
    g: Tensor, unit: Tensor, follows: Tensor | float, rstd: Tensor, stream: Tensor | None, spec: NormSpec
) -> Tensor:
    """The formula of the module, `unit` being d * rstd and `follows` k; overwrites `unit`."""
    along = (g * unit).mean(-1, keepdim=True) * follows
    by_s = torch.sub(g, unit.mul_(along))
    if spec.kind == "layer":
        by_s.sub_(g.mean(-1, keepdim=True))
    by_s.mul_(rstd)
    return by_s if stream is None else by_s.add_(stream)


def _sensitivity(d: Tensor, rstd: Tensor, spec: NormSpec) -> Tensor | float:
    """How much rstd follows the row's size, relative to eps_at "square": the k of the formula."""
    if spec.eps_at == "square":
        return 1.0
    root = _mean_square(d).sqrt().to(spec.backward)
    if spec.eps_at == "floor":
        return (root >= spec.epsilon).to(root.dtype)
    return torch.where(
        root == 0, 0.0, 1 / (root * rstd.to(root.dtype))
    )  # as ATen has it, the norm of a zero row has gradient zero


def _mean_square(d: Tensor) -> Tensor:
    return d.square().mean(-1, keepdim=True)


def _inverse_scale(v: Tensor, spec: NormSpec) -> Tensor:
    if spec.eps_at == "square":
        return (v + spec.epsilon).rsqrt()
    root = v.sqrt()
    return (root + spec.epsilon if spec.eps_at == "root" else root.clamp_min(spec.epsilon)).reciprocal()


def _normalized(d: Tensor, rstd: Tensor, spec: NormSpec) -> Tensor:
    if spec.rounded_rstd:
        return d.to(spec.normalized) * rstd.to(spec.normalized)
    return (d * rstd).to(spec.normalized)


def _scale(weight: Tensor, spec: NormSpec) -> Tensor:
    wide = weight.to(spec.affine)
    return wide + spec.offset if spec.offset else wide


def _affine(n: Tensor, weight: Tensor | None, bias: Tensor | None, spec: NormSpec) -> Tensor:
    n = n.to(spec.affine)
    if weight is not None:
        n = n * _scale(weight, spec)
    return n if bias is None else n + bias.to(spec.affine)


def _silu(gate: Tensor) -> tuple[Tensor, Tensor]:
    """The derivative of silu at `gate`, and silu."""
    sigmoid = gate.sigmoid()
    return sigmoid * (1 + gate * (1 - sigmoid)), gate * sigmoid


def _over_rows(values: Tensor) -> Tensor:
    """[..., H] -> [H]. A single row is copied by `sum` too, so that the result is never a view."""
    *rows, width = values.shape
    return values.reshape(math.prod(rows), width).sum(0)
