"""A graph built anew with the dtypes of a policy: the walk that `fxopt.passes.precision` is made of.

Every node is visited once, in order. Values carry the dtypes that they will have; what the graph had before is asked of
the old nodes. Nothing is decided by looking ahead.
"""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxopt import compat
from fxopt.casts import MARK, VIEWS, Casts, dtype_name, is_float
from fxopt.effects import mutated_storages, mutates, storages_of
from fxopt.fake import arguments, bound_arguments, value_of
from fxopt.ops.support import lacks
from fxopt.policy import LOW_ARGUMENTS, Class, Policy, operator_name
from fxopt.rule import Place, module_path

__all__ = ["Mixed"]

aten = torch.ops.aten

_WHOLE = "an operand holds whole numbers, positions say, which 16 bits would round"
_STREAM = "the residual stream has 16 bits"


class Mixed:
    """The walk through one graph; the body of a checkpoint has a walk of its own.

    given: for a body, its inputs as the caller passes them.
    kept:  (node, reason) of products that stay in fp32. paths: the module paths of the nodes seen.
    one_by_one: number and bytes of the casts if each use had its own (`Casts.bytes_one_by_one`).
    """

    def __init__(self, gm: fx.GraphModule, policy: Policy, given: Sequence[Any] | None = None):
        self.gm, self.policy = gm, policy
        self.given = None if given is None else iter(given)
        self.graph = fx.Graph()
        self.written = mutated_storages(gm.graph)
        self.casts = Casts(self.graph, self.written)
        self.env: dict[fx.Node, fx.Node] = {}
        self.whole: set[fx.Node] = set()
        self.regions: list[bool] = []
        self.bodies: dict[str, fx.GraphModule] = {}
        self.kept: list[tuple[str, str]] = []
        self.paths: set[str] = set()
        self.one_by_one = (0, 0)
        self.mode = compat.fake_mode_of([value_of(node) for node in gm.graph.nodes])

    def run(self) -> fx.GraphModule:
        """The new graph. Its values have the right shapes and dtypes; which of them alias is for `propagate` to say."""
        with self.mode or contextlib.nullcontext(), compat.ignoring_fresh_symbols(self.mode):
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

    def is_plumbing(self, node: fx.Node) -> bool:
        """Nodes without a dtype: sizes, and the parts of a tuple."""
        return not isinstance(node.target, compat.OpOverload | compat.HigherOrderOperator) and "kept" not in node.meta

    def returned(self, node: fx.Node) -> Any:
        """What the graph returns: in the dtypes it had, but from a body, whose reader takes what it gets."""
        if self.given is not None:
            return self.mapped(node.args[0])
        return fx.node.map_arg(node.args[0], lambda one: self.as_before(one, node, "an output keeps its dtype"))

    def switch(self, node: fx.Node) -> None:
        """Autocast regions go; whether the innermost one is switched off stays known."""
        if node.target is compat.ENTER_AUTOCAST:
            self.regions.append(bool(arguments(node)[2]))
        else:
            self.regions.pop()

    # --- operators ---

    def compute(self, node: fx.Node) -> None:
        chosen, reason = self.class_of(node)
        if chosen is None:
            self.emit(node, lambda one: self.as_before(one, node, reason))
        elif chosen == "low":
            self.low(node)
        elif chosen == "fp32":
            self.emit(node, lambda one: self.cast(one, torch.float32, node, reason))
        else:
            self.follow(node)

    def class_of(self, node: fx.Node) -> tuple[Class | None, str]:
        """The class that `node` computes in, None for the dtypes it had, and the reason for a cast or for no cast."""
        if not isinstance(node.target, compat.OpOverload) or "kept" in node.meta or mutates(node):
            return None, "it must have the dtype it had"
        if not storages_of(value_of(node)).isdisjoint(self.written):
            return None, "it is written to in place"
        chosen = self.policy.class_of(node.target)
        reason = self.why_kept(node)
        if reason and chosen == "low":
            self.kept.append((node.name, f"{reason} ({Place.of(node)})"))
        if reason:
            return None, reason
        if operator_name(node.target).split("::")[0] not in ("aten", "prims") and chosen == "follow":
            return None, "an operator of which nothing is known"
        if chosen == "low" and (why := self.why_not_low(node)):
            self.kept.append((node.name, f"{why} ({Place.of(node)})"))
            return "fp32", why
        if chosen == "fp32" and self.is_a_products_power(node):
            return "follow", ""
        return chosen, "sums and transcendental functions are computed in fp32"

    def is_a_products_power(self, node: fx.Node) -> bool:
        """Whether `node` is ``x ** 3`` and the like on its way to no sum, such as in gelu's approximation by tanh.

        There bf16, whose range is fp32's, loses no more than a product does; fp16 overflows at 40 ** 3.
        """
        if node.target is not aten.pow.Tensor_Scalar or type(arguments(node)[1]) not in (int, float):
            return False
        summed = any(self.policy.class_of(user.target) == "fp32" for user in node.users)
        return self.policy.compute == torch.bfloat16 and arguments(node)[1] in (2, 3, 4) and not summed

    def why_kept(self, node: fx.Node) -> str:
        if self.regions and not self.regions[-1]:
            return "autocast is switched off here"
        pattern = self.policy.keeps(module_path(node))
        return f"keep_fp32 has {pattern!r}" if pattern else ""

    def why_not_low(self, node: fx.Node) -> str:
        """Why a product stays in fp32 though the policy calls it low; "" for no reason."""
        operands = self.low_operands(node)
        if any(one in self.whole for one in operands):
            return _WHOLE
        devices = {value_of(one).device.type for one in operands}
        name, dtype = operator_name(node.target), self.policy.compute
        if devices == {"cpu"} and lacks(name, dtype):
            return f"this CPU has no {name} in {dtype_name(dtype)}"
        return ""

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

        def change(one: fx.Node) -> fx.Node:
            new = self.env[one]
            return self.cast(one, self.policy.compute, node, reason) if new in inside else self.as_before(one, node)

        self.emit(node, change)

    def follow(self, node: fx.Node) -> None:
        """An operator in the dtypes it is given; in fp32 where 16 bits would change what it says."""
        if node.target is aten.to.dtype and self.is_idle(node):
            self.env[node] = self.env[arguments(node)[0]]
            return
        floats = [one for one in node.all_input_nodes if is_float(value_of(self.env[one]))]
        narrow = [one for one in floats if value_of(self.env[one]).dtype != torch.float32]
        if narrow and (_beyond(node, value_of(self.env[narrow[0]]).dtype) or self.mixes_a_scalar(floats, narrow)):
            self.emit(node, lambda one: self.cast(one, torch.float32, node, "a constant that 16 bits do not hold"))
        elif self.is_stream(node, floats, narrow):
            self.emit(node, lambda one: self.cast(one, self.policy.residual, node, _STREAM))
        else:
            self.emit(node, lambda one: self.no_wider(one, node))
        self.note_whole(node, floats)
        if node.target is aten.embedding.default and self.policy.residual != torch.float32:
            self.env[node] = self.casts.to(self.env[node], self.policy.residual, _STREAM, node)

    def is_idle(self, node: fx.Node) -> bool:
        """Whether a cast of the user's is to the dtype that its input now has."""
        source, dtype = self.env[arguments(node)[0]], value_of(node).dtype
        return isinstance(value_of(source), Tensor) and value_of(source).dtype == dtype and is_float(value_of(source))

    def mixes_a_scalar(self, floats: Sequence[fx.Node], narrow: Sequence[fx.Node]) -> bool:
        """Whether an fp32 tensor without axes meets 16-bit ones: it would be rounded, `finfo.min` to -inf."""
        wide = (value_of(one) for one in floats if one not in narrow)
        return any(value.dim() == 0 for value in wide)

    def is_stream(self, node: fx.Node, floats: Sequence[fx.Node], narrow: Sequence[fx.Node]) -> bool:
        """Whether `node` adds a 16-bit tensor to an fp32 one of its size, and the stream is to have 16 bits."""
        if node.target is not aten.add.Tensor or self.policy.residual == torch.float32:
            return False
        shapes = {str(tuple(value_of(one).shape)) for one in floats}
        return bool(narrow) and len(narrow) < len(floats) and len(shapes) == 1

    def note_whole(self, node: fx.Node, floats: Sequence[fx.Node]) -> None:
        """Remember that `node` holds whole numbers as floats, or is made of such: positions, distances."""
        if not is_float(value_of(node)):
            return
        new = self.env[node]
        if node.target is aten.to.dtype:
            made = _counts(arguments(node)[0])
        else:
            made = node.target in (aten.arange.default, aten.arange.start, aten.arange.start_step)
        inherits = [self.env[one] in self.whole for one in floats]
        others = (one for one, whole in zip(floats, inherits, strict=True) if not whole)
        if made or (any(inherits) and all(_is_given(one) and not value_of(one).requires_grad for one in others)):
            self.whole.add(new)

    # --- casts of arguments: from a node of the old graph to one of the new ---

    def as_before(self, one: fx.Node, reader: fx.Node, reason: str = "it must have the dtype it had") -> fx.Node:
        """In the dtype that `one` has in the old graph."""
        return self.cast(one, value_of(one).dtype, reader, reason) if is_float(value_of(one)) else self.env[one]

    def no_wider(self, one: fx.Node, reader: fx.Node) -> fx.Node:
        """As it is, but rounded where the old graph rounded: else fp32 would spread through a model of 16 bits."""
        value, before = value_of(self.env[one]), value_of(one)
        wider = is_float(before) and before.dtype != torch.float32 and value.dtype == torch.float32
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
            new.meta["val"] = next(self.given)
        elif node.target is operator.getitem:
            new.meta["val"] = operator.getitem(*fx.node.map_arg(new.args, value_of))
        return self.put(node, new)

    def put(self, node: fx.Node, new: fx.Node) -> fx.Node:
        self.env[node] = new
        if len(node.users) == 1:
            self.casts.once.add(new)
        return new

    def emit(self, node: fx.Node, change: Callable[[fx.Node], fx.Node]) -> None:
        """`node` on arguments brought to their dtypes by `change`; where it refuses them, all in the widest."""
        arranged = {one: change(one) for one in node.all_input_nodes}
        try:
            self.place(node, arranged)
        except Exception:  # some operators take inputs of one dtype only, and only calling them tells which
            floats = [one for one in node.all_input_nodes if is_float(value_of(arranged[one]))]
            if len({value_of(arranged[one]).dtype for one in floats}) < 2:
                raise
            for one in floats:
                arranged[one] = self.casts.to(arranged[one], torch.float32, "the operator takes one dtype", node)
            self.place(node, arranged)

    def place(self, node: fx.Node, arranged: dict[fx.Node, fx.Node]) -> None:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), arranged.__getitem__)
        value = self.value(node, arranged, args, kwargs)
        new = self.graph.create_node(node.op, node.target, args, kwargs, node.name, node.type)
        new.meta = dict(node.meta) | {"val": value}
        self.put(node, new)

    def value(self, node: fx.Node, arranged: dict[fx.Node, fx.Node], args: Any, kwargs: Any) -> Any:
        """What `node` gives on the new arguments. It is only run where a dtype may be another one."""
        alike = all(_dtypes(value_of(one)) == _dtypes(value_of(new)) for one, new in arranged.items())
        if not isinstance(node.target, compat.OpOverload) or "kept" in node.meta or mutates(node):
            return value_of(node)
        if alike and node.meta.get("autocast") is None:
            return value_of(node)
        values, named = fx.node.map_arg((args, kwargs), value_of)
        with torch.set_grad_enabled(node.meta.get("grad", True)):
            return node.target(*values, **named)

    # --- bodies ---

    def enter(self, node: fx.Node) -> None:
        """The body of a checkpoint takes what it is given; casts of parameters in it are made outside, once."""
        name, shared = str(arguments(node)[0].target), len(arguments(node)[0].users) > 1
        given = [self.as_before(one, node) if shared else self.env[one] for one in arguments(node)[1:]]
        walk = Mixed(operator.attrgetter(name)(self.gm), self.policy, [value_of(one) for one in given])
        walk.regions = list(self.regions)
        body = walk.run()
        self.kept += walk.kept
        self.paths |= walk.paths
        self.count(walk.one_by_one)
        if not shared:
            inside = body.graph.find_nodes(op="placeholder")
            given = [self.hoisted(*pair, node) for pair in zip(given, inside, strict=True)]
        body.recompile()
        self.bodies[name] = body
        new = self.graph.create_node(node.op, node.target, (self.env[arguments(node)[0]], *given), dict(node.kwargs))
        results = next(iter(reversed(body.graph.nodes))).args[0]
        new.meta = dict(node.meta) | {"val": fx.node.map_arg(results, value_of)}
        self.put(node, new)

    def hoisted(self, outer: fx.Node, inner: fx.Node, node: fx.Node) -> fx.Node:
        """The cast of `outer` in place of it, if it is an input of this graph and all that the body reads is a cast."""
        readers = list(inner.users)
        if outer.op != "placeholder" or len(readers) != 1 or MARK not in readers[0].meta:
            return outer
        (cast,) = readers
        cast.replace_all_uses_with(inner)
        inner.graph.erase_node(cast)
        inner.meta["val"] = value_of(cast)
        return self.casts.placed(outer, value_of(cast).dtype, cast.meta[MARK], node)


