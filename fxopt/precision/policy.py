"""Which operators compute in 16 bits and which in fp32: ``options={"precision": ...}``, parsed, and the table.

Three classes. "low": products, which are faster on 16-bit inputs and accumulate in fp32. "fp32": sums over many
entries, losses and functions that lose their digits in 16 bits. "follow": pointwise operators and movements, in what
they are given.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch

from fxopt.errors import OptionError, nearest

__all__ = ["LOW_ARGUMENTS", "Policy", "matches", "operator_name", "short_name"]

Class = Literal["low", "fp32", "follow"]
CLASSES: tuple[str, ...] = get_args(Class)

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "half": torch.float16,
}
COMPUTE = ("bf16", "fp16")

_LOW = """
    linear matmul mm mv bmm addmm addmv addbmm baddbmm chain_matmul linalg_multi_dot einsum bilinear
    conv1d conv2d conv3d convolution _convolution conv_tbc conv_transpose1d conv_transpose2d conv_transpose3d
    scaled_dot_product_attention
"""
_FP32 = """
    softmax _softmax special_softmax log_softmax _log_softmax special_log_softmax logsumexp
    layer_norm native_layer_norm rms_norm group_norm native_group_norm instance_norm batch_norm native_batch_norm
    _native_batch_norm_legit cosine_similarity
    sum mean var std var_mean std_mean prod cumsum cumprod logcumsumexp trace nansum nanmean
    norm linalg_norm linalg_vector_norm linalg_matrix_norm frobenius_norm nuclear_norm renorm dist cdist pdist
    cross_entropy_loss nll_loss nll_loss_nd nll_loss2d mse_loss l1_loss smooth_l1_loss huber_loss kl_div
    binary_cross_entropy binary_cross_entropy_with_logits soft_margin_loss multi_margin_loss multilabel_margin_loss
    multilabel_soft_margin_loss hinge_embedding_loss margin_ranking_loss triplet_margin_loss cosine_embedding_loss
    poisson_nll_loss gaussian_nll_loss ctc_loss
    scatter_add index_add index_reduce scatter_reduce log_sigmoid
    pow exp exp2 expm1 log log2 log10 log1p rsqrt sqrt reciprocal softplus logit erfinv
    cos sin tan acos asin cosh sinh atan2
    polar complex view_as_complex view_as_real angle igamma igammac lgamma digamma polygamma i0
"""
_FOLLOW = """
    alias clone contiguous detach to type_as lift_fresh lift_fresh_copy expand expand_as view view_as reshape
    reshape_as _unsafe_view flatten unflatten ravel transpose permute t mT mH numpy_T movedim moveaxis swapaxes swapdims
    unsqueeze squeeze select slice narrow split split_with_sizes tensor_split chunk unbind hsplit vsplit dsplit
    diagonal unfold as_strided cat concat concatenate stack hstack vstack dstack repeat repeat_interleave tile roll flip
    rot90 pad constant_pad_nd index index_select gather take take_along_dim masked_select embedding where masked_fill
    masked_scatter scatter index_put index_copy index_fill slice_scatter select_scatter diagonal_scatter
    tril triu diag diag_embed one_hot meshgrid broadcast_to broadcast_tensors
    dropout native_dropout alpha_dropout feature_dropout bernoulli
    empty_like zeros_like ones_like full_like rand_like randn_like new_empty new_zeros new_ones new_full
    new_empty_strided
    topk sort argsort argmax argmin max min amax amin maximum minimum any all eq ne
    max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
    adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d pixel_shuffle pixel_unshuffle
    upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d upsample_bicubic2d
    glu scalar_tensor item _local_scalar_dense is_nonzero numel sym_size
