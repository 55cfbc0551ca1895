"""The only file that reaches into torch's private modules (torch 2.11 to 2.13).

Everything else imports what it needs from here, so that a new torch release is a change to one file.
"""

from __future__ import annotations

import collections
import contextlib
import contextvars
import copy
import dataclasses
import functools
import itertools
import logging
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Self

import sympy
import torch
from torch import fx
from torch._C import _set_grad_enabled
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo import convert_frame, eval_frame, external_utils
from torch._dynamo.exc import RestartAnalysis, ShortenTraceback, SkipFrame
from torch._dynamo.source import ConstantSource
from torch._functorch import partitioners
from torch._guards import tracing
from torch._higher_order_ops.wrap import tag_activation_checkpoint
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv, guard_or_false, statically_known_true
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes as outside_dispatch_modes
from torch.utils._sympy.functions import FloorDiv, Max

__all__ = [
    "DYNAMO_CONTROL",
    "ENTER_AUTOCAST",
    "EXIT_AUTOCAST",
    "STATE_SWITCHES",
    "FakeTensor",
    "FakeTensorMode",
    "FunctionalTensorMode",
    "HigherOrderOperator",
    "Lowered",
    "OpOverload",
    "PassesThroughDynamo",
    "TorchDispatchMode",
    "aot_backend",
    "aot_backend_by",
    "apart",
    "compile_graph",
    "decompose_within",
    "disabled_torch_function",
    "ends_in_break",
    "extern_kernel",
    "fake_mode_of",
    "forbid_data_pointer",
    "frame_being_compiled",
    "fusible",
    "guard_or_false",
    "hidden_from_hooks",
    "inductor_cache_directory",
    "inductor_option_names",
    "inherit_from_dynamo",
    "is_traced",
    "load_wrapper",
    "lower",
    "mode_options",
    "must_recompute",
    "must_save",
    "outside_dispatch_modes",
    "partition",
    "partitioner_class",
    "pytree",
    "records_cuda_graphs",
    "returns_aligned",
    "running_symbolic",
    "shielded_from_autocast",
    "size_expression",
    "size_hint",
    "size_text",
    "statically_known_true",
    "symbolic",
    "tag_activation_checkpoint",
    "trace_artifact",
    "trace_atens",
    "whole_name",
]


class PassesThroughDynamo(ShortenTraceback):
    """An exception that reaches the user as it is: Dynamo wraps any other that a backend raises."""

    def __init__(self, message: str):
        super().__init__(message, first_useful_frame=None)

    def remove_dynamo_frames(self) -> Self:
        """Without the hundred lines between the user's call and what raised; TORCHDYNAMO_VERBOSE=1 keeps them."""
        frames = [frame for frame, _ in traceback.walk_tb(self.__traceback__)]
        self.first_useful_frame = frames[-1] if frames else None
        return super().remove_dynamo_frames()


ENTER_AUTOCAST: Any = torch.amp._enter_autocast
EXIT_AUTOCAST: Any = torch.amp._exit_autocast
STATE_SWITCHES: frozenset[Any] = frozenset({_set_grad_enabled, ENTER_AUTOCAST, EXIT_AUTOCAST})
"""Nodes that change ambient state for the nodes after them: grad mode and autocast regions."""


DYNAMO_CONTROL = (RestartAnalysis, SkipFrame, PassesThroughDynamo)
"""Exceptions by which a backend talks to Dynamo and to the user; they are no failures, as Inductor's own are."""


def ends_in_break(gm: fx.GraphModule) -> bool:
    """Whether Dynamo cut the graph here, so that others of the same model will follow."""
    return bool(getattr(getattr(gm, "compile_subgraph_reason", None), "graph_break", False))


RESUME = "torch_dynamo_resume_in_"
"""How Dynamo names the rest of a frame that it has cut."""


class Frame(NamedTuple):
    """What Dynamo traces. module: its first argument. code: where it is. inner: whether one that breaks calls it.

    argument: what the code calls the module. others: all modules that it has names for.
    """

    module: torch.nn.Module | None = None
    code: str = ""
    inner: bool = False
    argument: str = "self"
    others: Mapping[str, torch.nn.Module] = {}


