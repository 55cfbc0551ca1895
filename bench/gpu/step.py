"""Phase `step`: training steps of whole models, forward, backward and AdamW, under four backends.

Each backend has a process of its own. Those of a case are compiled beside each other, as far as the card's memory
allows, and then take turns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fxopt.metering import release
from gpu.item import Answer, Item, Settings
from gpu.models import model

BACKENDS = ("inductor", "fxopt", "liger+inductor", "eager")
SHAPES = {"4x2048": (4, 2048), "1x8192": (1, 8192)}
TINY_SHAPES = {"4x2048": (2, 24), "1x8192": (1, 40)}
CASES = (
    ("Llama-3.2-1B", "4x2048", "full"),
    ("Qwen3-0.6B", "1x8192", "full"),
    ("Llama-3.2-1B", "1x8192", "lora"),
    ("Qwen3-0.6B", "4x2048", "lora"),
    ("Llama-3.2-1B", "1x8192", "full"),
    ("Qwen3-0.6B", "4x2048", "full"),
    ("Llama-3.2-1B", "4x2048", "lora"),
    ("Qwen3-0.6B", "1x8192", "lora"),
)
"""By value: the first four have both models, both shapes and both ways."""

TURNS, WARM, TIMED = 3, 2, 6
SECONDS = {"eager": 30.0, "inductor": 75.0, "fxopt": 120.0, "liger+inductor": 75.0}
PEAK_GIB = {"eager": 40.0, "inductor": 30.0, "fxopt": 20.0, "liger+inductor": 20.0}
REST_GIB = {"full": 9.0, "lora": 4.0}
"""Estimates for a process, generous: what a step holds at most, and what stays between turns."""


def items(settings: Settings) -> list[Item]:
    """Every backend of every case."""
    cases = CASES[:2] if settings.tiny else CASES
    return [_item(*case, backend, settings) for case in cases for backend in BACKENDS]


def _item(name: str, shape: str, way: str, backend: str, settings: Settings) -> Item:
    spec = {"model": name, "shape": shape, "way": way, "backend": backend}
    case = f"{name} {shape} {way}"
    return Item(
        "step", f"{case}: {backend}", spec, seconds=SECONDS[backend], gib=0.5 if settings.tiny else PEAK_GIB[backend],
        turns=1 if settings.tiny else TURNS, turn_seconds=4, rest_gib=0.5 if settings.tiny else REST_GIB[way],
        group=case, fresh=True,
    )  # fmt: skip


class Training:
    """A model under a backend, with its optimizer and one batch of random tokens."""

    def __init__(self, item: Item, settings: Settings) -> None:
        spec, self.settings = item.spec, settings
        self.backend: str = spec["backend"]
        if self.backend.startswith("liger"):
            patch_with_liger(spec["model"], settings)
        self.model = model(spec["model"], spec["way"] == "lora", settings.tiny, settings.device)
        self.trained = [one for one in self.model.parameters() if one.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5, fused=settings.device == "cuda")
        batch, length = (TINY_SHAPES if settings.tiny else SHAPES)[spec["shape"]]
        vocabulary = self.model.get_input_embeddings().num_embeddings  # type: ignore[operator]
        tokens = torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(1))
        self.tokens = tokens.to(settings.device)
        self.run = compiled(self.model, self.backend, settings)

    def step(self) -> tuple[torch.Tensor, torch.Tensor]:
        """One training step; the loss, and the norm of all gradients."""
        loss: torch.Tensor = self.run(input_ids=self.tokens, labels=self.tokens).loss
        loss.backward()
        norm = torch.nn.utils.get_total_norm([one.grad for one in self.trained if one.grad is not None])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach(), norm

    def prepare(self) -> Answer:
        """Compile and warm up: seconds of compiling, what the first step computed, peak and rest in MiB."""
        first, (loss, norm) = self._timed()
        later = statistics.median(self._timed()[0] for _ in range(2))
        found = {"loss": float(loss), "grad_norm": float(norm), "compile_s": first - later, **self._memory()}
        release()
        return found | ({"report": said_by_fxopt()} if self.backend == "fxopt" else {})

    def measure(self, turn: int) -> Answer:
        """Milliseconds of each of some steps, after others that refill the allocator's cache."""
        steps = (1, 1) if self.settings.tiny else (WARM, TIMED)
        for _ in range(steps[0]):
            self._timed()
        found = [1000 * self._timed()[0] for _ in range(steps[1])]
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


def compiled(model: nn.Module, backend: str, settings: Settings) -> Callable[..., Any]:
    """`model` under a backend of `BACKENDS`."""
    if backend == "eager":
        return model
    if backend != "fxopt":
        return torch.compile(model)
    from fxopt.backend import fxopt  # by name it is found only where fxopt is installed

    return torch.compile(model, backend=fxopt, options={"kernels": settings.lowering})


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