"""
"""What takes and gives any dtype and sums nothing: movements, choices, pools. Pointwise operators, which torch tags,
need no mention. What is in none of the lists computes in fp32: many of the rest have no kernel for 16 bits."""

TABLE: Mapping[str, Class] = {
    **{f"aten::{name}": "low" for name in _LOW.split()},
    **{f"aten::{name}": "fp32" for name in _FP32.split()},
    **{f"aten::{name}": "follow" for name in _FOLLOW.split()},
}
"""Operators by name, all overloads alike. As autocast has it on CUDA (torch/amp docs), and
by its reasons for what autocast has no row for."""

LOW_ARGUMENTS: Mapping[str, tuple[str, ...]] = {
    "aten::scaled_dot_product_attention": ("query", "key", "value"),
}
"""What of a "low" operator is cast, where that is not every floating tensor: ``finfo.min`` of an fp32 mask is -inf in
bf16, and a row of them NaN."""


@dataclass(frozen=True)
class Policy:
    """What ``options={"precision": ...}`` asks for.

    compute:   dtype of the "low" operators, bf16 or fp16.
    residual:  dtype of the residual stream: fp32, or `compute`, which halves what its activations take.
    keep_fp32: shell patterns of module paths ("lm_head", "*.router"), which keep the dtypes they have without a
               precision; a pattern stands for the modules inside as well.
    ops:       (operator, class) that override the table, as in ``{"aten.silu": "fp32"}``.
    """

    compute: torch.dtype
    residual: torch.dtype = torch.float32
    keep_fp32: tuple[str, ...] = ()
    ops: tuple[tuple[str, Class], ...] = field(default=())

    @classmethod
    def parse(cls, given: Any) -> Policy | None:
        """`given` as the option has it: None, "bf16", "fp16", or a dict of the fields. Raises `OptionError`."""
        if given is None or isinstance(given, Policy):
            return given
        values = dict(given) if isinstance(given, Mapping) else {"compute": given}
        known = ("compute", "residual", "keep_fp32", "ops")
        for key in values:
            if key not in known:
                raise OptionError(f"option precision has no {key!r}{nearest(key, known)}. It has: {', '.join(known)}.")
        if "compute" not in values:
            raise OptionError("option precision says no 'compute': say {'compute': 'bf16', ...} or 'fp16'.")
        compute = _dtype("compute", values["compute"], COMPUTE)
        residual = _dtype("residual", values.get("residual", "fp32"), ("fp32", short_name(compute)))
        return cls(compute, residual, _patterns(values.get("keep_fp32", ())), _overrides(values.get("ops", {})))

    def class_of(self, target: Any) -> Class | None:
        """The class of operator `target`, an overload; None for one of another package than torch, unless `ops` names
        it; of what is no operator: "follow"."""
        name = operator_name(target)
        chosen = dict(self.ops).get(name) or TABLE.get(name)
        if chosen is not None or not name:
            return chosen or "follow"
        space, base = name.split("::")
        if space not in ("aten", "prims"):
            return None
        if base.startswith("special_"):  # most have no kernel in 16 bits, forward or backward
            return "fp32"
        return "follow" if torch.Tag.pointwise in target.tags else "fp32"

    def as_option(self) -> dict[str, Any]:
        """What ``options={"precision": ...}`` would say, in plain values."""
        return {
            "compute": short_name(self.compute), "residual": short_name(self.residual),
            "keep_fp32": list(self.keep_fp32),
            "ops": {name.replace("::", "."): chosen for name, chosen in self.ops},
        }  # fmt: skip

    def keeps(self, *paths: str) -> str | None:
        """The first pattern of `keep_fp32` that one of the `paths` of a module matches; None for none."""
        return next((one for one in self.keep_fp32 if any(matches(one, path) for path in paths)), None)

    def __str__(self) -> str:
        """Words for a report."""
        kept = f", {', '.join(self.keep_fp32)} kept" if self.keep_fp32 else ""
        return f"{short_name(self.compute)} (residual stream {short_name(self.residual)}{kept})"


def operator_name(target: Any) -> str:
    """ "aten::linear" for any overload of it; "" for what is no operator."""
    schema = getattr(target, "_schema", None)
    return "" if schema is None else str(schema.name)


def matches(pattern: str, path: str) -> bool:
    """Whether module `path` or one it lies in is meant by `pattern`."""
    return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path, f"{pattern}.*")


def short_name(dtype: torch.dtype) -> str:
    """ "bf16"; of dtypes that no policy has, "float64"."""
    return next((name for name, one in DTYPES.items() if one == dtype), str(dtype).removeprefix("torch."))


def _dtype(key: str, given: Any, allowed: Sequence[str]) -> torch.dtype:
    dtype = given if isinstance(given, torch.dtype) else DTYPES.get(str(given))
    if dtype not in [DTYPES[name] for name in allowed]:
        raise OptionError(
            f"option precision: {key}={given!r}{nearest(given, allowed)} is none of {', '.join(allowed)}."
        )
    return dtype


def _patterns(given: Any) -> tuple[str, ...]:
    if isinstance(given, str) or not isinstance(given, list | tuple | set | frozenset):
        raise OptionError(
            f"option precision: keep_fp32={given!r} must be a list of module paths, for example keep_fp32=[{given!r}]."
        )
    for one in given:
        if not isinstance(one, str) or not one:
            raise OptionError(
                f"option precision: keep_fp32 holds {one!r}, which is no module path such as 'lm_head' or '*.router'."
            )
    return tuple(given)


def _overrides(given: Any) -> tuple[tuple[str, Class], ...]:
    if not isinstance(given, Mapping):
        raise OptionError(
            f"option precision: ops={given!r} must be a dict from operator to class: {{'aten.silu': 'fp32'}}."
        )
    found = []
    for written, chosen in given.items():
        if chosen not in CLASSES:
            raise OptionError(
                f"option precision: ops: {written!r} is {chosen!r}{nearest(chosen, CLASSES)}, not low, fp32 or follow."
            )
        found.append((_operator(str(written)), chosen))
    return tuple(found)


def _operator(written: str) -> str:
    """ "aten::silu" from "aten.silu", "silu" or an overload's "aten.silu.default". Raises `OptionError`."""
    parts = written.replace("::", ".").removeprefix("torch.ops.").split(".")
    space, name = (parts[0], parts[1]) if len(parts) > 1 else ("aten", parts[0])
    if not hasattr(getattr(torch.ops, space), name):
        names = [one.split("::")[1] for one in TABLE] + dir(torch.ops.aten)
        raise OptionError(f"option precision: ops: torch has no operator {space}.{name}{nearest(name, names)}.")
    return f"{space}::{name}"