def frame_being_compiled() -> Frame:
    """The frame at the root of what Dynamo traces in this thread; an empty one where it traces none.

    A first argument may be among ``*args``, or be what Dynamo's wrapper of torch's own modules calls.
    """
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        frame = InstructionTranslator.current_tx().output.root_tx
        code, held = frame.f_code, frame.f_locals
    except (AttributeError, AssertionError):
        return Frame()
    cut = code.co_name.startswith(RESUME)  # whose first arguments are what Dynamo hands over
    names = [one for one in code.co_varnames if not (cut and one.startswith("__"))]
    name = "self" if "self" in held else next(iter(names), "")
    first = held.get(name)
    given = first[:1] if isinstance(first, tuple) else (first,)
    called = held.get("fn") if code.co_filename == external_utils.__file__ else None
    candidates = (called, getattr(called, "__self__", None), *given)
    found = next((one for one in candidates if isinstance(one, torch.nn.Module)), None)
    argument = f"{name}.0" if isinstance(first, tuple) else name
    where = f"{code.co_filename}:{code.co_firstlineno} {code.co_name}"
    others = {key: one for key, one in held.items() if isinstance(one, torch.nn.Module)}
    return Frame(found, where, _is_inner(code.co_name), argument, others)


def whole_name(name: str) -> str:
    """Of the function that Dynamo traces a part of under `name`."""
    return name.removeprefix(RESUME).rsplit("_at_", 1)[0] if name.startswith(RESUME) else name


def _is_inner(name: str) -> bool:
    """Whether the frame that Dynamo traces, of code called `name`, is called by other code than the user's.

    Above Dynamo's own frames in the stack is who calls it: what `torch.compile` returned, by a module's ``__call__`` or
    not, or another frame, which Dynamo has cut at this call. The rest of a cut frame is called by its beginning.
    """
    own, past = convert_frame.__file__, itertools.dropwhile
    stack: Any = ((frame.f_code.co_filename, frame.f_code.co_name) for frame, _ in traceback.walk_stack(None))
    stack = past(lambda one: one[0] == own, past(lambda one: one != (own, "__call__"), stack))
    if name.startswith(RESUME):
        stack = itertools.islice(past(lambda one: one[1].startswith(RESUME), stack), 1, None)
    caller = next(past(lambda one: one[0] == torch.nn.modules.module.__file__, stack), None)
    return caller is not None and caller[0] != eval_frame.__file__


def inherit_from_dynamo(gm: fx.GraphModule, source: fx.GraphModule) -> None:
    """Tell AOTAutograd of `gm` what it would learn of `source`, Dynamo's graph with the same inputs.

    It is which of them are parameters, whose memory stays where it is: CUDA graphs copy all others at every step, and a
    partitioner is told. It reads it from attributes of the module and of its placeholders. Why the graph ends goes with
    it (`ends_in_break`).
    """
    if hasattr(source, "compile_subgraph_reason"):
        gm.compile_subgraph_reason = source.compile_subgraph_reason
    before, after = (list(one.graph.find_nodes(op="placeholder")) for one in (source, gm))
    known = hasattr(source, "_param_name_to_source") and all(hasattr(node, "_dynamo_source") for node in before)
    if gm is source or not known or len(before) != len(after):
        return
    held = (gm.named_parameters(remove_duplicate=False), gm.named_buffers(remove_duplicate=False))
    own = (name for name, _ in itertools.chain(*held))  # constants that capture made
    sources: Any = source._param_name_to_source
    gm._param_name_to_source = {name: ConstantSource(name) for name in own} | sources
    for old, new in zip(before, after, strict=True):
        new._dynamo_source = old._dynamo_source
        if "tensor_dict" in old.meta:
            new.meta["tensor_dict"] = old.meta["tensor_dict"]


def fake_mode_of(values: Any) -> FakeTensorMode | None:
    """The fake mode of the first fake tensor among `values`: a backend's node metadata has a mode of its own."""
    for value in pytree.tree_leaves(values):
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return None


@contextlib.contextmanager
def running_symbolic(mode: FakeTensorMode | None) -> Iterator[None]:
    """Within, operators can be run on the fake tensors of `mode`, whose sizes may be symbols.

    Data-dependent sizes (`.item()`, `nonzero`) make symbols that nobody waits to see bound to a node. Where there are
    others, composite operators go by their decompositions in Python, as when Dynamo traces: those in C++ ask for plain
    numbers in torch 2.11 (`aten.linear` of a view).
    """
    shape_env = getattr(mode, "shape_env", None)
    with contextlib.ExitStack() as stack:
        if shape_env is not None:
            stack.enter_context(shape_env.ignore_fresh_unbacked_symbols())
            if shape_env.backed_var_to_val:
                stack.enter_context(enable_python_dispatcher())
        yield


