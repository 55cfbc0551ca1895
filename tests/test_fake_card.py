"""What fxopt decides for CUDA, for whole models, on a machine that has none: a process of its own with a fake device.

Nothing is computed. Each test asks one process about a few models: capture and rewrite as they are on a GPU, and
AOTAutograd's joint graph of what is left.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from models import BATCH, SEQ, VOCAB

TESTS = Path(__file__).resolve().parent
ROWS = BATCH * SEQ
DECODED = SEQ - 4
"""Positions of t5's decoder (`models._seq2seq`)."""
HEAD = f"{BATCH} x {SEQ} rows x {VOCAB} classes, bfloat16; generated kernels"
SDPA = "torch's scaled_dot_product_attention"
LAUNCHES = {
    "forward": "Lse Out",
    "backward": ["Delta", "ByQ", "ByK ByV"],
    "loss": "Chosen Largest Total",
    "norms backward": "By_weight By_x",
}


class Answer:
    """What was decided for one model: its report, and the nodes of its joint graph."""

    def __init__(self, found: dict[str, Any]):
        assert "error" not in found, found["error"]
        (report,) = found["reports"]
        (self.graph,), self.joint = report["graphs"], found["joint"]

    def details(self, rule: str) -> list[str]:
        """Of the sites of `rule` that were rewritten; a loss or a norm without its sizes."""
        return [item["detail"] for item in self.graph["rewrites"] if item["rule"] == rule]

    def reasons(self, rule: str) -> list[str]:
        """Of the sites of `rule` that were left alone."""
        return ["; ".join(item["reasons"]) for item in self.graph["refusals"] if item["rule"] == rule]

    def launches(self) -> Counter[str]:
        """How often each kernel is launched, by what it writes to."""
        return Counter(" ".join(node["writes"]) for node in self.joint if node["writes"])

    def calls(self, name: str) -> int:
        """How many nodes call operators whose name begins with `name`."""
        return sum(node["target"].startswith(name) for node in self.joint)

    def ending_in(self, *shape: int) -> list[str]:
        """The nodes that make a tensor whose last axes are `shape`."""
        return [
            f"{node['target']} {found}"
            for node in self.joint
            for found in node["shapes"]
            if found[-len(shape) :] == list(shape)
        ]

    def holds_nothing_large(self) -> None:
        """Neither scores nor logits are in the joint graph."""
        assert not self.ending_in(SEQ, SEQ)
        assert not self.ending_in(VOCAB, ROWS)
        assert not self.ending_in(ROWS, VOCAB)
        assert not self.ending_in(SEQ, VOCAB)

    def attends(self, layers: int) -> None:
        """Attention is four launches a layer."""
        assert self.launches()[LAUNCHES["forward"]] == layers
        assert [self.launches()[name] for name in LAUNCHES["backward"]] == [layers] * 3


