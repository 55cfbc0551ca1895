"""Sites take what is measured to be best: the candidates are real and run here, the times are made up."""

import dataclasses
import inspect
import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from choosers import MIB, ScriptedMeter, as_it_is, scripted
from graphs import LargestDraw, captured, targets
from hypothesis import given, settings
from hypothesis import strategies as st
from models import build
from tiny_kernels import COPY

import fxopt
from fxopt import Pattern, backend, choosing, compat, metering, remembering
from fxopt.capture import trace
from fxopt.choice import INDUCTOR, OURS, Choice, Measured, decide
from fxopt.choosing import Chooser
from fxopt.differential import same_function
from fxopt.draw import SeededDraw
from fxopt.excerpt import Unmeasurable, draw, excerpt
from fxopt.kernels import refused
from fxopt.kernels.refused import KernelError
from fxopt.passes import RULES
from fxopt.report import GraphReport, Report
from fxopt.rewrite import apply_rule, candidates
from fxopt.rule import Cost, Refusal
from fxopt.testing.strategies import drawn_inputs

ATTENTION, LOSS, NORM = (next(rule for rule in RULES if rule.name == name) for name in (
    "attention", "linear_cross_entropy", "norm"
))  # fmt: skip


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path):
    """Nothing is remembered, in the process or on disk."""
    monkeypatch.setenv("FXOPT_CACHE", str(tmp_path))
    remembering.forget()
    yield
    remembering.forget()


def swish(x, k):
    return x * torch.sigmoid(k * x)


VERSIONS = st.integers(0, 2**62)
"""Of rules: with another, nothing that an earlier example left on disk is read."""

SWISH = Pattern(
    name="swish",
    spellings=(swish,),
    replacement=lambda x, k: F.silu(k * x) / k,
    candidates=lambda site: {"twice": lambda x, k: F.silu(k * x + k * x - k * x) / k},
    inputs=lambda draw: {"x": draw.tensor(draw.size(1, 4), 5, dtype=torch.float32), "k": 1.5},
)


def of_swish(chooser, rule=SWISH, **how):
    graph = captured(lambda x: swish(x, 2.0), torch.randn(3, requires_grad=True)).module
    return graph, apply_rule(rule, graph, chooser=chooser, **how)


TIMES = {OURS: (1.0, 1), "twice": (2.0, 1), INDUCTOR: (2.0, 1)}


# --- the decision ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("times", "saves_memory", "winner"),
    [
        ({OURS: (2, 10), INDUCTOR: (3, 10)}, False, OURS),
        ({OURS: (3, 10), INDUCTOR: (2, 900)}, False, INDUCTOR),
        ({OURS: (3, 10), INDUCTOR: (2, 900)}, True, OURS),
        ({OURS: (3, 10), INDUCTOR: (2, 11)}, True, INDUCTOR),
        ({OURS: (3, 10), INDUCTOR: (2, 11.1)}, True, OURS),
        ({OURS: (3, 10), "flash": (2.5, 12), INDUCTOR: (2, 900)}, True, "flash"),
        ({OURS: (3, 10), "flash": (2.5, 12), INDUCTOR: (2.7, 10)}, True, "flash"),
        ({OURS: (3, 10), "flash": (3, 10), INDUCTOR: (3, 10)}, True, OURS),
        ({OURS: (None, None), INDUCTOR: (2, 900)}, True, INDUCTOR),
        ({OURS: (None, None), "flash": (3, 10), INDUCTOR: (2, 900)}, True, "flash"),
        ({OURS: (3, 10), INDUCTOR: (None, None)}, False, OURS),
        ({OURS: (None, None), INDUCTOR: (None, None)}, False, OURS),
    ],
)
def test_the_fastest_wins_and_memory_is_not_lost_on_time_alone(times, saves_memory, winner):
    measured = [Measured(name, time, mib and int(mib * MIB)) for name, (time, mib) in times.items()]
    assert decide(measured, saves_memory) == winner


