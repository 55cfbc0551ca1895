"""Every fault has a test or a refusal, every marker names a fault, and docs/reliability.md shows them."""

from __future__ import annotations

import ast
from pathlib import Path

import faults
import pytest


def test_every_fault_has_a_test_or_a_refusal() -> None:
    tested = {fault for fault, _ in faults.named()}
    for fault in faults.FAULTS:
        assert (fault.name in tested) != bool(fault.refusal), f"{fault.name} needs a test or a refusal, and not both"


def test_every_marker_names_a_fault() -> None:
    known = {fault.name for fault in faults.FAULTS}
    assert len(known) == len(faults.FAULTS)
    assert {fault for fault, _ in faults.named()} <= known


def test_the_page_is_up_to_date() -> None:
    assert faults.PAGE.read_text() == faults.page(), "docs/reliability.md: run `make faults`"


@pytest.mark.fault("triton/torch skew")
def test_private_modules_of_torch_are_imported_in_one_file() -> None:
    """So that a release of torch that moves one is a change to one file."""
    found = [
        f"{path.relative_to(faults.ROOT)}: {name}"
        for folder in ("fxopt", "passes")
        for path in sorted((faults.ROOT / folder).rglob("*.py"))
        if path.name != "compat.py"
        for name in _imported(path)
        if name.startswith("torch.") and any(part.startswith("_") for part in name.split("."))
    ]
    assert found == []


def _imported(path: Path) -> list[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    froms = [f"{n.module}.{a.name}" for n in nodes if isinstance(n, ast.ImportFrom) and n.module for a in n.names]
    return froms + [a.name for n in nodes if isinstance(n, ast.Import) for a in n.names]
