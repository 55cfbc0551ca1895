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


def forward(s: Tensor, weight: Tensor | None, bias: Tensor | None, gate: Tensor | None, spec: NormSpec
            ) -> tuple[Tensor, Tensor, Tensor | None]:
    """The result [..., H] in `output`, and rstd and mean [..., 1] in `compute` (no mean for "rms").

    s [..., H] of any floating dtype, weight and bias [H] or None, gate as s or None.
    """
    c = s.to(spec.compute)
    mean = c.mean(-1, keepdim=True) if spec.kind == "layer" else None
    d = c if mean is None else c - mean
    rstd = _inverse_scale(_mean_square(d), spec)
    a = _affine(_normalized(d, rstd, spec), weight, bias, spec)
    if gate is not None:
        a = a.to(spec.gated) * torch.nn.functional.silu(gate.to(spec.gated))
    return a.to(spec.output), rstd, mean


def gradients(upstream: Tensor, stream: Tensor | None, s: Tensor, weight: Tensor | None, bias: Tensor | None,
              gate: Tensor | None, rstd: Tensor, mean: Tensor | None, spec: NormSpec,
              wanted: Sequence[bool]) -> list[Tensor | None]:
    """Gradients by s, weight, bias and gate, in the dtype of each; None where not `wanted`, or there is no such input.

    upstream, stream: gradients of the result and of s itself (or None), both [..., H]. The normalised values are
    computed again from s. Sums over rows are fp32 (fp64 for fp64) and rounded once.
    """
    dtype = spec.backward
    g, d, by_gate = upstream.to(dtype), _centred(s, mean, spec), None
    n = _normalized(d, rstd, spec)
    if gate is not None:
        slope, silu = _silu(gate.to(dtype))
        by_gate = (g * _affine(n, weight, bias, spec) * slope).to(gate.dtype) if wanted[3] else None
        g = g * silu
    by_bias = _over_rows(g).to(bias.dtype) if bias is not None and wanted[2] else None
    by_weight = _over_rows(g * n).to(weight.dtype) if weight is not None and wanted[1] else None
    del n
    by_s = None
    if wanted[0]:
        g = g if weight is None else g * _scale(weight, spec).to(dtype)
        by_s = _by_s(g, stream, d.to(dtype), rstd.to(dtype), spec).to(s.dtype)
    return [by_s, by_weight, by_bias, by_gate]


def _by_s(g: Tensor, stream: Tensor | None, d: Tensor, rstd: Tensor, spec: NormSpec) -> Tensor:
    unit = d * rstd
    along = (g * unit).mean(-1, keepdim=True) * _sensitivity(d, rstd, spec)
    by_s = g - unit * along
    if spec.kind == "layer":
        by_s = by_s - g.mean(-1, keepdim=True)
    by_s = by_s * rstd
    return by_s if stream is None else by_s + stream


def _sensitivity(d: Tensor, rstd: Tensor, spec: NormSpec) -> Tensor | float:
    """How much rstd follows the row's size, relative to eps_at "square": the k of the formula."""
    if spec.eps_at == "square":
        return 1.0
    root = _mean_square(d).sqrt()
    if spec.eps_at == "floor":
        return (root >= spec.epsilon).to(root.dtype)
    return torch.where(root == 0, 0.0, 1 / (root * rstd))  # as ATen has it, the norm of a zero row has gradient zero


def _centred(s: Tensor, mean: Tensor | None, spec: NormSpec) -> Tensor:
    c = s.to(spec.compute)
    return c if mean is None else c - mean


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
    a = n.to(spec.affine)
    if weight is not None:
        a = a * _scale(weight, spec)
    return a if bias is None else a + bias.to(spec.affine)


def _silu(gate: Tensor) -> tuple[Tensor, Tensor]:
    """The derivative of silu at `gate`, and silu."""
    sigmoid = gate.sigmoid()
    return sigmoid * (1 + gate * (1 - sigmoid)), gate * sigmoid


def _over_rows(values: Tensor) -> Tensor:
    """[..., H] -> [H]. A single row is copied by `sum` too, so that the result is never a view."""
    return values.reshape(-1, values.shape[-1]).sum(0)
