"""Blocks of a graph, by module path and by width."""

from __future__ import annotations

from torch import fx

from fxopt.memory.blocks import PRODUCTS_A_BLOCK, Blocks


def chain(paths: list[str], key: str = "nn_module_stack") -> list[fx.Node]:
    graph = fx.Graph()
    node = graph.placeholder("x")
    nodes = []
    for path in paths:
        node = graph.call_function(abs, (node,))
        node.meta[key] = {"": (f"L['self'].{path}", None)} if path else {}
        nodes.append(node)
    return nodes


def test_layers_are_blocks_and_what_lies_between_belongs_to_the_former() -> None:
    paths = ["embed", "", "layers.0.a", "", "layers.0.b", "layers.1.a", "rotary", "layers.1.b", "norm", "head"]
    nodes = chain(paths)
    blocks = Blocks.find(nodes, [True] * len(nodes), [0.0] * len(nodes))
    assert [blocks.of[node] for node in nodes] == [0, 0, 0, 0, 0, 1, 1, 1, 2, 2]
    assert blocks.count == 3
    backward = chain(["head", "norm", "layers.1.b", "", "layers.1.a", "layers.0.b", "embed"], "fwd_nn_module_stack")
    assert blocks.backward(backward) == [2, 2, 1, 1, 1, 0, 0]


def test_encoder_and_decoder_are_told_apart() -> None:
    nodes = chain(["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"])
    blocks = Blocks.find(nodes, [True] * 4, [0.0] * 4)
    assert [blocks.of[node] for node in nodes] == [0, 1, 2, 3]


def test_an_index_that_does_not_repeat_is_no_layer() -> None:
    nodes = chain(["features.0", "features.0"])
    blocks = Blocks.find(nodes, [True, True], [1.0, 1.0])
    assert blocks.layers == {}
    assert blocks.count == 1


def test_without_names_blocks_are_cut_where_little_crosses() -> None:
    count = 3 * PRODUCTS_A_BLOCK
    nodes = chain([""] * count)
    crossing = [5.0] * count
    crossing[PRODUCTS_A_BLOCK + 1] = 1.0
    blocks = Blocks.find(nodes, [True] * count, crossing)
    found = [blocks.of[node] for node in nodes]
    assert found == sorted(found)
    assert blocks.count >= 2
    assert found.index(1) == PRODUCTS_A_BLOCK + 2