def ask(**cases: dict[str, Any]) -> dict[str, Answer]:
    """The answers of a process with a fake device (tests/fake_card/decide.py). Raises AssertionError where it ended."""
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {"PYTHONPATH": paths}
    command = [sys.executable, "-m", "fake_card", json.dumps(cases)]
    done = subprocess.run(command, env=environment, cwd=TESTS, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return {name: Answer(found) for name, found in json.loads(done.stdout).items()}


def model(family: str, attention: str = "eager", mask: str = "none", **changes: Any) -> dict[str, Any]:
    return {"build": {"family": family, "attention": attention, "mask": mask, **changes}}


SIZES = f"{BATCH} x 4 x {SEQ} x {SEQ}"


def launches_all(answer: Answer, norms: int) -> None:
    """Two layers of attention, the loss and `norms` norms are launches, and nothing large is held."""
    assert answer.graph["notes"] == []
    assert answer.graph["refusals"] == []
    assert answer.details("linear_cross_entropy") == [HEAD]
    assert {device for node in answer.joint for device in node["devices"]} == {"cuda"}
    answer.attends(2)
    answer.holds_nothing_large()
    assert answer.launches()[LAUNCHES["loss"]] == 1
    assert answer.calls("fxopt.linear_cross_entropy_backward") == 1
    # Norms are refused on a CPU, and each is a launch forward and one backward here.
    assert len(answer.details("norm")) == norms
    assert answer.launches()[LAUNCHES["norms backward"]] == norms
    assert answer.launches()["Out Rstd"] + answer.launches()["Out Rstd Stream"] == norms


def test_a_llama_is_rewritten_to_launches() -> None:
    found = ask(llama=model("llama"))["llama"]
    launches_all(found, 5)
    assert found.details("attention") == [f"{SIZES}: causal, score s * 0.25; generated kernels"] * 2
    assert found.launches()["Out Rstd Stream"] == 4


@pytest.mark.slow
def test_decoders_are_rewritten_to_launches() -> None:
    found = ask(masked=model("llama", "sdpa"), packed=model("llama", "sdpa", "packed"), gemma2=model("gemma2"))
    for name, answer in found.items():
        launches_all(answer, 9 if name == "gemma2" else 5)
    # transformers gives SDPA a mask tensor, which is structure here: no node of it is left.
    assert found["masked"].details("attention") == [f"{SIZES}: causal; generated kernels"] * 2
    assert found["masked"].calls("aten.le") == 0
    # The keys of each query are computed once for both layers, and their tiles once a step for both backwards.
    assert found["packed"].details("attention") == [f"{SIZES}: causal & documents; generated kernels"] * 2
    assert found["packed"].calls("fxopt.key_intervals") == 1
    program = "score tanh(s * 0.25 / 50) * 50; generated kernels"
    assert found["gemma2"].details("attention") == [f"{SIZES}: window(9), {program}", f"{SIZES}: causal, {program}"]


@pytest.mark.slow
def test_encoders_and_biases_that_are_learned() -> None:
    found = ask(
        padded=model("bert", "sdpa", "right"), bare=model("bert", "sdpa"), eager=model("bert"), t5=model("t5")
    )  # fmt: skip
    sizes = f"{BATCH} x 4 x {SEQ} x {SEQ}"
    assert found["padded"].details("attention") == [f"{sizes}: padding; generated kernels"] * 2
    assert found["eager"].details("attention") == [f"{sizes}: all, score s * 0.25; generated kernels"] * 2
    for name in ("padded", "eager"):
        found[name].attends(2)
        found[name].holds_nothing_large()
    # Without a mask tensor torch's own kernel runs already, and unmeasured that is where it is left.
    assert found["bare"].reasons("attention") == ["it has no mask tensor: torch's flash kernel runs here already"] * 2
    assert found["bare"].calls("aten._scaled_dot_product_flash_attention.default") == 2
    t5 = found["t5"]
    assert [item.split(": ")[1].split(" + ")[0] for item in t5.details("attention")] == [
        "all, score s", "all, score s", "causal, score s", "all; generated kernels", "causal, score s",
        "all; generated kernels",
    ]  # fmt: skip
    assert len(t5.details("norm")) == 12
    t5.attends(6)
    # The bias of each of the four self-attentions has a gradient by a launch, and nothing else is as large as scores.
    assert t5.launches()["ByC"] == 4
    large = [item for size in (SEQ, DECODED) for item in t5.ending_in(4, size, size)]
    assert not [item for item in large if f"[{BATCH}," in item]
    assert not t5.ending_in(4, DECODED, SEQ)


@pytest.mark.slow
def test_what_no_kernel_takes_goes_through_with_a_sentence() -> None:
    found = ask(
        wide=model("llama", head_dim=264),
        fp64=model("llama") | {"dtype": "float64"},
        fp32=model("llama") | {"dtype": "float32"},
    )
    wide = found["wide"]
    limits = [f"no kernel can be generated: heads of {name} have 264 entries, and 256 fit in a tile"
              for name in ("query", "value")]  # fmt: skip
    assert wide.reasons("attention") == ["; ".join(limits)] * 2
    assert wide.launches()[LAUNCHES["forward"]] == 0
    assert wide.calls("aten._softmax.default") == 2
    assert len(wide.details("norm")) == 5
    fp64 = found["fp64"]
    sentence = (
        "Inductor fuses this norm as well, and for float64 on cuda with kernels='auto' fxopt has no kernel of its own"
    )
    assert fp64.reasons("norm") == [sentence] * 5
    assert [item.split("; ")[1] for item in fp64.details("attention")] == [SDPA] * 2
    assert not fp64.launches()
    assert fp64.calls("fxopt.linear_cross_entropy") == 1
    assert not fp64.ending_in(ROWS, VOCAB)
    assert found["fp32"].graph["refusals"] == []
    found["fp32"].attends(2)
    found["fp32"].holds_nothing_large()


@pytest.mark.slow
def test_by_aten_there_are_no_launches() -> None:
    aten = {"options": {"kernels": "aten"}}
    found = ask(llama=model("llama") | aten, gemma2=model("gemma2") | aten)
    for answer in found.values():
        assert not answer.launches()
        assert set(answer.reasons("norm")) == {
            "Inductor fuses this norm as well, and for bfloat16 on cuda with kernels='aten' "
            "fxopt has no kernel of its own"
        }
        assert len(answer.details("linear_cross_entropy")) == 1
    assert [item.split("; ")[1] for item in found["llama"].details("attention")] == [SDPA] * 2
    assert found["llama"].calls("aten._scaled_dot_product_flash_attention.default") == 2
    found["llama"].holds_nothing_large()
    assert found["gemma2"].reasons("attention") == [
        "by ATen on cuda:0 only plain and causal attention is rewritten: more needs kernels='auto' and CUDA"
    ] * 2  # fmt: skip
    assert found["gemma2"].calls("aten._softmax.default") == 2


@pytest.mark.slow
def test_a_backend_of_sdpa_that_is_chosen_is_what_is_in_the_graph() -> None:
    """Named by its operator, with its own backward; eager attention is no less fit for it."""
    found = ask(
        flash=model("llama", "sdpa") | {"winner": "flash"},
        cudnn=model("llama") | {"winner": "cudnn"},
        efficient=model("llama") | {"winner": "efficient", "dtype": "float32"},
        odd=model("llama", head_dim=20) | {"winner": "flash"},
        softcapped=model("gemma2") | {"winner": "flash"},
        inductor=model("llama") | {"winner": "inductor"},
    )
    for name in ("flash", "cudnn", "efficient"):
        assert [item.split("; ")[1] for item in found[name].details("attention")] == [name] * 2
        for suffix in (".default", "_backward.default"):
            assert found[name].calls(f"aten._scaled_dot_product_{name}_attention{suffix}") == 2
        assert found[name].calls("aten._scaled_dot_product") == 4
        assert found[name].launches()[LAUNCHES["forward"]] == 0
        found[name].holds_nothing_large()
    # Heads of 20 are padded to 24 for the flash kernel, and nobody sees that.
    assert len(found["odd"].ending_in(SEQ, 24)) > 0
    assert found["odd"].graph["notes"] == []
    assert [item.split("; ")[1] for item in found["softcapped"].details("attention")] == ["generated kernels"] * 2
    # fp32 has one backend of these, and what SDPA has no argument for has none.
    (choice, _) = (item["choice"] for item in found["efficient"].graph["rewrites"] if item["rule"] == "attention")
    assert [one["name"] for one in choice["measured"]] == ["fxopt", "efficient", "inductor"]
    assert not found["inductor"].graph["rewrites"]
    assert all(
        item["cost"] and "Inductor's own code was measured" in item["reasons"][0]
        for item in found["inductor"].graph["refusals"]
    )
    assert len(found["inductor"].graph["refusals"]) == 8


@pytest.mark.slow
def test_mixed_precision_decides_the_dtype_of_kernels() -> None:
    """Under autocast, and by explicit casts: then norms round their results, and no launch is followed by a cast."""
    wide = model("llama") | {"dtype": "float32"}
    found = ask(autocast=wide | {"autocast": "bfloat16"}, explicit=wide | {"options": {"precision": "bf16"}})
    for answer in found.values():
        assert answer.graph["refusals"] == []
        assert answer.details("linear_cross_entropy") == [HEAD]
        assert len(answer.details("norm")) == 5
        answer.attends(2)
        answer.holds_nothing_large()
    casts = {name: answer.calls("aten._to_copy") for name, answer in found.items()}
    assert casts["explicit"] < casts["autocast"]
    assert {cast["reason"] for cast in found["explicit"].graph["casts"]} == {
        "aten::linear computes in 16 bits", "aten::matmul computes in 16 bits",
    }  # fmt: skip
