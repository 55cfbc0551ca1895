"""The kernels in a dump: those that run, each once, with the line of the model that each statement came from."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import models
import pytest
import torch
from transformers.models.gemma2 import modeling_gemma2

import fxopt
from fxopt.kernels import source
from fxopt.report import Report

pytestmark = pytest.mark.filterwarnings("error::fxopt.FxoptWarning")


def line_of(module: object, code: str) -> int:
    """The only line of `module` that has `code` in it."""
    lines = inspect.getsource(module).splitlines()  # type: ignore[arg-type]
    (found,) = [number for number, line in enumerate(lines, 1) if code in line]
    return found


def dumped(family: str, directory: Path, mask: models.Mask = "none") -> Report:
    model, inputs = models.build(family, "eager", mask)
    return fxopt.explain(model, options={"kernels": "interpret", "dump": str(directory)}, **inputs)


def test_statements_of_gemma2_name_the_lines_of_transformers(tmp_path: Path) -> None:
    report = dumped("gemma2", tmp_path)
    tanh = f"modeling_gemma2.py:{line_of(modeling_gemma2, 'attn_weights = torch.tanh(attn_weights)')}"
    cap = f"modeling_gemma2.py:{line_of(modeling_gemma2, 'attn_weights = attn_weights / softcap')}"
    forwards = [item for item in report.kernels if item.kernel == "attention_forward"]
    assert len({item.path for item in forwards}) == 2  # one layer has a window, the other has none
    for item in forwards:
        text = item.path.read_text()
        assert re.findall(r" = tanh\(\w+\)  # (.*)", text) == [f"{tanh}: attn_weights = torch.tanh(attn_weights)"] * 2
        assert re.findall(r" / 50.0  # (.*)", text) == [f"{cap}: attn_weights = attn_weights / softcap"] * 2
        assert f"# modeling_gemma2.py is {modeling_gemma2.__file__}" in text
    backward = next(item for item in report.kernels if item.kernel == "attention_backward_q").path.read_text()
    assert f"# derivative of {tanh}" in backward


def test_every_site_is_listed_with_each_of_its_kernels_and_each_kernel_is_one_file(tmp_path: Path) -> None:
    report = dumped("gemma2", tmp_path)
    by_site = {
        done.node: {item.kernel for item in report.kernels if item.site == done.node} for done in report.rewrites
    }
    expected = {
        "attention": {"attention_forward", "attention_delta", "attention_backward_q", "attention_backward_kv"},
        "norm": {"norm_forward_long", "norm_backward", "norm_backward_sums"},
        "linear_cross_entropy": {"linear_cross_entropy_forward", "linear_cross_entropy_backward"},
    }
    assert [by_site[done.node] for done in report.rewrites] == [expected[done.rule] for done in report.rewrites]
    paths = {item.path for item in report.kernels}
    assert paths == set((tmp_path / "graph_0_kernels").iterdir()) == paths & set(report.graphs[0].files)
    norms = [item for item in report.kernels if item.kernel == "norm_backward_sums"]
    assert len(norms) == 9
    (text,) = {item.path.read_text() for item in norms}
    assert "# launched by norm at modeling_gemma2.py:61 (model.layers.1.post_attention_layernorm)\n" in text
    assert Report.from_json((tmp_path / "graph_0_report.json").read_text()).kernels == report.kernels
    assert "launched by" in str(report)


@pytest.mark.slow
def test_what_is_dumped_is_what_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding, so that what is shared by the layers is launched too."""
    launched: dict[str, str] = {}
    load = source.Kernel.load

    def noted(kernel: source.Kernel) -> object:
        launched[kernel.path.name] = kernel.source
        return load(kernel)

    model, inputs = models.build("bert", "eager", "right")
    fxopt.clear_reports()
    monkeypatch.setattr(source.Kernel, "load", noted)
    options = {"kernels": "interpret", "dump": str(tmp_path), "logits": "eager", "rules": ["-linear_cross_entropy"]}
    torch.compile(model, backend="fxopt", options=options)(**inputs).loss.backward()
    (report,) = fxopt.reports()
    written = {item.path.name: item.path.read_text() for item in report.kernels}
    assert set(written) == set(launched)
    assert "attention_query_tiles" in {item.kernel for item in report.kernels}
    for name, text in written.items():
        code = [re.sub(r"  # \S+\.py:.*|  # derivative of .*", "", line) for line in text.splitlines()]
        assert "\n".join(code).endswith("\n\n" + launched[name].rstrip()), name


def test_nothing_is_written_without_a_dump_or_without_kernels(tmp_path: Path) -> None:
    model, inputs = models.build("llama")
    assert fxopt.explain(model, options={"kernels": "interpret"}, **inputs).kernels == []
    assert fxopt.explain(model, options={"kernels": "aten", "dump": str(tmp_path)}, **inputs).kernels == []
    assert not list(tmp_path.glob("*kernels*"))
