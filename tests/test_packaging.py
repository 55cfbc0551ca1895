"""What is installed is what is in the tree: packages, files, the backend's name, pinned versions."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def tree_modules() -> set[str]:
    """Return every Python file as it must lie in a wheel; `passes/x.py` is `fxopt/passes/x.py` there."""
    own = {path.relative_to(ROOT) for path in (ROOT / "fxopt").rglob("*.py") if "passes" not in path.parts}
    passes = {Path("fxopt") / path.relative_to(ROOT) for path in (ROOT / "passes").rglob("*.py")}
    return {path.as_posix() for path in own | passes} | {"fxopt_pytest.py"}


def wheel_modules(wheel: Path) -> set[str]:
    """Return every Python file in a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if name.endswith(".py")}


def build(source: Path, *arguments: str) -> None:
    """Run `python -m build` on `source` with what is installed here: no network."""
    command = [sys.executable, "-m", "build", "--no-isolation", *arguments, str(source)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Return a copy of what is built, so that no stale build/ adds files to a wheel and none is left behind."""
    folder = tmp_path / "source"
    for name in ("fxopt", "passes"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "fxopt_pytest.py"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture
def wheel(source: Path, tmp_path: Path) -> Path:
    """Return a wheel built from the tree."""
    build(source, "--wheel", "--outdir", str(tmp_path / "dist"))
    return next((tmp_path / "dist").glob("*.whl"))


def test_every_package_of_the_tree_is_listed() -> None:
    packages = {Path(name).parent.as_posix().replace("/", ".") for name in tree_modules() if "/" in name}
    assert packages == set(PROJECT["tool"]["setuptools"]["packages"])


def test_every_package_has_an_init() -> None:
    modules = tree_modules()
    folders = {Path(name).parent for name in modules if "/" in name}
    assert {folder for folder in folders if f"{folder.as_posix()}/__init__.py" not in modules} == set()


def test_passes_is_a_relative_link() -> None:
    link = ROOT / "fxopt" / "passes"
    assert link.is_symlink(), "fxopt/passes must be a symlink: git and unpacking must keep it"
    assert link.readlink() == Path("../passes")


def test_wheel_holds_every_module(wheel: Path) -> None:
    assert wheel_modules(wheel) == tree_modules()


def test_wheel_holds_what_is_not_python(wheel: Path) -> None:
    templates = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fxopt").rglob("templates/*")}
    assert {Path(name).suffix for name in templates} == {".jinja", ".css", ".js"}
    with zipfile.ZipFile(wheel) as archive:
        assert templates | {"fxopt/py.typed"} <= set(archive.namelist())


def test_backend_and_command_are_found_by_name_where_the_wheel_is_unpacked(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    script = f"""
import sys
sys.path.insert(0, {str(site)!r})
from importlib.metadata import distribution
found = [e for e in distribution("fxopt").entry_points if e.group == "torch_dynamo_backends" and e.name == "fxopt"]
assert len(found) == 1, found
backend = found[0].load()
assert callable(backend), backend
import fxopt, fxopt.passes, torch
assert fxopt.__file__.startswith({str(site)!r}), fxopt.__file__
assert "fxopt" in torch.compiler.list_backends(), torch.compiler.list_backends()
(command,) = [e for e in distribution("fxopt").entry_points if e.group == "console_scripts"]
assert command.name == "fxopt", command
(plugin,) = [e for e in distribution("fxopt").entry_points if e.group == "pytest11"]
assert hasattr(plugin.load(), "pytest_addoption")
assert command.load()(["kernels", "--source", "norm_forward rms 4096 bf16"]) == 0
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "def norm_forward(" in done.stdout, "templates are found in the wheel"


def test_sdist_builds_the_same_wheel(source: Path, tmp_path: Path) -> None:
    build(source, "--outdir", str(tmp_path / "dist"))  # an sdist, then a wheel from that sdist
    assert wheel_modules(next((tmp_path / "dist").glob("*.whl"))) == tree_modules()


def test_every_direct_dependency_is_pinned() -> None:
    groups = [PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"].values()]
    names = {re.split(r"[<>=! ;\[]", requirement)[0] for group in groups for requirement in group}
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0] for line in lines if line and not line.startswith("#")}
    assert names <= pinned


def test_version_is_said_once() -> None:
    import fxopt

    assert fxopt.__version__ == PROJECT["project"]["version"]
