"""RMS and layer norms, in the ways models write them, -> one op, with the residual add before it.

Of the norms that transformers 5.23 writes by hand, 138 are one function (`rms_weight_after_cast`); the others are two
dozen more, which differ in where they cast, where eps stands and what is multiplied when. The op keeps all of that.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxopt.effects import mutated_arguments, storage_of
from fxopt.fake import value_of
from fxopt.ops.launch import kernels_on, runs_triton
from fxopt.ops.norm import NormSpec, norm
from fxopt.ops.norm_formulas import sum_dtype
from fxopt.ops.norm_launch import can_compute
from fxopt.ops.products import accumulate_dtype
from fxopt.rewrite import illegal
from fxopt.rule import Cost, Draw, Pattern, Site

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Form:
    """What tells the spellings apart: with the dtypes of a site, a `NormSpec`.

    wide:       "float32" or "kernel" (at least float32) where x is computed with in that. A spelling without casts
                rounds to x's dtype at every step, the op at the last of them: the normalised value.
    normalized: dtype to which the normalised value is cast before the weight: "x", or "weight" if that is narrow.
    weight:     "float32" where the weight is cast to that; "plus one" where one is added in its own dtype.
    output:     "x" where the result is cast to x's dtype.
    gate_first: whether x, not the result, is multiplied by silu(gate).
    row_eps:    whether eps bounds the length of the row, which is sqrt(width) times its root mean square.
    """

    kind: str = "rms"
    wide: str = ""
    normalized: str = ""
    rounded_rstd: bool = False
    weight: str = ""
    offset: float = 0.0
    output: str = ""
    gate_first: bool = False
    eps_at: str = "square"
    row_eps: bool = False

    def spec(self, x: torch.dtype, weight: Tensor | None, bias: Tensor | None, eps: float | None) -> NormSpec:
        """The norm of rows of dtype `x`, which is that of the sum where there is one."""
        compute = torch.float32 if self.wide == "float32" else accumulate_dtype(x)
        normalized = compute if self.wide else x
        if self.normalized == "x" or (self.normalized and weight is not None and weight.dtype.itemsize < 4):
            normalized = x if self.normalized == "x" or weight is None else weight.dtype
        factors = [torch.float32 if self.weight == "float32" else weight.dtype] if weight is not None else []
        affine = functools.reduce(torch.promote_types, [*factors, *([] if bias is None else [bias.dtype])], normalized)
        output = x if self.output else affine
        return NormSpec(
            self.kind, eps, self.eps_at, compute, normalized, self.rounded_rstd, self.offset, affine, output
        )


def replacement(
    *,
    x: Tensor,
    form: Form,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    eps: float | None = None,
    residual: Tensor | None = None,
    output: torch.dtype | None = None,
    contiguous: bool = False,
    lowering: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """The norm in one op, and the new residual stream where there is a `residual` to add.

    output: the result's dtype, where `form` does not say. contiguous: whether results are, whatever x is.
    lowering: how the op is computed (`fxopt.ops.launch`).
    """
    if form.weight == "plus one":
        weight = None if weight is None else weight + 1
    if form.row_eps and eps is not None:
        eps = eps / x.shape[-1] ** 0.5
    spec = form.spec(sum_dtype(x, residual), weight, bias, eps)
    if output is not None:
        spec = dataclasses.replace(spec, output=output)
    x = x.contiguous() if contiguous else x
    if form.gate_first and gate is not None:
        x, gate = x.to(torch.float32) * F.silu(gate.to(torch.float32)), None
    out, stream = norm(x, weight, bias, spec=spec, residual=residual, gate=gate, lowering=lowering)
    return out if stream is None else (out, stream)


def extend(site: Site) -> Site:
    """Take in the residual add that makes x, whose sum stays as the second result, and the cast that rounds the first.

    Where the wider site may not be rewritten as one, the narrow one is kept.
    """
    site = _with_rounding(_with_output(site))
    total = site.inputs["x"]
    if site.inputs["form"].gate_first or "contiguous" in site.inputs or not _is_residual_add(total):
        return site
    order = {node: index for index, node in enumerate(total.graph.nodes)}
    if min(total.users, key=order.__getitem__) not in site.nodes:
        return site  # the norm that reads the sum first takes it in: sites may not overlap
    wider = dataclasses.replace(
        site,
        outputs=(*site.outputs, total),
        nodes=(total, *site.nodes),
        inputs=site.inputs | {"x": total.args[0], "residual": total.args[1]},
        detail=f"{site.detail}, with the add before it",
    )
    return site if [*illegal(wider, order, may_defer=False), *_surprises(wider)] else wider


def objections(site: Site) -> Iterator[str]:
    """Every reason to leave the norm alone."""
    values = {name: site.value(name) for name in ("x", "weight", "bias", "gate") if name in site.inputs}
    for name, value in values.items():
        if not value.dtype.is_floating_point:
            yield f"{_named(site, name)}: only floating point is normalised"
    if len({value.device for value in values.values()}) > 1:
        yield f"{' and '.join(_named(site, name) for name in values)} are on several devices"
    eps = site.inputs.get("eps")
    if eps is not None and type(eps) not in (int, float):
        yield f"eps is {getattr(eps, 'name', eps)}, a value of the graph, not a number"
    elif site.inputs["form"].row_eps and type(values["x"].shape[-1]) is not int:
        yield f"the width of {_named(site, 'x')} is not known, and eps depends on it"
    else:
        yield from _surprises(site)
    yield from _written_later(site)
    yield from _costs(site)


def computed(site: Site) -> str:
    """By kernels or by ATen."""
    return kernels_on(site.value("x").device) if _has_kernels(site) else "by ATen, a step at a time"


def _has_kernels(site: Site) -> bool:
    names = ("residual", "weight", "bias", "gate")
    x, (residual, weight, bias, gate) = site.value("x"), (_value(site, name) for name in names)
    spec = site.inputs["form"].spec(sum_dtype(x, residual), weight, bias, None)
    return runs_triton(x, site.lowering) and can_compute(x, residual, weight, bias, gate, spec)


def _value(site: Site, name: str) -> Any:
    return site.value(name) if name in site.inputs else None


def _costs(site: Site) -> Iterator[Cost]:
    """Where the op is computed by ATen: Inductor's fused norm is what a generated kernel is, and ATen is not."""
    if _has_kernels(site):
        return
    x = site.value("x")
    if x.device.type == "cpu":
        yield Cost(
            "Inductor fuses this norm as well on a CPU (bench/norm.py: the op of fxopt takes 2 to 7 times as long)"
        )
    else:
        yield Cost(
            f"Inductor fuses this norm as well, and for {str(x.dtype).removeprefix('torch.')} on {x.device.type} with "
            f"kernels={site.lowering!r} fxopt has no kernel of its own"
        )


