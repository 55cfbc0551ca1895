"""Calls of attention of every kind, and the same written out in PyTorch, compared by the fp64 rule."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
from hypothesis import strategies as st
from torch import Tensor

from fxopt.ops import flash_tiles, score_tiles
from fxopt.ops.attention import attention
from fxopt.ops.key_intervals import key_intervals
from fxopt.score.program import Program
from fxopt.score.term import Term, apply, cast_to, constant, load, variable
from fxopt.testing import layouts
from fxopt.testing.compare import Step, compare
from fxopt.testing.interval_masks import dense

FEW = 64
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
S, B, H, Q, K = (variable(name) for name in "sbhqk")


# --- what the operator stands for --------------------------------------------------------------------------------


def written_out(
    q: Tensor, k: Tensor, v: Tensor, *, allowed: Tensor, scale: float, sink: Tensor | None = None,
    score: Callable[[Tensor], Tensor] = lambda s: s, empty: str = "zero", keep: tuple[Tensor, float] | None = None,
) -> Tensor:  # fmt: skip
    """Attention as models write it: softmax in fp32, all else in q's dtype; `keep` is dropout's mask and factor."""
    k, v = (one.repeat_interleave(q.shape[1] // k.shape[1], 1) for one in (k, v))
    s = score(q @ k.mT * scale)
    low, allowed = torch.finfo(s.dtype).min, allowed.expand(s.shape)
    some = allowed.any(-1, keepdim=True)
    if empty == "uniform":
        s = torch.where(allowed, s, low)
    elif empty == "uniform+":
        s = s + s.new_zeros(s.shape).masked_fill(~allowed, low)
    else:
        s = s.masked_fill(~(allowed | ~some), -math.inf)
    if sink is not None:
        s = torch.cat([s, sink[:, None, None].to(s.dtype).expand(*s.shape[:-1], 1)], -1)
    p = s.softmax(-1, dtype=torch.promote_types(s.dtype, torch.float32)).to(v.dtype)[..., : k.shape[2]]
    if empty == "zero" or sink is not None:
        p = p * some
    return (p if keep is None else p * keep[0] * keep[1]) @ v


class Case:
    """One call of `attention`: tensors, options, and the same in the words of `written_out`."""

    def __init__(self, tensors: dict[str, Tensor], allowed: Tensor, options: dict[str, Any]):
        self.tensors, self.allowed, self.options = tensors, allowed, options
        self.captures: list[Tensor] = []
        self.score: Callable[..., Tensor] = lambda s: s
        self.heads_last = True
        self.keep: tuple[Tensor, float] | None = None

    def __repr__(self) -> str:
        tensors = {**self.tensors, **dict(enumerate(self.captures))}
        said = [f"{name}: {one.dtype} {list(one.shape)} of strides {one.stride()}" for name, one in tensors.items()]
        options = {name: one for name, one in self.options.items() if name != "intervals"}
        return f"Case({', '.join(said)}, {options}, heads_last={self.heads_last})"

    def leaves(self, dtype: torch.dtype | None) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Inputs and captures that require gradients as the case's do, floats in `dtype` if given."""

        def leaf(tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point():
                return tensor
            copy = tensor.detach() if dtype in (None, tensor.dtype) else tensor.detach().to(dtype)
            return copy.requires_grad_(tensor.requires_grad)

        return {name: leaf(one) for name, one in self.tensors.items()}, [leaf(one) for one in self.captures]

    def ours(self, tensors: Mapping[str, Tensor], captures: Sequence[Tensor]) -> Tensor:
        return attention(**tensors, captures=captures, heads_last=self.heads_last, **self.options)

    def eager(self, tensors: Mapping[str, Tensor], captures: Sequence[Tensor]) -> Tensor:
        scale = self.options.get("scale", 1 / math.sqrt(tensors["q"].shape[-1]))
        return written_out(
            **tensors, allowed=self.allowed, scale=scale, empty=self.options.get("empty", "zero"), keep=self.keep,
            score=lambda s: self.score(s, *captures),
        )  # fmt: skip

    def upstream(self, out: Tensor) -> Tensor:
        draw = torch.Generator().manual_seed(1)
        return torch.randn(out.shape, generator=draw, dtype=torch.float64).to(self.tensors["v"].dtype).to(out.dtype)

    def run(self, function: Callable[..., Tensor], dtype: torch.dtype | None = None) -> Step:
        tensors, captures = self.leaves(dtype)
        out = function(tensors, captures)
        if out.requires_grad:
            out.backward(self.upstream(out))
        every = {**tensors, **{f"capture {slot}": one for slot, one in enumerate(captures)}}
        gradients = {name: one.grad for name, one in every.items()}
        return Step(out.detach(), {}, gradients, torch.finfo(self.tensors["q"].dtype).eps)

    def check(self) -> Step:
        """Apply the rule and return the operator's step. Nothing exact holds against fp64: sums of a row may be 64 eps
        off, and those over all rows (gradients of a few numbers) 1024.

        What gradients of a few numbers are in other dtypes eager gets right by luck now and then: see the test of them.
        """
        ours, exact = self.run(self.ours), self.run(self.eager, torch.float64)
        if ours.eps == torch.finfo(torch.float64).eps:
            for name, right in exact.named().items():
                scale = 1.0 if right is None or not right.numel() else max(float(right.abs().max()), 1.0)
                most = 1024 if right is not None and right.numel() < FEW else 64
                torch.testing.assert_close(ours.named()[name], right, rtol=0, atol=most * ours.eps * scale)
        else:
            compare(*(without_few(step) for step in (ours, self.run(self.eager), exact))).check()
        return ours


def without_few(step: Step) -> Step:
    gradients = {name: one for name, one in step.gradients.items() if one is None or one.numel() >= FEW}
    return dataclasses.replace(step, gradients=gradients)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def case(
    batch: int = 2, heads: int = 4, key_heads: int = 2, queries: int = 33, keys: int | None = None, width: int = 8,
    value_width: int | None = None, dtype: torch.dtype = torch.float32, seed: int = 0, **options: Any,
) -> Case:  # fmt: skip
    """Tensors that require gradients, laid out as projections leave them; the band of `options` is in `allowed`."""
    keys = queries if keys is None else keys
    shapes = {"q": (heads, queries, width), "k": (key_heads, keys, width), "v": (key_heads, keys, value_width or width)}
    tensors = {
        name: normal(batch, n, h, d, seed=seed + at, dtype=dtype).transpose(1, 2).requires_grad_()
        for at, (name, (h, n, d)) in enumerate(shapes.items())
    }
    limits = {name: options.get(name) for name in ("lower", "upper")}
    return Case(tensors, dense(1, queries, keys, **limits)[:, None], options)


# --- programs: a term, and the same in PyTorch --------------------------------------------------------------------

DISTANCE = apply("sub", K, Q)


def softcap(s: Tensor | Term, cap: float = 3.0) -> Any:
    if isinstance(s, Term):
        return apply("mul", apply("tanh", apply("div", s, constant(cap))), constant(cap))
    return torch.tanh(s / cap) * cap


def distance(s: Tensor) -> Tensor:
    return torch.arange(s.shape[-1]) - torch.arange(s.shape[-2])[:, None]


def clipped(s: Tensor) -> Tensor:
    return distance(s).clamp(-3, 3) + 3


BUCKET = apply("add", apply("max", apply("min", DISTANCE, constant(3)), constant(-3)), constant(3))
FAR = apply("lt", DISTANCE, constant(-10))

PROGRAMS: dict[str, tuple[Term, Callable[..., Tensor], Callable[[int, int, int, int], tuple[int, ...]] | None]] = {
    # name: (term, function of scores and capture, shape of the capture by batch, heads, queries and keys)
    "identity": (S, lambda s: s, None),
    "affine": (apply("sub", apply("mul", S, constant(0.5)), constant(1.5)), lambda s: s * 0.5 - 1.5, None),
    "negative": (apply("mul", S, constant(-0.7)), lambda s: s * -0.7, None),
    "softcap": (softcap(S), softcap, None),
    "far is weak": (
        apply("where", FAR, apply("mul", S, constant(0.25)), S),
        lambda s: torch.where(distance(s) < -10, s * 0.25, s), None,
    ),
    "alibi": (
        apply("add", S, apply("mul", load(0, (H,), "float"), cast_to("float", DISTANCE))),
        lambda s, slopes: s + slopes[:, None, None] * distance(s).to(s.dtype), lambda b, h, q, k: (h,),
    ),
    "bias": (apply("add", S, load(0, (H, Q, K), "float")), lambda s, c: s + c, lambda b, h, q, k: (h, q, k)),
    "bias of keys": (
        apply("add", S, load(0, (B, constant(0), K), "float")),
        lambda s, c: s + c[:, None], lambda b, h, q, k: (b, 1, k),
    ),
    "bias of rows": (
        apply("add", S, load(0, (Q, H), "float")), lambda s, c: s + c.t()[:, :, None], lambda b, h, q, k: (q, h),
    ),
    "buckets": (
        apply("add", softcap(S), load(0, (BUCKET, H), "float")),
        lambda s, c: softcap(s) + c[clipped(s)].permute(2, 0, 1), lambda b, h, q, k: (7, h),
    ),
    "temperature": (
        apply("mul", S, load(0, (H,), "float")), lambda s, c: s * c[:, None, None], lambda b, h, q, k: (h,),
    ),
    "not of s": (
        apply("mul", load(0, (H, K), "float"), constant(2.0)),
        lambda s, c: (c * 2)[:, None, :] + 0 * s, lambda b, h, q, k: (h, k),
    ),
}  # fmt: skip


def with_program(one: Case, name: str, seed: int = 7, requires_grad: bool = True) -> Case:
    term, score, shape_of = PROGRAMS[name]
    one.options["program"], one.score = Program(term), score
    if shape_of is not None:
        q, k = one.tensors["q"], one.tensors["k"]
        shape = shape_of(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        one.captures = [normal(*shape, seed=seed, dtype=q.dtype).requires_grad_(requires_grad)]
    return one


# --- masks -------------------------------------------------------------------------------------------------------


def with_intervals(one: Case, seed: int = 0, **parts: Tensor) -> Case:
    """The case with the intervals of `parts` and its band."""
    batch, queries, keys = one.tensors["q"].shape[0], one.tensors["q"].shape[2], one.tensors["k"].shape[2]
    sizes = {"batch": batch, "queries": queries, "keys": keys}
    limits = {name: one.options.get(name) for name in ("lower", "upper")}
    one.options["intervals"] = key_intervals(**sizes, **parts, **limits)
    one.allowed = dense(**sizes, **parts, **limits)[:, None]
    if "documents" in parts or "keep" in parts or "prefix" in parts:  # holes, in which the predicate decides
        one.captures.append(one.allowed[:, 0].expand(batch, queries, keys))
        slot = len(one.captures) - 1
        one.options["predicate"] = Program(load(slot, (B, Q, K), "bool"))
        score = one.score
        one.score = lambda s, *captures: score(s, *captures[:-1])
    return one


def by_hash(one: Case) -> Case:
    """The case with a predicate that says no to a fifth of the pairs, others in every head, and to all of some rows."""
    mixed = apply("add", apply("add", apply("mul", Q, constant(7)), apply("mul", K, constant(3))), apply("add", H, B))
    some = apply("ne", apply("mod", mixed, constant(5)), constant(0))
    term = apply("and", some, apply("ne", apply("mod", Q, constant(6)), constant(2)))
    sizes = (one.tensors["q"].shape[0], *one.tensors["q"].shape[1:3], one.tensors["k"].shape[2])
    b, h, q, k = torch.meshgrid(*map(torch.arange, sizes), indexing="ij")
    one.allowed = one.allowed & ((q * 7 + k * 3 + h + b) % 5 != 0) & (q % 6 != 2)
    one.options["predicate"] = Program(term)
    return one


MASKS = ("none", "causal", "window", "right", "documents", "padding", "rows", "lengths", "prefix", "predicate", "ahead")


def masked(name: str, seed: int = 0, **sizes: Any) -> Case:
    """A case under a mask of one of `MASKS`."""
    batch, queries, keys = sizes["batch"], sizes["queries"], sizes["keys"]
    draw = torch.Generator().manual_seed(seed)
    limits = {
        "none": {}, "rows": {}, "window": {"lower": -4, "upper": 0}, "right": {"upper": keys - queries},
        "ahead": {"lower": 2, "upper": 9},
    }.get(name, {"upper": 0})  # fmt: skip
    one = case(seed=seed, **limits, **sizes)
    if name == "documents" and queries == keys:
        return with_intervals(one, documents=torch.randint(0, 3, (batch, keys), generator=draw).sort(1).values)
    if name == "padding":
        return with_intervals(one, keep=torch.rand(batch, keys, generator=draw) < 0.7)
    if name == "rows":
        return with_intervals(one, rows=torch.rand(batch, queries, generator=draw) < 0.7)
    if name == "lengths":
        return with_intervals(one, lengths=torch.randint(0, keys + 1, (batch,), generator=draw))
    if name == "prefix":
        return with_intervals(one, prefix=torch.randint(0, keys + 1, (batch,), generator=draw))
    return by_hash(one) if name == "predicate" else one


@contextlib.contextmanager
def computed(small: bool, flash: bool | None = None) -> Iterator[None]:
    """Within, blocks and parts of 16 rows and fewer, so that small inputs take every loop twice; flash False: never.

    bf16 goes by torch's kernel only where it is small.
    """
    with contextlib.ExitStack() as stack:
        if small:
            sizes = {"BLOCK_BYTES": 6000, "LEAST_ROWS": 16, "MOST_BYTES": 20000}
            stack.enter_context(mock.patch.multiple(score_tiles, **sizes))
            stack.enter_context(mock.patch.multiple(flash_tiles, MASK_BYTES=3000, CUT_ROWS=16, LONG_ROWS=2))
        if flash is False:
            stack.enter_context(mock.patch.object(flash_tiles, "can_compute", return_value=False))
        yield


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {"as projected": lambda t: t, **layouts.LAYOUTS}


@st.composite
def cases(draw: st.DrawFn, dtypes: Sequence[torch.dtype] = DTYPES, small: bool = False) -> Case:
    """Any dtype, layout, mask, program, sink and way of rows without keys; lengths of 1 in fp64.

    small: a third of the tiles, for the interpreter, which takes as long for each; two or three along each axis.
    """
    dtype = draw(st.sampled_from(dtypes))
    exact = dtype == torch.float64  # elsewhere few numbers say nothing about accuracy: eager's are right by luck
    queries = draw(st.sampled_from((1, 2, 33, 70) if exact else (25, 40) if small else (33, 70)))
    keys = draw(st.sampled_from((queries, queries, 1, 50) if exact else (queries, queries, 50)))
    key_heads, group = draw(st.sampled_from(((1, 1), (1, 2), (2, 1)) if small else ((1, 1), (2, 2), (1, 4), (3, 1))))
    width = draw(st.sampled_from((1, 3, 8, 16, 33) if exact else (8, 16, 33)))
    seed, batch = draw(st.integers(0, 2**16)), draw(st.sampled_from((1, 2) if small else (1, 3)))
    one = masked(
        draw(st.sampled_from(MASKS)), seed, batch=batch, heads=key_heads * group,
        key_heads=key_heads, queries=queries, keys=keys, width=width,
        value_width=draw(st.sampled_from((width, width, 5))), dtype=dtype,
    )  # fmt: skip
    for name in ("q", "k", "v"):
        tensor = LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))](one.tensors[name].detach())
        one.tensors[name] = tensor.requires_grad_(draw(st.sampled_from((True, True, True, False))))
    if draw(st.booleans()):
        one.tensors["sink"] = normal(key_heads * group, seed=seed, dtype=dtype).requires_grad_(draw(st.booleans()))
    if not one.captures:
        one = with_program(one, draw(st.sampled_from(sorted(PROGRAMS))), requires_grad=draw(st.booleans()))
    one.options["empty"] = draw(st.sampled_from(("zero", "uniform", "uniform+")))
    one.heads_last = draw(st.booleans())
    return one
