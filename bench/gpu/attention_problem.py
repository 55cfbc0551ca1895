"""Attention as the operator and as plain PyTorch computes it."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from fxopt.ops.attention import attention
from fxopt.ops.dropout_bits import keep_bits
from fxopt.ops.key_intervals import key_intervals
from fxopt.score.program import Program
from gpu.attention_parts import MASKS, SCORES, Mask, default_scale, mask
from gpu.layouts import LAYOUTS, USUAL
from gpu.problem import DTYPES, Outputs, Tensors, normal

SCORE_BYTES = 2**26
"""Of the fp64 reference's scores: it holds ten such tensors, and as many processes as there are cores do so at once."""

_FAN = ((1, 1), (2, 2), (3, 1), (1, 4), (2, 4), (1, 8), (4, 2))
_SIZES = (1, 17, 64, 127, 128, 129, 200, 256, 333, 512, 777, 1024)
_WIDTHS = ((32, 32), (64, 64), (64, 64), (80, 80), (96, 96), (128, 128), (128, 128), (192, 128), (256, 256), (128, 64))


@dataclass(frozen=True)
class AttentionCase:
    """What a call is made of; frozen: the names of inputs that want no gradient, joined."""

    dtype: str = "bfloat16"
    batch: int = 1
    heads: int = 8
    key_heads: int = 8
    queries: int = 128
    keys: int = 128
    depth: int = 64
    width: int = 64
    mask: str = "causal"
    window: int = 64
    score: str = "none"
    sink: bool = False
    dropout: float = 0.0
    empty: str = "zero"
    layout: str = "as drawn"
    heads_last: bool = True
    frozen: str = ""
    seed: int = 0