def _surprises(site: Site) -> Iterator[str]:
    """Where the op would give another dtype or layout than the graph has: autocast, or an unusual x."""
    x, form = site.value("x"), site.inputs["form"]
    total, values = sum_dtype(x, _value(site, "residual")), [_value(site, name) for name in ("weight", "bias")]
    dtype = site.inputs.get("output", form.spec(total, *values, None).output)
    strides = _strides(x.new_empty(x.shape) if "contiguous" in site.inputs else torch.empty_like(x))
    for node, expected in zip(site.outputs, (dtype, total), strict=False):
        value = value_of(node)
        if value.dtype != expected:
            yield f"{node.name} is {value.dtype}, and would be {expected}"
        if _strides(value) != strides:
            yield f"{node.name} has strides {list(value.stride())}, and would have {strides}"


def _written_later(site: Site) -> Iterator[str]:
    """In-place writes to what the op keeps for the backward; a spelling that casts x first keeps a copy."""
    kept = [site.outputs[-1] if "residual" in site.inputs else site.inputs["x"]]
    kept += [site.inputs[name] for name in ("weight", "bias", "gate") if name in site.inputs]
    memory = {storage_of(value_of(node)) for node in kept} - {None}
    node = site.anchor.next
    while node.op != "output":
        if any(storage_of(value_of(written)) in memory for written in mutated_arguments(node)):
            yield f"{node.name} ({node.target}) writes in place to what the op would keep for the backward"
        node = node.next


