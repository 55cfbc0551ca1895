"""The benchmark's and the demo's own parts: a wrong measurement must not look like a result."""

import io
import json
import math
import subprocess
import sys
from pathlib import Path

import cases
import measure
import precision
import pytest
import readme
import rss
import step
import torch
from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent
MIB = 2**20


def run(*arguments: str | Path) -> str:
    """Run a script as a user does and return what it prints; fail where it does."""
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_peak_counts_what_was_freed_again_and_forgets_earlier_peaks() -> None:
    def transient() -> None:
        assert len(b"x" * (200 * MIB)) == 200 * MIB

    assert 199 <= rss.peak_over_rest(transient) < 212
    assert rss.peak_over_rest(lambda: b"x" * MIB) < 12


def test_ratio_is_taken_turn_by_turn() -> None:
    # the machine was three times slower in the middle turn: it cancels
    assert measure.median_ratio([5.0, 15.0, 5.0], [10.0, 30.0, 10.0]) == 0.5
    assert measure.alternate(["a", "b"], 0) == ["a", "b"]
    assert measure.alternate(["a", "b"], 1) == ["b", "a"]


@pytest.mark.slow
def test_worker_answers_and_says_why_it_died() -> None:
    with measure.Worker("deep-1", "eager") as worker:
        assert worker.ask("check")["loss"] == pytest.approx(math.log(4096), rel=0.05)  # random weights: all alike
        assert len(worker.ask("steps", 2)) == 2
        assert worker.ask("memory") > 4096 * 128 * 4 / MIB  # at least the logits
        with pytest.raises(measure.WorkerError, match="no attribute 'nonsense'"):
            worker.ask("nonsense")


def result(step_ratio: float, loss: float, rewrites: tuple[str, ...] = ("loss",)) -> dict[str, object]:
    """Return what step.py measures, as small as it goes."""
    return {
        "report": {"rewrites": list(rewrites)},
        "ratios": {"fxopt": {"step": step_ratio, "memory": 0.3, "compile": 0.9}},
        "checks": {"fxopt": {"loss": loss, "grad_norm": 1.0}, "inductor": {"loss": 10.0, "grad_norm": 1.0}},
    }


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        (result(0.99, 10.0), []),
        (result(1.01, 10.0), ["llama-4L: step is 1.01x Inductor's, target 1.00x"]),
        (result(0.99, 10.1), ["llama-4L: loss is 10.1, Inductor's 10.0"]),
        (result(0.99, 10.0, ()), ["llama-4L: fxopt rewrote nothing, so these numbers are Inductor's"]),
        (result(0.99, float("nan")), ["llama-4L: loss is nan, Inductor's 10.0"]),
    ],
)
def test_missed_targets_and_other_results_are_problems(measured: dict[str, object], expected: list[str]) -> None:
    assert step.problems("llama-4L", measured) == expected


def test_every_case_has_its_own_targets() -> None:
    assert list(step.CASES) == list(cases.CASES)
    measured = result(0.79, 10.0)
    assert step.problems("llama-packed", measured) == []
    assert step.problems("llama-eager-2048", measured) == [
        "llama-eager-2048: step is 0.79x Inductor's, target 0.75x",
        "llama-eager-2048: memory is 0.30x Inductor's, target 0.25x",
    ]


def test_cases_are_what_they_are_called() -> None:
    padded, packed = (cases.find(name).inputs() for name in ("llama-padded", "llama-packed"))
    assert padded["input_ids"].shape == (4, 512)
    assert len(set(padded["attention_mask"].sum(1).tolist())) == 4, "lengths differ"
    assert torch.equal(padded["labels"] == -100, padded["attention_mask"] == 0)
    assert bool((padded["attention_mask"].diff(dim=1) <= 0).all()), "padded on the right"
    assert packed["input_ids"].shape == packed["position_ids"].shape == (1, 4096)
    assert int((packed["position_ids"] == 0).sum()) == 8
    assert cases.find("mistral-window").build().config.sliding_window == 256
    assert cases.find("llama-eager-2048").build().config._attn_implementation == "eager"
    assert all(case.build().config.num_hidden_layers == 4 for case in cases.CASES.values())