@pytest.mark.parametrize("winner", [OURS, "twice", INDUCTOR])
def test_a_site_takes_what_is_best(winner):
    times = {OURS: (2.0, 1), "twice": (2.0, 1), INDUCTOR: (2.0, 1)} | {winner: (1.0, 1)}
    chooser, meter = scripted(**times)
    graph, outcome = of_swish(chooser)
    assert meter.ran == [OURS, "twice", INDUCTOR]
    names = targets(outcome.module)
    if winner == INDUCTOR:
        (refusal,) = outcome.refusals
        assert outcome.module is graph
        assert refusal.cost
        assert refusal.reasons == (
            "Inductor's own code was measured to be the better choice here: fxopt 2 ms 1 MiB, twice 2 ms 1 MiB, "
            "inductor 1 ms 1 MiB",
        )
        assert refusal.choice.winner == INDUCTOR
    else:
        (done,) = outcome.rewrites
        assert done.choice.winner == winner
        assert ("aten.sub.Tensor" in names) == (winner == "twice")
        assert done.detail == ("swish" if winner == OURS else "swish; twice")
        same_function(graph, outcome.module, [torch.randn(3, requires_grad=True)])


def test_force_takes_ours_and_measures_nothing():
    chooser, meter = scripted(**{OURS: (9.0, 9), "twice": (2.0, 1), INDUCTOR: (1.0, 1)})
    _, outcome = of_swish(chooser, force=True)
    assert [item.choice for item in outcome.rewrites] == [None]
    assert meter.ran == []


def test_what_is_measured_settles_objections_of_cost_and_no_others():
    chooser, meter = scripted(**TIMES)
    costly = dataclasses.replace(SWISH, objections=lambda site: [Cost("slow, I think")])
    assert len(of_swish(chooser, costly)[1].rewrites) == 1
    wrong = dataclasses.replace(SWISH, objections=lambda site: [Cost("slow, I think"), "wrong"])
    meter.ran.clear()
    (refusal,) = of_swish(chooser, wrong)[1].refusals
    assert refusal.reasons == ("slow, I think", "wrong")
    assert refusal.choice is None
    assert meter.ran == []


def of_spelling(rule, spelling, values):
    """The graph of `spelling`, and the tensors that it is called with."""
    chosen = {name: values[name] for name in inspect.signature(spelling).parameters}
    return trace(spelling, chosen), [value for value in chosen.values() if isinstance(value, torch.Tensor)]


@settings(max_examples=6, deadline=None)
@given(
    rule=st.sampled_from(RULES),
    times=st.lists(st.sampled_from([0.5, 1.0, 2.0, None]), min_size=3, max_size=3),
    data=st.data(),
)
def test_law_whatever_the_clock_says_the_function_is_the_same(rule, times, data):
    """A time of None is a failure. Rules have no other candidate on a CPU: the replacement again is one."""
    remembering.forget()
    both = dataclasses.replace(rule, candidates=lambda site: {"other": rule.replacement}, version=data.draw(VERSIONS))
    spelling = data.draw(st.sampled_from(rule.spellings))
    graph, tensors = of_spelling(rule, spelling, data.draw(drawn_inputs(rule)))
    script = {name: (time, 1.0) for name, time in zip((OURS, "other", INDUCTOR), times, strict=True) if time}
    outcome = apply_rule(both, graph, chooser=scripted(**script)[0])
    same_function(graph, outcome.module, tensors)
    fastest = min(script, key=lambda name: script[name], default="")
    for item in (*outcome.rewrites, *outcome.refusals):
        if item.choice is not None and item.choice.winner:
            assert item.choice.winner == fastest
            assert isinstance(item, Refusal) == (fastest == INDUCTOR)


# --- failures ----------------------------------------------------------------------------------------------------


def test_a_candidate_that_fails_is_out_with_its_reason():
    def broken(x, k):
        raise ZeroDivisionError("a bug in a candidate")

    rule = dataclasses.replace(SWISH, candidates=lambda site: {"twice": broken})
    chooser, _ = scripted(**{OURS: (2.0, 1), "twice": (1.0, 1), INDUCTOR: (3.0, 1)})
    (done,) = of_swish(chooser, rule)[1].rewrites
    assert done.choice.winner == OURS
    assert done.choice.measured[1] == Measured("twice", None, failure="ZeroDivisionError: a bug in a candidate")
    assert "twice failed (ZeroDivisionError: a bug in a candidate)" in str(done.choice)