def size_expression(size: Any) -> Any:
    """A size as an int, or as the sympy expression behind a symbolic one; reading it installs no guard."""
    return size.node.expr if isinstance(size, torch.SymInt) else size


def size_text(size: Any) -> str:
    """A size or stride as text, equal for symbolic ones that are equal wherever there are elements.

    Exact quotients are carried out: views leave ``(s**2)//s`` where two sizes are one symbol, as they are while a batch
    is as large as its rows are long. ``Max(1, s)``, which contiguous strides have for empty tensors' sake, is s.
    """
    expression = size_expression(size)
    if not isinstance(expression, sympy.Expr) or expression.is_Atom:
        return str(size)

    def exact(whole: Any, by: Any) -> Any:
        quotient = sympy.cancel(whole / by)
        return quotient if sympy.denom(quotient) == 1 else FloorDiv(whole, by)

    def at_least_one(*items: Any) -> Any:
        others = [item for item in items if item != 1]
        return others[0] if len(others) == 1 and len(items) == 2 else Max(*items)

    plain = expression.replace(FloorDiv, exact)
    for kind in (sympy.Max, Max):
        plain = plain.replace(kind, at_least_one)
    return str(sympy.expand(plain))


def symbolic(values: Sequence[Any]) -> list[Any]:
    """Fake tensors of one mode in the place of real ones, whose sizes above 1 are symbols; equal sizes share one."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    return [mode.from_tensor(value) if isinstance(value, torch.Tensor) else value for value in values]


def shielded_from_autocast() -> contextlib.AbstractContextManager[None]:
    """Within, what AOTAutograd compiles switches autocast off while it runs, forward and backward.

    By itself it does so only if autocast was on while it compiled (``disable_amp``).
    """
    return patched(torch._C, "_is_any_autocast_enabled", lambda: True)


def size_hint(size: Any) -> Any:
    """A symbolic number as the one it was traced with, None where there was none; anything else is itself.

    Reading it installs no guard.
    """
    return size.node.hint if isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool) else size


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Within, graphs are compiled as if no other were being compiled in this thread, and no dispatch mode is on.

    A backend runs under Dynamo's tracing context, to whose fake mode and metadata a second compilation would add.
    """
    with tracing(None), outside_dispatch_modes():
        yield


def hidden_from_hooks() -> contextlib.AbstractContextManager[Any]:
    """Within, what is traced and tried reaches no saved-tensor hook of the user, under which a backend may run.

    A checkpoint counts what its hook sees, and raises where the second forward, compiled by then, shows it less. Where
    torch.func forbids such hooks there are none, and none can be put in their place.
    """
    autograd: Any = torch._C._autograd
    if not autograd._saved_tensors_hooks_is_enabled():
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


def is_batched(value: torch.Tensor) -> bool:
    """Whether `value` is vmap's view of a tensor, which has no storage to ask for."""
    return torch._C._functorch.is_batchedtensor(value)


def trace_atens(fn: Callable[..., Any], values: Sequence[Any]) -> fx.GraphModule:
    """Trace `fn` on fake or symbolic `values` to ATen above autograd, so that composite operators stay whole."""
    mode = fake_mode_of(values)
    with mode or FakeTensorMode(allow_non_fake_inputs=True), running_symbolic(mode):
        return make_fx(fn, pre_dispatch=True, tracing_mode="real", _allow_non_fake_inputs=True)(*values)


def compile_graph(
    gm: fx.GraphModule, inputs: Sequence[Any], patches: Mapping[str, Any], key: str = ""
) -> Callable[..., Any]:
    """Compile `gm` for training with Inductor. The backward is lowered now, so that it fails now if it fails.

    Torch's caches are keyed on the graph; what fxopt's operators do in it, backward too, is known by `key`. Inductor's
    attention patterns stay off it (see `attention_patterns_off`).
    """
    from torch._functorch import config as functorch_config
    from torch._inductor.compile_fx import compile_fx

    tag = f"{torch.compiler.config.cache_key_tag} {key} without sfdp"
    lowering = functorch_config.patch(force_non_lazy_backward_lowering=True)
    tagged = patched(torch.compiler.config, "cache_key_tag", tag)
    with lowering, _nothing_donated(), attention_patterns_off(), tagged:
        return compile_fx(gm, list(inputs), config_patches=dict(patches))  # type: ignore[return-value]


