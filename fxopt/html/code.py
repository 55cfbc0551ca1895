"""Source with highlighting: generated kernels, and the colours for light and dark."""

from __future__ import annotations

from typing import Any

import pygments
from markupsafe import Markup
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from fxopt.report import GraphReport

__all__ = ["kernels", "style"]

PREFIX = "py-"
"""Of the classes of tokens: the page has short names of its own."""


def kernels(graph: GraphReport) -> list[dict[str, Any]]:
    """Each generated kernel once: name, sites, path and source; what the dump no longer has is said to be gone."""
    return [
        {
            "name": name,
            "path": path,
            "sites": [one.site for one in group],
            "resources": group[0].resources,
            "source": _source(path),
        }
        for (name, path), group in graph.by_kernel().items()
    ]


def _source(path: Any) -> Markup:
    try:
        return Markup(
            pygments.highlight(path.read_text(), PythonLexer(), HtmlFormatter(cssclass="code", classprefix=PREFIX))
        )
    except OSError:
        return Markup("<p>the file is not there any more</p>")


def style() -> str:
    """Rules for both themes."""
    light = HtmlFormatter(style="default", classprefix=PREFIX).get_style_defs("[data-theme=light] .code")
    dark = HtmlFormatter(style="github-dark", classprefix=PREFIX).get_style_defs("[data-theme=dark] .code")
    return f"{light}\n{dark}\n.code, [data-theme] .code {{ background: transparent; }}"
