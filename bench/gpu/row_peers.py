"""Who else computes norms and losses: Inductor, torch's own operators, liger-kernel and cut-cross-entropy."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F

from gpu.contender import Maker, Skipped
from gpu.item import Settings
from gpu.loss_problem import LossProblem
from gpu.norm_problem import NormProblem
from gpu.problem import Outputs, Tensors

LLAMA, LAYER = "N1 llama", "N8 layer norm"
Function = Callable[[Tensors], Outputs]


def norm_makers(problem: NormProblem, settings: Settings) -> dict[str, Maker]:
    """Ours first."""
    return {
        "fxopt": lambda: torch.compile(problem.ours, backend=settings.compiler),
        "inductor": lambda: torch.compile(problem.eager, backend=settings.compiler),
        "torch": lambda: fused_norm(problem),
        "liger": lambda: liger_norm(problem),
    }


def loss_makers(problem: LossProblem, settings: Settings) -> dict[str, Maker]:
    """Ours first, as the cost model chooses, then both of what it chooses from."""

    def fixed(recompute: bool) -> Function:
        other = copy.copy(problem)
        other.case = dataclasses.replace(problem.case, recompute=recompute)
        made: Function = torch.compile(other.ours, backend=settings.compiler)
        return made

    return {
        "fxopt": lambda: torch.compile(problem.ours, backend=settings.compiler),
        "fxopt tiles": lambda: fixed(True),
        "fxopt chunks": lambda: fixed(False),
        "inductor": lambda: torch.compile(problem.eager, backend=settings.compiler),
        "liger": lambda: liger_loss(problem),
        "cce": lambda: cut_loss(problem),
    }


def fused_norm(problem: NormProblem) -> Function:
    """``F.rms_norm`` or ``F.layer_norm`` after the add, uncompiled."""
    eps, layer = problem.spec.epsilon, problem.case.variant == LAYER

    def call(tensors: Tensors) -> Outputs:
        x, weight = tensors["x"], tensors["weight"]
        s = x + tensors["residual"] if "residual" in tensors else x
        if layer:
            out = F.layer_norm(s, weight.shape, weight, tensors["bias"], eps)
        else:
            out = F.rms_norm(s, weight.shape, weight, eps)
        return (out, s) if "residual" in tensors else (out,)

    return call


def liger_norm(problem: NormProblem) -> Function:
    """Liger's norms. Not in place: the upstream gradient that they would overwrite is used again."""
    from liger_kernel.transformers import functional as liger

    if problem.device == "cpu":
        raise Skipped("liger-kernel is of GPUs only")
    eps, variant = problem.spec.epsilon, problem.case.variant

    def call(tensors: Tensors) -> Outputs:
        x, weight, residual = tensors["x"], tensors["weight"], tensors.get("residual")
        if variant == LAYER:
            return (liger.liger_layer_norm(x, weight, tensors["bias"], eps),)
        if residual is None:
            return (liger.liger_rms_norm(x, weight, eps, 0.0, "llama", False),)
        out, s = liger.liger_fused_add_rms_norm(x, residual, weight, eps, 0.0, "llama", False)
        return out, s

    return call


def liger_loss(problem: LossProblem) -> Function:
    """Liger's fused linear cross-entropy, which adds up the weight's gradient in the weight's dtype."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    if problem.device == "cpu":
        raise Skipped("liger-kernel is of GPUs only")
    softcap = problem.case.softcap

    def call(tensors: Tensors) -> Outputs:
        return (
            liger_fused_linear_cross_entropy(tensors["hidden"], tensors["weight"], tensors["target"], softcap=softcap),
        )

    return call


def cut_loss(problem: LossProblem) -> Function:
    """Apple's Cut Cross-Entropy with its default filter, which leaves out small gradients."""
    from cut_cross_entropy import linear_cross_entropy

    if problem.device == "cpu":
        raise Skipped("cut-cross-entropy is of GPUs only")
    softcap = problem.case.softcap

    def call(tensors: Tensors) -> Outputs:
        return (linear_cross_entropy(tensors["hidden"], tensors["weight"], tensors["target"], softcap=softcap),)

    return call
