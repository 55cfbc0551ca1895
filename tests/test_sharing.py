"""Equal nodes that a rule made are computed once, unless somebody could tell."""

import pytest
import torch
from graphs import captured, targets

from fxopt import Region, Site
from fxopt.differential import same_function
from fxopt.rewrite import apply_rule
from fxopt.verify import VerificationError

aten = torch.ops.aten


def spelled(x, ids):
    return torch.where(ids.diff(dim=0, prepend=ids[:1]) == 0, x, -x)


def grow(anchor):
    condition, x, _ = anchor.args
    diff = condition.args[0]
    return Site("runs", (anchor,), (diff, condition, anchor), {"x": x, "ids": diff.args[0]})


def replaced(x, ids):
    """Reads `ids` through two made nodes, one of them a tuple's item."""
    values, place = torch.cummax(ids, 0)
    return x * (1.0 - (values - ids).float() - place.float() * 0.0)


def rule(replacement=replaced):
    return Region(
        name="runs",
        anchors=frozenset({aten.where.self}),
        grow=grow,
        replacement=replacement,
        spellings=(spelled,),
        inputs=lambda draw: {"x": draw.tensor(5, dtype=torch.float32), "ids": draw.integers(0, 2, 5)},
    )


def applied(fn, *args, **how):
    graph = captured(fn, *args).module
    return graph, apply_rule(rule(**how), graph)


def count(module, target):
    return sum(node.target is target for node in module.graph.nodes)


X, IDS = torch.randn(5, requires_grad=True), torch.zeros(5, dtype=torch.long)


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_metadata_is_computed_once_whatever_the_number_of_layers(layers):
    def fn(x, ids):
        for _ in range(layers):
            x = spelled(x.cos(), ids)
        return x

    graph, outcome = applied(fn, X, IDS)
    assert len(outcome.rewrites) == layers
    assert count(outcome.module, aten.cummax.default) == 1
    assert count(outcome.module, aten.mul.Tensor) == layers + 1, "one for each layer, and place * 0"
    names = {node.name for node in outcome.module.graph.nodes}
    assert all(name in names for item in outcome.rewrites for name in item.made), "the report names nodes that exist"
    same_function(graph, outcome.module, [X, IDS])


def test_other_inputs_constants_and_the_users_own_nodes_are_kept_apart():
    def fn(x, ids, others):
        kept = torch.cummax(ids, 0).values + torch.cummax(ids, 0).values
        return spelled(x.cos(), ids) + spelled(x.sin(), others) + kept

    _, outcome = applied(fn, X, IDS, IDS.clone())
    assert count(outcome.module, aten.cummax.default) == 4

    def by_length(x, ids):
        return x * torch.cumsum(ids, 0, dtype=torch.float32 if x.shape[0] > 3 else torch.float64).to(x.dtype)

    def two(x, ids):
        return spelled(x, ids), spelled(x[:3], ids[:3])

    assert count(applied(two, X, IDS, replacement=by_length)[1].module, aten.cumsum.default) == 2


def test_a_write_in_between_keeps_them_apart():
    def fn(x, ids):
        first = spelled(x.cos(), ids)
        ids.add_(1)
        return first + spelled(x.sin(), ids) + spelled(x.tan(), ids)

    _, outcome = applied(fn, X, IDS.clone())
    assert len(outcome.rewrites) == 3
    assert count(outcome.module, aten.cummax.default) == 2, "the third is the second's"


def test_what_is_written_or_returned_is_not_shared():
    def fn(x, ids):
        y = x.cos()
        one, other = spelled(y, ids), spelled(y, ids)
        return one, other

    _, outcome = applied(fn, X, IDS)
    results = next(iter(reversed(outcome.module.graph.nodes))).args[0]
    assert results[0] is not results[1], "two tensors to the caller, before and after"
    assert count(outcome.module, aten.cummax.default) == 1

    def written(x, ids):
        y = x.cos()
        one, other = spelled(y, ids), spelled(y, ids)
        one[0] = 0.0
        return one + other

    graph, outcome = applied(written, X, IDS)
    assert len(outcome.rewrites) == 2
    same_function(graph, outcome.module, [X, IDS])


def test_a_replacement_that_draws_unasked_is_refused_before_anything_is_shared():
    def drawing(x, ids):
        return x * torch.rand_like(x).round().abs() * (ids.diff(dim=0, prepend=ids[:1]) == 0)

    def fn(x, ids):
        y = x.cos()
        return spelled(y, ids) + spelled(y, ids)

    with pytest.raises(VerificationError, match=r"random operators changed: \[\] became .*rand_like.*rand_like"):
        applied(fn, X, IDS, replacement=drawing)


def test_layers_in_bodies_share_within_each():
    from torch.utils.checkpoint import checkpoint

    def fn(x, ids):
        for _ in range(2):
            x = checkpoint(lambda a: spelled(spelled(a.cos(), ids).cos(), ids), x, use_reentrant=False)
        return spelled(spelled(x, ids).cos(), ids)

    _, outcome = applied(fn, X, IDS)
    assert len(outcome.rewrites) == 6
    for module in outcome.module.modules():
        if isinstance(module, torch.fx.GraphModule):
            assert count(module, aten.cummax.default) == 1, targets(module)
