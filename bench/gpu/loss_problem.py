"""A linear layer under cross-entropy as the operator and as plain PyTorch computes it."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fxopt.ops.linear_cross_entropy import linear_cross_entropy
from gpu.layouts import LAYOUTS, USUAL
from gpu.problem import DTYPES, Outputs, Tensors, normal

MOST = 2**23
"""Logits, which the references hold."""


@dataclass(frozen=True)
class LossCase:
    """What a call is made of. spread: standard deviation of the logits; ignored: share of the targets. frozen: the
    names of inputs that want no gradient, joined."""

    dtype: str = "bfloat16"
    rows: int = 128
    width: int = 64
    classes: int = 1000
    bias: bool = False
    scale: float = 1.0
    softcap: float | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    recompute: bool | None = None
    reduction: str = "mean"
    ignored: float = 0.0
    ignore_index: int = -100
    spread: float = 1.0
    layout: str = "as drawn"
    frozen: str = ""
    seed: int = 0


class LossProblem:
    """The tensors of a case: hidden [rows, width], weight [classes, width], target [rows], and bias or none."""

    def __init__(self, case: LossCase, device: str, lowering: str) -> None:
        self.case, self.device, self.lowering = case, device, lowering
        self.dtype = DTYPES[case.dtype]
        self.tensors = self._drawn()

    def _drawn(self) -> Tensors:
        case = self.case
        hidden = normal((case.rows, case.width), case.seed, self.dtype, self.device)
        weight = normal((case.classes, case.width), case.seed + 1, self.dtype, self.device)
        weight *= case.spread * case.width**-0.5
        found = {"hidden": LAYOUTS[case.layout](hidden), "weight": weight, "target": self._target()}
        if case.layout != "far":  # which is of two rows
            found["weight"] = LAYOUTS[case.layout](weight)
        if case.bias:
            found["bias"] = normal((case.classes,), case.seed + 2, self.dtype, self.device)
        for name, one in found.items():
            one.requires_grad_(one.is_floating_point() and name not in case.frozen.split())
        return found

    def _target(self) -> torch.Tensor:
        """Some ignored, the first never: a mean over nothing is NaN."""
        case = self.case
        generator = torch.Generator(self.device).manual_seed(case.seed + 3)
        drawn = torch.randint(case.classes, (case.rows,), generator=generator, device=self.device)
        skipped = torch.rand(case.rows, generator=generator, device=self.device) < case.ignored
        skipped[0] = False
        drawn[0] = case.classes - 1
        return drawn.masked_fill(skipped, case.ignore_index)

    def ours(self, tensors: Tensors) -> Outputs:
        case = self.case
        names = ("scale", "softcap", "z_loss", "recompute")
        options = {name: getattr(case, name) for name in names} | self._options() | {"lowering": self.lowering}
        found = linear_cross_entropy(
            tensors["hidden"], tensors["weight"], tensors.get("bias"), tensors["target"],
            **options,
        )  # fmt: skip
        return (found,)

    def eager(self, tensors: Tensors) -> Outputs:
        """With logits, as models write it: scale and cap in the dtype of the logits, all after that in fp32."""
        case = self.case
        logits = F.linear(tensors["hidden"], tensors["weight"], tensors.get("bias"))
        logits = logits * case.scale if case.scale != 1 else logits
        if case.softcap is not None:
            logits = case.softcap * torch.tanh(logits / case.softcap)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = F.cross_entropy(logits, tensors["target"], **self._options())  # type: ignore[arg-type]
        return (loss + self._z_loss(logits, tensors["target"]) if case.z_loss else loss,)

    exact = eager

    def _z_loss(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """z_loss times the squared logsumexp of the rows that are not ignored, reduced as the loss is."""
        counted = target != self.case.ignore_index
        squares = self.case.z_loss * logits.logsumexp(-1).square() * counted
        if self.case.reduction == "none":
            return squares
        return squares.sum() / (counted.sum() if self.case.reduction == "mean" else 1)

    def _options(self) -> dict[str, object]:
        names = ("label_smoothing", "reduction", "ignore_index")
        return {name: getattr(self.case, name) for name in names}


def drawn(number: int, seed: int, tiny: bool) -> LossCase:
    """The case of a number, the same for equal seeds; reductions and frozen inputs take turns."""
    draw = random.Random(f"loss {seed} {number}")
    classes = draw.choice((57, 100) if tiny else (7, 57, 1000, 4096, 5003, 32000, 50257, 128256))
    rows = draw.choice((17, 33) if tiny else (33, 128, 257, 500, 1000, 2048))
    return LossCase(
        dtype=draw.choice(("bfloat16", "bfloat16", "bfloat16", "float16", "float32")),
        rows=min(rows, max(33, MOST // classes)),
        width=draw.choice((24, 40) if tiny else (8, 64, 80, 128, 576, 1024, 2304)), classes=classes,
        bias=draw.random() < 0.3, scale=draw.choice((1.0, 1.0, 0.3, -2.0)),
        softcap=draw.choice((None, None, 5.0, 30.0)),
        label_smoothing=draw.choice((0.0, 0.0, 0.1)), z_loss=draw.choice((0.0, 0.0, 0.0, 1e-3)),
        recompute=draw.choice((None, None, True, False)), reduction=("mean", "sum", "none")[number % 3],
        ignored=draw.choice((0.0, 0.4)), ignore_index=draw.choice((-100, 0)), spread=draw.choice((1.0, 5.0)),
        layout=draw.choice(("as drawn", *USUAL)), frozen=("", "", "weight", "hidden", "bias")[number % 5],
        seed=1000 * number,
    )  # fmt: skip
