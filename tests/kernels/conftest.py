"""A card that is not there, for tests that trace launches and run none."""

from __future__ import annotations

import pytest
import triton
from triton.backends.compiler import GPUTarget


class _Driver:
    """An H100 that is not there: `wrap_triton` asks for it to see what a kernel writes to."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton takes the machine for one with an H100."""
    monkeypatch.setattr(triton.runtime.driver, "_active", _Driver())
