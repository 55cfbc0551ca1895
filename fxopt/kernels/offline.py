"""Compiling kernels for cards that are not there: registers, spills and shared memory, as the card would have them.

Triton's wheel brings the assemblers of all NVIDIA targets and a linker of AMD's. What is measured is what a launch on
the card would load: Triton's own call of ``ptxas`` is listened to, so that its options are those of a launch.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fxopt.kernels.cards import Card
from fxopt.kernels.configs import ALIGNMENT, Config
from fxopt.kernels.interpreter import interpreting
from fxopt.kernels.source import Kernel, cache_directory, write_whole

__all__ = ["Job", "Resources", "compile_offline", "recalled", "remember"]

TENSOR_MEMORY = 512
"""Columns of tensor memory that a block may use on sm_100."""


@dataclass(frozen=True)
class Job:
    """One kernel with one configuration for one card; aligned: the arguments that `ALIGNMENT` divides."""

    kernel: Kernel
    config: Config
    card: Card
    aligned: tuple[str, ...] = ()


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel uses.

    registers:    of a thread.
    spill_bytes:  written to and read from local memory by a thread for want of registers, by instructions in the code,
                  each counted once: the sum of ``ptxas``'s spill stores and loads; on AMD, of spilled registers.
    shared_bytes: of a block.
    fits:         a block can be launched on the card.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    fits: bool


def compile_offline(job: Job) -> Resources:
    """Compile `job`, for as long as it takes. Raises what Triton raises, and RuntimeError where Triton interprets."""
    if interpreting():
        raise RuntimeError("triton was imported with TRITON_INTERPRET=1 and compiles nothing: unset it and start again")
    with _listening() as log:
        compiled = triton.compile(_source(job), target=target_of(job.card), options=_options(job.config))
    metadata = compiled.metadata
    tensor_memory = getattr(metadata, "tmem_size", None) or 0
    fits = metadata.shared <= job.card.shared and tensor_memory <= TENSOR_MEMORY
    found = _of_ptxas(log.getvalue()) if job.card.backend == "cuda" else _of_amd(compiled.asm["amdgcn"])
    return Resources(*found, metadata.shared, fits)


def target_of(card: Card) -> GPUTarget:
    """The card as Triton knows it."""
    return GPUTarget("cuda", card.arch, 32) if card.backend == "cuda" else GPUTarget("hip", card.name, 64)


def _source(job: Job) -> ASTSource:
    function = job.kernel.load()
    aligned = {(function.arg_names.index(name),): [["tt.divisibility", ALIGNMENT]] for name in job.aligned}
    return ASTSource(function, dict(job.kernel.signature), dict(job.config.tiles), aligned)


def _options(config: Config) -> dict[str, int]:
    return {"num_warps": config.num_warps, "num_stages": config.num_stages}


@contextlib.contextmanager
def _listening() -> Iterator[io.StringIO]:
    """Within, this process compiles anew and keeps nothing (Triton would, 0.5 MB a kernel); yields ptxas's log."""
    with contextlib.ExitStack() as stack:
        for group in (knobs.cache, knobs.nvidia):
            stack.enter_context(group.scope())
        knobs.cache.dir = stack.enter_context(tempfile.TemporaryDirectory(prefix="fxopt-offline-"))
        knobs.nvidia.dump_ptxas_log = True
        yield stack.enter_context(contextlib.redirect_stdout(io.StringIO()))


def _of_ptxas(log: str) -> tuple[int, int]:
    """(registers, spill bytes) of ``ptxas -v``."""
    stored, loaded = _number(r"(\d+) bytes spill stores", log), _number(r"(\d+) bytes spill loads", log)
    return _number(r"Used (\d+) registers", log), stored + loaded


def _of_amd(assembly: str) -> tuple[int, int]:
    """(vector registers, spill bytes) of the metadata at the end of AMD assembly."""
    return _number(r"\.vgpr_count:\s+(\d+)", assembly), 4 * _number(r"\.vgpr_spill_count:\s+(\d+)", assembly)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"triton {triton.__version__} said nothing like {pattern!r} of a kernel that it compiled")
    return int(found[1])


# --- what was compiled before -------------------------------------------------------------------------------------


def recalled(job: Job) -> Resources | None:
    """What `job` came to when it was compiled before, by this version of Triton."""
    try:
        return Resources(**json.loads(_place(job).read_text()))
    except (OSError, ValueError, TypeError):  # none, or a file that somebody broke
        return None


def remember(job: Job, resources: Resources) -> None:
    """Keep what `job` came to; where the disk does not take it, it is compiled again the next time."""
    with contextlib.suppress(OSError):
        write_whole(_place(job), json.dumps(asdict(resources)))


def _place(job: Job) -> Path:
    kernel, config = job.kernel, job.config
    parts: tuple[Any, ...] = (kernel.source, kernel.signature, config, job.card, job.aligned, triton.__version__)
    return cache_directory() / "offline" / f"{kernel.name}_{sha256(repr(parts).encode()).hexdigest()[:24]}.json"
