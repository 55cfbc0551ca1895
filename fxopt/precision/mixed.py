"""A graph built anew with the dtypes of a policy: the walk that `fxopt.passes.precision` is made of.

Every node is visited once, in order. Values carry the dtypes that they will have; what the graph had before is asked of
the old nodes.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxopt import compat, verify
from fxopt.effects import mutated_storages, mutates, storages_of
from fxopt.fake import arguments, bound_arguments, value_of
from fxopt.precision.biases import Apart, apart
from fxopt.precision.calls import class_of_call, has_products
from fxopt.precision.casts import Casts, dtype_name, is_float
from fxopt.precision.held import beyond, counts, is_given, returned_views, written_in_bodies
from fxopt.precision.hoisting import hoist
from fxopt.precision.paths import Paths
from fxopt.precision.policy import LOW_ARGUMENTS, Class, Policy, operator_name, short_name
from fxopt.precision.support import lacks
from fxopt.rule import Place, module_path
from fxopt.simplify import WIDE

__all__ = ["Mixed"]

aten = torch.ops.aten

Traits = tuple[bool, bool, bool]
"""Whether a node is in `Mixed.whole`, in `Mixed.active` and in `Casts.leaves`."""

_WRITTEN = "it is written to in place"
_WHOLE = "an operand holds whole numbers, positions say, which 16 bits would round"
_STREAM = "the residual stream has 16 bits"
_ALIKE = "the operator takes one dtype"
_PUTS = frozenset(
    {
        aten.where.self, aten.masked_fill.Tensor, aten.maximum.default, aten.minimum.default, aten.fmax.default,
        aten.fmin.default, aten.clamp.Tensor, aten.add.Tensor, aten.sub.Tensor,
    }
)  # fmt: skip
"""Operators that may put a number of a tensor without axes in the place of another's."""
_ONE_DTYPE = frozenset(
    {
        aten.index_put.default, aten.index_copy.default, aten.masked_scatter.default, aten.scatter.src,
        aten.slice_scatter.default, aten.select_scatter.default, aten.diagonal_scatter.default,
    }
)  # fmt: skip
"""Operators that refuse inputs of two dtypes when they run, though not on fake tensors."""


