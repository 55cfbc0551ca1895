"""The command `fxopt`: exit codes, what goes to stdout and what to stderr, mistakes and the nearest name."""

import io
import json
import os
import re
import subprocess
import sys

import pytest
from tiny_kernels import COPY, FAT, PRODUCT, SLIM, SMALL, SPILLING

import fxopt
from fxopt.cli import main
from fxopt.commands import kernels
from fxopt.kernels.cards import Card
from fxopt.kernels.catalog import FAMILIES, Shipped, catalog
from fxopt.kernels.configs import Config

ALIGNED = ("X", "Y", "Out", "width")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled is kept for the tests of this file: a process to compile in takes 3 s to start."""
    folder = tmp_path_factory.getbasetemp() / "cli-cache"
    monkeypatch.setenv("FXOPT_CACHE", str(folder))


def ship(monkeypatch: pytest.MonkeyPatch, *shipped: Shipped) -> None:
    """Let the catalog have `shipped` alone, for every card."""

    def tiny(card: Card, families: tuple[str, ...]) -> list[Shipped]:
        assert set(families) <= set(FAMILIES)
        return list(shipped)

    monkeypatch.setattr(kernels, "catalog", tiny)


def product(*configs: Config) -> Shipped:
    """A product of matrices."""
    return Shipped("product bf16", PRODUCT, configs, ALIGNED)


GOOD = (Shipped("copy bf16", COPY, (SMALL,)), product(SLIM, FAT, SPILLING))


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m fxopt`."""
    command = [sys.executable, "-m", "fxopt", *arguments]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)


# --- the command -------------------------------------------------------------------------------------------------


def test_runs_as_a_module_and_says_its_version() -> None:
    done = python("--version")
    assert (done.returncode, done.stdout) == (0, f"fxopt {fxopt.__version__}\n")


def test_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, expected in ((["--help"], "kernels"), (["kernels", "--help"], "--source NAME")):
        with pytest.raises(SystemExit) as left:
            main(arguments)
        assert left.value.code == 0
        assert expected in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["kernel"], ["kernels", "--jobs", "0"], ["kernels", "--json", "--list"]])
