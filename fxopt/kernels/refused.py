"""Kernels that Triton does not compile for a card: which errors say so, and what is said of them."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import TypeVar

from triton.errors import TritonError

from fxopt.errors import FxoptWarning
from fxopt.kernels.source import Kernel

__all__ = ["KernelError", "is_refusal", "or_else", "warn_of"]

T = TypeVar("T")


class KernelError(RuntimeError):
    """A generated kernel does not compile for the card, or does not fit it; the message names its source."""

    def __init__(self, kernel: Kernel, why: str):
        with contextlib.suppress(OSError):
            kernel.written()  # it may have been compiled by another process, or not at all
        super().__init__(f"the kernel {kernel.name} does not compile here ({why}); its source is {kernel.path}")
        self.kernel = kernel


def is_refusal(error: BaseException) -> bool:
    """Whether Triton says by `error` that it does not take a kernel: OutOfResources, CompilationError, PTXASError.

    What CUDA says, of an illegal address say, is none: nothing can be launched after it.
    """
    return isinstance(error, TritonError | KernelError) or "PassManager::run failed" in str(error)


_WARNED: set[str] = set()


def warn_of(error: KernelError, instead: str) -> None:
    """Warn of `error` and what is done `instead`, once for each name of a kernel."""
    if error.kernel.name not in _WARNED:
        _WARNED.add(error.kernel.name)
        warnings.warn(f"fxopt: {error}. {instead}.", FxoptWarning, stacklevel=3)


def or_else(by_kernels: Callable[[], T], by_aten: Callable[[], T]) -> T:
    """`by_kernels()`, or `by_aten()` with a warning where Triton refuses a kernel: in the middle of a step there is no
    site to revert any more."""
    try:
        return by_kernels()
    except KernelError as error:
        warn_of(error, "ATen computes that operator instead, and holds more memory")
        return by_aten()