def _with_output(site: Site) -> Site:
    """Note on the site what a kernel chose: fp32 under autocast, or contiguous results for an x that is not."""
    x, out, noted = site.value("x"), value_of(site.anchor), dict[str, Any]()
    if site.inputs["form"].wide == "kernel":
        noted["output"] = out.dtype
    if _strides(out) != _strides(torch.empty_like(x)) and _strides(out) == _strides(x.new_empty(x.shape)):
        noted["contiguous"] = True
    return dataclasses.replace(site, inputs=site.inputs | noted)


def _with_rounding(site: Site) -> Site:
    """With the cast of an fp32 result to 16 bits, where nothing else reads that result: a kernel rounds at no cost."""
    out, readers = site.anchor, list(site.anchor.users)
    if len(readers) != 1 or readers[0].target is not aten.to.dtype or value_of(out).dtype != torch.float32:
        return site
    rounded = value_of(readers[0])
    if rounded.dtype not in (torch.bfloat16, torch.float16) or _strides(rounded) != _strides(value_of(out)):
        return site
    inputs = site.inputs | {"output": rounded.dtype}
    return dataclasses.replace(site, outputs=(readers[0],), nodes=(*site.nodes, readers[0]), inputs=inputs)


def _is_residual_add(node: Any) -> bool:
    """Whether `node` adds two tensors of its own shape, alike in dtype or one in 16 bits to an fp32 stream."""
    if not isinstance(node, fx.Node) or node.target is not aten.add.Tensor or len(node.args) != 2 or node.kwargs:
        return False
    values = [value_of(item) for item in node.args]
    if not all(isinstance(value, Tensor) and value.dtype.is_floating_point for value in values):
        return False
    if len({value.dtype for value in values}) > 1 and value_of(node).dtype != torch.float32:
        return False
    alike = all(_facts(value) == _facts(value_of(node)) for value in values)
    return alike and sum_dtype(*values) == value_of(node).dtype


def _facts(value: Tensor) -> tuple[str, str]:
    """As text: comparing symbolic sizes by value would install guards."""
    return str(tuple(value.shape)), str(value.device)


def _strides(value: Tensor) -> str:
    return str([str(stride) for size, stride in zip(value.shape, value.stride(), strict=True) if str(size) != "1"])


def _named(site: Site, name: str) -> str:
    value = site.value(name)
    return f"{site.inputs[name].name} ({str(value.dtype).removeprefix('torch.')}{list(value.shape)})"


# --- what users write: RMS norms ---------------------------------------------------------------------------------

Spelling = Callable[..., Tensor]


def rms_weight_after_cast(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Llama, and most others."""
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return weight * h.to(x.dtype)


def rms_weight_before_cast(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """OLMo 2, gpt-oss."""
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return (weight * h).to(x.dtype)


def rms_float_weight(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Gemma 4, Moshi, Nemotron-H."""
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return (h * weight.float()).type_as(x)


def rms_one_plus_weight(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Gemma."""
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return (h * (1.0 + weight.float())).type_as(x)


def rms_promoted(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """T5: a narrow x times an fp32 factor, back to the weight's dtype if that is narrow."""
    h = x * torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + eps)
    return weight * (h.to(weight.dtype) if weight.dtype.itemsize < 4 else h)


def rms_without_weight(x: Tensor, eps: float) -> Tensor:
    """nanochat; Llama 4 before its weight."""
    h = x.float()
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)).type_as(x)