class Mixed:
    """The walk through one graph; the body of a checkpoint has a walk of its own.

    named: by which paths the modules are called.
    given: for a body, its inputs as the caller passes them, each with its `traits`.
    whole: nodes that hold whole numbers as floats. active: nodes that are made of products or embeddings.
    results: by call of a checkpoint, the traits of each of its results.
    kept:  (node, in which dtype it stays and why) of products that are not computed in 16 bits.
    paths: the module paths of the nodes seen.
    one_by_one: number and bytes of the casts if each use had its own (`Casts.bytes_one_by_one`).
    """

    def __init__(
        self, gm: fx.GraphModule, policy: Policy, named: Paths, given: Sequence[tuple[Any, Traits]] | None = None
    ):
        self.gm, self.policy, self.named = gm, policy, named
        self.given = None if given is None else iter(given)
        self.graph = fx.Graph()
        self.written = mutated_storages(gm.graph) | written_in_bodies(gm)
        self.shared = {} if given is not None else returned_views(gm)
        self.casts = Casts(self.graph, self.written)
        self.env: dict[fx.Node, fx.Node] = {}
        self.whole: set[fx.Node] = set()
        self.active: set[fx.Node] = set()
        self.results: dict[fx.Node, Sequence[Traits]] = {}
        self.regions: list[tuple[str, bool]] = []
        self.bodies: dict[str, fx.GraphModule] = {}
        self.kept: list[tuple[str, str]] = []
        self.paths: set[str] = set()
        self.one_by_one = (0, 0)
        self.mode = compat.fake_mode_of([value_of(node) for node in gm.graph.nodes])

    def run(self) -> fx.GraphModule:
        """The new graph. Its values have the right shapes and dtypes; which of them alias is for `propagate` to say."""
        with self.mode or contextlib.nullcontext(), compat.running_symbolic(self.mode):
            for node in self.gm.graph.nodes:
                self.visit(node)
        self.count(self.casts.bytes_one_by_one())
        module = fx.GraphModule(self.gm, self.graph, class_name=type(self.gm).__name__)
        module.meta = dict(self.gm.meta)
        for name, body in self.bodies.items():
            setattr(module, name, body)
        return module

    def count(self, casts: tuple[int, int]) -> None:
        self.one_by_one = (self.one_by_one[0] + casts[0], self.one_by_one[1] + casts[1])

    def visit(self, node: fx.Node) -> None:
        self.paths.add(module_path(node))
        if node.op == "output":
            self.graph.output(self.returned(node))
        elif node.target in (compat.ENTER_AUTOCAST, compat.EXIT_AUTOCAST):
            self.switch(node)
        elif node.op != "call_function" or node.target in compat.STATE_SWITCHES or self.is_plumbing(node):
            self.copy(node)
        elif node.target is compat.tag_activation_checkpoint:
            self.enter(node)
        else:
            self.compute(node)
            self.note(node)

    def note(self, node: fx.Node) -> None:
        """What of a computed node later ones will ask; and its dtype, where other outputs are views of it."""
        new, floats = self.env[node], self.floats_of(node)
        product = class_of_call(self.policy, node) == "low" or node.target is aten.embedding.default
        if product or any(self.env[one] in self.active for one in floats):
            self.active.add(new)
        if self.is_whole(node, floats):
            self.whole.add(new)
        if any(self.shared.get(storage) is node for storage in storages_of(value_of(node))):
            self.env[node] = self.as_before(node, node, "outputs share its memory, and keep their dtype")

    def floats_of(self, node: fx.Node) -> list[fx.Node]:
        """The floating inputs of `node`."""
        return [one for one in node.all_input_nodes if is_float(value_of(self.env[one]))]

    def is_plumbing(self, node: fx.Node) -> bool:
        """Nodes without a dtype: sizes, and the parts of a tuple."""
        return not isinstance(node.target, compat.OpOverload | compat.HigherOrderOperator) and "kept" not in node.meta

    def returned(self, node: fx.Node) -> Any:
        """What the graph returns: in the dtypes it had, but from a body, whose reader takes what it gets."""
        if self.given is not None:
            return self.mapped(node.args[0])
        return fx.node.map_arg(node.args[0], lambda one: self.as_before(one, node, "an output keeps its dtype"))

    def switch(self, node: fx.Node) -> None:
        """Autocast regions go; what the innermost one of a device said stays known."""
        if node.target is compat.ENTER_AUTOCAST:
            self.regions.append((str(arguments(node)[0]), bool(arguments(node)[2])))
        else:
            self.regions.pop()

    # --- operators ---

    def compute(self, node: fx.Node) -> None:
        chosen, reason = self.class_of(node)
        if chosen is None:
            self.emit(node, lambda one: self.as_before(one, node, reason))
        elif chosen == "low":
            self.low(node)
            if self.is_written(node):
                self.restore(node)
        elif chosen == "fp32":
            self.emit(node, lambda one: self.cast(one, torch.float32, node, reason))
        else:
            self.follow(node)

    def class_of(self, node: fx.Node) -> tuple[Class | None, str]:
        """The class that `node` computes in, None for the dtypes it had, and the reason for a cast or for no cast."""
        if not isinstance(node.target, compat.OpOverload):
            self.keep(node, f"{node.target} and what it is given keep their dtypes")
            return None, "it is given to a body"
        if "kept" in node.meta or mutates(node) or node.target is aten.view.dtype:
            return None, "it must have the dtype it had"
        chosen, kept = class_of_call(self.policy, node), self.why_kept(node)
        if why := kept or self.why_not_low(node, chosen):
            # What it had under autocast may be autocast's.
            as_it_was = self.is_written(node) or (bool(kept) and node.meta.get("autocast") is None)
            if chosen == "low" or not kept:
                self.keep(node, why, value_of(node) if as_it_was else torch.float32)
            return None if as_it_was else "fp32", why
        if chosen is None:
            return None, "an operator of which nothing is known"
        if self.is_written(node) and chosen != "low":
            return None, _WRITTEN
        if chosen == "fp32" and self.is_a_products_power(node):
            return "follow", ""
        return chosen, "sums and transcendental functions are computed in fp32"

    def is_written(self, node: fx.Node) -> bool:
        """Whether something writes to the memory of `node`."""
        return not storages_of(value_of(node)).isdisjoint(self.written)

    def keep(self, node: fx.Node, reason: str, dtype: Any = None) -> None:
        """Note that `node` stays in `dtype`, or in that of the tensor `dtype`; None: in those that it has."""
        dtype = getattr(dtype, "dtype", dtype)
        stays = "keeps its dtypes" if dtype is None else f"stays in {short_name(dtype)}"
        self.kept.append((node.name, f"{stays}: {reason} ({Place.of(node)})"))

    def is_a_products_power(self, node: fx.Node) -> bool:
        """Whether `node` is ``x ** 3`` and the like on its way to no sum, such as in gelu's approximation by tanh.

        There bf16, whose range is fp32's, loses no more than a product does; fp16 overflows at 40 ** 3.
        """
        if node.target is not aten.pow.Tensor_Scalar or type(arguments(node)[1]) not in (int, float):
            return False
        summed = any(class_of_call(self.policy, user) == "fp32" for user in node.users)
        return self.policy.compute == torch.bfloat16 and arguments(node)[1] in (2, 3, 4) and not summed

    def why_kept(self, node: fx.Node) -> str:
        values = [value for value in compat.pytree.tree_leaves(value_of(node)) if isinstance(value, Tensor)]
        said = [enabled for device, enabled in self.regions if values and device == values[0].device.type]
        if said and not said[-1]:
            return "autocast is switched off here"
        pattern = self.policy.keeps(*self.named.spellings(module_path(node)))
        return f"keep_fp32 has {pattern!r}" if pattern else ""

    def why_not_low(self, node: fx.Node, chosen: Class | None) -> str:
        """Why a product stays in fp32 though the policy calls it low, or would if it saw it; "" for no reason."""
        if chosen != "low":
            return "its products are inside of one operator" if has_products(node) and chosen == "fp32" else ""
        operands = self.low_operands(node)
        if any(one in self.whole for one in operands):
            return _WHOLE
        devices = {value_of(one).device.type for one in operands}
        name, dtype = operator_name(node.target), self.policy.compute
        if devices == {"cpu"} and lacks(name, dtype):
            return f"this CPU has no {name} in {dtype_name(dtype)}"
        return ""

    def restore(self, node: fx.Node) -> None:
        """The product `node` in the dtype it had, in memory that may be written to: it is where the old node's was."""
        new = self.env[node] = self.as_before(node, node, _WRITTEN)
        new.meta["val"] = value_of(node)

    def low_operands(self, node: fx.Node) -> list[fx.Node]:
        """The new nodes that a product casts."""
        names = LOW_ARGUMENTS.get(operator_name(node.target))
        given = bound_arguments(node)
        leaves = compat.pytree.tree_leaves([value for name, value in given.items() if names is None or name in names])
        found = (self.env[one] for one in leaves if isinstance(one, fx.Node))
        return [one for one in found if isinstance(value_of(one), Tensor)]

    def low(self, node: fx.Node) -> None:
        operands = self.low_operands(node)
        dtypes = {value_of(one).dtype for one in operands}
        if not all(is_float(value_of(one)) for one in operands) or (len(dtypes) == 1 and torch.float32 not in dtypes):
            self.follow(node)  # nothing to cast: fp64, complex, integers, or 16 bits already
            return
        inside = set(operands)
        reason = f"{operator_name(node.target)} computes in 16 bits"
        if self.policy.residual == torch.float32 and (parts := apart(node, self.env)):
            self.add_behind(node, parts, reason)
            return

        def change(one: fx.Node) -> fx.Node:
            new = self.env[one]
            return self.cast(one, self.policy.compute, node, reason) if new in inside else self.as_before(one, node)

        self.emit(node, change)

    def add_behind(self, node: fx.Node, parts: Apart, reason: str) -> None:
        """The product `node` in 16 bits, and its bias added to it in fp32."""
        low, bias = self.policy.compute, self.env[parts.bias]
        self.casts.spare(bias, low)
        product = self.append(node, parts.product, [self.cast(one, low, node, reason) for one in parts.factors])
        self.put(node, self.append(node, aten.add.Tensor, [product, bias]))

    def follow(self, node: fx.Node) -> None:
        """An operator in the dtypes it is given; in fp32 where 16 bits would change what it says."""
        if node.target is aten.to.dtype and self.is_idle(node):
            self.pass_on(node)
            return
        floats = self.floats_of(node)
        narrow = [one for one in floats if value_of(self.env[one]).dtype != torch.float32]
        if why := self.why_not_narrow(node, floats, narrow):
            self.emit(node, lambda one: self.cast(one, torch.float32, node, why))
        elif self.is_stream(node, floats, narrow):
            self.emit(node, lambda one: self.cast(one, self.policy.residual, node, _STREAM))
        else:
            asked = node.meta.get(WIDE, ())
            self.emit(
                node,
                lambda one: (
                    self.cast(one, torch.float32, node, "the code says .float()")
                    if one in asked
                    else self.no_wider(one, node)
                ),
            )
        if node.target is aten.embedding.default and self.policy.residual != torch.float32:
            self.env[node] = self.casts.to(self.env[node], self.policy.residual, _STREAM, node)

    def is_idle(self, node: fx.Node) -> bool:
        """Whether a cast of the user's is to the dtype that its input now has."""
        value = value_of(self.env[arguments(node)[0]])
        return is_float(value) and bool(value.dtype == value_of(node).dtype)

    def pass_on(self, node: fx.Node) -> None:
        """The input of an idle cast in its place: detached, where the cast is under `no_grad`; a copy, where the caller
        would see that they are one tensor."""
        before: Any = arguments(node)[0]
        source = self.env[before]
        stopped = value_of(before).requires_grad and not node.meta.get("grad", True)
        target = aten.detach.default if stopped else aten.clone.default
        if stopped or any(user.op == "output" for user in node.users):
            made = self.graph.call_function(target, (source,))
            made.meta = dict(node.meta) | {"val": target(value_of(source))}
            source = made
        self.env[node] = source

    def why_not_narrow(self, node: fx.Node, floats: Sequence[fx.Node], narrow: Sequence[fx.Node]) -> str:
        """Why an operator that follows does not, where some of its inputs have 16 bits; "" for no reason."""
        if narrow and beyond(node, value_of(self.env[narrow[0]]).dtype):
            return "a constant is beyond the range of 16 bits"
        wide = [value_of(one) for one in floats if one not in narrow]
        if narrow and node.target in _PUTS and any(value.dim() == 0 for value in wide):
            return "a number in fp32 is met in fp32"  # it would be rounded to what it is put into: `finfo.min` to -inf
        return _ALIKE if narrow and wide and node.target in _ONE_DTYPE else ""

    def is_stream(self, node: fx.Node, floats: Sequence[fx.Node], narrow: Sequence[fx.Node]) -> bool:
        """Whether `node` adds a 16-bit tensor to an fp32 one of its size, and the stream is to have 16 bits."""
        if node.target is not aten.add.Tensor or self.policy.residual == torch.float32:
            return False
        shapes = {str(tuple(value_of(one).shape)) for one in floats}
        mixed = bool(narrow) and len(narrow) < len(floats) and len(shapes) == 1
        return mixed and all(self.env[one] in self.active for one in floats)  # a mask comes from no product

    def is_whole(self, node: fx.Node, floats: Sequence[fx.Node]) -> bool:
        """Whether `node` holds whole numbers as floats, or is made of such: positions, distances."""
        if not is_float(value_of(node)):
            return False
        if node.target in (aten.arange.default, aten.arange.start, aten.arange.start_step):
            return True
        if class_of_call(self.policy, node) != "follow":
            return False
        if node.target is aten.to.dtype and counts(arguments(node)[0]):
            return True
        inherits = [self.env[one] in self.whole for one in floats]
        others = (one for one, whole in zip(floats, inherits, strict=True) if not whole)
        return any(inherits) and all(is_given(one) and not value_of(one).requires_grad for one in others)

    # --- casts of arguments: from a node of the old graph to one of the new ---

    def as_before(self, one: fx.Node, reader: fx.Node, reason: str = "it must have the dtype it had") -> fx.Node:
        """In the dtype that `one` has in the old graph."""
        return self.cast(one, value_of(one).dtype, reader, reason) if is_float(value_of(one)) else self.env[one]

    def no_wider(self, one: fx.Node, reader: fx.Node) -> fx.Node:
        """As it is, but rounded where the old graph rounded: else fp32 would spread through a model of 16 bits."""
        value, before = value_of(self.env[one]), value_of(one)
        wider = is_float(before) and before.dtype != torch.float32 and value.dtype == torch.float32
        if reader.meta.get("autocast") is not None:
            return self.env[one]  # it was autocast that rounded
        return self.as_before(one, reader, "rounded as it was") if wider else self.env[one]

    def cast(self, one: fx.Node, dtype: torch.dtype, reader: fx.Node, reason: str) -> fx.Node:
        new = self.env[one]
        return self.casts.to(new, dtype, reason, reader) if is_float(value_of(new)) else new

    def mapped(self, args: Any) -> Any:
        return fx.node.map_arg(args, lambda one: self.env[one])

    # --- nodes of the new graph ---

    def copy(self, node: fx.Node) -> fx.Node:
        """`node` on the new nodes, with the value it gives on them."""
        new = self.graph.node_copy(node, lambda one: self.env[one])
        if node.op == "placeholder" and self.given is not None:
            new.meta["val"], traits = next(self.given)
            self.mark(new, traits)
        elif node.op == "placeholder" and isinstance(value_of(new), Tensor):
            self.mark(new, (False, False, value_of(new).requires_grad and value_of(new).is_leaf))
        elif node.target is operator.getitem:
            source, at = arguments(new)
            new.meta["val"] = operator.getitem(*fx.node.map_arg(new.args, value_of))
            self.mark(new, self.results[source][at] if source in self.results else self.traits(source))
        return self.put(node, new)

    def traits(self, new: Any) -> Traits:
        """Of a node of the new graph, or of a number, which has none."""
        return new in self.whole, new in self.active, new in self.casts.leaves

    def mark(self, new: fx.Node, traits: Traits) -> None:
        for has, nodes in zip(traits, (self.whole, self.active, self.casts.leaves), strict=True):
            if has:
                nodes.add(new)

    def put(self, node: fx.Node, new: fx.Node) -> fx.Node:
        self.env[node] = new
        if len(node.users) == 1:
            self.casts.once.add(new)
        return new

    def emit(self, node: fx.Node, change: Callable[[fx.Node], fx.Node]) -> None:
        """`node` on arguments brought to their dtypes by `change`; where it refuses them, in fp32, or as they were."""
        ways = (
            change,
            lambda one: self.cast(one, torch.float32, node, _ALIKE),
            lambda one: self.as_before(one, node, "the operator takes the dtypes it had only"),
        )
        for way in ways:
            try:
                return self.place(node, {one: way(one) for one in node.all_input_nodes})
            except Exception as error:  # what dtypes an operator takes, only calling it tells
                failed = error
        raise failed

    def place(self, node: fx.Node, arranged: dict[fx.Node, fx.Node]) -> None:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), arranged.__getitem__)
        value = self.value(node, arranged, args, kwargs)
        new = self.graph.create_node(node.op, node.target, args, kwargs, node.name, node.type)
        new.meta = dict(node.meta) | {"val": value}
        self.put(node, new)

    def append(self, like: fx.Node, target: Any, args: Sequence[fx.Node]) -> fx.Node:
        """A call of `target` that is a part of what `like` computes."""
        with torch.set_grad_enabled(like.meta.get("grad", True)):
            value = target(*map(value_of, args))
        new = self.graph.create_node("call_function", target, tuple(args), name=like.name)
        new.meta = dict(like.meta) | {"val": value}
        return new

    def value(self, node: fx.Node, arranged: dict[fx.Node, fx.Node], args: Any, kwargs: Any) -> Any:
        """What `node` gives on the new arguments. It is only run where a dtype may be another one."""
        if not isinstance(node.target, compat.OpOverload) or "kept" in node.meta or mutates(node):
            return value_of(node)
        alike = all(_dtypes(value_of(one)) == _dtypes(value_of(new)) for one, new in arranged.items())
        if alike and node.meta.get("autocast") is None:
            return value_of(node)
        values, named = fx.node.map_arg((args, kwargs), value_of)
        with torch.set_grad_enabled(node.meta.get("grad", True)):
            return node.target(*values, **named)

    # --- bodies ---

    def enter(self, node: fx.Node) -> None:
        """The body of a checkpoint takes what it is given; casts of parameters in it are made outside, once."""
        name, shared = str(arguments(node)[0].target), len(arguments(node)[0].users) > 1
        given = [
            one if not isinstance(one, fx.Node) else self.as_before(one, node) if shared else self.env[one]
            for one in arguments(node)[1:]  # numbers among them, which Dynamo passes for sizes
        ]
        passed = [(value_of(one), self.traits(one)) for one in given]
        walk = Mixed(operator.attrgetter(name)(self.gm), self.policy, self.named, passed)
        walk.regions = list(self.regions)
        body = walk.run()
        self.kept += walk.kept
        self.paths |= walk.paths
        self.count(walk.one_by_one)
        if not shared:
            body.graph.eliminate_dead_code(lambda one: not verify.is_removable(one))  # which may read weights
            given = hoist(self.casts, body.graph, given, node, walk.written)
        body.recompile()
        self.bodies[name] = body
        new = self.graph.create_node(node.op, node.target, (self.env[arguments(node)[0]], *given), dict(node.kwargs))
        results = next(iter(reversed(body.graph.nodes))).args[0]
        new.meta = dict(node.meta) | {"val": fx.node.map_arg(results, value_of)}
        if isinstance(results, tuple | list):
            self.results[new] = [walk.traits(one) for one in results]
        self.put(node, new)


def _dtypes(value: Any) -> list[Any]:
    return [one.dtype if isinstance(one, Tensor) else None for one in compat.pytree.tree_leaves(value)]