class AttentionProblem:
    """The tensors of a case: q, k, v, and where there are such, sink and capture."""

    def __init__(self, case: AttentionCase, device: str, lowering: str) -> None:
        self.case, self.device, self.lowering = case, device, lowering
        self.dtype, self.score = DTYPES[case.dtype], SCORES[case.score]
        self.tensors = self._drawn()
        slots = 1 if self.score.shape else 0
        self.mask: Mask = mask(
            case.mask, case.batch, case.queries, case.keys, case.window, slots, device, case.seed + 7
        )  # fmt: skip
        self.scale = default_scale(case.depth)
        self.options = self._options()

    def _drawn(self) -> Tensors:
        """Laid out as projections leave them, or as the case says."""
        case, found = self.case, {}
        shapes = {
            "q": (case.heads, case.queries, case.depth),
            "k": (case.key_heads, case.keys, case.depth),
            "v": (case.key_heads, case.keys, case.width),
        }
        for at, (name, (heads, length, width)) in enumerate(shapes.items()):
            one = normal((case.batch, length, heads, width), case.seed + at, self.dtype, self.device).transpose(1, 2)
            found[name] = LAYOUTS[case.layout](one)
        if case.sink:
            found["sink"] = normal((case.heads,), case.seed + 4, self.dtype, self.device)
        if self.score.shape:
            shape = self.score.shape(case.batch, case.heads, case.queries, case.keys)
            found["capture"] = normal(shape, case.seed + 5, self.dtype, self.device)
        frozen = case.frozen.split()
        return {name: one.requires_grad_(name not in frozen) for name, one in found.items()}

    def _options(self) -> dict[str, object]:
        case, mask = self.case, self.mask
        options: dict[str, object] = {
            "lower": mask.lower, "upper": mask.upper, "empty": case.empty, "heads_last": case.heads_last,
            "program": "" if case.score == "none" else str(Program(self.score.term)),
            "predicate": "" if mask.predicate is None else str(mask.predicate), "lowering": self.lowering,
        }  # fmt: skip
        if mask.intervals:
            options["intervals"] = key_intervals(
                batch=case.batch, queries=case.queries, keys=case.keys, lower=mask.lower, upper=mask.upper,
                **mask.intervals,
            )  # fmt: skip
        if case.dropout:
            options |= {"dropout": case.dropout, "seed": torch.tensor(case.seed, device=self.device)}
        return options

    def allowed(self) -> Tensor:
        """bool, broadcastable to [B, H, Sq, Sk]."""
        case = self.case
        return self.mask.allowed(case.batch, case.heads, case.queries, case.keys, self.device)

    def ours(self, tensors: Tensors) -> Outputs:
        captures = [*([tensors["capture"]] if "capture" in tensors else []), *self.mask.captures]
        named = {name: tensors[name] for name in ("q", "k", "v", "sink") if name in tensors}
        return (attention(**named, captures=captures, scale=self.scale, **self.options),)  # type: ignore[arg-type]

    def eager(self, tensors: Tensors) -> Outputs:
        """As models write it: softmax in fp32 (fp64 for fp64), all else in the inputs' dtype."""
        q, k, v, empty = *(tensors[name] for name in "qkv"), self.case.empty
        k, v = (one.repeat_interleave(q.shape[1] // k.shape[1], 1) for one in (k, v))
        s = self.score.plain(q @ k.mT * self.scale, *([tensors["capture"]] if "capture" in tensors else []))
        if self.case.mask == "none":
            allowed = some = torch.ones((), dtype=torch.bool, device=s.device)
        else:
            allowed = self.allowed()
            some = allowed.any(-1, keepdim=True)
            s = _masked(s, allowed, some, empty)
        if "sink" in tensors:
            s = torch.cat([s, tensors["sink"][:, None, None].to(s.dtype).expand(*s.shape[:-1], 1)], -1)
        p = s.softmax(-1, dtype=torch.promote_types(s.dtype, torch.float32)).to(v.dtype)[..., : k.shape[2]]
        if empty == "zero" or "sink" in tensors:
            p = p * some
        return ((self._dropped(p) if self.case.dropout else p) @ v,)

    exact = eager

    def _dropped(self, p: Tensor) -> Tensor:
        """With what our operator drops set to 0."""
        spans = [slice(0, size) for size in p.shape]
        seed = torch.tensor(self.case.seed, device=self.device)
        kept = keep_bits(seed, self.case.dropout, *spans) != 0
        return p * kept / (1 - self.case.dropout)


def _masked(s: Tensor, allowed: Tensor, some: Tensor, empty: str) -> Tensor:
    """Scores of what is not allowed replaced, as models with rows without keys of the kind `empty` do."""
    low = torch.finfo(s.dtype).min
    if empty == "uniform":
        return torch.where(allowed, s, low)
    if empty == "uniform+":
        return s + torch.zeros_like(s).masked_fill(~allowed, low)
    return s.masked_fill(~(allowed | ~some), -math.inf)


def drawn(number: int, seed: int, tiny: bool) -> AttentionCase:
    """The case of a number, the same for equal seeds; masks and programs take turns, so that few cases have all."""
    draw = random.Random(f"attention {seed} {number}")
    key_heads, group = draw.choice(_FAN)
    depth, width = draw.choice(((16, 16), (32, 16)) if tiny else _WIDTHS)
    mask = MASKS[number % len(MASKS)]
    queries = draw.choice((17, 33) if tiny else _SIZES)
    equal = mask == "documents" or draw.random() < 0.7
    keys = queries if equal else draw.choice((20, 33) if tiny else _SIZES[1:])
    batch = 1 if tiny else draw.choice((1, 2, 3))
    while batch * key_heads * group * queries * keys * 8 > SCORE_BYTES:
        batch, key_heads = max(1, batch // 2), max(1, key_heads // 2)
        queries, keys = (queries, keys) if batch * key_heads > 1 else (queries // 2, keys // 2)
    dropout = draw.choice((0.0, 0.0, 0.0, 0.0, 0.1))
    return AttentionCase(
        dtype=draw.choice(("bfloat16", "bfloat16", "bfloat16", "float16", "float32")),
        batch=batch, heads=key_heads * group, key_heads=key_heads, queries=queries, keys=keys, depth=depth, width=width,
        mask=mask, window=draw.choice((4, 60, 128, 200)),
        score=list(SCORES)[number * 3 % len(SCORES)] if draw.random() < 0.6 else "none",
        sink=draw.random() < 0.2, dropout=dropout,
        empty="zero" if dropout else draw.choice(("zero", "zero", "uniform", "uniform+")),
        layout=draw.choice(("as drawn", *USUAL)), heads_last=draw.random() < 0.7,
        frozen=draw.choice(("", "", "", "", "q", "k v", "v", "sink capture")), seed=1000 * number,
    )  # fmt: skip