def test_a_candidate_of_another_shape_is_out():
    rule = dataclasses.replace(SWISH, candidates=lambda site: {"twice": lambda x, k: x.sum()})
    chooser, _ = scripted(**{OURS: (2.0, 1), "twice": (1.0, 1), INDUCTOR: (3.0, 1)})
    (done,) = of_swish(chooser, rule)[1].rewrites
    assert "shape was" in done.choice.measured[1].failure


def test_ours_that_fails_is_left_to_inductor():
    chooser, _ = scripted(**{INDUCTOR: (3.0, 1)})
    with pytest.warns(fxopt.FxoptWarning, match="fxopt's swish at .* failed .KeyError.*; the site is left to others"):
        (refusal,) = of_swish(chooser)[1].refusals
    assert "fxopt failed (KeyError: 'fxopt')" in refusal.reasons[0]


@pytest.mark.fault("a kernel that does not compile for the card")
def test_a_kernel_of_ours_that_does_not_compile_is_warned_of_and_forgotten(tmp_path, monkeypatch):
    """What failed once, with a disk full say, is tried again by the next process."""
    wrong = {("swish", "mul"): KernelError(COPY, "PTXASError: no")}
    monkeypatch.setattr(choosing, "refused_sites", lambda graph: wrong)
    monkeypatch.setattr(refused, "_WARNED", set())
    with pytest.warns(fxopt.FxoptWarning, match=f"the kernel copy does not compile here .*{COPY.path}.*left to others"):
        of_swish(scripted(**{INDUCTOR: (3.0, 1)})[0])
    assert not list(tmp_path.rglob("chosen/**/*.json"))


@pytest.mark.parametrize("cost", [False, True])
def test_where_nothing_runs_the_site_is_decided_without(cost):
    chooser, _ = scripted()
    rule = dataclasses.replace(SWISH, objections=lambda site: [Cost("slow")] * cost)
    outcome = of_swish(chooser, rule)[1]
    (item,) = (*outcome.rewrites, *outcome.refusals)
    assert len(outcome.refusals) == cost
    assert item.choice.winner == ""
    assert "inductor failed (KeyError: 'inductor')" in item.choice.unmeasured


def test_a_chooser_that_fails_costs_nothing():
    def nonsense(site):
        raise IndexError("a bug in a hook")

    chooser, _ = scripted(**{OURS: (1.0, 1)})
    (done,) = of_swish(chooser, dataclasses.replace(SWISH, integers=nonsense))[1].rewrites
    assert done.choice == Choice(unmeasured="IndexError: a bug in a hook")


# --- excerpts and what they are run on ---------------------------------------------------------------------------


class Recording(torch.fx.Interpreter):
    """Keeps the value of every node."""

    def run_node(self, n):
        value = super().run_node(n)
        self.kept[n] = value.detach().clone() if isinstance(value, torch.Tensor) else value
        return value


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_an_excerpt_is_the_site(rule):
    """Bit for bit: on what its nodes read in the whole graph it gives what they give there."""
    seen = 0
    for spelling in rule.spellings:
        graph, tensors = of_spelling(rule, spelling, rule.inputs(SeededDraw(3)))
        run = Recording(graph)
        run.kept = {}
        run.run(*tensors)
        for site in candidates(rule, graph):
            if isinstance(site, Refusal):
                continue
            found = excerpt(site)
            reads = dict.fromkeys([*site.input_nodes, *(item for node in site.nodes for item in node.all_input_nodes)])
            given = [run.kept[node] for node in reads if node not in site.nodes]
            given = [value for value in given if isinstance(value, torch.Tensor)]
            for output, node in zip(found.module(*given), site.outputs, strict=True):
                assert torch.equal(output.nan_to_num(), run.kept[node].nan_to_num()), spelling.__name__
            seen += 1
    assert seen >= len(rule.spellings)


