"""The engine: sites are rewritten where that is legal, refused with a sentence where not, and undone where wrong."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from graphs import captured, targets

import fxopt
from fxopt import NoSite, Pattern, Region, Site
from fxopt.capture import trace
from fxopt.differential import same_function
from fxopt.rewrite import apply_rule
from fxopt.rule import Cost
from fxopt.verify import VerificationError, same_interface

aten = torch.ops.aten


def gelu_by_hand(x, k):
    return x * torch.sigmoid(k * x)


def drawn(draw):
    return {"x": draw.tensor(draw.size(1, 4), 5, dtype=torch.float32), "k": 1.5}


SWISH = Pattern(name="swish", spellings=(gelu_by_hand,), replacement=lambda x, k: F.silu(k * x) / k, inputs=drawn)


def rule(**changes):
    from dataclasses import replace

    return replace(SWISH, **changes)


def applied(fn, *args, rule=SWISH, force=False):
    return apply_rule(rule, captured(fn, *args).module, force=force)


def test_a_pattern_binds_its_constant_and_every_site():
    outcome = applied(lambda x: gelu_by_hand(gelu_by_hand(x, 1.5), 0.5), torch.randn(3, requires_grad=True))
    assert [item.detail for item in outcome.rewrites] == ["gelu by hand"] * 2
    assert targets(outcome.module) == ["aten.mul.Tensor", "aten.silu.default", "aten.div.Tensor"] * 2
    assert [node.args[1] for node in outcome.module.graph.nodes if node.target is aten.div.Tensor] == [1.5, 0.5]


def test_places_name_line_and_module():
    class Block(torch.nn.Module):
        def forward(self, x):
            return gelu_by_hand(x, 2.0)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList([Block()])

        def forward(self, x):
            return self.layers[0](x) + 1

    (item,) = applied(Model(), torch.randn(3)).rewrites
    assert item.place.module == "layers.0"
    assert item.place.code == "return x * torch.sigmoid(k * x)"
    assert "test_rewrite.py:" in item.place.source


def test_commuted_and_cast_spellings_are_found():
    for fn in (
        lambda x: torch.sigmoid(x * 3.0) * x,
        lambda x: (torch.sigmoid(3.0 * x.float()) * x.float()).to(x.dtype).to(x.dtype),
    ):
        assert len(applied(fn, torch.randn(3)).rewrites) == 1


@pytest.mark.parametrize(
    ("fn", "sentence"),
    [
        (lambda x: (gelu_by_hand(x, 2.0), torch.sigmoid(2.0 * x)[0]), None),
        (lambda x: (lambda s: (x * s, s))(torch.sigmoid(2.0 * x)), "is also a graph output"),
        (lambda x: (lambda s: (x * s, s + 1))(torch.sigmoid(2.0 * x)), "is also used by add (test_rewrite.py"),
        (lambda x: x * torch.sigmoid(2.0 * x.add_(1)), ""),
    ],
    ids=["twins are separate", "escapes to an output", "escapes to a user", "mutated in between"],
)
def test_illegal_sites_are_refused_with_a_sentence(fn, sentence):
    outcome = applied(fn, torch.randn(3))
    reasons = [reason for item in outcome.refusals for reason in item.reasons]
    assert len(outcome.rewrites) == (sentence is None)
    assert not sentence or any(sentence in reason for reason in reasons)


@pytest.mark.fault("a match across a mutation")
def test_a_write_inside_the_region_is_refused():
    def fn(x, y):
        s = torch.sigmoid(2.0 * y)
        y.add_(1)
        return y.detach() * 0 + (y * s)

    def same(x):
        s = torch.sigmoid(2.0 * x)
        t = x.view(-1)
        t.add_(1)
        return x * s

    for f, args in ((fn, (torch.randn(3), torch.randn(3))), (same, (torch.randn(3),))):
        outcome = applied(f, *args)
        assert not outcome.rewrites
    assert any("writes in place" in reason for item in outcome.refusals for reason in item.reasons)


def test_a_write_that_nobody_sees_is_no_disturbance():
    def fn(x):
        h = x.cos()
        s = 2.0 * h
        s.sigmoid_()
        s *= h
        return s

    outcome = applied(fn, torch.randn(3, requires_grad=True))
    assert targets(outcome.module)[1:] == ["aten.mul.Tensor", "aten.silu.default", "aten.div.Tensor"]


def test_a_switch_that_concerns_no_node_of_the_region_is_no_disturbance():
    """Another layer's RoPE, or a mask, may be computed under `no_grad` between a site's first node and its last."""

    def fn(x, y):
        s = torch.sigmoid(2.0 * x)
        with torch.no_grad():
            angle = y.cos()
        return x * s + angle

    outcome = applied(fn, torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True))
    assert len(outcome.rewrites) == 1

    def masked(x, keep):
        with torch.no_grad():
            mask = keep.logical_not()
        return (x * 2.0).masked_fill(mask, 0.0)

    def grow(anchor):
        scaled, mask, _ = anchor.args
        return Site("mask", (anchor,), (mask, scaled, anchor), {"x": scaled.args[0], "keep": mask.args[0]})

    region = Region(
        name="mask",
        anchors=frozenset({aten.masked_fill.Scalar}),
        grow=grow,
        replacement=lambda x, keep: torch.where(keep, 2.0 * x, 0.0),
        spellings=(masked,),
        inputs=drawn,
    )
    graph = captured(masked, torch.randn(3, requires_grad=True), torch.ones(3, dtype=torch.bool)).module
    assert len(apply_rule(region, graph).rewrites) == 1


@pytest.mark.fault("no_grad mid-graph")
def test_a_grad_mode_switch_inside_the_region_is_refused():
    def fn(x):
        s = 2.0 * x
        with torch.no_grad():
            s = torch.sigmoid(s)
        return x * s

    outcome = applied(fn, torch.randn(3, requires_grad=True))
    assert not outcome.rewrites
    assert any("switches grad mode" in reason for item in outcome.refusals for reason in item.reasons)


def test_cost_objections_yield_to_force_and_others_do_not():
    def picky(site):
        yield Cost("slow here")
        if site.value("x").dtype is torch.float64:
            yield f"x is {site.value('x').dtype}"

    careful = rule(objections=picky)
    (refusal,) = applied(lambda x: gelu_by_hand(x, 2.0), torch.randn(3), rule=careful).refusals
    assert refusal.reasons == ("slow here",)
    assert refusal.cost
    assert len(applied(lambda x: gelu_by_hand(x, 2.0), torch.randn(3), rule=careful, force=True).rewrites) == 1
    (refusal,) = applied(lambda x: gelu_by_hand(x, 2.0), torch.randn(3).double(), rule=careful, force=True).refusals
    assert refusal.reasons == ("x is torch.float64",)
    assert not refusal.cost


def test_near_misses_say_how_far_they_got():
    def near(x):
        h = x * torch.rsqrt(x.pow(2).mean(0, keepdim=True) + 1e-6)
        return h + 1

    def rms(x, eps):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)

    norm = Pattern(
        name="rms",
        spellings=(rms,),
        replacement=lambda x, eps: F.rms_norm(x, x.shape[-1:], eps=eps),
        inputs=lambda draw: {"x": draw.tensor(2, 5, dtype=torch.float32), "eps": 1e-5},
    )
    (refusal,) = applied(near, torch.randn(3, 4), rule=norm).refusals
    assert refusal.agreed >= 4
    assert "expected the constant 1, found the constant 0" in refusal.reasons[0]
    for same in (
        lambda x: x / (x * x).mean(-1, keepdim=True).add(1e-6).sqrt(),
        lambda x: (1 / torch.sqrt(torch.square(x).mean(dim=1, keepdim=True) + 1e-6)) * x,
        lambda x: x * (x**2).mean([-1], True).add(1e-6) ** -0.5,
    ):
        assert len(applied(same, torch.randn(3, 4), rule=norm).rewrites) == 1


def test_a_wrong_rule_is_caught_and_leaves_the_graph():
    graph = captured(lambda x: gelu_by_hand(x, 2.0), torch.randn(3, requires_grad=True)).module
    before = str(graph.graph)
    for wrong, message in (
        (lambda x, k: (k * x).sum(), "shape was"),
        (lambda x, k: F.silu(k * x).double(), "dtype was"),
        (lambda x, k: F.silu(k * x).detach(), "requires_grad was"),
    ):
        with pytest.raises(VerificationError, match=message):
            apply_rule(rule(replacement=wrong), graph)
        assert str(graph.graph) == before
    wrong_number = apply_rule(rule(replacement=lambda x, k: F.silu(k * x) * k), graph)
    with pytest.raises(VerificationError, match="in fp64 output 0 differs"):
        same_function(graph, wrong_number.module, [torch.randn(3, requires_grad=True)])
    wrong_gradient = apply_rule(rule(replacement=lambda x, k: F.silu(k * x).detach() / k + 0 * x), graph)
    with pytest.raises(VerificationError, match="gradient of input 0 differs"):
        same_function(graph, wrong_gradient.module, [torch.randn(3, requires_grad=True)])


@pytest.mark.fault("output aliasing an input")
def test_verification_sees_aliasing_writes_and_randomness():
    def graph(fn):
        return captured(fn, torch.randn(4, 4)).module

    plain = graph(lambda x: x.t().clone())
    for other, message in (
        (lambda x: x.t(), "aliasing"),
        (lambda x: x.mul_(2).t().clone(), "in-place writes"),
        (lambda x: (x.t() * torch.rand_like(x).t()).clone(), "random operators"),
    ):
        with pytest.raises(VerificationError, match=message):
            same_interface(plain, graph(other))


def test_rules_reach_checkpointed_bodies():
    from torch.utils.checkpoint import checkpoint

    def fn(x):
        return checkpoint(lambda a: gelu_by_hand(a, 2.0), x, use_reentrant=False).sum()

    outcome = applied(fn, torch.randn(3, requires_grad=True))
    assert len(outcome.rewrites) == 1


def test_a_region_grows_from_its_anchor():
    def grow(anchor):
        (source,) = anchor.all_input_nodes
        if source.target is not aten.exp.default:
            raise NoSite(f"{source.name} is no exp", 1)
        return Site("log_exp", (anchor,), (source, anchor), {"x": source.args[0]})

    region = Region(
        name="log_exp",
        anchors=frozenset({aten.log.default}),
        grow=grow,
        replacement=lambda x: x.clone(),
        spellings=(lambda x: x.exp().log(),),
        inputs=drawn,
    )
    outcome = apply_rule(region, trace(lambda x: x.exp().log() + x.cos().log(), {"x": torch.randn(3)}))
    assert len(outcome.rewrites) == 1
    assert [(item.reasons, item.agreed) for item in outcome.refusals] == [(("cos is no exp",), 1)]


def halved(x):
    return F.dropout(x, 0.5) * 0.5


def redrawing(replacement, draws=True):
    """A rule that replaces `halved`, the dropout in it included."""

    def grow(anchor):
        dropped = anchor.args[0]
        if getattr(dropped, "target", None) is not aten.dropout.default:
            return None
        return Site("half", (anchor,), (dropped, anchor), {"x": dropped.args[0]}, draws=(dropped,) if draws else ())

    return Region(
        name="half",
        anchors=frozenset({aten.mul.Tensor}),
        grow=grow,
        replacement=replacement,
        spellings=(halved,),
        inputs=drawn,
    )


def with_others(x):
    return torch.bernoulli(x.sigmoid()) + halved(x) + torch.randn_like(x)


def test_random_nodes_are_replaced_where_the_rule_draws_anew():
    graph = captured(with_others, torch.randn(3)).module
    (refusal,) = apply_rule(redrawing(lambda x: x * torch.rand_like(x).round(), draws=False), graph).refusals
    assert refusal.reasons == ("dropout (aten.dropout.default) draws random numbers",)
    outcome = apply_rule(redrawing(lambda x: x * torch.rand_like(x).round()), graph)
    assert [name for name in targets(outcome.module) if "rand" in name or "bern" in name or "drop" in name] == [
        "aten.bernoulli.default", "aten.rand_like.default", "aten.randn_like.default",
    ]  # fmt: skip


@pytest.mark.fault("recompute of dropout")
def test_draws_are_replaced_by_draws_and_the_others_keep_their_order():
    graph = captured(with_others, torch.randn(3)).module
    with pytest.raises(VerificationError, match="dropout should be drawn anew, and nothing is"):
        apply_rule(redrawing(lambda x: x * 0.5), graph)
    swapped = captured(lambda x: torch.randn_like(x) + torch.bernoulli(x.sigmoid()), torch.randn(3)).module
    with pytest.raises(VerificationError, match="random operators changed"):
        same_interface(graph, swapped, redrawn={"dropout"})


def test_random_operators_of_bodies_are_compared_too():
    from torch.utils.checkpoint import checkpoint

    graph = captured(
        lambda x: checkpoint(with_others, x, use_reentrant=False) + halved(x), torch.randn(3, requires_grad=True)
    ).module
    assert len(apply_rule(redrawing(lambda x: x * torch.rand_like(x).round()), graph).rewrites) == 2
    with pytest.raises(VerificationError, match="dropout should be drawn anew"):
        apply_rule(redrawing(lambda x: x * 0.5), graph)


def broken(x, k):
    raise ZeroDivisionError("a bug in a rule")


def test_a_failing_rule_costs_one_warning_and_nothing_else(tmp_path, monkeypatch):
    import runpy
    import tempfile

    from fxopt import fallback

    monkeypatch.setattr(fallback, "_WARNED", set())
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    x = torch.randn(3, requires_grad=True)
    fxopt.clear_reports()
    bad, options = rule(replacement=broken), {}
    options["rules"] = [bad, rule(name="other")]
    with pytest.warns(
        fxopt.FxoptWarning, match=r"rule swish failed \(ZeroDivisionError: a bug in a rule\).*python "
    ) as caught:
        out = torch.compile(lambda x: gelu_by_hand(x, 2.0), backend=fxopt.backend.fxopt, options=options)(x)
    assert [item.category for item in caught].count(fxopt.FxoptWarning) == 1
    torch.testing.assert_close(out, gelu_by_hand(x, 2.0))
    report = fxopt.reports()[-1]
    assert [item.rule for item in report.rewrites] == ["other"]
    assert "ZeroDivisionError" in report.notes[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error", fxopt.FxoptWarning)
        torch.compile(lambda x: gelu_by_hand(x, 3.0), backend=fxopt.backend.fxopt, options=options)(x)
    (script,) = tmp_path.rglob("*.py")
    assert "ZeroDivisionError: a bug in a rule" in script.read_text()
    runpy.run_path(str(script))  # defines the graph and its inputs


@pytest.mark.fault("a backward that fails to compile lazily")
def test_a_backward_that_inductor_cannot_compile_is_found_out_at_once(monkeypatch):
    """And not by the first `backward()`, where nothing can be done about it any more."""
    from fxopt import fallback

    failed = []

    def failing(graph):
        if not failed and any("tangents" in node.name for node in graph.find_nodes(op="placeholder")):
            failed.append(graph)
            raise RuntimeError("no kernel for you")

    monkeypatch.setattr(fallback, "_WARNED", set())
    options = {"inductor": {"post_grad_custom_post_pass": failing}}
    x = torch.randn(5, requires_grad=True)
    with pytest.warns(fxopt.FxoptWarning, match="no kernel for you"):
        loss = torch.compile(lambda x: (x.sin() * 3.25).exp().sum(), backend=fxopt.backend.fxopt, options=options)(x)
    assert failed
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], (x.sin() * 3.25).exp() * 3.25 * x.cos())


def test_a_failing_compilation_falls_back_to_the_graph_as_it_came(monkeypatch):
    from fxopt import backend, fallback

    monkeypatch.setattr(fallback, "_WARNED", set())
    seen = []

    def compiler(gm, inputs):
        seen.append(gm)
        if len(seen) == 1:
            raise RuntimeError("no kernel for you")
        return gm.forward

    def through(gm, inputs):
        report, call = backend.run(gm, inputs, fxopt.Options(), compiler)
        assert "stage compile failed" in report.notes[0]
        return call

    x = torch.randn(3)
    with pytest.warns(fxopt.FxoptWarning, match="no kernel for you"):
        assert torch.equal(torch.compile(torch.sin, backend=through)(x), torch.sin(x))
    assert seen[0] is not seen[1]