def rms_left_wide(x: Tensor, eps: float) -> Tensor:
    """Grouped norms of Mamba 2, which go back to x's dtype after a view."""
    h = x.float()
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)


def rms_rounded_factor(x: Tensor, eps: float) -> Tensor:
    """DeepSeek V4."""
    return x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps).to(x.dtype)


def rms_then_gate(x: Tensor, weight: Tensor, gate: Tensor, eps: float) -> Tensor:
    """Qwen3-Next."""
    h = x.to(torch.float32)
    h = weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
    return (h * F.silu(gate.to(torch.float32))).to(x.dtype)


def rms_wide_then_gate(x: Tensor, weight: Tensor, gate: Tensor, eps: float) -> Tensor:
    """Qwen3-Next's, with the weight in float32."""
    h = x.to(torch.float32)
    h = weight.to(torch.float32) * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps))
    return (h * F.silu(gate.to(torch.float32))).to(x.dtype)


def gate_then_rms(x: Tensor, weight: Tensor, gate: Tensor, eps: float) -> Tensor:
    """Mamba 2 with one group."""
    h = x.to(torch.float32) * F.silu(gate.to(torch.float32))
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return weight * h.to(x.dtype)


# Without casts; an x that was cast before is the x of these, so that they are what is left for all other casts.


def rms(x: Tensor, eps: float) -> Tensor:
    """ImageGPT, and most tutorials."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def rms_weight_first(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Time embeddings of Gradium Phonon."""
    return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def rms_of_sum(x: Tensor, eps: float) -> Tensor:
    """The mean by hand."""
    return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) / x.shape[-1] + eps)


def rms_of_length(x: Tensor, eps: float) -> Tensor:
    """By vector norm, eps inside the root."""
    return x * torch.rsqrt(x.norm(2, dim=-1, keepdim=True).pow(2) / x.shape[-1] + eps)


def rms_eps_outside(x: Tensor, eps: float) -> Tensor:
    """By vector norm, eps outside the root: the reference code of the paper (arXiv:1910.07467)."""
    return x / (x.norm(2, dim=-1, keepdim=True) * x.shape[-1] ** -0.5 + eps)


def rms_eps_as_floor(x: Tensor, eps: float) -> Tensor:
    """By vector norm, eps as the least divisor: x-transformers, older."""
    return x / (x.norm(dim=-1, keepdim=True) * x.shape[-1] ** -0.5).clamp(min=eps)


def unit_length(x: Tensor, eps: float) -> Tensor:
    """By `normalize`, eps as the least length of the row: x-transformers."""
    return F.normalize(x, dim=-1, eps=eps) * x.shape[-1] ** 0.5


# --- layer norms -------------------------------------------------------------------------------------------------


