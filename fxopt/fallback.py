"""When something inside fxopt fails: one warning that names it, a script that reproduces it, and training goes on."""

from __future__ import annotations

import tempfile
import traceback
import warnings
from pathlib import Path

from torch import fx

from fxopt import dump
from fxopt.errors import FxoptWarning

_REPRO = '''

# {error}
#
{traceback}


def reproduce():
    """Compile the graph above with fxopt; the warning that wrote this file appears again.

    Rules of your own are named in the options below: put the objects in their place.
    """
    compiled = torch.compile(Graph(), backend="fxopt", options={options!r})
    print(compiled(*inputs()))


if __name__ == "__main__":
    reproduce()
'''

_WARNED: set[tuple[str, str]] = set()


def warn_once(part: str, consequence: str, error: BaseException, gm: fx.GraphModule, options: dict[str, object]) -> str:
    """Warn, once for each part and kind of error, that `part` failed with `error`, and write a repro script.

    Returns the note for the report.
    """
    summary = (
        f"{part} failed ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}); {consequence}"
    )
    key = part, type(error).__name__
    if key in _WARNED:
        return summary
    _WARNED.add(key)
    warnings.warn(
        f"fxopt: {summary}. Reproduce with: {_write_repro(part, error, gm, options)}", FxoptWarning, stacklevel=3
    )
    return summary


def _write_repro(part: str, error: BaseException, gm: fx.GraphModule, options: dict[str, object]) -> str:
    lines = "".join(traceback.format_exception(error)).splitlines()
    epilogue = _REPRO.format(
        error=f"{part} failed: {type(error).__name__}",
        traceback="\n".join(f"# {line}" for line in lines),
        options=options,
    )
    try:
        directory = Path(tempfile.mkdtemp(prefix="fxopt-repro-"))
        path = dump.write(
            gm, directory / f"{part.replace(' ', '_').replace(chr(39), '')}.py", f"Repro: {part} failed.", epilogue
        )
        return f"python {path}"
    except Exception as failure:  # a repro that cannot be written must not cost the training run
        return f"(no script could be written: {failure})"
