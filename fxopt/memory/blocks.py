"""Transformer blocks of a joint graph, by module path or, where there is none, by where the graph is narrow.

A plan recomputes within a block from what is kept at its border: without that rule a chain of recomputations reaches
back through the whole model, and a plan for 90 MiB takes 280 (shared/evidence.md, section 10).
"""

from __future__ import annotations

import collections
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from fxopt.rule import module_path

__all__ = ["Blocks"]

_INDEXED = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")

PRODUCTS_A_BLOCK = 7
"""Products in a block that is made up: as many as a layer of a Llama has."""

Layer = tuple[str, int]


@dataclass(frozen=True)
class Blocks:
    """The blocks of a joint graph's forward; what comes after the last layer is a block too.

    of: the block of each forward node, which never falls along the graph. layers: the number of each layer
    ("model.layers", 3); empty where blocks are made up.
    """

    of: Mapping[fx.Node, int]
    layers: Mapping[Layer, int]
    count: int

    @classmethod
    def find(cls, nodes: Sequence[fx.Node], heavy: Sequence[bool], crossing: Sequence[float]) -> Blocks:
        """The blocks of forward `nodes`. heavy: is it a product? crossing: bytes made up to it that are read after."""
        layers = [_layer(module_path(node)) for node in nodes]
        indices = collections.defaultdict[str, set[int]](set)
        for prefix, index in filter(None, layers):
            indices[prefix].add(index)
        named = [layer if layer and len(indices[layer[0]]) > 1 else None for layer in layers]
        numbers = {layer: at for at, layer in enumerate(dict.fromkeys(filter(None, named)))}
        blocks = _by_name(named, numbers) if numbers else _by_width(heavy, crossing)
        return cls(dict(zip(nodes, blocks, strict=True)), numbers, max(blocks, default=0) + 1)

    def backward(self, nodes: Sequence[fx.Node]) -> list[int]:
        """The block of each backward node, which never rises along the graph.

        By the module of the forward node that it is the derivative of, or else by the latest block that it reads.
        """
        blocks, now = [], self.count - 1
        for node in nodes:
            layer = _layer(module_path(node, "fwd_nn_module_stack"))
            if layer is not None and layer in self.layers:
                now = min(now, self.layers[layer])
            elif not self.layers and (read := [self.of[one] for one in node.all_input_nodes if one in self.of]):
                now = min(now, max(read))
            blocks.append(now)
        return blocks


def _layer(path: str) -> Layer | None:
    """("model.layers", 3) of "model.layers.3.mlp.up_proj"."""
    found = _INDEXED.search(path)
    return (path[: found.start()], int(found[1])) if found else None


def _by_name(layers: Sequence[Layer | None], numbers: Mapping[Layer, int]) -> list[int]:
    """Layers in the order in which they come; what lies between two belongs to the former."""
    last = max(at for at, layer in enumerate(layers) if layer)
    blocks, now = [], 0
    for at, layer in enumerate(layers):
        now = max(now, numbers[layer]) if layer is not None else now
        blocks.append(now if at <= last else len(numbers))
    return blocks


def _by_width(heavy: Sequence[bool], crossing: Sequence[float]) -> list[int]:
    """Blocks of about `PRODUCTS_A_BLOCK` products, cut where the fewest bytes cross."""
    ends = [at for at, is_heavy in enumerate(heavy) if is_heavy][PRODUCTS_A_BLOCK - 1 :: PRODUCTS_A_BLOCK]
    cuts = set()
    for here, there in itertools.pairwise([*ends, len(heavy)]):
        span = range(here, max((here + there) // 2, here + 1))
        cuts.add(min(span, key=lambda at: crossing[at]))
    return list(itertools.accumulate(int(at in cuts) for at in range(-1, len(heavy) - 1)))
