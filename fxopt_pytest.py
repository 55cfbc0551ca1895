"""A pytest plugin: ``pytest --fxopt-rules mypkg.rules`` checks every law on every spelling of a user's own rules.

A module of its own beside the package: pytest imports its plugins whenever it starts, and fxopt takes seconds for it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options."""
    group = parser.getgroup("fxopt", "laws of rewrite rules (fxopt)")
    group.addoption(
        "--fxopt-rules", action="append", default=[], metavar="MODULE",
        help="check the laws on the rules of this module: its RULES, or all fxopt.Rule objects in it; may be repeated",
    )  # fmt: skip
    group.addoption(
        "--fxopt-examples", type=int, default=25, metavar="N", help="inputs drawn for each spelling of a rule (25)"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker by which laws alone are run: ``-m fxopt_rules``."""
    config.addinivalue_line("markers", "fxopt_rules: a law of a rule that --fxopt-rules names")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    """Add the laws to what was collected, before anything is deselected by name or marker."""
    for name in config.getoption("--fxopt-rules"):
        found = Rules.from_parent(session, name=name, nodeid=name)
        items.extend(found.collect())


def rules_of(module: ModuleType) -> list[Any]:
    """The rules of `module`: its `RULES`, else every `fxopt.Rule` among its names. Raises `pytest.UsageError`."""
    import fxopt

    given = getattr(module, "RULES", None)
    found = list(given) if isinstance(given, Iterable) else _distinct(vars(module).values(), fxopt.Rule)
    for item in found:
        if not isinstance(item, fxopt.Rule):
            raise pytest.UsageError(f"--fxopt-rules {module.__name__}: RULES holds {item!r}, which is no fxopt.Rule")
    if not found:
        raise pytest.UsageError(
            f"--fxopt-rules {module.__name__}: no fxopt.Rule in {module.__file__}; give it a tuple RULES of them"
        )
    return found


def _distinct(values: Iterable[Any], kind: type) -> list[Any]:
    return list({id(value): value for value in values if isinstance(value, kind)}.values())


class Rules(pytest.Collector):
    """The rules of one module."""

    def collect(self) -> Iterator[pytest.Item]:
        """An item for each spelling of each rule, named ``module::rule::spelling``."""
        for rule in rules_of(self.imported()):
            for spelling in rule.spellings:
                yield Law.from_parent(self, name=f"{rule.name}::{spelling.__name__}", rule=rule, spelling=spelling)

    def imported(self) -> ModuleType:
        """The module, also from the folder where pytest was called. Raises `pytest.UsageError`."""
        here = str(self.config.invocation_params.dir)
        if here not in sys.path:
            sys.path.insert(0, here)
        try:
            return importlib.import_module(self.name)
        except ModuleNotFoundError as error:
            if error.name is None or not (self.name + ".").startswith(error.name + "."):
                raise
            raise pytest.UsageError(
                f"--fxopt-rules {self.name}: there is no module {error.name!r} on sys.path or in {here}; "
                "give a dotted name that `import` takes"
            ) from error


class Law(pytest.Item):
    """Every law on one spelling."""

    def __init__(self, *, rule: Any, spelling: Any, **how: Any):
        super().__init__(**how)
        self.rule, self.spelling = rule, spelling
        self.add_marker("fxopt_rules")

    def runtest(self) -> None:
        """Check."""
        from fxopt.testing import check_spelling

        check_spelling(self.rule, self.spelling, self.config.getoption("--fxopt-examples"))

    def repr_failure(self, excinfo: Any, style: Any = None) -> str:
        """What broke, and the code that shows it; where it broke inside fxopt says little to the rule's author."""
        error = excinfo.value
        notes = [note for note in getattr(error, "__notes__", []) if "check_laws" in note]
        frames = [f"{entry.path}:{entry.lineno + 1}: in {entry.name}" for entry in excinfo.traceback[-3:]]
        return "\n".join([f"{type(error).__name__}: {error}", "", *frames, "", *notes])

    def reportinfo(self) -> tuple[Any, int | None, str]:
        """Where the spelling is written."""
        code = getattr(self.spelling, "__code__", None)
        place = code.co_filename if code else "unknown"
        return place, code.co_firstlineno if code else None, f"{self.parent.name}::{self.name}"  # type: ignore[union-attr]
