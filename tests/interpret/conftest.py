"""Tests of generated kernels under Triton's interpreter: a process of its own, since it interprets or it compiles.

TRITON_INTERPRET=1 pytest tests/interpret
"""

import os

import pytest

from fxopt.kernels.interpreter import interpreting


@pytest.fixture(scope="session", autouse=True)
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Fail at once in a process that compiles; keep generated sources out of the user's cache."""
    assert interpreting(), "run these by themselves: TRITON_INTERPRET=1 pytest tests/interpret"
    os.environ["FXOPT_CACHE"] = str(tmp_path_factory.mktemp("fxopt"))