# --- what a memory plan asks of the partitioner and of Inductor ---------------------------------------------------


def partitioner_class() -> Any:
    """What ``torch._inductor.config.custom_partitioner_fn`` must be an instance of.

    It is called with a joint graph, and has a `uuid()` for caches' keys, into which the whole instance is pickled.
    """
    from torch._inductor.custom_graph_pass import CustomPartitionerFn

    return CustomPartitionerFn


_CHOICE = contextvars.ContextVar[Any]("fxopt_saved_values", default=None)


def partition(gm: fx.GraphModule, inputs: Any, choose: Callable[..., Any], **how: Any) -> Any:
    """Torch's min-cut partitioner, whose choice of saved values is replaced: -> (forward, backward) graph modules.

    choose: is called with the joint graph, torch's `NodeInfo` and a function that returns torch's own choice; returns
    nodes. What is not among them and the backward needs is recomputed. Collectives, effects, random numbers in
    checkpoints and symbolic sizes are dealt with by torch, before and after.
    """
    _guard_partitioner()
    token = _CHOICE.set(choose)
    try:
        return partitioners.min_cut_rematerialization_partition(gm, inputs, **how)
    finally:
        _CHOICE.reset(token)


@functools.cache
def _guard_partitioner() -> None:
    """Once a process: the partitioner asks, each time, whether somebody chooses in its place in this thread."""
    own = partitioners.choose_saved_values_set

    def choose(joint_graph: fx.Graph, node_info: Any, *args: Any, **kwargs: Any) -> Any:
        def stock() -> Any:
            return own(joint_graph, node_info, *args, **kwargs)

        chosen = _CHOICE.get()
        return stock() if chosen is None else chosen(joint_graph, node_info, stock)

    partitioners.choose_saved_values_set = choose


def records_cuda_graphs() -> bool:
    """Whether what Inductor compiles now is recorded in CUDA graphs."""
    from torch._inductor import config

    return bool(config.triton.cudagraphs)


@functools.cache
def returns_aligned(operator: Any) -> None:
    """Let Inductor know that the custom `operator` returns new memory, which allocators align, whatever it reads.

    By itself it takes the result of an operator that reads host memory for unaligned, and kernels that read it load
    numbers one by one.
    """
    from torch._inductor import lowering
    from torch._inductor.virtualized import V

    fallback = lowering.fallback_handler(operator)

    def lower(*args: Any, **kwargs: Any) -> Any:
        made = fallback(*args, **kwargs)
        V.graph.unaligned_buffers.discard(made.get_name())
        return made

    lowering.register_lowering(operator, type_promotion_kind=None)(lower)


def must_recompute(node: fx.Node) -> bool:
    """Whether the user's checkpoint says that the backward makes `node` again."""
    return bool(partitioners.must_recompute(node))


def must_save(node: fx.Node) -> bool:
    """Whether the user's policy, or torch for what has effects, says that `node` is computed once."""
    policy = torch.utils.checkpoint.CheckpointPolicy
    return node.meta.get("recompute") in (policy.MUST_SAVE, policy.PREFER_SAVE)


def is_symbolic(node: fx.Node) -> bool:
    """Whether `node` is a symbolic number."""
    return bool(partitioners.is_sym_node(node))


def is_opaque(node: fx.Node) -> bool:
    """Whether `node` is an opaque object, for example a process group."""
    return bool(getattr(partitioners, "is_opaque_node", lambda _: False)(node))


def fusible() -> Any:
    """Torch's table of operators, for its `is_fusible(node)` and `is_view(node)`."""
    return partitioners.get_default_op_list()


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A graph as Inductor's wrapper code: source, values of its inputs, names of inputs and outputs in the graph."""

    code: str
    inputs: list[Any]
    input_names: list[str]
    output_names: list[str]


class _Lowered(Exception):
    """Ends a compilation once the wrapper is written, before any kernel is compiled."""


_LOWERING = contextvars.ContextVar[Any]("fxopt_lowering", default=None)


