"""A norm as the operator and as plain PyTorch computes it."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fxopt.ops.norm import NormSpec, norm
from gpu.layouts import LAYOUTS, USUAL
from gpu.problem import DTYPES, Outputs, Tensors, normal

NAMES = ("x", "residual", "weight", "bias", "gate")
MOST = 2**22
"""Numbers in x."""

VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    # in the style of: which of weight, bias, gate there are; what differs from a norm without casts, "low" x's dtype
    "N1 llama": ("w", {"compute": "float32"}),
    "N2 olmo2": ("w", {"normalized": "float32", "affine": "float32"}),
    "N3 gemma": ("w", {"normalized": "float32", "affine": "float32", "offset": 1.0}),
    "N4 weightless": ("", {"normalized": "float32", "affine": "float32"}),
    "N5 t5": ("w", {"eps": 1e-6}),
    "N6 rounded": ("w", {"rounded_rstd": True}),
    "N7 centred": ("w", {"kind": "layer", "normalized": "float32", "affine": "float32"}),
    "N8 layer norm": ("wb", {"kind": "layer", "normalized": "float32", "affine": "float32"}),
    "N9 bare layer norm": ("", {"kind": "layer", "normalized": "float32", "affine": "float32"}),
    "N10 rms_norm": ("w", {"eps": None, "normalized": "float32", "affine": "float32"}),
    "N11 gated": ("wg", {"normalized": "low", "affine": "low"}),
    "eps beside the root": ("w", {"eps_at": "root", "eps": 0.05}),
    "eps as a floor": ("w", {"eps_at": "floor", "eps": 0.9}),
    "wide output": ("wb", {"output": "float32", "affine": "float32"}),
}


@dataclass(frozen=True)
class NormCase:
    """What a call is made of; frozen: the names of inputs that want no gradient, joined."""

    variant: str = "N1 llama"
    dtype: str = "bfloat16"
    weights: str = ""
    rows: int = 128
    width: int = 64
    residual: bool = False
    layout: str = "as drawn"
    frozen: str = ""
    seed: int = 0

    def spec(self) -> NormSpec:
        """The constants of the operator."""
        low = DTYPES[self.dtype]
        plain = NormSpec("rms", 1e-5, "square", torch.float32, low, False, 0.0, low, low)
        changes = {
            name: DTYPES.get(str(value), low) if name in ("compute", "normalized", "affine", "output") else value
            for name, value in VARIANTS[self.variant][1].items()
        }
        return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


class NormProblem:
    """The tensors of a case: x [rows, width], and where there are such, residual, weight, bias and gate."""

    def __init__(self, case: NormCase, device: str, lowering: str) -> None:
        self.case, self.device, self.lowering, self.spec = case, device, lowering, case.spec()
        self.dtype = DTYPES[case.dtype]
        parts = VARIANTS[case.variant][0] + ("r" if case.residual else "")
        self.tensors = self._drawn(parts)

    def _drawn(self, parts: str) -> Tensors:
        case, found = self.case, {}
        for at, name in enumerate(NAMES):
            if name == "x" or name[0] in parts:
                vector = name in ("weight", "bias")
                dtype = DTYPES[case.weights or case.dtype] if vector else self.dtype
                shape = (case.width,) if vector else (case.rows, case.width)
                one = normal(shape, case.seed + at, dtype, self.device)
                found[name] = one if vector else LAYOUTS[case.layout](one)
        return {name: one.requires_grad_(name not in case.frozen.split()) for name, one in found.items()}

    def ours(self, tensors: Tensors) -> Outputs:
        named = {name: tensors.get(name) for name in NAMES}
        found = norm(**named, spec=self.spec, lowering=self.lowering)  # type: ignore[arg-type]
        return tuple(one for one in found if one is not None)

    def eager(self, tensors: Tensors) -> Outputs:
        return formula(tensors, self.spec)

    def exact(self, tensors: Tensors) -> Outputs:
        wide = torch.float64
        eps = torch.finfo(self.spec.compute).eps if self.spec.eps is None else self.spec.eps
        widened = dataclasses.replace(self.spec, compute=wide, normalized=wide, affine=wide, output=wide, eps=eps)
        return formula(tensors, widened)


def formula(tensors: Tensors, spec: NormSpec) -> Outputs:
    """The result, and the sum where there is a residual, as a model would write them; tests compare with it too."""
    x, residual, weight, bias, gate = map(tensors.get, NAMES)
    assert x is not None
    s = x if residual is None else x + residual
    d = s.to(spec.compute)
    d = d - d.mean(-1, keepdim=True) if spec.kind == "layer" else d
    eps = torch.finfo(spec.compute).eps if spec.eps is None else spec.eps
    if spec.eps_at == "square":
        rstd = torch.rsqrt(d.pow(2).mean(-1, keepdim=True) + eps)
    else:
        root = torch.linalg.vector_norm(d, dim=-1, keepdim=True) / d.shape[-1] ** 0.5
        rstd = 1 / (root + eps if spec.eps_at == "root" else root.clamp_min(eps))
    a = d.to(spec.normalized) * rstd.to(spec.normalized) if spec.rounded_rstd else (d * rstd).to(spec.normalized)
    a = a.to(spec.affine)
    if weight is not None:
        a = a * (weight.to(spec.affine) + spec.offset)
    if bias is not None:
        a = a + bias.to(spec.affine)
    if gate is not None:
        a = a.to(spec.compute) * F.silu(gate.to(spec.compute))
    return (a.to(spec.output),) if residual is None else (a.to(spec.output), s)


def drawn(number: int, seed: int, tiny: bool) -> NormCase:
    """The case of a number, the same for equal seeds; the variants take turns."""
    draw = random.Random(f"norm {seed} {number}")
    width = draw.choice((8, 40)) if tiny else draw.choice(
        (8, 24, 64, 80, 127, 128, 576, 1000, 1024, 2048, 2560, 4096, 5120, 8192, 12288, 16384, 32768, 65536)
    )  # fmt: skip
    rows = draw.choice((3, 9) if tiny else (2, 3, 33, 128, 257, 1000, 4096))
    dtype = draw.choice(("bfloat16", "bfloat16", "bfloat16", "float16", "float32"))
    return NormCase(
        variant=list(VARIANTS)[number % len(VARIANTS)], dtype=dtype, weights=draw.choice(("", "", "float32")),
        rows=max(1, min(rows, MOST // width)), width=width, residual=draw.random() < 0.5,
        layout=draw.choice(("as drawn", *USUAL)), frozen=draw.choice(("", "", "", "weight bias", "x residual")),
        seed=1000 * number,
    )  # fmt: skip
