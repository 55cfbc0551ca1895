"""Kernels of attention as models of today have it, compiled by ``fxopt kernels``: heads, masks and score programs."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

from fxopt.kernels.attention import (
    backward_kv_kernel,
    backward_pairs_kernel,
    backward_q_kernel,
    delta_kernel,
    forward_kernel,
    query_tiles_kernel,
    slots_by_kernel,
)
from fxopt.kernels.attention_configs import configs, grain_of, row_config, tiles_config
from fxopt.kernels.attention_spec import AttentionKernelSpec
from fxopt.kernels.cards import Card
from fxopt.kernels.catalog import Shipped
from fxopt.kernels.configs import Config
from fxopt.kernels.source import Kernel
from fxopt.score.program import Program
from fxopt.score.term import apply, constant, load, variable

__all__ = ["shipped"]

_STRIDES = ("_b", "_h", "_s")
"""How arguments end that are strides of whole heads, which 16 divides."""


def shipped(card: Card) -> Iterator[Shipped]:
    """Kernels of common heads, masks and programs, with the configurations that are tried on `card`."""
    for name, spec in _representatives():
        kernels = [forward_kernel(spec), backward_q_kernel(spec, True), backward_kv_kernel(spec, True, True)]
        kernels += [backward_pairs_kernel(spec, slot) for slot in slots_by_kernel(spec, [True] * len(spec.captures))[2]]
        for kernel in kernels:
            yield _shipped(name, kernel, configs(kernel.name, spec, card), _STRIDES)
    for dtype, width in (("bf16", 64), ("bf16", 128), ("bf16", 256), ("fp32", 128)):
        kernel = delta_kernel(AttentionKernelSpec(dtype, 16, width, 1.0))
        yield _shipped(f"{dtype} {width}", kernel, [row_config(width, card)], _STRIDES)
    for name, spreads in (("documents", False), ("documents, rows without keys see all", True)):
        yield _shipped(name, query_tiles_kernel(spreads), [tiles_config(grain_of(card))])


def _shipped(name: str, kernel: Kernel, tried: Sequence[Config], strides: tuple[str, ...] = ()) -> Shipped:
    aligned = [one for one, kind in kernel.signature if kind[0] == "*" or (strides and one.endswith(strides))]
    return Shipped(f"{kernel.name} {name}", kernel, tuple(tried), tuple(aligned))


def _representatives() -> Iterator[tuple[str, AttentionKernelSpec]]:
    """Plain ones; then masks and programs at the head dims of models that have them: Gemma 2 (256 and a softcap),
    DeepSeek's MLA (192 and 128), gpt-oss (64, a window and a sink), T5 (64 and a learned bias)."""
    for dtype, sizes in (("bf16", (64, 80, 96, 128, 256)), ("fp16", (128,)), ("fp32", (64, 128))):
        for size in sizes:
            yield f"{dtype} {size} causal", AttentionKernelSpec(dtype, size, size, size**-0.5, upper=0)
    half = functools.partial(AttentionKernelSpec, "bf16")
    bf16 = functools.partial(half, 128, 128, 128**-0.5)
    yield "bf16 128 documents", bf16(intervals=True)
    yield "bf16 128 window sink", bf16(lower=-127, upper=0, sink="bf16")
    yield "bf16 128 dropout", bf16(upper=0, dropout=0.1)
    s, h, q, k = (variable(name) for name in "shqk")
    capped = str(Program(apply("mul", apply("tanh", apply("div", s, constant(50.0))), constant(50.0))))
    yield "bf16 128 softcap", bf16(upper=0, program=capped)
    biased = str(Program(apply("add", s, load(0, (constant(0), h, q, k), "float"))))
    yield "bf16 64 learned bias", half(64, 64, 1.0, program=biased, captures=("*bf16",))
    yield "bf16 256 softcap", half(256, 256, 0.0625, program=capped, upper=0)
    yield "bf16 256 softcap documents", half(256, 256, 0.0625, program=capped, intervals=True)
    yield "bf16 192/128 causal", half(192, 128, 192**-0.5, upper=0)
    yield "bf16 64 window sink", half(64, 64, 0.125, lower=-127, upper=0, sink="bf16")
