"""Who else computes attention: torch's SDPA backends, FlexAttention, and the formula compiled."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from gpu.attention_problem import AttentionProblem
from gpu.contender import Maker, Skipped
from gpu.item import Settings
from gpu.problem import Outputs, Tensors

BACKENDS = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa math": SDPBackend.MATH,
}
OF_BATCH = ("documents", "padding", "rows", "lengths", "prefix", "dense")
"""Masks that differ between rows of the batch."""


def makers(problem: AttentionProblem, settings: Settings) -> dict[str, Maker]:
    """Ours first."""
    found: dict[str, Maker] = {
        "fxopt": lambda: torch.compile(problem.ours, backend=settings.compiler),
        **{name: (lambda backend=backend: sdpa(problem, backend)) for name, backend in BACKENDS.items()},  # type: ignore[misc]
        "flex": lambda: flex(problem, settings),
        "inductor": lambda: torch.compile(problem.eager, backend=settings.compiler),
    }
    if settings.interpret:
        del found["sdpa cudnn"], found["sdpa efficient"]  # of GPUs only
    return found


def sdpa(problem: AttentionProblem, backend: SDPBackend) -> Callable[[Tensors], Outputs]:
    """`scaled_dot_product_attention` on one backend, with a mask tensor where there is no other way to say it."""
    case = problem.case
    if case.sink or case.score not in ("none", "bias", "alibi"):
        raise Skipped(f"SDPA has no {'sink' if case.sink else case.score}")
    causal = case.mask == "causal" and case.queries == case.keys and case.score == "none"
    dense = None if causal or case.mask == "none" else problem.allowed()
    grouped = case.heads != case.key_heads
    repeats = grouped and backend == SDPBackend.EFFICIENT_ATTENTION  # which has no enable_gqa

    def call(tensors: Tensors) -> Outputs:
        q, k, v = (tensors[name] for name in "qkv")
        if repeats:
            k, v = (one.repeat_interleave(case.heads // case.key_heads, 1) for one in (k, v))
        mask = _mask_tensor(problem, tensors, dense)
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(
                q, k, v, mask, is_causal=causal, scale=problem.scale, enable_gqa=grouped and not repeats
            )  # fmt: skip
        return (out,)

    _try(call, problem.tensors)
    return call


def _try(call: Callable[[Tensors], Outputs], tensors: Tensors) -> None:
    """Raise `Skipped` with the backend's own reasons, which it gives as warnings, where it does not take the case."""
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        try:
            call(tensors)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reasons = [str(one.message).split(" (Triggered")[0] for one in given] or [str(error)]
            raise Skipped("; ".join(reasons)[-300:]) from error


def _mask_tensor(problem: AttentionProblem, tensors: Tensors, dense: Tensor | None) -> Tensor | None:
    """bool, or of floats where something is added to the scores."""
    if "capture" not in tensors:
        return dense
    case, capture = problem.case, tensors["capture"]
    zeros = torch.zeros(1, case.heads, case.queries, case.keys, dtype=capture.dtype, device=capture.device)
    added = problem.score.plain(zeros, capture)
    return added if dense is None else added.masked_fill(~dense, -torch.inf)


def flex(problem: AttentionProblem, settings: Settings) -> Callable[[Tensors], Outputs]:
    """FlexAttention, compiled; its block mask is made here, once, as our key intervals are."""
    case, element = problem.case, problem.score.element
    if element is None:
        raise Skipped(f"{case.score} is not written for FlexAttention")
    blocks = None
    if case.mask != "none":
        batch = case.batch if case.mask in OF_BATCH else None
        blocks = create_block_mask(problem.mask.rule, batch, None, case.queries, case.keys, device=problem.device)
    score, grouped = element, case.heads != case.key_heads

    def call(tensors: Tensors) -> Outputs:
        captures = [tensors["capture"]] if "capture" in tensors else []
        out, lse = flex_attention(
            tensors["q"], tensors["k"], tensors["v"], lambda s, b, h, q, k: score(s, b, h, q, k, *captures), blocks,
            problem.scale, grouped, return_lse=True,
        )  # fmt: skip
        if "sink" in tensors:
            out = out * torch.sigmoid(lse - tensors["sink"][:, None])[..., None].to(out.dtype)
        return (out,)

    return call if settings.interpret else torch.compile(call, dynamic=False)