def sites(rule, spelling):
    graph, _ = of_spelling(rule, spelling, rule.inputs(LargestDraw(3)))
    return [site for site in candidates(rule, graph) if not isinstance(site, Refusal)]


def spelled(rule, name):
    (site, *_) = sites(rule, next(one for one in rule.spellings if one.__name__ == name))
    return site


def test_inputs_are_drawn_as_they_are_in_the_graph():
    x = torch.randn(6, 4).t()[:, ::2].requires_grad_()
    graph = captured(lambda x: swish(x * 1.5, 2.0), x).module
    (site,) = candidates(SWISH, graph)
    (drawn,) = draw(excerpt(site), SWISH)
    (node,) = site.input_nodes
    value = node.meta["val"]
    assert (drawn.shape, drawn.stride(), drawn.dtype) == (value.shape, value.stride(), value.dtype)
    assert drawn.requires_grad
    assert drawn.is_leaf


def test_targets_are_classes():
    found = excerpt(spelled(LOSS, "causal_lm_loss"))
    target = next(item for item in draw(found, LOSS) if item.dtype == torch.int64)
    assert 0 <= int(target.min()) <= int(target.max()) < found.site.value("weight").shape[0]


@pytest.mark.parametrize(
    ("spelling", "numbers"),
    [
        ("eager_causal", {}),
        ("packed_documents", {0}),
        ("documents_by_pairs", {0}),
        ("padded", {1}),
        ("up_to_lengths", {9}),
        ("with_alibi", {}),
    ],
)
def test_integers_of_attention_are_such_that_all_of_the_band_is_allowed(spelling, numbers):
    ranges = ATTENTION.integers(excerpt(spelled(ATTENTION, spelling)).site)
    assert {low for low, _ in ranges.values()} == set(numbers)
    assert all(high == low + 1 for low, high in ranges.values())


def test_a_mask_of_which_nothing_is_known_is_not_measured():
    site = spelled(ATTENTION, "prefix_and_causal")
    with pytest.raises(Unmeasurable, match=r"capture\d holds torch.int64 whose values decide"):
        draw(excerpt(site), ATTENTION)


def test_an_empty_site_is_not_measured():
    chooser, _ = scripted(**{OURS: (1.0, 1), INDUCTOR: (2.0, 1)})
    graph = captured(lambda x: swish(x, 2.0), torch.randn(0, 3)).module
    (done,) = apply_rule(SWISH, graph, chooser=chooser).rewrites
    assert done.choice.unmeasured.endswith("is empty")


def test_symbolic_sizes_are_measured_at_their_hints_and_guard_nothing():
    chooser, _ = scripted(**TIMES)
    graph = captured(lambda x: swish(x, 2.0), torch.randn(7, 5, requires_grad=True), dynamic=True).module
    environment = compat.fake_mode_of([node.meta.get("val") for node in graph.graph.nodes]).shape_env
    guards = len(environment.guards)
    (site,) = candidates(SWISH, graph)
    assert any(isinstance(size, torch.SymInt) for size in site.value("x").shape)
    (drawn,) = draw(excerpt(site), SWISH)
    assert tuple(drawn.shape) == (7, 5)
    (done,) = apply_rule(SWISH, graph, chooser=chooser).rewrites
    assert done.choice.winner == OURS
    assert len(environment.guards) == guards


def test_random_numbers_of_the_training_run_stay_what_they_are():
    torch.manual_seed(3)
    wanted = torch.randn(2)
    torch.manual_seed(3)
    chooser, _ = scripted(**TIMES)
    graph = trace(lambda x: swish(x, 2.0), {"x": torch.ones(3)})
    apply_rule(SWISH, graph, chooser=chooser)
    assert torch.equal(torch.randn(2), wanted)


