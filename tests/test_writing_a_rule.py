"""docs/writing-a-rule.md is executed, and the pytest plugin that it describes is run."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "writing-a-rule.md").read_text()
BLOCK = re.compile(r"<!-- (file|run|fails)(?:: (.+?))? -->\n```python\n(.*?)```", re.DOTALL)
BLOCKS = BLOCK.findall(PAGE)
PLUGIN = ("-p", "fxopt_pytest", "-p", "no:cacheprovider", "-q")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder, with the page's file of rules."""
    for kind, name, code in BLOCKS:
        if kind == "file":
            (tmp_path / name).write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_rules", raising=False)
    return tmp_path


@dataclasses.dataclass
class Done:
    """What a run of pytest gave."""

    ret: int
    text: str


@pytest.fixture
def pytest_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """Pytest with the plugin, called in the user's folder; in this process, for torch takes seconds to import.

    Not by `pytester`, which forgets the modules imported within: those of torch cannot be imported twice.
    """
    monkeypatch.chdir(folder)

    def call(*arguments: str) -> Done:
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            ret = pytest.main([*PLUGIN, "-s", "--rootdir", str(folder), *arguments])
        return Done(int(ret), out.getvalue())

    return call


def python_in(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Another Python, called in the user's folder."""
    return subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, check=False)


def test_every_block_of_the_page_is_executed() -> None:
    assert PAGE.count("```python") == len(BLOCKS) == 5


def _at(block: int) -> Any:
    """A parameter; the run that finds what fails takes 35 s."""
    kind, name, _ = BLOCKS[block]
    return pytest.param(block, id=f"{kind} {name}".strip(), marks=pytest.mark.slow if kind == "fails" else ())


@pytest.mark.parametrize("at", [_at(block) for block in range(len(BLOCKS))])
def test_block(at: int, folder: Path) -> None:
    kind, name, code = BLOCKS[at]
    scope = {"__name__": "page"}
    if kind == "fails":
        with pytest.raises(AssertionError, match=name) as caught:
            exec(compile(code, "page", "exec"), scope)
        notes = "\n".join(caught.value.__notes__)
        for line in re.search(r"prints, after.*?\n\n(.*?)\n\n", PAGE, re.DOTALL)[1].splitlines():  # type: ignore[index]
            assert line.strip() in ("...", *map(str.strip, notes.splitlines())), line
    else:
        exec(compile(code, "page", "exec"), scope)


@pytest.mark.slow
def test_a_failure_is_printed_as_code_that_runs(folder: Path, pytest_in: Callable[..., Done]) -> None:
    broken = (folder / "my_rules.py").read_text().replace("F.silu(k * x) / k", "F.silu(k * x)")
    (folder / "broken_rules.py").write_text(broken)
    done = pytest_in("--fxopt-rules", "broken_rules", "--fxopt-examples", "3")
    assert done.ret == 1
    shown = done.text
    assert "in fp64 output 0 differs" in shown
    script = shown.split("This runs the smallest failure found:")[1].split("====")[0]
    script = "\n".join(line for line in script.splitlines() if not line.startswith("_"))
    assert "from broken_rules import" in script
    (folder / "script.py").write_text(f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(folder)!r}]\n{script}")
    again = python_in(folder, "script.py")
    assert again.returncode == 1
    assert "in fp64 output 0 differs" in again.stderr, again.stderr


def test_the_plugin_runs_the_laws_beside_other_tests(folder: Path, pytest_in: Callable[..., Done]) -> None:
    (folder / "test_other.py").write_text("def test_it():\n    pass\n")
    done = pytest_in("--fxopt-rules", "my_rules", "--fxopt-examples", "2")
    assert done.ret == 0, done.text
    assert "2 passed" in done.text
    alone = pytest_in("--fxopt-rules", "my_rules", "-m", "fxopt_rules", "--collect-only").text
    assert "swish::swish" in alone
    assert "test_it" not in alone


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_rules", "there is no module 'no_such_rules'"),
        ("my_rules.nothing", "there is no module 'my_rules.nothing'"),
        ("empty_rules", "no fxopt.Rule in"),
        ("odd_rules", "RULES holds 3, which is no fxopt.Rule"),
    ],
)
def test_modules_without_rules_are_named(name: str, message: str, folder: Path, pytest_in: Callable[..., Done]) -> None:
    (folder / "empty_rules.py").write_text("")
    (folder / "odd_rules.py").write_text("RULES = (3,)")
    done = pytest_in("--fxopt-rules", name)
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    assert message in done.text
    assert "Traceback" not in done.text


def test_pytest_without_the_option_imports_no_torch(folder: Path) -> None:
    (folder / "test_other.py").write_text("import sys\ndef test_it():\n    assert 'torch' not in sys.modules\n")
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    done = python_in(folder, "-c", code, *PLUGIN)
    assert done.returncode == 0, done.stdout


def test_hypothesis_is_needed_only_where_it_draws(folder: Path) -> None:
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
sys.modules["hypothesis"] = None
import fxopt, fxopt.testing
from fxopt.testing import check_laws, made, ModuleSpec
try:
    fxopt.testing.check_rule
except ImportError as error:
    assert "pip install" in str(error), error
else:
    raise SystemExit("no error")
"""
    done = python_in(folder, "-c", code)
    assert done.returncode == 0, done.stderr
