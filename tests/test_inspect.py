"""`fxopt explain`, `diff` and `doctor`: what they print, how they end, and what they say of mistakes."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from inspected import report, report_json

from fxopt.cli import main
from fxopt.commands import doctor
from fxopt.comparison import compare
from fxopt.errors import ReportError
from fxopt.memory.plan import KEPT, RECOMPUTED, Plan, Row, Timeline
from fxopt.outline import HOLE
from fxopt.precision.casts import Cast
from fxopt.report import Check, Report, SiteKernel
from fxopt.report_format import FORMAT
from fxopt.rule import Place

FILE = str(Path(__file__).with_name("inspected.py"))
Capture = pytest.CaptureFixture[str]


def flags(text: str) -> list[str]:
    """A command line as arguments."""
    return text.split()


# --- explain -----------------------------------------------------------------------------------------------------


def test_a_file_is_explained(capsys: Capture) -> None:
    assert main(["explain", FILE]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("fxopt: 1 graph, rewrote 1 linear_cross_entropy; left alone 1 norm")
    assert "inspected.py:" in printed


def test_options_and_json(capsys: Capture) -> None:
    assert main(["explain", f"{FILE}:make", "--options", '{"force": ["norm"]}', "--json"]) == 0
    found = Report.from_json(capsys.readouterr().out)
    assert [one.rule for one in found.rewrites] == ["linear_cross_entropy", "norm"]
    assert found.model == "Gated, 4,514 parameters"
    assert found.versions["torch"] == torch.__version__


def test_a_report_that_was_written_is_shown_again(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "a.json").write_text(report_json())
    assert main(["explain", str(tmp_path / "a.json"), "--html", str(tmp_path / "a.html")]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(report().verdict)
    assert f"wrote {tmp_path / 'a.html'}" in printed.err
    assert "capture" in (tmp_path / "a.html").read_text()


def test_a_model_of_any_size_is_explained_without_memory(capsys: Capture) -> None:
    """70 billion parameters would be 280 GB."""
    sizes = flags("--hidden 8192 --layers 1 --heads 64 --kv-heads 8 --vocab 4000000 --intermediate 28672 --seq 64")
    assert main(["explain", "--config", "llama", *sizes, "--precision", "bf16", "--json"]) == 0
    found = Report.from_json(capsys.readouterr().out)
    assert "66,391" in found.model
    assert {one.rule for one in found.rewrites} == {"linear_cross_entropy", "attention"}
    assert found.casts


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "vit", "gemma2", "qwen3_moe"])
def test_configurations_of_every_task_are_explained(name: str, capsys: Capture) -> None:
    sizes = flags("--layers 2" if name == "vit" else "--hidden 64 --layers 2 --heads 4 --vocab 203 --seq 16")
    assert main(["explain", "--config", name, *sizes, "--json"]) == 0
    found = Report.from_json(capsys.readouterr().out)
    assert found.rewrites or found.refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "neither a file nor --config: say FILE.py:factory, or --config NAME"),
        ([FILE, "--config", "llama"], "both a file and --config"),
        (["/nowhere.py"], "no file '/nowhere.py'"),
        ([f"{FILE}:mak"], "(did you mean 'make'?)"),
        ([f"{FILE}:report"], "it must return (model, inputs)"),
        (["--config", "lama"], "no model type 'lama' (did you mean 'llama'?)"),
        (["--config", "llama", "--hidden", "64", "--heads", "3"], "The hidden size (64)"),
        (["--config", "gpt2", "--kv-heads", "2"], "the configuration of gpt2 has no 'num_key_value_heads'"),
        (["--config", "llama", "--set", "tie"], "--set 'tie' is not KEY=VALUE"),
        (["--config", "llama", "--set", "hidden_sise=3"], "has no 'hidden_sise' (did you mean 'hidden_size'?)"),
        ([FILE, "--options", "{force"], "--options '{force' is no JSON"),
        ([FILE, "--options", "[]"], "is no JSON object"),
        ([FILE, "--options", '{"forse": []}'], "fxopt has no option 'forse' (did you mean 'force'?)"),
        ([FILE, "--precision", "bf8"], "compute='bf8' (did you mean 'bf16'?)"),
        ([FILE, "--redact"], "--redact is for --html PATH"),
    ],
)
def test_mistakes(arguments: list[str], message: str, capsys: Capture) -> None:
    assert main(["explain", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return (lambda x: x @ torch.randn(5, 5)), (torch.randn(2, 3),)", "the model failed while it was traced"),
        ("return (lambda x: 3), (1,)", "no graph came of the model"),
    ],
)
def test_models_that_cannot_be_explained(body: str, message: str, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "odd.py").write_text(f"import torch\ndef make():\n    {body}\n")
    assert main(["explain", str(tmp_path / "odd.py")]) == 1
    assert message in capsys.readouterr().err


def test_a_factory_that_needs_values_says_so_without_them(tmp_path: Path, capsys: Capture) -> None:
    body = "return (lambda x: x.sin() if x.sum() > 0 else x), (torch.ones(3),)"
    (tmp_path / "values.py").write_text(f"import torch\ndef make():\n    {body}\n")
    assert main(["explain", str(tmp_path / "values.py"), "--fake"]) == 1
    assert "its tensors have no values, which may be why" in capsys.readouterr().err


def test_torchs_structured_trace_has_the_report(tmp_path: Path) -> None:
    environment = os.environ | {"TORCH_TRACE": str(tmp_path)}
    command = [sys.executable, "-m", "fxopt", "explain", FILE, "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    (log,) = tmp_path.glob("*.log")
    lines = log.read_text().splitlines()
    (at,) = (n for n, line in enumerate(lines) if '"name": "fxopt_report"' in line)
    payload: list[str] = []
    for line in lines[at + 1 :]:
        if not line.startswith("\t"):
            break
        payload.append(line[1:])
    (traced,), (printed,) = (Report.from_json(text).graphs for text in ("\n".join(payload), done.stdout))
    assert (traced.rewrites, traced.outline) == (printed.rewrites, printed.outline)
    assert '"name": "fxopt_tables"' in log.read_text()


# --- the graphs in a report ----------------------------------------------------------------------------------------


def test_outline_holds_each_stages_graph_as_it_is() -> None:
    (graph,) = report().graphs
    outline = graph.outline
    assert outline is not None
    assert [stage.name for stage in outline.stages] == ["dynamo", "capture", "rewrite", "outputs"]
    for stage in outline.stages:
        nodes = list(outline.nodes(stage))
        names = {node.name for node in nodes}
        assert all(set(node.inputs) <= names for node in nodes)
        assert all(node.call.count(HOLE) == len(node.inputs) for node in nodes)
        assert graph.nodes.get(stage.name, len(nodes)) == len(nodes)
    rewritten = list(outline.nodes(outline.stages[2]))
    (loss,) = (node for node in rewritten if node.call.startswith("fxopt.linear_cross_entropy"))
    assert loss.rule == "linear_cross_entropy"
    assert loss.kind.startswith("(float32[]")
    assert {node.module for node in rewritten} >= {"layers.0.gate", "layers.2.down", "norm", "head"}


def test_checks_are_noted() -> None:
    (graph,) = report().graphs
    assert [check.part for check in graph.checks] == ["capture", "rule linear_cross_entropy"]
    assert not any(check.failure for check in graph.checks)


# --- diff ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def written(tmp_path: Path) -> Callable[[str, str], str]:
    """Return a function that writes a file of the temporary directory and gives its path."""

    def write(name: str, text: str) -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def test_diff_finds_sites_and_fails_for_those_that_are_lost(written: Any, capsys: Capture) -> None:
    a, b = written("a.json", report_json(force=True)), written("b.json", report_json())
    assert main(["diff", a, a]) == 0
    assert "0 differences" in capsys.readouterr().err
    assert main(["diff", a, b]) == 1
    printed = capsys.readouterr()
    assert "site: norm norm" in printed.out
    assert printed.err == "1 differences, 1 of them worse\n"
    assert main(["diff", b, a, "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["section"], found["verdict"]) == ("site", "better")
    assert found["before"].startswith("left alone: Inductor fuses this norm")


def planned(decision: str, predicted: int) -> Plan:
    """A plan that decides one tensor."""
    rows = [Row("h", 2**20, decision, "", Place())]
    return Plan(2**30, {}, rows, predicted, 0, 0, {}, Timeline(), 0.0, 1.0, 0.0, 1)


def test_every_section_is_compared() -> None:
    before, after = report(), report()
    (one,), (other,) = before.graphs, after.graphs
    cast = Cast("x_bf16", "x", "float32", "bfloat16", 2**20, "linear", 1, Place())
    one.casts, other.casts = [cast], [cast, cast]
    other.notes.append("rule norm failed (ValueError: no); it was left out for this graph")
    other.checks.append(Check("rule norm", "same outputs", "VerificationError: no"))
    one.deferred.append("logits")
    one.plan, other.plan = planned(KEPT, 2**24), planned(RECOMPUTED, 2**25)
    one.kernels, other.kernels = [SiteKernel("a", "k", Path())], [SiteKernel("b", "k", Path())]
    found = compare(before, after)
    kinds = [(item.section, item.verdict) for item in found]
    assert kinds == [
        ("failure", "worse"), ("failure", "worse"), ("deferred", "worse"), ("cast", "worse"), ("saved", "changed"),
        ("peak", "worse"), ("kernel", "changed"), ("kernel", "changed"),
    ]  # fmt: skip
    assert [item.verdict for item in compare(after, before)].count("worse") == 0
    assert found[3].after == "2 casts, 2.0 MiB"


def test_what_kernels_take_of_a_card_is_compared() -> None:
    before, after = report(), report()
    used = {"registers": 96, "spill_bytes": 0, "shared_bytes": 4096, "fits": True}
    changed = {"registers": 64, "spill_bytes": 128, "shared_bytes": 4096, "fits": False}
    for one, takes in ((before, used), (after, changed)):
        one.graphs[0].kernels = [SiteKernel("a", "k", Path(), {"sm_86": takes})]
    found = compare(before, after)
    assert [(item.what.split(": ")[1], item.verdict) for item in found] == [
        ("registers", "better"), ("spill bytes", "worse"), ("fits", "worse"),
    ]  # fmt: skip
    assert Report.from_json(after.to_json()).kernels == after.kernels
    assert "sm_86  64         128" in str(after)


def test_a_report_without_a_plan_is_compared_in_all_else() -> None:
    before, after = report(), report()
    before.graphs[0].plan = planned(KEPT, 1)
    assert compare(before, after) == []


def test_growth_within_the_tolerance_is_no_regression() -> None:
    before, after = report(), report()
    before.graphs[0].plan, after.graphs[0].plan = (planned(KEPT, 1000 + grown) for grown in (0, 40))
    assert [one.verdict for one in compare(before, after)] == ["worse"]
    assert [one.verdict for one in compare(before, after, tolerance=0.05)] == ["changed"]


def old() -> str:
    """A report as it was before formats had numbers."""
    data = json.loads(report_json())
    del data["format"]
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (lambda: "{", "this is no report, it is not even JSON"),
        (lambda: "[1]", "this JSON is no report of fxopt's"),
        (old, f"of an older format, 0 (fxopt 0.1.0); fxopt 0.1.0 reads format {FORMAT}"),
        (lambda: report_json().replace(f'"format": {FORMAT}', '"format": 99'), "of a newer format, 99"),
        (lambda: report_json().replace('"rewrites"', '"rewrite"'), "this report is damaged (KeyError: 'rewrites')"),
        (lambda: report_json().replace('"agreed"', '"agred"'), "this report is damaged (TypeError"),
        (lambda: dataclasses.replace(report(), graphs=[]).to_json(), "the second report is empty"),
        (lambda: report_json(layers=2), "two models, Gated, 4,514 parameters and Gated, "),
    ],
)
def test_reports_that_cannot_be_compared(text: Callable[[], str], message: str, written: Any, capsys: Capture) -> None:
    assert main(["diff", written("a.json", report_json()), written("b.json", text())]) == 2
    assert message in capsys.readouterr().err


def test_missing_file_and_binary_file(tmp_path: Path, written: Any, capsys: Capture) -> None:
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    good = written("a.json", report_json())
    for path in ("missing.json", "binary.json"):
        assert main(["diff", good, str(tmp_path / path)]) == 2
        assert "cannot be read" in capsys.readouterr().err


def test_reports_of_other_inputs_are_told_apart_by_them() -> None:
    before, after = report(), report()
    before.model = ""
    after.graphs[0].inputs = {**after.graphs[0].inputs, "float32[8, 16]": 0, "float32[9, 16]": 1}
    with pytest.raises(ReportError, match=r"only the first takes 1 x float32\[8, 16\], only the second 1 x float32\[9"):
        compare(before, after)
    assert compare(before, after, anyway=True) == []


# --- doctor --------------------------------------------------------------------------------------------------------


def test_doctor_looks_at_everything(capsys: Capture) -> None:
    assert main(["doctor", "--quick", "--json"]) == 0
    found = {(one["section"], one["what"]): one for one in json.loads(capsys.readouterr().out)}
    assert found["versions", "torch"]["says"] == torch.__version__
    assert {"fxopt", "Inductor", "Triton"} == {what for section, what in found if section == "caches"}
    assert found["tools", "Python.h"]["state"] == "ok"


def test_doctor_tries_and_says_what_is_broken(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def broken() -> str:
        raise OSError("no space left on device")

    monkeypatch.setattr(doctor, "_training_step", broken)
    monkeypatch.setattr(doctor, "_offline_kernel", lambda: "fine")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert main(["doctor"]) == 1
    printed = capsys.readouterr()
    assert "OSError: no space left on device" in printed.out
    assert "not found; Inductor compiles C++ with it" in printed.out
    assert printed.err == "does not work: no-such-compiler, training step\n"


def test_doctor_says_if_triton_is_not_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: ["triton==1.2.3; platform_system == 'Linux'"])
    (pair,) = (one for one in doctor.findings(trying=False) if one.what == "torch and triton")
    assert pair.state == "broken"
    assert "torch asks for triton==1.2.3" in pair.says


@pytest.mark.slow
def test_doctor_really_tries(capsys: Capture) -> None:
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "compiled, 1 site rewritten" in printed
    assert "for sm_80: " in printed
