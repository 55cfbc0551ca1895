"""Reports: the verdict first, every site with file and line, the same as text, JSON and runnable dumps."""

import json
import subprocess
import sys
import time

import torch
from models import build

import fxopt
from fxopt.html.page import render
from fxopt.report import Report


def llama_report(**options):
    model, inputs = build("llama")
    return fxopt.explain(model, options=options, **inputs), model


def test_explain_shows_every_site_with_file_and_line():
    report, model = llama_report()
    text = str(report)
    assert text.splitlines()[0] == report.verdict
    assert report.verdict.startswith(
        "fxopt: 1 graph, rewrote 1 linear_cross_entropy, 2 attention; left alone 5 norm; 1 output deferred"
    )
    assert "loss_utils.py:" in text
    assert "modeling_llama.py:" in text
    assert "model.layers.1.post_attention_layernorm" in text
    assert all(item.place.source and item.place.code for item in (*report.rewrites, *report.refusals))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_explain_leaves_reports_and_compilations_alone():
    fxopt.clear_reports()
    llama_report()
    assert fxopt.reports() == []


def test_json_round_trip():
    report, _ = llama_report()
    data = json.loads(report.to_json())
    assert data["verdict"] == report.verdict
    assert data["graphs"][0]["rewrites"][0]["place"]["source"].endswith(
        report.rewrites[0].place.source.rsplit("/", 1)[-1]
    )
    again = Report.from_json(report.to_json())
    assert again.to_json() == report.to_json()


def test_two_graphs_and_their_sums():
    def fn(x):
        y = x.sin()
        torch._dynamo.graph_break()
        return y.cos()

    report = fxopt.explain(fn, torch.randn(3))
    assert [graph.name for graph in report.graphs] == ["graph 0", "graph 1"]
    assert report.verdict == "fxopt: 2 graphs, rewrote nothing"
    assert set(report.timings) >= {"capture", "rewrite", "verify"}


def test_reports_are_kept_in_order_and_forgotten():
    fxopt.clear_reports()
    for fn in (torch.sin, torch.cos):
        torch.compile(fn, backend=fxopt.backend.fxopt)(torch.randn(3))
    assert [report.graphs[0].name for report in fxopt.reports()] == ["graph 0", "graph 1"]
    assert "compile" in fxopt.reports()[0].timings
    fxopt.clear_reports()
    assert fxopt.reports() == []


def test_dumps_run_and_say_which_rule_made_each_node(tmp_path):
    report, _ = llama_report(dump=str(tmp_path), force=["norm"])
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [
        "graph_0_0_dynamo.py",
        "graph_0_1_capture.py",
        "graph_0_2_rewrite.py",
        "graph_0_3_outputs.py",
        "graph_0_report.json",
    ]
    rewritten = (tmp_path / "graph_0_2_rewrite.py").read_text()
    assert rewritten.count("[made by rule norm]") == 5
    assert "[made by rule linear_cross_entropy]" in rewritten
    assert "modeling_llama.py:" in rewritten
    run_all([tmp_path / name for name in names[:-1]])
    assert Report.from_json((tmp_path / names[-1]).read_text()).rewrites == report.rewrites


def test_dumps_of_bodies_and_symbolic_sizes_run(tmp_path):
    from torch.utils.checkpoint import checkpoint

    def fn(x):
        return checkpoint(lambda a: a.cos() * a.shape[0], x, use_reentrant=False) + torch.tensor(2.5)

    torch.compile(fn, backend=fxopt.backend.fxopt, dynamic=True, options={"dump": tmp_path})(
        torch.randn(3, 4, requires_grad=True)
    )
    run_all(sorted(tmp_path.glob("*.py")))


def run_all(scripts):
    """Each as a program, in one process that has not imported fxopt: importing torch takes 4 s."""
    assert scripts
    each = "import runpy, sys\nfor path in sys.argv[1:]: print(path); runpy.run_path(path, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", each, *scripts], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
    assert done.stdout.count("backward ran") == len(scripts)


def test_a_step_has_a_time_once_some_have_run():
    fxopt.clear_reports()
    layer = torch.nn.Linear(4, 4)
    compiled = torch.compile(lambda x: layer(x).sum(), backend=fxopt.backend.fxopt)
    (start, times) = time.perf_counter(), []
    for at in range(40):
        compiled(torch.randn(3, 4)).backward()
        times.append(fxopt.reports()[0].step_seconds)
        assert (times[-1] is None) == (at < 3)
    (report,) = fxopt.reports()
    assert len(report.graphs[0].steps) == 32
    assert sum(report.graphs[0].steps) < time.perf_counter() - start
    assert 0 < report.step_seconds < 1
    assert "a step took" in str(report)
    assert f"{report.step_seconds:.3g} s</b><span>a step, median" in render(report)
    assert Report.from_json(report.to_json()).step_seconds == report.step_seconds
