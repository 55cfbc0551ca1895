"""Phase `step`: training steps of whole models, forward, backward and AdamW, under four backends.

Each backend has a process of its own. Compiling needs a core and the model's weights, so it is done ahead, while other
phases and cases are measured; the first step, from which on there are gradients and an optimizer's state, waits for
the case's turn.
"""

from __future__ import annotations

import functools
import os
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn

from fxopt.metering import release
from gpu import turns
from gpu.item import Answer, Item, Settings
from gpu.models import model

BACKENDS = ("inductor", "fxopt", "liger+inductor", "eager")
SHAPES = {"4x2048": (4, 2048), "1x8192": (1, 8192)}
TINY_SHAPES = {"4x2048": (2, 24), "1x8192": (1, 40)}
CASES = (
    ("Llama-3.2-1B", "4x2048", "full"),
    ("Qwen3-0.6B", "4x2048", "lora"),
    ("Llama-3.2-1B", "1x8192", "lora"),
    ("Qwen3-0.6B", "1x8192", "full"),
    ("Llama-3.2-1B", "4x2048", "lora"),
    ("Qwen3-0.6B", "4x2048", "full"),
    ("Llama-3.2-1B", "1x8192", "full"),
    ("Qwen3-0.6B", "1x8192", "lora"),
)
"""By value: the first four have both models, both shapes and both ways. Those of the others have a model and a shape
that were there before, so that fxopt has measured their sites, and Inductor finds kernels in its cache."""

TURNS, WARM, TIMED, EAGER_TIMED = 2, 1, 5, 3
COMPILING = {"inductor": 75.0, "fxopt": 120.0, "liger+inductor": 75.0, "eager": 15.0}
TURN_SECONDS = 3.0
"""Estimates: of compiling, eager's of starting alone; of a turn of steps of about 0.3 s."""

CONTEXT_GIB = 0.7
WEIGHTS_GIB = {"Llama-3.2-1B": 2.5, "Qwen3-0.6B": 1.2}
WORK_GIB = {"eager": 31.0, "inductor": 21.0, "fxopt": 12.0, "liger+inductor": 12.0}
"""Of a process, over its context: weights; and what a step holds at most over what stays between steps, which is the
weights, and where all are trained AdamW's two moments besides."""


def items(settings: Settings) -> list[Item]:
    """Every backend of every case."""
    cases = CASES[:2] if settings.tiny else CASES
    return [_item(*case, backend, settings) for case in cases for backend in BACKENDS]


def _item(name: str, shape: str, way: str, backend: str, settings: Settings) -> Item:
    spec = {"model": name, "shape": shape, "way": way, "backend": backend}
    case = f"{name} {shape} {way}"
    weights, work = (0.1, 0.4) if settings.tiny else (WEIGHTS_GIB[name], WORK_GIB[backend])
    rest = CONTEXT_GIB + weights * (3.0 if way == "full" else 1.1)
    eager = backend == "eager"
    return Item(
        "step", f"{case}: {backend}", spec, seconds=COMPILING[backend], gib=rest + work,
        turns=1 if settings.tiny or eager else TURNS, turn_seconds=TURN_SECONDS, rest_gib=rest,
        group=f"{case}: eager" if eager else case, fresh=True, ahead_gib=CONTEXT_GIB + weights,
    )  # fmt: skip


class Gate:
    """Where the first step waits, on a thread of its own, between being compiled and running."""

    def __init__(self) -> None:
        self._reached, self._open = threading.Event(), threading.Event()
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None

    def wait(self) -> None:
        """Called by the step, before it runs anything."""
        self._reached.set()
        self._open.wait()

    def start(self, step: Callable[[], Any]) -> None:
        """Run `step` until it waits; raises what it raises before."""

        def run() -> None:
            try:
                self.result = step()
            except BaseException as error:
                self._failure = error
            finally:
                self._reached.set()

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()
        self._reached.wait()
        self._check()

    def finish(self) -> Any:
        """Let the step run; what it returns or raises."""
        assert self._thread is not None
        self._open.set()
        self._thread.join()
        self._check()
        return self.result

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure


class Training:
    """A model under a backend, with its optimizer and one batch of random tokens."""

    def __init__(self, item: Item, settings: Settings) -> None:
        spec, self.settings = item.spec, settings
        self.backend: str = spec["backend"]
        self.gate, self.compile_s = Gate(), 0.0
        if settings.device == "cuda":
            os.nice(10)  # what is timed meanwhile has its threads on the host first
        if self.backend.startswith("liger"):
            patch_with_liger(spec["model"], settings)
        with turns.beside_others():
            self.model = model(spec["model"], spec["way"] == "lora", settings.tiny, settings.device)
        self.trained = [one for one in self.model.parameters() if one.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5, fused=settings.device == "cuda")
        batch, length = (TINY_SHAPES if settings.tiny else SHAPES)[spec["shape"]]
        vocabulary = self.model.get_input_embeddings().num_embeddings  # type: ignore[operator]
        tokens = torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(1))
        self.tokens = tokens.to(settings.device)
        self.run = compiled(self.model, self.backend, settings, self.gate)

    def step(self) -> tuple[torch.Tensor, torch.Tensor]:
        """One training step; the loss, and the norm of all gradients."""
        loss: torch.Tensor = self.run(input_ids=self.tokens, labels=self.tokens).loss
        loss.backward()
        norm = torch.nn.utils.get_total_norm([one.grad for one in self.trained if one.grad is not None])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach(), norm

    def compile(self) -> Answer:
        """Compile; the first step waits before it runs."""
        start = time.perf_counter()
        self.gate.start(self.step)
        self.compile_s = time.perf_counter() - start
        return {}

    def prepare(self) -> Answer:
        """Warm up: seconds of compiling, what the first step computed, peak and rest in MiB."""
        if not self.compile_s:
            self.compile()
        with turns.alone():
            start = time.perf_counter()
            loss, norm = self.gate.finish()
            self._wait()
            first = time.perf_counter() - start
            later = statistics.median(self._timed()[0] for _ in range(1 if self.settings.tiny else 2))
            compiling = self.compile_s + max(0.0, first - later)
            found = {"loss": float(loss), "grad_norm": float(norm), "compile_s": compiling, **self._memory()}
            release()
        return found | ({"report": said_by_fxopt()} if self.backend == "fxopt" else {})

    def measure(self, turn: int) -> Answer:
        """Milliseconds of each of some steps, after others that refill the allocator's cache."""
        timed = 1 if self.settings.tiny else EAGER_TIMED if self.backend == "eager" else TIMED
        for _ in range(0 if self.settings.tiny else WARM):
            self._timed()
        found = [1000 * self._timed()[0] for _ in range(timed)]
        release()
        return {"step_ms": found, "tokens": self.tokens.numel()}

    def _timed(self) -> tuple[float, tuple[torch.Tensor, torch.Tensor]]:
        """Seconds of a step, until the GPU has done it."""
        self._wait()
        start = time.perf_counter()
        found = self.step()
        self._wait()
        return time.perf_counter() - start, found

    def _wait(self) -> None:
        if self.settings.device == "cuda":
            torch.cuda.synchronize()

    def _memory(self) -> Answer:
        if self.settings.device != "cuda":
            return {"peak_mib": None, "rest_mib": None}
        release()
        torch.cuda.reset_peak_memory_stats()
        rest = torch.cuda.memory_allocated()
        self._timed()
        return {"peak_mib": torch.cuda.max_memory_allocated() / 2**20, "rest_mib": rest / 2**20}


def compiled(model: nn.Module, backend: str, settings: Settings, gate: Gate) -> Callable[..., Any]:
    """`model` under a backend of `BACKENDS`, which waits at `gate` before it runs."""
    if backend == "eager":

        def eager(**inputs: Any) -> Any:
            gate.wait()
            return model(**inputs)

        return eager
    compiler: Callable[..., Any] = torch._dynamo.lookup_backend(settings.compiler)
    if backend == "fxopt":
        from fxopt.backend import fxopt  # by name it is found only where fxopt is installed

        turns.measure_sites_alone()
        compiler = functools.partial(fxopt, options={"kernels": settings.lowering})

    def gated(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        made: Callable[..., Any] = compiler(graph, inputs)
        gate.wait()
        return made

    return torch.compile(model, backend=gated)


def patch_with_liger(name: str, settings: Settings) -> None:
    """All that liger-kernel has for the model, before it is built. Raises ImportError without its wheel."""
    from liger_kernel import transformers as liger

    if settings.device != "cuda":
        raise ImportError("liger-kernel is of GPUs only")
    apply = {"Llama-3.2-1B": "apply_liger_kernel_to_llama", "Qwen3-0.6B": "apply_liger_kernel_to_qwen3"}[name]
    getattr(liger, apply)()


def said_by_fxopt() -> Answer:
    """The verdict of the last report and the rules that fired."""
    import fxopt

    reports = fxopt.reports()
    return {
        "verdict": reports[-1].verdict if reports else "nothing was compiled",
        "rewrites": [site.rule for report in reports for site in report.rewrites],
    }
