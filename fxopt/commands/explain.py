"""``fxopt explain``: what fxopt would do to a model, and why not more, without compiling it."""

from __future__ import annotations

import argparse
import sys
import traceback
from typing import Any

from fxopt.backend import explain
from fxopt.commands import UsageError, console, models, options
from fxopt.commands.diff import read
from fxopt.errors import OptionError
from fxopt.memory.units import mib
from fxopt.report import Report

__all__ = ["add_to", "failure", "said"]

HELP = "say what fxopt would do to a model, and why not more"
DESCRIPTION = """\
Traces a model's forward with its loss, takes it through fxopt's stages, and prints every site that would be rewritten
and every reason why another would not. Nothing is compiled, and a --config model has no memory: 70 billion parameters
are explained on a laptop.

exit code: 1 if the model cannot be traced or no graph comes of it; 2 for a mistake in the arguments."""
EXAMPLES = """\
examples:
  fxopt explain train.py:make
  fxopt explain --config llama --hidden 2048 --layers 4 --heads 16 --precision bf16
  fxopt explain --config qwen3 --layers 36 --html report.html
  fxopt explain --config llama --layers 2 --dump out --cards sm_86,sm_120 --html report.html
  fxopt explain before.json --html before.html
  fxopt explain --config mistral --layers 2 --set sliding_window=128 --json > after.json
"""


def add_to(subparsers: Any) -> None:
    """Add the command to argparse's subparsers."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = subparsers.add_parser("explain", help=HELP, description=DESCRIPTION, epilog=EXAMPLES, formatter_class=raw)
    models.add_flags(parser)
    options.add_flags(parser)
    parser.add_argument("--json", action="store_true", help="print the whole report as JSON, for `fxopt diff`")
    parser.add_argument("--html", metavar="PATH", help="write the report as one HTML file, too")
    parser.add_argument("--redact", action="store_true", help="leave source and names out of the HTML")
    parser.add_argument("--traceback", action="store_true", help="print the traceback of a model that fails")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """What the arguments say. Raises UsageError."""
    if arguments.redact and not arguments.html:
        raise UsageError("--redact is for --html PATH, and there is none")
    report = _report(arguments)
    if report is None:
        return 1
    if arguments.json:
        print(report.to_json())
    else:
        console().print(report)
    if arguments.html:
        path = report.to_html(arguments.html, redact=arguments.redact)
        print(f"wrote {path}, {mib(path.stat().st_size)}", file=sys.stderr)
    return 0


def failure(error: Exception) -> str:
    """What was raised, with its kind."""
    return f"{type(error).__name__}: {said(error)}"


def said(error: Exception) -> str:
    """The message; Dynamo's has the line of the model in its midst, and advice about itself at its end."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    stop = next((at for at, line in enumerate(lines) if line.startswith("Set TORCHDYNAMO_VERBOSE")), len(lines))
    return "\n  ".join(lines[: min(stop, 12)])


def _report(arguments: argparse.Namespace) -> Report | None:
    """The report that was written, or that of a model."""
    if str(arguments.target).endswith(".json"):
        return read(arguments.target)
    chosen = options.given(arguments)
    return explained(models.subject(arguments), chosen, arguments.traceback)


def explained(subject: models.Subject, chosen: dict[str, Any], with_traceback: bool = False) -> Report | None:
    """The report; None, with a sentence on stderr, where the model cannot be traced or has no graph."""
    args, kwargs = subject.arguments
    try:
        report = explain(subject.model, *args, options=chosen, **kwargs)
    except OptionError as error:
        raise UsageError(str(error)) from error
    except Exception as error:
        if with_traceback:
            traceback.print_exc()
        print(f"fxopt: the model failed while it was traced, {failure(error)}", file=sys.stderr)
        if subject.fake:
            print("its tensors have no values, which may be why: --real, or a file without --fake", file=sys.stderr)
        return None
    if not report.graphs:
        why = "it computes nothing with tensors, or Dynamo could trace none of it (TORCH_LOGS=graph_breaks says why)"
        print(f"fxopt: no graph came of the model: {why}", file=sys.stderr)
        return None
    return report
