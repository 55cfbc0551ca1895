"""Results on disk: a JSON file a phase, written after every item, so that a run that is cut loses nothing.

    {"machine": {...}, "items": {name: {"commit", "card", "spec", "prepared", "samples" or "error", "seconds"}}}

Records of other commits and cards stay until their item is run again; every record says what it is of.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fxopt.kernels.source import write_whole

Record = dict[str, Any]


class Store:
    """The records of one commit on one card, read and written by item."""

    def __init__(self, folder: Path, machine: dict[str, Any], earlier: Iterable[Path] = ()) -> None:
        """folder: where files are written. earlier: folders that are read first, the last has the last word."""
        self.folder, self.machine = folder, machine
        self._earlier = [*earlier, folder]
        self._phases: dict[str, dict[str, Record]] = {}
        self._writing = threading.Lock()

    def phase(self, phase: str) -> dict[str, Record]:
        """The records of this commit and card by name."""
        return {name: one for name, one in self._read(phase).items() if self._is_ours(one)}

    def add(self, phase: str, name: str, record: Record) -> None:
        """Write a record down, whole or not at all."""
        with self._writing:
            records = self._read(phase)
            records[name] = {"commit": self.machine["commit"], "card": self.machine["card"], **record}
            write_whole(self.path(phase), json.dumps({"machine": self.machine, "items": records}, indent=1) + "\n")

    def path(self, phase: str) -> Path:
        """The file of a phase."""
        return self.folder / f"{phase}.json"

    def _read(self, phase: str) -> dict[str, Record]:
        if phase not in self._phases:
            found: dict[str, Record] = {}
            for folder in self._earlier:
                path = folder / f"{phase}.json"
                if path.is_file():
                    found |= json.loads(path.read_text())["items"]
            self._phases[phase] = found
        return self._phases[phase]

    def _is_ours(self, record: Record) -> bool:
        return all(record.get(name) == self.machine[name] for name in ("commit", "card"))