@pytest.mark.parametrize(
    "rule",
    [pytest.param(rule, id=rule.name, marks=() if rule.name == "norm" else pytest.mark.slow) for rule in RULES],
)
def test_excerpts_compile_by_inductor_and_give_the_same(rule):
    """Ours and the site's own nodes, forward and backward, as `fxopt.compat.compile_graph` compiles them."""
    name = {"attention": "eager_causal", "linear_cross_entropy": "causal_lm_loss", "norm": "rms_weight_after_cast"}
    site = spelled(rule, name[rule.name]) if rule.name != "norm" else sites(NORM, NORM.spellings[0])[0]
    results = {}

    def compiler(graph, inputs):
        call = compat.compile_graph(graph, inputs, {}, "test")
        ours = "fxopt" in str(graph.graph)
        results[ours] = [item.detach().clone() for item in call(*inputs)], [item.detach() for item in graph(*inputs)]
        return call

    chooser, meter = scripted(compiler, **{OURS: (1.0, 1), INDUCTOR: (2.0, 1)})
    choice = chooser.choose(rule, site)
    assert choice.winner == OURS, choice
    assert meter.ran == [OURS, INDUCTOR]
    for compiled, eager in results.values():
        torch.testing.assert_close(compiled, eager, rtol=2e-2, atol=2e-2)  # they are bf16; the law above is in fp64
    if rule.name != "attention":  # whose own nodes read a mask that is drawn, and ours none
        torch.testing.assert_close(results[True][0], results[False][0], rtol=2e-2, atol=2e-2)


def test_a_site_under_autocast_is_measured_under_it():
    def loss(hidden, weight, target):
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(F.linear(hidden, weight).float(), target)

    hidden, weight = torch.randn(4, 3, requires_grad=True), torch.randn(9, 3, requires_grad=True)
    graph = captured(loss, hidden, weight, torch.randint(9, (4,))).module
    (site,) = (item for item in candidates(LOSS, graph) if not isinstance(item, Refusal))
    linear = next(iter(excerpt(site).site.nodes))
    assert linear.meta["val"].dtype == torch.bfloat16
    dtypes = []

    def compiler(graph, inputs):
        dtypes.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
        return lambda *given: dtypes.append(torch.is_autocast_enabled("cpu")) or graph(*given)

    choice = scripted(compiler, **{OURS: (1.0, 1), INDUCTOR: (2.0, 1)})[0].choose(LOSS, site)
    assert choice.winner == OURS, choice
    assert dtypes == [torch.bfloat16, True, True, True] * 2
    assert not torch.is_autocast_enabled("cpu")


def test_a_site_without_gradients_is_measured_forward():
    class Keeping(ScriptedMeter):
        def __call__(self, name, run):
            self.results.append(run())
            return super().__call__(name, run)

    (site,) = candidates(SWISH, captured(lambda x: swish(x, 2.0), torch.randn(3)).module)
    meter = Keeping(TIMES)
    meter.results = []
    assert Chooser(as_it_is, meter=meter).choose(SWISH, site).winner == OURS
    assert meter.results == [None] * 3


def test_a_tensor_of_another_kind_is_not_measured():
    class Odd(torch.Tensor):
        pass

    (site,) = candidates(SWISH, captured(lambda x: swish(x, 2.0), torch.randn(3)).module)
    site.inputs["x"].meta["val"] = torch.randn(3).as_subclass(Odd)
    chooser, _ = scripted(**{OURS: (1.0, 1)})
    assert chooser.choose(SWISH, site).unmeasured == f"{site.inputs['x'].name} is a Odd, not a plain tensor"


@pytest.mark.slow
def test_within_a_compilation_another_disturbs_nothing(monkeypatch):
    """The whole way: Dynamo, the stages, Inductor for each candidate, and then for the graph."""
    _, meter = scripted(**{OURS: (3.0, 1), "twice": (1.0, 1), INDUCTOR: (2.0, 1)})
    monkeypatch.setattr("fxopt.choosing.CudaMeter", lambda: meter)
    x, weight = torch.randn(5, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)

    def model(x, weight):
        return swish(x @ weight, 2.0).sum() + swish(x, 3.0).mean()

    fxopt.clear_reports()
    options = {"rules": ["-attention", "-linear_cross_entropy", "-norm", SWISH]}
    compiled = torch.compile(model, backend=backend.fxopt, options=options)
    for shape in (5, 5, 7):  # the last with symbolic sizes
        rows = x.repeat(2, 1)[:shape].detach().requires_grad_()
        ours = torch.autograd.grad(compiled(rows, weight), (rows, weight))
        torch.testing.assert_close(ours, torch.autograd.grad(model(rows, weight), (rows, weight)))
    static, dynamic = fxopt.reports()
    for report in (static, dynamic):
        assert [item.choice.winner for item in report.rewrites] == ["twice"] * 2
        assert report.notes == []
        assert {"choose", "compile"} <= set(report.timings)
    assert meter.ran == [OURS, "twice", INDUCTOR] * 4


