"""Inductor's attention patterns, which miscompile a softmax over another axis, and no others stay off our graphs."""

import concurrent.futures

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.fx_passes import joint_graph

import fxopt
from fxopt import compat


def other_axis(q, k, v):
    """It reads as attention, and its softmax runs over the queries."""
    return (q @ k.mT / 2.0).softmax(-2) @ v


def attention(q, k, v):
    return (q @ k.mT / 2.0).softmax(-1) @ v


def inputs(training=True):
    return [torch.randn(2, 4, 16, 8, requires_grad=training) for _ in "qkv"]


def results(fn, given):
    """The output and, where anything needs them, the gradients of a sum in which no two entries weigh the same."""
    out = fn(*given)
    if not out.requires_grad:
        return [out]
    weights = torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).view_as(out)
    return [out, *torch.autograd.grad((out * weights).sum(), given)]


def attention_entries(whole):
    """The entries of a pass that are attention's, by the name that torch 2.13 gives each."""
    return [entry for entry in every(whole) if str(getattr(entry, "pattern_name", "")).startswith("_sfdp_")]


def every(whole):
    return [entry for entries in whole.patterns.values() for entry in entries]


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("plain_first", [False, True], ids=["fxopt first", "Inductor first"])
@pytest.mark.fault("wildcarded constants")
def test_a_softmax_over_another_axis_is_compiled_right(training, plain_first):
    given = inputs(training)
    if plain_first:
        torch.compile(other_axis, backend="inductor")(*given)
        torch.compiler.reset()
    counters.clear()
    exact = results(other_axis, [value.detach().double().requires_grad_(training) for value in given])
    eager = results(other_axis, given)
    for ours, theirs, truth in zip(
        results(torch.compile(other_axis, backend="fxopt"), given), eager, exact, strict=True
    ):
        floor = 2 * torch.finfo(torch.float32).eps * truth.norm()
        assert (ours.double() - truth).norm() <= 2 * (theirs.double() - truth).norm() + floor
    assert not fxopt.reports()[-1].graphs[0].notes
    assert counters["inductor"]["fuse_attention"] == 0
    assert counters["inductor"]["pattern_matcher_count"] > 0, "the rest of the pattern matcher is on"


def test_inductor_keeps_its_patterns():
    torch.compile(other_axis, backend="fxopt")(*inputs())
    registered = len(attention_entries(joint_graph.patterns))
    assert registered > 0
    for backend, fused in (("inductor", True), ("fxopt", False), ("inductor", True)):
        torch.compiler.reset()
        counters.clear()
        torch.compile(attention, backend=backend)(*inputs())
        assert (counters["inductor"]["fuse_attention"] > 0) == fused
    assert len(attention_entries(joint_graph.patterns)) == registered


def test_all_other_patterns_are_left():
    torch.compile(other_axis, backend="fxopt")(*inputs())
    whole = joint_graph.patterns
    left = every(compat.without_attention(whole))
    assert [entry for entry in every(whole) if entry not in left] == attention_entries(whole)
    assert len(left) > 10, "views, casts, softmax and padding"
    second = joint_graph.pass_patterns[1]
    assert compat.without_attention(second).patterns == second.patterns


@pytest.mark.fault("concurrent compiles")
def test_another_threads_compilation_is_not_touched():
    def seen():
        return compat._ATTENTION_OFF.get()

    with compat.attention_patterns_off(), concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert seen()
        assert not pool.submit(seen).result()
    assert not seen()