def test_a_busy_machine_is_given_time(monkeypatch: pytest.MonkeyPatch) -> None:
    loads = iter([3.0, 3.0, 2.0, 0.5])
    monkeypatch.setattr(measure.os, "getloadavg", lambda: (next(loads), 0, 0))
    said = Console(record=True, file=io.StringIO())
    measure.wait_until_quiet(said, pause=0)
    assert "load 3.0: waiting up to 120 s" in said.export_text()
    assert next(loads, None) is None, "it looked until the load had fallen"
    monkeypatch.setattr(measure.os, "getloadavg", lambda: (9.0, 0, 0))
    measure.wait_until_quiet(said, patience=0)


def test_readme_shows_targets_of_fxopt_only() -> None:
    measured = {**result(1.2, 10.0), "about": "a model", "targets": {"step": 1.0, "memory": 0.4, "compile": 1.1}}
    measured["samples"] = {
        backend: {"step": [100.0], "memory": [30.0], "compile": [9.0]} for backend in ("inductor", "fxopt")
    }
    assert readme.step_table({"cases": {"one": measured}})[2:] == [
        "| a model | inductor | 100 | 30 | 9.0 |",
        "|  | fxopt | 100 (1.20x, target 1.00x) | 30 (0.30x, target 0.40x) | 9.0 (0.90x, target 1.10x) |",
    ]


def test_the_interval_of_an_error_ratio_is_of_pairs() -> None:
    """fxopt is 1.1 times as far off at every seed, however seeds differ; losses alone count for losses alone."""
    draws = [{"gradients": error, "loss": error} for error in (1e-3, 5e-2, 2e-4, 7e-3)] + [{"loss": 3e-3}]
    worse = [{what: 1.1 * error for what, error in one.items()} for one in draws]
    for what in ("gradients", "loss"):
        ratio = precision.error_ratio({"autocast": draws, "fxopt": worse}, what)
        assert str(ratio) == "1.10x, 1.10 to 1.10"
    noise = [{"gradients": one["gradients"] * factor, "loss": one["loss"]}
             for one, factor in zip(draws[:4], (0.5, 2.0, 3.0, 0.5), strict=True)]  # fmt: skip
    ratio = precision.error_ratio({"autocast": draws[:4], "fxopt": noise}, "gradients")
    assert ratio.low < 1 < ratio.value < ratio.high
    results = {"errors": {"one": {"autocast": draws, "fxopt": worse}, "two": {"autocast": draws[:4], "fxopt": noise}}}
    assert precision.problems(results) == [
        f"one: error of {what} is 1.10x, 1.10 to 1.10 autocast's" for what in ("gradients", "loss")
    ]


def test_readme_text_is_replaced_between_the_markers_only() -> None:
    old = f"a\n{readme.BEGIN}\nold\n{readme.END}\nb\n"
    assert readme.replaced(old, "new") == f"a\n{readme.BEGIN}\nnew\n{readme.END}\nb\n"
    with pytest.raises(ValueError, match="once each"):
        readme.replaced(old + old, "new")


def test_readme_says_what_was_measured() -> None:
    run("bench/readme.py", "--check")


def test_readme_names_every_option() -> None:
    import dataclasses

    import fxopt

    text = (ROOT / "README.md").read_text()
    missing = [field.name for field in dataclasses.fields(fxopt.Options) if f"| `{field.name}` |" not in text]
    assert missing == []


def test_scripts_explain_themselves() -> None:
    assert "usage:" in run(str(step.__file__), "--help")


@pytest.mark.slow
def test_demo_trains_alike_under_every_backend_and_draws_it(tmp_path: Path) -> None:
    backends = ["eager", "inductor", "fxopt"]
    printed = run("examples/compare.py", "--steps", "7", "--layers", "1", "--out", tmp_path)
    rows = {row["backend"]: row for row in json.loads((tmp_path / "demo.json").read_text())}
    assert list(rows) == backends
    assert all(name in printed for name in backends)
    for name in backends:
        # seven steps of AdamW, whose first ones divide by |g|: eager and Inductor themselves are 1e-6 apart
        assert rows[name]["losses"] == pytest.approx(rows["eager"]["losses"], rel=1e-4)
    assert rows["eager"]["losses"][-1] < rows["eager"]["losses"][0] - 0.3
    assert "linear_cross_entropy" in rows["fxopt"]["verdict"]
    assert rows["fxopt"]["peak_mib"] < rows["inductor"]["peak_mib"]
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
