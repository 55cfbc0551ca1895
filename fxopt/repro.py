"""Scripts that show a fault with as little as it takes: a site as it was and as it becomes, or one graph."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import fx

from fxopt import dump
from fxopt.errors import brief
from fxopt.excerpt import excerpt
from fxopt.rule import Place, Site

__all__ = ["GRAPH", "SITE", "write_graph", "write_site"]

SITE, GRAPH = "site.py", "graph.py"
"""The names of the scripts in the directory that they are written to."""

_CHECK_SITE = """

if __name__ == "__main__":
    from fxopt.testing.near import as_near_as

    as_near_as(fx.symbolic_trace(Before()), fx.symbolic_trace(After()), inputs())
    print("after is as near to fp64 as before")
"""

_CHECK_GRAPH = '''

def check():
    """Compile the graph above and compare it with itself in fp64.

    Rules of your own are named in the options below: put the objects in their place.
    """
    from fxopt.testing.near import as_near_as

    compiled = torch.compile(Graph(), backend="fxopt", options={options!r})
    as_near_as(fx.symbolic_trace(Graph()), compiled, inputs())
    print("compiled is as near to fp64 as eager")


if __name__ == "__main__":
    check()
'''


def write_site(site: Site, replacement: Callable[..., Any], directory: Path) -> None:
    """Write `site` and what takes its place as a script that fails where they differ; nothing if it cannot be had."""
    try:
        before = excerpt(site).module
        after = excerpt(site).rewritten(replacement)
    except Exception as error:  # what the site reads is no tensor, or the replacement is what fails
        logging.getLogger(__name__).info("no script of the site alone: %s", brief(error))
        return
    classes: list[str] = []
    dump.class_source(before, "Before", classes)
    dump.class_source(after, "After", classes)
    place = Place.of(site.anchor)
    title = f"{site.rule} at {place}: {site.detail}\n\n{place.code}"
    written = dump.HEADER.format(title=title) + "\n\n".join(classes) + dump.inputs_source(before) + _CHECK_SITE
    directory.mkdir(parents=True, exist_ok=True)
    (directory / SITE).write_text(written)


def write_graph(gm: fx.GraphModule, options: dict[str, object], directory: Path) -> None:
    """Write the Dynamo graph `gm` as a script that compiles it and fails where the result is wrong."""
    dump.write(gm, directory / GRAPH, "A graph as Dynamo gave it to fxopt.", _CHECK_GRAPH.format(options=options))
