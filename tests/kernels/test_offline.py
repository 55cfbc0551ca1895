"""Kernels compiled for cards that are not there: every default of every family fits and spills nothing."""

import contextlib
import dataclasses
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
import triton
from tiny_kernels import COPY, FAT, PRODUCT, SLIM, SMALL, SPILLING, odd

import fxopt
from fxopt.commands.kernels import MOST_SPILLS, Row, faults
from fxopt.kernels import offline
from fxopt.kernels.cards import CARDS, TARGETS, Card
from fxopt.kernels.catalog import FAMILIES, Shipped, catalog
from fxopt.kernels.configs import Config
from fxopt.kernels.farm import compile_all
from fxopt.kernels.offline import Job, Resources, compile_offline

SM = {card.arch: card for card in CARDS}
ALIGNED = ("X", "Y", "Out", "width")  # else tiles are not copied ahead into shared memory


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing is remembered yet, and nothing is left in the user's directories."""
    monkeypatch.setenv("FXOPT_CACHE", str(tmp_path / "fxopt"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    return tmp_path


# --- one kernel --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("card", TARGETS, ids=lambda card: card.name)
def test_compiles_for_every_target(card: Card) -> None:
    found = compile_offline(Job(COPY, SMALL, card))
    assert 0 < found.registers < 64
    assert found == Resources(found.registers, spill_bytes=0, shared_bytes=0, fits=True)


def test_shared_memory_decides_what_fits() -> None:
    large, small = (compile_offline(Job(PRODUCT, FAT, SM[arch], ALIGNED)) for arch in (90, 86))
    assert SM[86].shared < small.shared_bytes < SM[90].shared
    assert (large.fits, small.fits) == (True, False)
    slim = compile_offline(Job(PRODUCT, SLIM, SM[86], ALIGNED))
    assert 0 < slim.shared_bytes <= 2 * (64 + 64) * 32 * 2
    assert slim.fits


def test_spills_are_counted_where_registers_are_not() -> None:
    found = compile_offline(Job(PRODUCT, SPILLING, SM[80]))
    assert found.registers <= 255
    assert found.spill_bytes > 4 * (128 * 128 // 32 - 255), "each thread has 512 totals and 255 registers"


def test_what_ptxas_says_is_read_and_missed_where_it_says_nothing() -> None:
    log = """ptxas info    : Function properties for product
    8 bytes stack frame, 24 bytes spill stores, 36 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 8 bytes cumulative stack size
"""
    assert offline._of_ptxas(log) == (40, 60)
    with pytest.raises(RuntimeError, match="said nothing like"):
        offline._of_ptxas("")


def test_arguments_that_16_divides_are_loaded_at_once() -> None:
    plain, aligned = (compile_offline(Job(COPY, SMALL, SM[86], names)) for names in ((), ("X", "Y", "size")))
    assert aligned.registers < plain.registers


def test_leaves_nothing_in_tritons_cache(cache: Path) -> None:
    compile_offline(Job(COPY, SMALL, SM[86]))
    assert not (cache / "triton").exists()
    assert triton.knobs.cache.dir == str(cache / "triton")


def test_refuses_where_triton_interprets() -> None:
    script = "import fxopt.kernels.farm as f; list(f.compile_all([], 1))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "RuntimeError: triton was imported with TRITON_INTERPRET=1 and compiles nothing" in done.stderr


# --- many --------------------------------------------------------------------------------------------------------


def jobs_of(*warps: int) -> list[Job]:
    """Jobs for `tiny_kernels.odd`."""
    return [Job(COPY, Config((("BLOCK", 256),), each, 1), SM[86]) for each in warps]


@pytest.mark.slow
def test_many_compile_in_processes_and_one_that_does_not_is_a_sentence() -> None:
    wrong = dataclasses.replace(COPY, source=COPY.source.replace("at < size", "at < sise"))
    found = dict(compile_all([Job(kernel, SMALL, SM[arch]) for kernel in (COPY, wrong) for arch in (86, 120)], 2))
    for arch in (86, 120):
        assert found[Job(COPY, SMALL, SM[arch])] == compile_offline(Job(COPY, SMALL, SM[arch]))
        assert "sise is not defined" in str(found[Job(wrong, SMALL, SM[arch])])


@pytest.mark.slow
def test_compilers_that_raise_die_or_hang_do_not_take_the_others_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINY_ASSEMBLER", str(tmp_path / "pid"))
    raises, dies, hangs, *right = jobs = jobs_of(1, 2, 8, 4, 16, 32)
    found = dict(compile_all(jobs, 1, limit=2, compiler=odd))
    assert [found[job] for job in right] == [Resources(warps, 0, 0, True) for warps in (4, 16, 32)]
    assert found[raises] == "ValueError: what is wrong"
    assert found[dies] == "the compiler's process ended with exit code -6"
    assert found[hangs] == "compilation took longer than 2 s"
    assert not is_running(int((tmp_path / "pid").read_text())), "what the compiler waited for is ended with it"
    assert not workers()
    assert [offline.recalled(job) for job in jobs[:3]] == [None] * 3, "a failure may be the machine's"
    assert dict(compile_all(right, 1, compiler=odd)) == {job: found[job] for job in right}, "remembered: in no time"


def workers() -> list[str]:
    """Processes of this one that serve compilations."""
    found = []
    for one in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it may end meanwhile
            parent = (one / "stat").read_text().rpartition(")")[2].split()[1]
            if parent == str(os.getpid()) and b"farm" in (one / "cmdline").read_bytes():
                found.append(one.name)
    return found


def is_running(pid: int) -> bool:
    """Whether there is such a process; one that is dead but waited for by nobody is not running."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_script_that_compiles_is_run_once(tmp_path: Path) -> None:
    """Training scripts rarely ask whether they are `__main__`."""
    script = tmp_path / "train.py"
    script.write_text(
        "from tiny_kernels import COPY, odd\n"
        "from fxopt.kernels.cards import CARDS\n"
        "from fxopt.kernels.configs import Config\n"
        "from fxopt.kernels.farm import compile_all\n"
        "from fxopt.kernels.offline import Job\n"
        "print('once')\n"
        "print(list(compile_all([Job(COPY, Config((('BLOCK', 256),), 4, 1), CARDS[1])], 1, compiler=odd))[0][1])\n"
    )
    paths = os.pathsep.join((str(Path(__file__).parents[1]), str(Path(fxopt.__file__).parents[1])))
    env = os.environ | {"PYTHONPATH": paths, "FXOPT_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.splitlines() == ["once", str(Resources(4, 0, 0, True))], done.stderr


def test_nobody_compiles_on_when_nobody_asks_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINY_ASSEMBLER", str(tmp_path / "pid"))
    started = time.monotonic()
    going = compile_all(jobs_of(4, 8), 1, compiler=odd)
    next(going)
    going.close()
    assert not workers()
    assert time.monotonic() - started < 60


# --- what was compiled before ------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"registers": 1}'])
def test_broken_files_are_compiled_anew(text: str, cache: Path) -> None:
    (job,) = jobs_of(4)
    offline.remember(job, Resources(4, 0, 0, True))
    (path,) = (cache / "fxopt" / "offline").iterdir()
    path.write_text(text)
    assert offline.recalled(job) is None


def test_other_configurations_cards_types_and_versions_are_other_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    (job,) = jobs_of(4)
    offline.remember(job, Resources(4, 0, 0, True))
    assert offline.recalled(job) == Resources(4, 0, 0, True)
    wide = dataclasses.replace(COPY, signature=(("X", "*fp32"), *COPY.signature[1:]))
    others = [
        dataclasses.replace(job, kernel=wide),
        dataclasses.replace(job, config=SMALL, aligned=("X",)),
        dataclasses.replace(job, card=SM[89]),
        *jobs_of(8),
    ]
    assert [offline.recalled(other) for other in others] == [None] * 4
    monkeypatch.setattr(triton, "__version__", "3.99")
    assert offline.recalled(job) is None


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FXOPT_CACHE", str(tmp_path / "file"))
    (job,) = jobs_of(4)
    offline.remember(job, Resources(4, 0, 0, True))
    assert offline.recalled(job) is None


# --- the families ------------------------------------------------------------------------------------------------


def default_jobs(card: Card, shipped: Iterable[Shipped]) -> dict[str, Job]:
    """What compiles the default configurations, by name."""
    return {one.name: Job(one.kernel, one.configs[0], card, one.aligned) for one in shipped}


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_names_are_unique_and_configurations_are_of_their_kernels(card: Card) -> None:
    every = list(catalog(card))
    assert len({one.name for one in every}) == len(every)
    for one in every:
        arguments = {name for name, kind in one.kernel.signature if kind != "constexpr"}
        assert set(one.aligned) <= arguments, one.name
        assert len(set(one.configs)) == len(one.configs) > 0, one.name
        for config in one.configs:
            assert tuple(name for name, _ in config.tiles) == one.kernel.tiles, one.name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("arch", [86, 120])
def test_a_default_of_every_kernel_fits_consumer_cards_and_spills_nothing(family: str, arch: int) -> None:
    bf16 = [one for one in catalog(SM[arch], (family,)) if "bf16" in one.name]
    by_kernel = itertools.groupby(sorted(bf16, key=lambda one: one.kernel.name), key=lambda one: one.kernel.name)
    jobs = default_jobs(SM[arch], [next(group) for _, group in by_kernel])
    assert len(jobs) >= 3
    assert faults(Row(name, job.card, job.config, True, compile_offline(job)) for name, job in jobs.items()) == []


@pytest.mark.parametrize("arch", [90, 100])
def test_the_widest_heads_with_a_softcap_spill_nothing_on_large_cards(arch: int) -> None:
    """Four warps of 64 rows did: 92 bytes on sm_90."""
    (job,) = default_jobs(
        SM[arch], [one for one in catalog(SM[arch]) if one.name == "attention_forward bf16 256 softcap"]
    ).values()
    assert compile_offline(job).spill_bytes == 0


@pytest.mark.slow
@pytest.mark.timeout(5400)
@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_every_default_fits_and_spills_nothing(card: Card) -> None:
    jobs = default_jobs(card, catalog(card))
    found = dict(compile_all(list(jobs.values()), 2))
    assert faults(Row(name, card, job.config, True, found[job]) for name, job in jobs.items()) == []


def test_faults_say_what_is_wrong_with_defaults_on_nvidia_cards() -> None:
    right, full = Resources(99, MOST_SPILLS, 1024, True), Resources(99, 0, 2**20, False)
    spilling = dataclasses.replace(right, spill_bytes=MOST_SPILLS + 1)
    row = Row("copy", SM[86], SMALL, True, right)
    with_faults = [dataclasses.replace(row, outcome=outcome) for outcome in (full, spilling, "no such name")]
    assert faults([row, *with_faults]) == [
        "copy on sm_86 (BLOCK=256 warps=4 stages=1) does not fit: it takes 1,048,576 bytes of shared memory of 101,376",
        "copy on sm_86 (BLOCK=256 warps=4 stages=1) spills 65 bytes, more than 64",
        "copy on sm_86 (BLOCK=256 warps=4 stages=1) does not compile: no such name",
    ]
    elsewhere = [dataclasses.replace(one, card=TARGETS[-1]) for one in with_faults]
    assert faults([*elsewhere, *(dataclasses.replace(one, default=False) for one in with_faults)]) == []
