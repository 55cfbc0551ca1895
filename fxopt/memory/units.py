"""Bytes as people write them: "12GiB", and back."""

from __future__ import annotations

import re

__all__ = ["MIB", "UNITS", "mib", "parse_bytes", "show_bytes"]

MIB = 2**20
UNITS = {
    "": 1,
    "B": 1,
    **{f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", 1)},
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", 1)},
}


def parse_bytes(text: str) -> int:
    """Bytes of "12GiB" (2**30 each), "12 GB" (10**9 each) or "1048576". Raises ValueError, which says what to write."""
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    units = {unit.lower(): size for unit, size in UNITS.items()}
    if found is None or found[2].lower() not in units:
        raise ValueError(f'{text!r} is no number of bytes: write "12GiB", "800MiB" or "12GB".')
    return int(float(found[1]) * units[found[2].lower()])


def mib(count: float) -> str:
    """`count` in MiB whatever its size, to be read beside others: "1,204.5 MiB"."""
    return f"{count / MIB:,.1f} MiB"


def show_bytes(count: float) -> str:
    """`count` in the largest binary unit that keeps four digits: "11.72 GiB"."""
    size = abs(count)
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count:.0f} B"
