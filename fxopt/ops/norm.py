"""RMS and layer norms over the last axis, in any of the ways models write them, with the residual add before them."""

from __future__ import annotations

from torch import Tensor

from fxopt.ops.launch import check_lowering
from fxopt.ops.norm_formulas import EPS_AT, KINDS, NormSpec
from fxopt.ops.norm_operator import FORWARD

__all__ = ["NormSpec", "norm"]


def norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    spec: NormSpec,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    lowering: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Normalise the rows of ``x + residual``, scale and shift them, and multiply by ``silu(gate)``.

    Args:
        x: [..., H], of any strides and floating dtype.
        weight, bias: [H], of any floating dtype, or None.
        spec: which norm, its eps, and where it rounds to which dtype; formulas in `fxopt.ops.norm_formulas`.
        residual: x's shape and any floating dtype, or None.
        gate: x's shape and any floating dtype, or None.
        lowering: "auto" (Triton kernels on CUDA, else ATen), "aten", or "interpret" (`fxopt.ops.launch`).

    Returns:
        The result [..., H] in ``spec.output``, and ``x + residual`` in the wider of both dtypes (None without a
        residual), both with the strides of ``torch.empty_like(x)``.

    Raises:
        ValueError, TypeError: for shapes, dtypes or constants that do not fit.
        RuntimeError: for "interpret" where triton compiles, and in the backward, if it is to be differentiated again
            (``create_graph=True``).

    Ambient autocast is not looked at: cast the arguments, or say so in `spec`.
    """
    check_lowering(lowering)
    _check_spec(spec)
    _check_tensors(x, weight, bias, residual, gate)
    out, stream, _, _ = FORWARD(
        x, residual, weight, bias, gate, spec.kind, spec.eps, spec.eps_at, spec.compute, spec.normalized,
        spec.rounded_rstd, spec.offset, spec.affine, spec.output, lowering,
    )  # fmt: skip
    return out, None if residual is None else stream


def _check_spec(spec: NormSpec) -> None:
    if spec.kind not in KINDS or spec.eps_at not in EPS_AT:
        raise ValueError(
            f"kind is one of {', '.join(KINDS)}, eps_at of {', '.join(EPS_AT)}: not {spec.kind!r}, {spec.eps_at!r}"
        )
    if spec.compute.itemsize < 4:
        raise ValueError(f"statistics are computed in float32 or float64, not {spec.compute}")
    for dtype in (spec.compute, spec.normalized, spec.affine, spec.output):
        if not dtype.is_floating_point:
            raise TypeError(f"a norm has floating dtypes only, not {dtype}")


def _check_tensors(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, gate: Tensor | None
) -> None:
    if x.dim() == 0:
        raise ValueError("x is a scalar: there is no axis to normalise")
    for name, one in (("weight", weight), ("bias", bias)):
        if one is not None and (one.dim() != 1 or one.shape[0] != x.shape[-1]):
            raise ValueError(f"{name} must be [{x.shape[-1]}], not {list(one.shape)}")
    for name, one in (("residual", residual), ("gate", gate)):
        if one is not None and one.shape != x.shape:
            raise ValueError(f"{name} must be {list(x.shape)} like x, not {list(one.shape)}")
    for one in (x, residual, weight, bias, gate):
        if one is not None and not one.dtype.is_floating_point:
            raise TypeError(f"a norm is of floating dtypes only, not {one.dtype}")
