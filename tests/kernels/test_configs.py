"""Which configuration a kernel is launched with: the default, or what was measured to be faster and is remembered."""

import dataclasses
import json
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_kernels import COPY, PRODUCT
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources

from fxopt.kernels import cards, configs, tuning
from fxopt.kernels.cards import CARDS, GFX942, INTERPRETER, Card, card_of
from fxopt.kernels.configs import Config, config_for, remember, remembered
from fxopt.kernels.source import Kernel
from fxopt.kernels.tuning import tune

CARD = dataclasses.replace(CARDS[1], model="NVIDIA GeForce RTX 3090")
SIZES = tuple(Config((("BLOCK", size),)) for size in (64, 128, 256))
PAIR = tuple(Config((("M", size), ("N", 32), ("K", 32))) for size in (32, 64))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing is remembered, on disk or in the process."""
    monkeypatch.setenv("FXOPT_CACHE", str(tmp_path))
    monkeypatch.delenv("FXOPT_TUNE", raising=False)
    new_process(monkeypatch)
    return tmp_path


def new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is remembered is only on disk."""
    monkeypatch.setattr(configs, "_KNOWN", {})


class Launches:
    """A run of kernels, each with the configuration that it gets and a time that goes by it."""

    def __init__(self, times: dict[Config, float | BaseException], *kernels: tuple[Kernel, tuple[Config, ...]]):
        self.times, self.kernels, self.count = times, kernels, 0

    def __call__(self) -> None:
        self.count += 1
        self.clock = 0.0
        for kernel, candidates in self.kernels:
            took = self.times[config_for(kernel, candidates, CARD)]
            if isinstance(took, BaseException):
                raise took
            self.clock += took

    def timer(self, run: Callable[[], object]) -> float:
        """Milliseconds of `run`."""
        run()
        return self.clock


def launches(*times: float | BaseException) -> Launches:
    """Copies whose candidates take `times`."""
    return Launches(dict(zip(SIZES, times, strict=True)), (COPY, SIZES))


# --- what is chosen ----------------------------------------------------------------------------------------------


def test_first_candidate_is_the_default_and_what_is_remembered_goes_before() -> None:
    assert config_for(COPY, SIZES, CARD) == SIZES[0]
    remember(COPY, CARD, SIZES[2])
    assert config_for(COPY, SIZES, CARD) == SIZES[2]
    assert config_for(PRODUCT, PAIR, CARD) == PAIR[0]


def test_what_is_no_candidate_any_more_is_not_launched() -> None:
    remember(COPY, CARD, SIZES[2])
    assert config_for(COPY, SIZES[:2], CARD) == SIZES[0]


def test_it_is_remembered_by_the_next_process(monkeypatch: pytest.MonkeyPatch) -> None:
    remember(COPY, CARD, SIZES[2])
    new_process(monkeypatch)
    assert config_for(COPY, SIZES, CARD) == SIZES[2]


def test_other_cards_types_and_versions_are_measured_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    remember(COPY, CARD, SIZES[2])
    new_process(monkeypatch)
    same_arch = dataclasses.replace(CARD, model="NVIDIA GeForce RTX 3060")
    assert config_for(COPY, SIZES, same_arch) == SIZES[0]
    wide = dataclasses.replace(COPY, signature=(("X", "*fp32"), *COPY.signature[1:]))
    assert config_for(wide, SIZES, CARD) == SIZES[0]
    for module in ("VERSION", "triton.__version__", "torch.__version__"):
        with monkeypatch.context() as patched:
            new_process(patched)
            patched.setattr(f"fxopt.kernels.configs.{module}", "9.9")
            assert config_for(COPY, SIZES, CARD) == SIZES[0], module
    assert config_for(COPY, SIZES, CARD) == SIZES[2]


@pytest.mark.parametrize("card", [CARDS[1], INTERPRETER], ids=lambda card: card.name)
def test_nothing_is_read_or_measured_where_there_is_no_card(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "_read", lambda path: pytest.fail(f"{path} was read"))
    assert config_for(COPY, SIZES, card) == SIZES[0]
    run = launches(3.0, 2.0, 1.0)
    assert tune(run, card, run.timer) == ()
    assert run.count == 0