def layer_wide(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Cohere."""
    h = x.to(torch.float32)
    mean = h.mean(-1, keepdim=True)
    h = (h - mean) * torch.rsqrt((h - mean).pow(2).mean(-1, keepdim=True) + eps)
    return (weight.to(torch.float32) * h).to(x.dtype)


def layer_affine_after_cast(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """DeBERTa."""
    h = x.float()
    mean = h.mean(-1, keepdim=True)
    h = (h - mean) / torch.sqrt((h - mean).pow(2).mean(-1, keepdim=True) + eps)
    return weight * h.to(x.dtype) + bias


def layer(x: Tensor, eps: float) -> Tensor:
    """By hand."""
    mean = x.mean(-1, keepdim=True)
    return (x - mean) * torch.rsqrt((x - mean).pow(2).mean(-1, keepdim=True) + eps)


def layer_by_unbiased(x: Tensor, eps: float) -> Tensor:
    """By `var`, as it was spelled until torch 1.7."""
    return (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, unbiased=False, keepdim=True) + eps)


def layer_by_correction(x: Tensor, eps: float) -> Tensor:
    """By `var`, as it is spelled now."""
    return (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, correction=0, keepdim=True) + eps)


def layer_eps_outside(x: Tensor, eps: float) -> Tensor:
    """By `std`, eps outside the root."""
    return (x - x.mean(-1, keepdim=True)) / (x.std(-1, unbiased=False, keepdim=True) + eps)


# --- torch's own -------------------------------------------------------------------------------------------------


def layer_norm_one_plus_weight(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """VideoPrism."""
    return F.layer_norm(x, x.shape[-1:], weight + 1.0, bias, eps)


def layer_norm(x: Tensor, eps: float) -> Tensor:
    """OLMo."""
    return F.layer_norm(x, x.shape[-1:], eps=eps)


def layer_norm_weight(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`nn.LayerNorm(bias=False)`."""
    return F.layer_norm(x, x.shape[-1:], weight, eps=eps)


def layer_norm_weight_bias(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`nn.LayerNorm`."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """`nn.RMSNorm(elementwise_affine=False)`."""
    return F.rms_norm(x, x.shape[-1:], eps=eps)


def rms_norm_weight(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`nn.RMSNorm`."""
    return F.rms_norm(x, x.shape[-1:], weight, eps)


# Graphs do not write an eps that is the default.


def layer_norm_default(x: Tensor) -> Tensor:
    """OLMo."""
    return F.layer_norm(x, x.shape[-1:])


def layer_norm_weight_default(x: Tensor, weight: Tensor) -> Tensor:
    """`nn.LayerNorm(bias=False)`."""
    return F.layer_norm(x, x.shape[-1:], weight)


def layer_norm_weight_bias_default(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`nn.LayerNorm`."""
    return F.layer_norm(x, x.shape[-1:], weight, bias)


def layer_norm_one_plus_weight_default(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Nemotron."""
    return F.layer_norm(x, x.shape[-1:], weight + 1.0, bias)


def rms_norm_default(x: Tensor) -> Tensor:
    """`nn.RMSNorm(elementwise_affine=False)`: the default eps is that of fp32, for bf16 and fp16 too."""
    return F.rms_norm(x, x.shape[-1:])


def rms_norm_weight_default(x: Tensor, weight: Tensor) -> Tensor:
    """`nn.RMSNorm`."""
    return F.rms_norm(x, x.shape[-1:], weight)


# --- all of them -------------------------------------------------------------------------------------------------


def times_weight(core: Spelling) -> Spelling:
    """`core` and a weight."""

    def spelling(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return weight * core(x, eps)

    spelling.__name__ = f"{core.__name__}_weight"
    return spelling


def times_weight_plus_bias(core: Spelling) -> Spelling:
    """`core`, a weight and a bias."""

    def spelling(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return weight * core(x, eps) + bias

    spelling.__name__ = f"{core.__name__}_weight_bias"
    return spelling


def on_rows(spelling: Spelling) -> Spelling:
    """`spelling`, raising ValueError where what is multiplied or added is no weight or bias of the width of x.

    What raises does not match; the norm without that weight still may.
    """

    @functools.wraps(spelling)
    def checked(**values: Any) -> Tensor:
        x = values["x"]
        if x.dim() == 0:
            raise ValueError("`x` is a scalar")
        for name, shape in (("weight", x.shape[-1:]), ("bias", x.shape[-1:]), ("gate", x.shape)):
            if name in values and str(tuple(values[name].shape)) != str(tuple(shape)):
                raise ValueError(f"`{name}` is {list(values[name].shape)}, not {list(shape)}")
        return spelling(**values)

    return checked


_KERNELS = {kind: Form(kind, wide="kernel", output="x") for kind in ("rms", "layer")}
_CORES: dict[Spelling, Form] = {
    rms: Form(),
    rms_of_sum: Form(),
    rms_of_length: Form(),
    rms_eps_outside: Form(eps_at="root"),
    rms_eps_as_floor: Form(eps_at="floor"),
    unit_length: Form(eps_at="floor", row_eps=True),
    rms_rounded_factor: Form(normalized="x", rounded_rstd=True),
    layer: Form("layer"),
    layer_by_unbiased: Form("layer"),
    layer_by_correction: Form("layer"),
    layer_eps_outside: Form("layer", eps_at="root"),
}
_FORMS: dict[Spelling, Form] = {
    rms_weight_after_cast: Form(wide="float32", normalized="x"),
    rms_weight_before_cast: Form(wide="float32", output="x"),
    rms_float_weight: Form(wide="float32", weight="float32", output="x"),
    rms_one_plus_weight: Form(wide="float32", weight="float32", offset=1.0, output="x"),
    rms_promoted: Form(wide="float32", normalized="weight"),
    rms_without_weight: Form(wide="float32", normalized="x"),
    rms_left_wide: Form(wide="float32"),
    times_weight(rms_left_wide): Form(wide="float32"),
    rms_weight_first: Form(),
    rms_then_gate: Form(wide="float32", normalized="x", output="x"),
    rms_wide_then_gate: Form(wide="float32", weight="float32", output="x"),
    gate_then_rms: Form(wide="float32", normalized="x", gate_first=True),
    layer_wide: Form("layer", wide="float32", weight="float32", output="x"),
    layer_affine_after_cast: Form("layer", wide="float32", normalized="x"),
    layer_norm_one_plus_weight: dataclasses.replace(_KERNELS["layer"], weight="plus one"),
    layer_norm: _KERNELS["layer"],
    layer_norm_weight: _KERNELS["layer"],
    layer_norm_weight_bias: _KERNELS["layer"],
    rms_norm: _KERNELS["rms"],
    rms_norm_weight: _KERNELS["rms"],
    rms_norm_default: _KERNELS["rms"],
    rms_norm_weight_default: _KERNELS["rms"],
    **_CORES,
    **{times_weight(core): form for core, form in _CORES.items()},
    **{times_weight_plus_bias(core): form for core, form in _CORES.items() if form.kind == "layer"},
}
_DEFAULTS: dict[Spelling, Form] = {
    layer_norm_default: _KERNELS["layer"],
    layer_norm_weight_default: _KERNELS["layer"],
    layer_norm_weight_bias_default: _KERNELS["layer"],
    layer_norm_one_plus_weight_default: dataclasses.replace(_KERNELS["layer"], weight="plus one"),
}
GIVEN: dict[Spelling, dict[str, Any]] = {
    **{on_rows(spelling): {"form": form} for spelling, form in _FORMS.items()},
    **{on_rows(spelling): {"form": form, "eps": 1e-5} for spelling, form in _DEFAULTS.items()},
}
"""Every spelling, with what the replacement is told about it."""


def inputs(draw: Draw) -> dict[str, Any]:
    """x and a gate [B, T, H], weight and bias [H], eps.

    Rows have 8 values or more: the gradient of a row of one or two is a difference of equals, which no order of
    operations gets right to more than a few digits.
    """
    dtype = draw.choice(torch.float32, torch.bfloat16, torch.float16)
    shape = draw.size(1, 2), draw.size(1, 4), draw.size(8, 24)
    factor = draw.choice(torch.float32, dtype)
    return {
        "x": draw.tensor(*shape, dtype=dtype),
        "gate": draw.tensor(*shape, dtype=dtype),
        "weight": draw.tensor(shape[-1], dtype=factor),
        "bias": draw.tensor(shape[-1], dtype=factor),
        "eps": draw.choice(1e-5, 1e-6, 0.1),
    }


RULE = Pattern(
    name="norm",
    spellings=tuple(GIVEN),
    given=GIVEN,
    replacement=replacement,
    objections=objections,
    computed=computed,
    extend=extend,
    inputs=inputs,
)
