"""Settings that every test shares: offline, one thread, nothing compiled left over from the test before."""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Inductor's graph caches are keyed on the graph, not on the Python code of the ops in it: with them on, an edit to
# an op's backward would go unnoticed. Compiled kernels are keyed on their own source and stay shared.
os.environ.setdefault("TORCHINDUCTOR_FX_GRAPH_CACHE", "0")
os.environ.setdefault("TORCHINDUCTOR_AUTOGRAD_CACHE", "0")

import pytest
import torch
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent
# Triton interprets or compiles, as the environment says when it is imported; no process can do both.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpret"]

# A first example compiles for seconds, so no deadline; in CI the examples are the same in every run.
settings.register_profile("dev", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("dev"), derandomize=True, database=None)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


@pytest.fixture(scope="session", autouse=True)
def tested_tree() -> None:
    """Fail at once where the tests would import another copy of fxopt, or `passes/` by another name."""
    torch.set_num_threads(1)
    for name, folder in (("fxopt", "fxopt"), ("fxopt.passes", "passes")):
        spec = importlib.util.find_spec(name)
        assert spec is not None, f"{name} is not importable"
        assert spec.origin is not None, f"{name} has no __init__.py"
        found = Path(spec.origin).resolve().parent
        assert found == ROOT / folder, f"{name} comes from {found}, not from this tree's {folder}/"


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """Forget what was compiled, so that no test reaches the recompile limit or meets another's guards."""
    torch.compiler.reset()
    torch.manual_seed(0)
    yield
    torch.compiler.reset()