def _beyond(node: fx.Node, dtype: torch.dtype) -> bool:
    """Whether a number among the arguments of `node` is finite, but not in `dtype`."""
    target: Any = node.target
    numbers = [
        value
        for argument, value in zip(target._schema.arguments, bound_arguments(node).values(), strict=True)
        if str(argument.type).removeprefix("Optional[").removesuffix("]") in ("number", "float")
    ]
    return any(type(one) in (int, float) and torch.finfo(dtype).max < abs(one) < math.inf for one in numbers)


def _counts(node: fx.Node) -> bool:
    """Whether `node` holds integers that may be large: neither truth values nor a one-hot code."""
    while node.target in VIEWS and isinstance(arguments(node)[0], fx.Node):
        node = arguments(node)[0]
    value = value_of(node)
    integers = isinstance(value, Tensor) and not value.dtype.is_floating_point and value.dtype != torch.bool
    return integers and not value.dtype.is_complex and node.target is not aten.one_hot.default


def _is_given(node: fx.Node) -> bool:
    """Whether `node` is an input or a constant of the graph, or a view of one."""
    while node.target in VIEWS and isinstance(arguments(node)[0], fx.Node):
        node = arguments(node)[0]
    return node.op in ("placeholder", "get_attr")


def _dtypes(value: Any) -> list[Any]:
    return [one.dtype if isinstance(one, Tensor) else None for one in compat.pytree.tree_leaves(value)]