def lower(gm: fx.GraphModule, is_backward: bool, static_inputs: Sequence[int] = ()) -> Lowered:
    """The wrapper that Inductor writes for `gm`, of which it compiles no kernel. Raises what Inductor raises."""
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner

    _guard_output_code()
    gm = copy.deepcopy(gm)
    placeholders = gm.graph.find_nodes(op="placeholder")
    inputs = [node.meta["val"] for node in placeholders]
    outputs: Any = gm.graph.output_node().args[0]
    names = [item.name if isinstance(item, fx.Node) else "" for item in outputs]
    written: list[str] = []
    token = _LOWERING.set(written.append)
    how: dict[str, Any] = {
        "is_backward": is_backward,
        "static_input_idxs": static_inputs,
        "is_inference": False,
        "graph_id": 0,
    }
    quiet = logging.getLogger("torch._inductor.utils")
    try:
        with tracing(None), config.patch(force_disable_caches=True), _silenced(quiet):
            compile_fx_inner(gm, inputs, **how)
    except Exception:
        if not written:
            raise
    finally:
        _LOWERING.reset(token)
    return Lowered(written[0], inputs, [node.name for node in placeholders], names)


@contextlib.contextmanager
def _silenced(logger: logging.Logger) -> Iterator[None]:
    """Within, `logger` warns of nothing."""
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


@functools.cache
def _guard_output_code() -> None:
    """Once a process: what Inductor hands its wrappers to asks whether somebody in this thread waits for one."""
    from torch._inductor.graph import GraphLowering

    before = GraphLowering.save_output_code

    def save(code: str) -> None:
        if (waiting := _LOWERING.get()) is not None:
            waiting(code)
            raise _Lowered
        if before is not None:
            before(code)

    GraphLowering.save_output_code = staticmethod(save)


def load_wrapper(code: str, doubles: Mapping[str, Any]) -> Callable[[list[Any]], Any]:
    """The function ``call`` of a wrapper, with `doubles` in place of names that it imports or defines.

    Raises RuntimeError where the wrapper makes its kernels otherwise than is known.
    """
    maker = "async_compile = AsyncCompile()"
    if maker not in code:
        raise RuntimeError("Inductor's wrapper makes its kernels otherwise than is known")
    names: dict[str, Any] = {"__name__": "fxopt_wrapper", "_kernels": doubles["async_compile"]}
    exec(compile(code.replace(maker, "async_compile = _kernels"), "<wrapper>", "exec"), names)
    names |= doubles
    call: Callable[[list[Any]], Any] = names["call"]
    return call


def extern_kernel(name: str) -> Callable[..., Any]:
    """A library's kernel by the name that Inductor's wrappers call it."""
    from torch._inductor.select_algorithm import extern_kernels

    found: Callable[..., Any] = getattr(extern_kernels, name)
    return found


def trace_artifact(name: str, encoding: str, text: Callable[[], str]) -> None:
    """Put a file `name` into torch's structured trace (``TORCH_TRACE=dir``), which tlparse shows; else do nothing.

    encoding: "json" or "string". text: called only where there is a trace.
    """
    torch._logging.trace_structured("artifact", lambda: {"name": name, "encoding": encoding}, payload_fn=text)


def inductor_cache_directory() -> str:
    """Where Inductor keeps what it compiled."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return str(cache_dir())


def aot_backend(look: Callable[[fx.GraphModule], None]) -> Callable[..., Any]:
    """A backend that runs graphs as AOTAutograd makes them, uncompiled, and shows `look` each joint graph."""

    def partition_fn(joint: fx.GraphModule, inputs: Any, **how: Any) -> Any:
        look(joint)
        return partitioners.min_cut_rematerialization_partition(joint, inputs, **how)

    return aot_backend_by(partition_fn)


def aot_backend_by(partition_fn: Callable[..., Any]) -> Callable[..., Any]:
    """A backend that runs graphs as `partition_fn` cuts them, node by node; each value goes after its last use."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import boxed_nop_preserve_node_meta

    return aot_autograd(fw_compiler=boxed_nop_preserve_node_meta, partition_fn=partition_fn)


@contextlib.contextmanager
def _nothing_donated() -> Iterator[None]:
    """Within, no backward may reuse the memory of saved tensors, so that graphs compiled here can be retained.

    Lowered lazily, a backward learns first whether the graph is retained; lowered early it cannot, and
    ``backward(retain_graph=True)`` would raise. Switching `donated_buffer` off does not help: the check at run time
    takes the list that is then missing for a list that is not empty.
    """
    from torch._functorch._aot_autograd import graph_compile

    name = "collect_bw_donated_buffer_idxs"
    found = hasattr(graph_compile, name)
    with patched(graph_compile, name, lambda *_, **__: []) if found else contextlib.nullcontext():
        yield


_ATTENTION_OFF = contextvars.ContextVar("fxopt_attention_patterns_off", default=False)