# --- what is remembered ------------------------------------------------------------------------------------------


def test_what_was_measured_is_asked_for_once():
    chooser, meter = scripted(**TIMES)
    first = of_swish(chooser)[1].rewrites[0].choice
    assert of_swish(chooser)[1].rewrites[0].choice == first
    assert meter.ran == [OURS, "twice", INDUCTOR]
    remembering.forget()  # as a new process would
    other, meter = scripted(**TIMES)
    assert of_swish(other)[1].rewrites[0].choice == first
    assert meter.ran == []


def test_layers_are_measured_once(monkeypatch):
    chooser, meter = scripted(**TIMES)
    model, inputs = build("llama", "eager")
    seen = []

    def through(gm, given):
        report, call = backend.run(gm, given, fxopt.Options(), as_it_is, chooser=chooser)
        seen.append(report)
        return call

    out = torch.compile(model, backend=through)(**inputs)
    torch.testing.assert_close(out.loss, model(**inputs).loss)
    (report,) = seen
    assert [item.rule for item in report.rewrites] == ["linear_cross_entropy", "attention", "attention", *["norm"] * 5]
    # Two kinds of norm: the first of all has no add before it.
    assert sorted(meter.ran) == sorted([OURS, INDUCTOR] * 4)
    assert report.timings["choose"] > 0


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param("", marks=pytest.mark.slow),
        pytest.param("{}", marks=pytest.mark.slow),
        pytest.param("[3]", marks=pytest.mark.slow),
        '[{"name": "fxopt", "milliseconds": "soon"}]',
        pytest.param('[{"nam": 1}]', marks=pytest.mark.slow),
    ],
)
def test_a_file_that_somebody_broke_is_measured_again(tmp_path, broken):
    of_swish(scripted(**TIMES)[0])
    (path,) = tmp_path.rglob("*.json")
    assert path.parent == tmp_path / "chosen" / "Scripted_1"
    assert [item["name"] for item in json.loads(path.read_text())] == [OURS, "twice", INDUCTOR]
    path.write_text(broken)
    remembering.forget()
    chooser, meter = scripted(**TIMES)
    of_swish(chooser)
    assert meter.ran == [OURS, "twice", INDUCTOR]


def test_another_spec_is_another_measurement(tmp_path):
    chooser, meter = scripted(**TIMES)
    for x, k in ((torch.randn(3), 2.0), (torch.randn(3), 3.0), (torch.randn(4), 2.0), (torch.randn(3).double(), 2.0)):
        apply_rule(SWISH, captured(lambda x, k=k: swish(x, k), x).module, chooser=chooser)
    apply_rule(SWISH, captured(lambda x: swish(x, 2.0), torch.randn(3)).module, chooser=chooser, lowering="aten")
    apply_rule(dataclasses.replace(SWISH, version=2), of_swish(None)[0], chooser=chooser)
    assert len(meter.ran) == 3 * 6
    assert len(list(tmp_path.rglob("*.json"))) == 6


def test_want_of_memory_is_not_written_down(tmp_path):
    def hungry(graph, inputs):
        if "silu" not in str(graph.graph):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        return graph

    chooser, _ = scripted(hungry, **TIMES)
    (done,) = of_swish(chooser)[1].rewrites
    assert "CUDA out of memory" in done.choice.measured[-1].failure
    assert not list(tmp_path.rglob("*.json"))