def test_mistakes_that_argparse_finds(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "sm86"], "no target 'sm86' (did you mean 'sm_86'?). There are: sm_80, sm_86, sm_89, sm_90"),
        (["--target", "sm_86,"], "no target ''. There are: sm_80"),
        (["--family", "norm,attenton"], "no family 'attenton' (did you mean 'attention'?)"),
        (["--source", "copy bf61"], "no kernel 'copy bf61' (did you mean 'copy bf16'?). `fxopt kernels --list` prints"),
    ],
)
def test_names_that_are_none(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ship(monkeypatch, *GOOD)
    assert main(["kernels", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_refuses_where_triton_interprets() -> None:
    done = python("kernels", "--target", "sm_86", TRITON_INTERPRET="1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "fxopt: TRITON_INTERPRET=1 is set, and then triton compiles nothing: unset it\n"


# --- compiling ---------------------------------------------------------------------------------------------------


def test_json_is_a_list_of_what_each_configuration_uses_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    ship(monkeypatch, *GOOD)
    assert main(["kernels", "--target", "sm_86,sm_120", "--json", "--jobs", "1"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert [(one["kernel"], one["target"]) for one in found] == [
        (name, target) for target in ("sm_86", "sm_120") for name in ("copy bf16", "product bf16")
    ]
    copy, matrices, *_ = found
    keys = ["kernel", "target", "registers", "spill_bytes", "shared_bytes", "fits", "config", "default", "error"]
    assert list(copy) == keys
    assert copy["config"] == {"BLOCK": 256, "num_warps": 4, "num_stages": 1}
    assert (copy["spill_bytes"], copy["shared_bytes"], copy["fits"]) == (0, 0, True)
    assert (copy["default"], copy["error"]) == (True, None)
    assert 0 < copy["registers"] < matrices["registers"] <= 255


@pytest.mark.slow
def test_candidates_are_compiled_when_asked_for_and_may_be_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The one that takes too much shared memory and the one that spills are shown, and are no faults."""
    ship(monkeypatch, *GOOD, again := Shipped("copy again", COPY, (SMALL,)))
    assert main(["kernels", "--target", "sm_86", "--all", "--json", "--jobs", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["default"] for one in found] == [True, True, False, False, True]
    assert [one["fits"] for one in found] == [True, True, False, True, True]
    assert found[3]["spill_bytes"] > 64
    assert found[4] == found[0] | {"kernel": again.name}, "one kernel under two names is compiled once"


def test_table_has_a_paragraph_for_each_kernel(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ship(monkeypatch, *GOOD)
    assert main(["kernels", "--target", "sm_86", "--jobs", "1", "--all"]) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines[0].split() == ["target", "registers", "spills,", "B", "shared,", "B", "fits", "configuration"]
    assert [line for line in lines[1:] if not line.startswith(" ")] == ["copy bf16", "product bf16"]
    assert re.fullmatch(r"  sm_86 +\d+ +0 +0  yes   BLOCK=256 warps=4 stages=1", lines[2])
    assert re.fullmatch(r"  sm_86 +\d+ +0 +[\d,]{7}  no    M=128 N=128 .*warps=8 stages=5 \(candidate\)", lines[5])
    assert printed.err == "4 configurations, 0 of them defaults with a fault\n"


@pytest.mark.parametrize(
    ("shipped", "sentence"),
    [
        pytest.param(
            product(FAT),
            r"product bf16 on sm_86 \(M=128 .*\) does not fit: it takes [\d,]+ bytes .* of 101,376\n",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            product(SPILLING),
            r"product bf16 on sm_86 \(M=128 .*\) spills [\d,]+ bytes, more than 64\n",
            marks=pytest.mark.slow,
        ),
        (
            Shipped("copy bf16", COPY, (Config((("BLOCK", 100),)),)),
            r"copy bf16 on sm_86 \(BLOCK=100 .*\) does not compile: .*power of 2\n",
        ),
    ],
    ids=["does not fit", "spills", "does not compile"],
)
def test_a_default_with_a_fault_is_named_and_fails(
    shipped: Shipped, sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ship(monkeypatch, shipped)
    assert main(["kernels", "--target", "sm_86", "--jobs", "1"]) == 1
    printed = capsys.readouterr()
    assert re.match(sentence, printed.err)
    assert "1 configurations, 1 of them defaults with a fault" in printed.err
    assert shipped.name in printed.out
    assert main(["kernels", "--target", "gfx942", "--jobs", "1"]) == 0, "where nothing of ours is launched"


def test_one_kernel_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = []

    def compile_shown(jobs: list[object], processes: int, limit: float) -> dict[object, str]:
        limits.append((processes, limit))
        return dict.fromkeys(jobs, "compilation took longer than 7 s")

    ship(monkeypatch, *GOOD)
    monkeypatch.setattr(kernels, "compile_shown", compile_shown)
    assert main(["kernels", "--target", "sm_86", "--limit", "7", "--jobs", "3"]) == 1
    assert limits == [(3, 7)]


# --- showing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_lists_a_familys_kernels_and_prints_their_source(family: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels", "--list", "--family", family]) == 0
    names = capsys.readouterr().out.splitlines()
    assert len(set(names)) == len(names) > 3
    assert main(["kernels", "--source", names[0]]) == 0
    source = capsys.readouterr().out
    compile(source, names[0], "exec")
    first = next(iter(catalog(kernels.CARDS[0], (family,))))
    assert (first.name, first.kernel.source) == (names[0], source)


def test_source_is_highlighted_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    for name, value in (("TERM", "xterm-256color"), ("COLUMNS", "200")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    ship(monkeypatch, *GOOD)
    assert main(["kernels", "--source", "copy bf16"]) == 0
    shown = terminal.getvalue()
    assert "\x1b[" in shown
    plain = re.sub(r"\x1b\[[\d;]*m", "", shown)
    assert [line.rstrip() for line in plain.strip().splitlines()] == COPY.source.strip().splitlines()


def test_a_reader_that_closes_its_pipe_is_no_error() -> None:
    command = f"set -o pipefail; {sys.executable} -m fxopt kernels --list | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (141, "")