@contextlib.contextmanager
def attention_patterns_off() -> Iterator[None]:
    """Within, in this thread, Inductor matches no attention patterns (``_sfdp_*``); all its others it does.

    They miscompile: ``(q @ k.mT / c).softmax(-2) @ v`` becomes attention, whose softmax runs over the last axis (torch
    2.13 on a CPU, error 0.63). What is left of attention in our graphs, fxopt's own rule has refused with a reason.
    """
    _guard_joint_passes()
    token = _ATTENTION_OFF.set(True)
    try:
        yield
    finally:
        _ATTENTION_OFF.reset(token)


@functools.cache
def _guard_joint_passes() -> None:
    """Once a process: the passes over the joint graph ask, each time they run, whether attention is off.

    Patterns are registered on a device's first compilation and shared by all, so they can neither be taken away now
    nor for one compilation: another thread's would lose them.
    """
    from torch._inductor.fx_passes import joint_graph

    for one in getattr(joint_graph, "pass_patterns", ()):
        one.apply = functools.partial(_apply_guarded, one)


def _apply_guarded(whole: Any, graph: Any) -> int:
    return int(type(whole).apply(without_attention(whole) if _ATTENTION_OFF.get() else whole, graph))


def without_attention(whole: Any) -> Any:
    """A copy of Inductor's `PatternMatcherPass` without the attention patterns, known by their functions' names."""
    from torch._inductor import pattern_matcher

    known = getattr(pattern_matcher, "_known_precompiled_patterns", ())
    attention = {id(pattern) for function, *_, pattern in known if function.__name__.startswith("_sfdp_")}
    part = copy.copy(whole)
    part.patterns = collections.defaultdict(list)
    for key, entries in whole.patterns.items():
        if kept := [entry for entry in entries if id(entry.pattern) not in attention]:
            part.patterns[key] = kept
    return part


@contextlib.contextmanager
def patched(config: Any, name: str, value: Any) -> Iterator[None]:
    """`config.name` is `value` within."""
    before = getattr(config, name)
    setattr(config, name, value)
    try:
        yield
    finally:
        setattr(config, name, before)


def inductor_option_names() -> list[str]:
    """Names that ``torch._inductor.config`` accepts."""
    import torch._inductor as inductor

    return list(inductor.list_options())


def mode_options(mode: str | None, dynamic: bool | None = None) -> dict[str, Any]:
    """Inductor's configuration for a ``torch.compile(mode=...)``."""
    import torch._inductor as inductor

    return dict(inductor.list_mode_options(mode, dynamic)) if mode not in (None, "default") else {}


disabled_torch_function: Any = torch._C._disabled_torch_function_impl
"""The `__torch_function__` of a subclass that has none: torch's default one turns every result into the subclass."""


def forbid_data_pointer(tensor: torch.Tensor) -> None:
    """Make C++ code that asks `tensor`, which has no memory, for a data pointer raise: it would get a null one."""
    torch._C._set_throw_on_mutable_data_ptr(tensor)


def has_onednn() -> bool:
    """Whether oneDNN is built in and switched on (`torch.backends.mkldnn.flags`)."""
    return torch.backends.mkldnn.is_available() and torch._C._get_mkldnn_enabled()


def onednn_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ weight.T + bias`` by oneDNN's inner product: x [M, K], weight [N, K], bias [N] -> new [M, N], CPU only.

    `weight` must be contiguous or the transpose of a contiguous matrix: for any other strides oneDNN falls back to its
    reference loop (1,000 times slower). `aten.mm` multiplies fp32 by MKL instead, which leaves AVX-512 unused on AMD.
    """
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def is_traced(tensor: torch.Tensor) -> bool:
    """Whether `tensor` has no data, since it stands for one while a graph is traced."""
    return isinstance(tensor, FakeTensor | FunctionalTensor)


def decompose_within(
    operator: Any, kind: type[TorchDispatchMode], wanted: Callable[..., bool], function: Callable[..., Any]
) -> None:
    """Let a dispatch mode see `function` in place of the custom `operator` wherever `wanted` of its arguments holds.

    For AOTAutograd's, `FunctionalTensorMode`, what ``torch.library.triton_op`` does (torch/_library/triton.py), but for
    some calls of an operator only.
    """

    def dispatched(mode: Any, op: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if not wanted(*args, **kwargs):
            return mode.__torch_dispatch__(op, types, args, kwargs)
        with mode:
            return function(*args, **kwargs)

    operator.register_torch_dispatch(kind, dispatched)
