"""Kernels small enough to compile in a second, and compilers that misbehave, for tests of what handles kernels."""

import os
import signal
import subprocess
import time
from pathlib import Path

from fxopt.kernels.configs import Config
from fxopt.kernels.offline import Job, Resources
from fxopt.kernels.source import Kernel

HEAD = "import triton\nimport triton.language as tl\n\n\n@triton.jit\n"

COPY = Kernel(
    "copy",
    HEAD
    + '''\
def copy(X, Y, size, BLOCK: tl.constexpr):
    """Y = X, BLOCK elements a program."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Y + at, tl.load(X + at, mask=at < size), mask=at < size)
''',
    (("X", "*bf16"), ("Y", "*bf16"), ("size", "i32"), ("BLOCK", "constexpr")),
)

PRODUCT = Kernel(
    "product",
    HEAD
    + '''\
def product(X, Y, Out, width, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """Out [M, N] = X [M, width] @ Y [N, width].T."""
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    total = tl.zeros([M, N], tl.float32)
    for at in range(0, width, K):
        x = tl.load(X + m[:, None] * width + at + k[None, :])
        total += tl.dot(x, tl.load(Y + n[None, :] * width + at + k[:, None]))
    tl.store(Out + m[:, None] * N + n[None, :], total)
''',
    (("X", "*bf16"), ("Y", "*bf16"), ("Out", "*fp32"), ("width", "i32"), *tuple((tile, "constexpr") for tile in "MNK")),
)

SMALL = Config((("BLOCK", 256),), num_warps=4, num_stages=1)
SLIM = Config((("M", 64), ("N", 64), ("K", 32)), num_warps=4, num_stages=2)
FAT = Config((("M", 128), ("N", 128), ("K", 64)), num_warps=8, num_stages=5)
"""64 KiB a stage ahead: more shared memory than consumer cards have."""
SPILLING = Config((("M", 128), ("N", 128), ("K", 16)), num_warps=1, num_stages=1)
"""512 fp32 totals a thread, which has 255 registers."""


def odd(job: Job) -> Resources:
    """A compiler that raises for 1 warp, dies for 2, never ends for 8, and answers for the rest."""
    warps = job.config.num_warps
    if warps == 1:
        raise ValueError("where it is\n  what is wrong\n")
    if warps == 2:
        os.kill(os.getpid(), signal.SIGABRT)
    if warps == 8:
        assembler = subprocess.Popen(["sleep", "600"])
        Path(os.environ["TINY_ASSEMBLER"]).write_text(str(assembler.pid))
        time.sleep(600)
    return Resources(registers=warps, spill_bytes=0, shared_bytes=0, fits=True)