def test_a_cache_that_cannot_be_written_is_done_without(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FXOPT_CACHE", str(tmp_path / "file"))
    chooser, meter = scripted(**TIMES)
    of_swish(chooser)
    of_swish(chooser)
    assert meter.ran == [OURS, "twice", INDUCTOR]


def test_explain_recalls_and_measures_nothing(monkeypatch):
    of_swish(scripted(**TIMES)[0])
    chooser = Chooser(None, meter=scripted()[1])
    assert of_swish(chooser)[1].rewrites[0].choice.winner == OURS
    remembering.forget()
    graph = captured(lambda x: swish(x, 9.0), torch.randn(3)).module
    (done,) = apply_rule(SWISH, graph, chooser=chooser).rewrites
    assert done.choice.unmeasured.startswith("nothing is remembered of such a site")


# --- tuning first (with kernels: tests/interpret/test_tuning.py) -------------------------------------------------


@pytest.fixture
def tuned(monkeypatch):
    """What is tuned: names of calls, and the sentence that each gives."""
    calls = []

    def tune(run, card, timer, tell):
        run()
        tell("silu_forward, configuration 1 of 2")
        calls.append(card)
        return (f"silu_forward the {len(calls)}th time",)

    monkeypatch.setattr(choosing, "tune", tune)
    return calls


def test_each_replacement_is_tuned_before_it_is_measured_and_the_report_says_how(tuned, caplog):
    chooser, meter = scripted(tunes=True, **TIMES)
    with caplog.at_level("INFO", "fxopt"):
        done = of_swish(chooser)[1].rewrites
    assert len(tuned) == 2, "not the site as Inductor compiles it"
    assert meter.ran == [OURS, "twice", INDUCTOR]
    assert str(done[0].choice).splitlines()[1:] == [
        "tuned silu_forward the 1th time",
        "tuned silu_forward the 2th time",
    ]
    assert "silu_forward, configuration 1 of 2" in caplog.messages
    report = Report([GraphReport("graph 0", rewrites=done)])
    assert Report.from_json(report.to_json()).rewrites == done


def test_times_after_tuning_count_for_those_who_do_not_tune_and_not_the_other_way_round(tuned, monkeypatch):
    plain, meter = scripted(**TIMES)
    of_swish(plain)
    tuning, other = scripted(tunes=True, **TIMES | {OURS: (0.5, 1)})
    of_swish(tuning)
    of_swish(tuning)
    assert (len(meter.ran), len(other.ran), len(tuned)) == (3, 3, 2)
    remembering.forget()
    assert of_swish(plain)[1].rewrites[0].choice.measured[0].milliseconds == 0.5
    monkeypatch.setenv("FXOPT_TUNE", "0")  # defaults are launched again
    assert of_swish(plain)[1].rewrites[0].choice.measured[0].milliseconds == 1.0
    assert len(meter.ran) == 3


def test_what_cannot_be_tuned_is_measured_as_it_is(monkeypatch):
    def tune(run, card, timer, tell):
        raise RuntimeError("no room")

    monkeypatch.setattr(choosing, "tune", tune)
    (done,) = of_swish(scripted(tunes=True, **TIMES)[0])[1].rewrites
    assert done.choice.measured[0] == Measured(OURS, 1.0, MIB, tuned=("nothing: RuntimeError: no room",))


def test_the_option_reaches_the_chooser():
    for choose, tunes in (("measure", False), ("tune", True)):
        assert backend.chooser_for(fxopt.Options.parse({"choose": choose}), {}).tunes is tunes
    assert backend.chooser_for(fxopt.Options.parse({"choose": "never"}), {}) is None


# --- reports, options --------------------------------------------------------------------------------------------


def test_reports_show_the_candidates_and_come_back_from_json():
    chooser, _ = scripted(**{OURS: (1.2, 34), "twice": (1.25, 35.5), INDUCTOR: (1.91, 512)})
    done = of_swish(chooser)[1].rewrites
    chooser, _ = scripted(**{INDUCTOR: (1.0, 1)})
    remembering.forget()
    unlike = dataclasses.replace(SWISH, version=2)
    refused = of_swish(chooser, unlike)[1].refusals
    nothing = of_swish(scripted()[0], dataclasses.replace(SWISH, version=3, objections=lambda site: [Cost("slow")]))[1]
    report = Report([GraphReport("graph 0", rewrites=done, refusals=[*refused, *nothing.refusals])])
    text = " ".join(str(report).split())
    assert "chose fxopt: fxopt 1.2 ms 34 MiB, twice 1.25 ms 35.5 MiB, inductor 1.91 ms 512 MiB" in text
    assert "fxopt failed (KeyError: 'fxopt')" in text
    assert "slow; not measured: fxopt failed" in text
    again = Report.from_json(report.to_json())
    assert again.rewrites == done
    assert again.refusals == report.refusals
    assert again.to_json() == report.to_json()


def test_nothing_is_measured_on_a_cpu(monkeypatch):
    def forbidden(*_):
        raise AssertionError("measured")

    monkeypatch.setattr(Chooser, "_measure", forbidden)
    monkeypatch.setattr(compat, "compile_graph", lambda graph, *_: graph.forward)  # it takes 20 s and is no question
    fxopt.clear_reports()
    model, inputs = build("llama")
    torch.compile(model, backend=backend.fxopt)(**inputs)
    (report,) = fxopt.reports()
    assert all(item.choice is None for item in (*report.rewrites, *report.refusals))
    assert backend.chooser_for(fxopt.Options.parse({"choose": "never"}), {}) is None


@pytest.mark.fault("a cache key that lacks options and version")
def test_the_option_is_part_of_the_cache_key():
    keys = {fxopt.Options.parse({"choose": how}).cache_key() for how in ("measure", "never")}
    assert len(keys) == 2


@pytest.mark.fault("CUDA graphs with gradient accumulation")
def test_cuda_graphs_are_off_while_sites_are_measured(monkeypatch):
    seen = []
    monkeypatch.setattr(compat, "compile_graph", lambda gm, inputs, patches, key: seen.append(patches))
    chooser = backend.chooser_for(fxopt.Options(), {"triton.cudagraphs": True, "max_autotune": True})
    chooser.compiler(None, [])
    assert seen == [{"max_autotune": True}]


def test_a_log_hears_of_what_is_measured(caplog):
    caplog.set_level("INFO", "fxopt")
    of_swish(scripted(**TIMES)[0])
    (line,) = caplog.messages
    assert line.startswith("fxopt: measuring swish at test_choosing.py:")
    assert line.endswith("by fxopt, twice, inductor")


# --- the meter of GPUs, on a clock that is made up ---------------------------------------------------------------


class Clock:
    """A device that does one thing after the other: writing the cache takes 0.1 ms, a run 0.5 ms."""

    def __init__(self):
        self.now, self.held, self.peak, self.log = 0.0, 100, 0, []

    def module(self):
        clock = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = clock.now

            def elapsed_time(self, other):
                return other.at - self.at

        def reset():
            clock.peak = clock.held

        cuda = SimpleNamespace(
            Event=Event, synchronize=lambda: None, reset_peak_memory_stats=reset,
            memory_allocated=lambda: clock.held, max_memory_allocated=lambda: clock.peak,
        )  # fmt: skip
        cache = SimpleNamespace(zero_=lambda: clock.work("clear", 0.1))
        return SimpleNamespace(cuda=cuda, empty=lambda *_, **__: cache, int32=None)

    def work(self, name, milliseconds):
        self.log.append(name)
        self.now += milliseconds
        self.peak = max(self.peak, self.held + 34)
        return "gradients"


def test_the_meter_clears_the_cache_before_every_run_and_counts_what_is_above_the_rest(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(metering, "torch", clock.module())
    milliseconds, held = metering.CudaMeter()("fxopt", lambda: clock.work("run", 0.5))
    assert milliseconds == pytest.approx(0.5)
    assert held == 34
    timed = "".join(name[0] for name in clock.log[metering.WARM_UPS + 2 : -1])
    assert len(timed.split("r")) - 1 == metering.MOST_RUNS
    assert all(set(part) == {"c"} for part in timed.split("r")[:-1])


def test_the_meter_measures_on_cuda_alone():
    assert metering.CudaMeter().card(torch.device("cpu")) == ""
    if not torch.cuda.is_available():
        assert metering.CudaMeter().card(torch.device("cuda")) == ""
