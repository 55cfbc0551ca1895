"""The format of a written report: a number, and what to say to whoever brings another one, or no report at all."""

from __future__ import annotations

import json
from typing import Any

from fxopt.errors import ReportError
from fxopt.version import VERSION

__all__ = ["FORMAT", "readable"]

FORMAT = 1
"""Raised whenever a field of the report goes away or changes its meaning; 0 is what had no number."""


def readable(text: str) -> dict[str, Any]:
    """The JSON of a report in this format. Raises `ReportError`."""
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ReportError(f"this is no report, it is not even JSON ({error}): write it again") from error
    if not isinstance(data, dict) or "graphs" not in data:
        raise ReportError("this JSON is no report of fxopt's: `fxopt explain --json` and the option dump write one")
    given = data.get("format", 0)
    if given != FORMAT:
        age = "an older" if isinstance(given, int) and given < FORMAT else "a newer"
        who = data.get("versions", {}).get("fxopt", "unknown") if isinstance(data.get("versions"), dict) else "unknown"
        raise ReportError(
            f"this report is of {age} format, {given!r} (fxopt {who}); fxopt {VERSION} reads format {FORMAT}: "
            "write it again with this version, or read it with the one that wrote it"
        )
    return data