def test_tuning_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    remember(COPY, CARD, SIZES[2])
    monkeypatch.setenv("FXOPT_TUNE", "0")
    assert config_for(COPY, SIZES, CARD) == SIZES[0]
    run = launches(3.0, 2.0, 1.0)
    assert tune(run, CARD, run.timer) == ()
    assert run.count == 0


# --- the disk ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["", "{", "null", "[1, 2]", "{}", '{"tiles": 3}', '{"tiles": [["N", "x"]], "num_warps": 4, "num_stages": 1}', "\0"],
)
def test_a_broken_file_is_no_file(text: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remember(COPY, CARD, SIZES[2])
    (path,) = cache.rglob("*.json")
    path.write_text(text)
    new_process(monkeypatch)
    assert config_for(COPY, SIZES, CARD) == SIZES[0]
    remember(COPY, CARD, SIZES[1])
    new_process(monkeypatch)
    assert config_for(COPY, SIZES, CARD) == SIZES[1]


def test_a_directory_in_place_of_the_file_is_no_file(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remember(COPY, CARD, SIZES[2])
    (path,) = cache.rglob("*.json")
    path.unlink()
    path.mkdir()
    new_process(monkeypatch)
    assert config_for(COPY, SIZES, CARD) == SIZES[0]
    remember(COPY, CARD, SIZES[1])
    assert config_for(COPY, SIZES, CARD) == SIZES[1]
    assert [one for one in cache.rglob("*.tmp") if one.is_file()] == []


def test_where_nothing_can_be_written_this_process_still_remembers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FXOPT_CACHE", str(tmp_path / "file"))
    run = launches(3.0, 2.0, 1.0)
    tune(run, CARD, run.timer)
    assert config_for(COPY, SIZES, CARD) == SIZES[2]
    assert tune(run, CARD, run.timer) == ()


def test_readers_never_see_half_a_file(cache: Path) -> None:
    remember(COPY, CARD, SIZES[0])
    (path,) = cache.rglob("*.json")
    writers = [
        threading.Thread(target=lambda one=one: [remember(COPY, CARD, one) for _ in range(200)]) for one in SIZES
    ]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        seen.add(json.loads(path.read_text())["tiles"][0][1])
    assert seen <= {64, 128, 256}
    assert list(cache.rglob("*.tmp")) == []


# --- tuning ------------------------------------------------------------------------------------------------------


def test_the_fastest_candidate_of_each_kernel_is_found_and_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    times = dict(zip((*SIZES, *PAIR), (3.0, 1.0, 2.0, 8.0, 5.0), strict=True))
    run = Launches(times, (COPY, SIZES), (PRODUCT, PAIR), (COPY, SIZES))
    copy, product = tune(run, CARD, run.timer)
    assert (copy.kernel, copy.best) == (COPY, SIZES[1])
    assert [config for config, _ in copy.times] == list(SIZES)
    assert [time for _, time in copy.times] == [14.0, 10.0, 12.0]
    assert (product.kernel, product.best) == (PRODUCT, PAIR[1])
    assert [time for _, time in product.times] == [10.0, 7.0], "copies are already launched with what is fastest"
    new_process(monkeypatch)
    run()
    assert run.clock == 7.0


def test_what_is_remembered_is_measured_only_when_asked_again() -> None:
    run = launches(3.0, 2.0, 1.0)
    assert [one.best for one in tune(run, CARD, run.timer)] == [SIZES[2]]
    assert tune(run, CARD, run.timer) == ()
    run.times[SIZES[1]] = 0.5
    assert [one.best for one in tune(run, CARD, run.timer, again=True)] == [SIZES[1]]


def test_what_is_remembered_and_no_candidate_any_more_is_measured_anew() -> None:
    remember(COPY, CARD, Config((("BLOCK", 512),)))
    run = launches(3.0, 2.0, 1.0)
    assert [one.best for one in tune(run, CARD, run.timer)] == [SIZES[2]]


def test_a_kernel_without_a_choice_is_not_measured() -> None:
    run = Launches({SIZES[0]: 1.0}, (COPY, SIZES[:1]))
    assert tune(run, CARD, run.timer) == ()
    assert remembered(COPY, CARD) is None


@pytest.mark.parametrize(("time", "best"), [(0.99, 0), (0.97, 1)])
def test_the_default_is_kept_unless_it_is_clearly_beaten(time: float, best: int) -> None:
    run = launches(1.0, time, 2.0)
    assert [one.best for one in tune(run, CARD, run.timer)] == [SIZES[best]]
    assert remembered(COPY, CARD) == SIZES[best], "so that it is not measured again"


@pytest.mark.parametrize(
    "error",
    [
        OutOfResources(200_000, 101_376, "shared memory"),
        CompilationError("x", None, "no"),
        RuntimeError("PassManager::run failed"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_candidates_that_triton_refuses_are_left_out(error: Exception) -> None:
    run = launches(3.0, error, 1.0)
    (found,) = tune(run, CARD, run.timer)
    assert [time for _, time in found.times] == [3.0, None, 1.0]
    assert found.best == SIZES[2]


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: an illegal memory access"), KeyboardInterrupt()])
def test_what_is_not_the_candidates_fault_is_raised_and_nothing_stays_in_force(error: BaseException) -> None:
    run = launches(3.0, error, 1.0)
    with pytest.raises(type(error)):
        tune(run, CARD, run.timer)
    assert configs.TRIAL.get() is None
    assert config_for(COPY, SIZES, CARD) == SIZES[0]


def test_other_threads_are_launched_as_before_while_candidates_are_tried() -> None:
    run, elsewhere = launches(3.0, 2.0, 1.0), []

    def timer(tried: Callable[[], object]) -> float:
        other = threading.Thread(target=lambda: elsewhere.append(config_for(COPY, SIZES, CARD)))
        other.start()
        other.join()
        return run.timer(tried)

    assert [one.best for one in tune(run, CARD, timer)] == [SIZES[2]]
    assert elsewhere == [SIZES[0]] * 3


def test_backwards_run_in_the_thread_that_tries() -> None:
    """Autograd's threads for a device have no context variables of ours."""
    seen = []
    tune(lambda: seen.append(torch._C._is_multithreading_enabled()), CARD)
    assert seen == [False]
    assert torch._C._is_multithreading_enabled()


def test_kernels_of_another_card_are_left_alone() -> None:
    run = launches(3.0, 2.0, 1.0)
    assert tune(run, dataclasses.replace(CARD, model="NVIDIA H200"), run.timer) == ()


def test_time_is_tritons_median_of_milliseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    run = launches(3.0, 2.0, 1.0)

    def do_bench(fn: Callable[[], object], warmup: int, rep: int, return_mode: str) -> float:
        assert return_mode == "median"
        return run.timer(fn)

    monkeypatch.setattr("triton.testing.do_bench", do_bench)
    assert [one.best for one in tune(run, CARD)] == [SIZES[2]]
    assert tuning.MARGIN < 1


# --- cards -------------------------------------------------------------------------------------------------------


def described(monkeypatch: pytest.MonkeyPatch, name: str, hip: str | None = None, **properties: object) -> Card:
    """The card that torch describes so."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(**properties))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.version, "hip", hip)
    cards._card_of.cache_clear()
    found = card_of(torch.device("cuda", 0))
    cards._card_of.cache_clear()
    return found


def test_a_known_architecture_has_its_limits_and_the_model_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    found = described(monkeypatch, CARD.model, major=8, minor=6, shared_memory_per_block_optin=1)
    assert found == CARD


def test_an_unknown_architecture_has_the_limits_that_its_driver_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    found = described(monkeypatch, "Thor", major=11, minor=0, shared_memory_per_block_optin=232_448)
    assert (found.name, found.arch, found.shared, found.model) == ("sm_110", 110, 232_448, "Thor")


def test_amds_cards_are_not_taken_for_nvidias(monkeypatch: pytest.MonkeyPatch) -> None:
    found = described(monkeypatch, "MI300X", "7.0", major=9, minor=4, gcnArchName="gfx942:sramecc+:xnack-")
    assert found == dataclasses.replace(GFX942, model="MI300X")


def test_where_there_is_no_cuda_the_card_has_no_model() -> None:
    assert card_of(torch.device("cpu")) == INTERPRETER
    if not torch.cuda.is_available():
        assert card_of(torch.device("cuda", 0)) == CARDS[0]
