"""Attention, however it is written -> one op that knows its mask as structure and never holds the scores.

A region grown from a softmax, or from `scaled_dot_product_attention`. `transformers` gives SDPA a mask tensor whenever
it is compiled, even for plain causal attention, which shuts out flash attention; written out, attention holds several
fp32 tensors of [B, H, S, S].
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxopt.fake import value_of
from fxopt.kernels.attention_spec import MOST_WIDTH, unsupported
from fxopt.ops.attention import attention
from fxopt.ops.flash_tiles import LONG_ROWS
from fxopt.ops.key_intervals import key_intervals
from fxopt.ops.launch import kernels_on, runs_triton
from fxopt.ops.sdpa import backends_for, sdpa
from fxopt.rule import Cost, Draw, NoSite, Place, Region, Site
from fxopt.score.attention_site import Found, of_sdpa, of_softmax, softmax_at
from fxopt.score.formula import formula
from fxopt.score.masks import Mask, classify
from fxopt.score.operands import WIDTH, B, H, Operand, Q
from fxopt.score.origins import is_statement
from fxopt.score.program import Program
from fxopt.score.term import Term, apply, constant, variable

aten = torch.ops.aten


def grow(anchor: fx.Node) -> Site | None:
    """From the softmax, the sum of exponentials or the call, to the whole attention."""
    found = _found(anchor)
    if found is None:
        return None
    queries, keys = found.sizes["q"], found.sizes["k"]
    condition = constant(True)
    for part in found.scores.conditions:
        condition = apply("and", condition, part)
    if "s" in condition.reads:
        raise NoSite(f"{found.output.name} is masked by what the scores are, not by where they stand", 4)
    mask = classify(condition, found.reader, queries, keys)
    empty = found.scores.empty
    if mask.never_empty(queries, keys):
        empty = "zero"  # there is no such row, and zero costs least
    elif empty is None:
        raise NoSite(f"{found.output.name} adds two masks of finite numbers, and a row may be masked by both", 4)
    programs, sources = _programs(found, mask)
    inputs = _inputs(found, mask, programs, sources) | {"empty": empty, "heads_last": _heads_last(found)}
    return Site(
        RULE.name, (found.output,), found.nodes, inputs,
        detail=_detail(found, mask), draws=found.draws, origins=_places(found, programs.values()),
    )  # fmt: skip


def _found(anchor: fx.Node) -> Found | None:
    if anchor.target is aten.scaled_dot_product_attention.default:
        return of_sdpa(anchor)
    if anchor.target is aten.sum.dim_IntList:
        written_out = [softmax_at(user) for user in anchor.users]
        softmax = next((item for item in written_out if item is not None), None)
    else:
        softmax = softmax_at(anchor)
    return None if softmax is None else of_softmax(softmax)


def _programs(found: Found, mask: Mask) -> tuple[dict[str, Program], list[fx.Node]]:
    """The programs of a site by name, and the captured tensors, which they share, by slot. Raises `NoSite`."""
    terms = {
        "program": None if found.scores.program is variable("s") else found.scores.program,
        "sink": found.sink,
        "predicate": None if mask.condition.op == "const" else mask.condition,
        **{name: getattr(mask, name) for name in ("documents", "keep", "rows", "lengths", "prefix")},
    }
    programs, sources = {}, list[Any]()
    for name, term in terms.items():
        if term is not None:
            programs[name], sources = Program.of(term, sources, found.reader.origins.inherit)
    for source in sources:
        if not isinstance(source, fx.Node):
            raise NoSite(f"{found.output.name} is masked by the size {source}, which is known only at run time", 4)
    return programs, sources


def _places(found: Found, programs: Iterable[Program]) -> dict[Term, Place]:
    """Where in the user's code the statements of `programs` come from."""
    origins = found.reader.origins
    terms = {term for program in programs for term in program.result.walk() if is_statement(term)}
    nodes = {term: origins.of(term) for term in terms}
    return {term: Place.of(node) for term, node in nodes.items() if node is not None}


def _inputs(found: Found, mask: Mask, programs: dict[str, Program], sources: list[fx.Node]) -> dict[str, Any]:
    """The replacement's arguments: operands, captured tensors, programs that share their slots, constants."""
    operands = {"query": found.query, "key": found.key, "value": found.value}
    return {
        **{name: one.node for name, one in operands.items()},
        **{f"capture{slot}": node for slot, node in enumerate(sources)},
        "operands": tuple(operands.values()),
        "programs": tuple((name, str(program)) for name, program in programs.items()),
        "band": (mask.lower, mask.upper),
        "dense": mask.rest is not None,
        "scale": found.scale,
        "dropout": found.dropout,
        "compute_dtype": _compute_dtype(found),
        "output_dtype": value_of(found.output).dtype,
        "output_shape": tuple(_output_axes(found)),
        "sizes": (found.sizes["b"], found.sizes["h"]),
        "members": next((term.args[1].value for term in found.index if term.op == "mod"), 1),
    }


def _compute_dtype(found: Found) -> torch.dtype:
    """The wider of the dtypes of both products; ambient autocast has made them what they are."""
    return torch.promote_types(value_of(found.nodes[0]).dtype, value_of(found.output).dtype)


def _output_axes(found: Found) -> Iterator[str]:
    """For each axis of the output, what it is: "b", "h", "q", "width", "bh" (flat), "group" and "member" (of heads)."""
    names = {B: "b", H: "h", Q: "q", WIDTH: "width", constant(0): ""}
    for term in found.index:
        yield names[term] if term in names else {"floordiv": "group", "mod": "member"}.get(term.op, "bh")


def _heads_last(found: Found) -> bool:
    """Whether the output lies in memory as [B, S, H, D]. Raises `NoSite` for a layout that is neither."""
    axes, value = list(_output_axes(found)), value_of(found.output)
    if "h" not in axes or value.is_contiguous():
        order = [axis for axis in axes if axis in ("q", "h")]
        contiguous = value.is_contiguous()
    else:
        by_stride = sorted(range(value.dim()), key=lambda axis: -_hint(value.stride(axis)))
        order = [axes[axis] for axis in by_stride if axes[axis] in ("q", "h")]
        contiguous = value.permute(by_stride).is_contiguous()
    if not contiguous:
        raise NoSite(f"{found.output.name} has strides {value.stride()}, which no layout of the op has", 4)
    return order == ["q", "h"]


def _hint(stride: Any) -> float:
    return stride if type(stride) is int else math.inf


def _detail(found: Found, mask: Mask) -> str:
    """For the report: sizes, mask and program."""
    parts = [mask.name]
    program = found.scores.program
    if program is not variable("s"):
        parts.append(f"score {formula(program)}")
    if found.sink is not None:
        parts.append("sink")
    if found.dropout:
        parts.append(f"dropout {found.dropout} drawn by position from one seed")
    sizes = " x ".join(str(found.sizes[name]) for name in "bhqk")
    return f"{sizes}: {', '.join(parts)}"


def computed(site: Site) -> str:
    """How the op is computed; where the operator decides at run time, by what."""
    if runs_triton(_narrowed(site), site.lowering):
        return kernels_on(site.value("query").device)
    if site.value("query").device.type != "cpu":
        return "torch's scaled_dot_product_attention"
    why_not = _why_no_flash(site)
    if why_not:
        return f"blocks of scores ({why_not})"
    if site.inputs["compute_dtype"] == torch.bfloat16:
        return f"blocks of scores in bf16, the flash kernel on tiles of {LONG_ROWS} rows and more"
    if site.inputs["dense"]:
        return "flash kernel with a mask made a block at a time"
    if any(name in _INTERVALS for name, _ in site.inputs["programs"]):
        return "flash kernel on the keys of each run of queries"
    if site.inputs["band"] in _FLAGGED:
        return "flash kernel, no mask tensor"
    return "flash kernel on blocks along the diagonal"


def _why_no_flash(site: Site) -> str:
    """What keeps torch's CPU flash kernel from a site; "" for nothing. `fxopt.ops.flash_tiles.can_compute` decides."""
    program = _score(dict(site.inputs["programs"]))
    depth, width = (_entries(site, name) for name in ("query", "value"))
    if program.split_affine() is None:
        return "the program is not a factor and a bias"
    if site.inputs["dropout"]:
        return "dropout"
    if site.inputs["compute_dtype"] == torch.float16:
        return "it takes no fp16"
    if str(depth) != str(width):
        return f"values have {width} entries, keys {depth}"
    return "a bias wants its gradient" if _differentiable(site, program) else ""


def _score(texts: dict[str, str]) -> Program:
    """The program of the score."""
    return Program.parse(texts["program"]) if "program" in texts else Program(variable("s"))


def _entries(site: Site, name: str) -> Any:
    """How many entries a head of operand `name` has."""
    operand = site.inputs["operands"][("query", "key", "value").index(name)]
    return site.value(name).shape[operand.axes.index("column")]


def _differentiable(site: Site, program: Program) -> bool:
    """Whether the program loads a tensor that wants a gradient."""
    loads = (term for term in program.result.walk() if term.op == "load" and term.kind == "float")
    return any(site.value(f"capture{term.args[0]}").requires_grad for term in loads)


def replacement(
    *,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    operands: tuple[Operand, ...],
    programs: tuple[tuple[str, str], ...],
    band: tuple[int | None, int | None],
    dense: bool,
    scale: float,
    dropout: float,
    empty: str,
    heads_last: bool,
    compute_dtype: torch.dtype,
    output_dtype: torch.dtype,
    output_shape: tuple[str, ...],
    sizes: tuple[Any, Any],
    members: int,
    lowering: str = "auto",
    backend: str = "",
    **captured: Tensor,
) -> Tensor:
    """The attention op on operands brought to [B, heads, positions, depth], and its result as the site has it.

    backend: of SDPA, in the place of the op: for sites that `candidates` names it for.
    """
    captures = [captured[f"capture{slot}"] for slot in range(len(captured))]
    texts = dict(programs)
    batch, heads = sizes
    shared = max(one.heads_of(heads) for one in operands[1:])
    q, k, v = (
        _brought(one.arrange(x), (batch, count), compute_dtype)
        for one, x, count in zip(operands, (query, key, value), (heads, shared, shared), strict=True)
    )
    if backend or (q.device.type != "cpu" and not runs_triton(q, lowering)):
        factor = scale * (_factor(texts) or 1.0)
        out = sdpa(q, k, v, scale=factor, causal=band[1] == 0, dropout=dropout, backend=backend)
        return _shaped(_laid_out(out, heads_last).to(output_dtype), output_shape, members)
    on = _Tensors(texts, captures, (batch, heads, q.shape[2], k.shape[2]), q)
    intervals = on.intervals(band, dense)
    out = attention(
        q, k, v,
        sink=on.values("sink", "h"),
        intervals=intervals,
        seed=torch.randint(2**62, (), device=q.device) if dropout else None,
        captures=captures,
        program=texts.get("program", ""),
        predicate=texts.get("predicate", ""),
        scale=scale, lower=band[0], upper=band[1],
        dropout=dropout, empty=empty, heads_last=heads_last, lowering=lowering,
    )  # fmt: skip
    return _shaped(out if out.dtype == output_dtype else out.to(output_dtype), output_shape, members)


def _laid_out(out: Tensor, heads_last: bool) -> Tensor:
    """`out` [B, H, S, D] in memory as it is to be: backends of SDPA differ in that."""
    return out.transpose(1, 2).contiguous().transpose(1, 2) if heads_last else out.contiguous()


def _brought(x: Tensor, leading: tuple[Any, Any], dtype: torch.dtype) -> Tensor:
    """`x` with batch and heads as they are to be, in `dtype`; itself where it has them, so that no node is made.

    Heads are repeated where one of key and value is read before its heads are, and the other after.
    """
    own, heads = x.shape[1], leading[1]
    if str(own) not in ("1", str(heads)):
        x = x.repeat_interleave(heads // own, 1)
    if list(map(str, x.shape[:2])) != list(map(str, leading)):
        x = x.expand(*leading, -1, -1)
    return x if x.dtype == dtype else x.to(dtype)


class _Tensors:
    """What the programs of one site make tensors of: sinks, document ids, padding. sizes: of b, h, q and k."""

    def __init__(self, texts: dict[str, str], captures: list[Tensor], sizes: tuple[Any, ...], like: Tensor):
        self.texts, self.captures, self.sizes, self.like = texts, captures, sizes, like

    def values(self, name: str, axis: str) -> Tensor | None:
        """What program `name` gives along `axis` ("h"), or for each batch row along it ("q", "k", "" for none)."""
        if name not in self.texts:
            return None
        extents = [size if letter in ("b", axis) else 1 for letter, size in zip("bhqk", self.sizes, strict=True)]
        program = Program.parse(self.texts[name])
        b, h, q, k = (slice(0, extent) for extent in extents)
        dtype = self.like.dtype if self.like.dtype == torch.float64 else torch.float32
        found = program.on_block(None, b, h, q, k, self.captures, dtype=dtype, device=self.like.device)
        if axis == "h":
            return found.expand(1, extents[1], 1, 1).reshape(-1)
        if not axis:
            return found.reshape(-1)
        at = "bhqk".index(axis)
        shape = [1] * 4
        shape[0], shape[at] = found.shape[0], extents[at]
        return found.expand(shape).reshape(found.shape[0], extents[at])

    def intervals(self, band: tuple[int | None, int | None], dense: bool) -> Tensor | None:
        """The keys of each query, where more than the band says which; one call for all layers of a step."""
        given = {name: self.values(name, axis) for name, axis in _INTERVALS.items() if name in self.texts}
        if not given:
            return None
        batch, _, queries, keys = self.sizes
        found = key_intervals(batch=batch, queries=queries, keys=keys, lower=band[0], upper=band[1], **given)
        if not dense:
            return found
        return torch.cat([found[..., :2], torch.full_like(found[..., :1], -1)], dim=-1)  # the predicate decides


def _shaped(out: Tensor, axes: tuple[str, ...], members: int) -> Tensor:
    """[B, H, Sq, Dv] as the site's output: flat or grouped heads, positions before heads, or without axes of one."""
    names = ["b", "h", "q", "width"]
    if "bh" in axes:
        out, names = out.flatten(0, 1), ["bh", "q", "width"]
    elif "group" in axes:
        out, names = out.unflatten(1, (-1, members)), ["b", "group", "member", "q", "width"]
    for name in names[:2]:
        if name not in axes:
            out = out.squeeze(names.index(name))
            names.remove(name)
    order = [names.index(name) for name in axes if name]
    out = out if order == sorted(order) else out.permute(order)
    for position, name in enumerate(axes):
        if not name:
            out = out.unsqueeze(position)
    return out


def objections(site: Site) -> Iterator[str]:
    """Every reason to leave attention alone."""
    tensors = {name: site.value(name) for name in ("query", "key", "value")}
    for name, value in tensors.items():
        if not value.dtype.is_floating_point:
            yield f"{name} is {value.dtype}: only floating point is fused"
    devices = {value.device for value in tensors.values()}
    if len(devices) > 1:
        yield f"queries, keys and values are on {', '.join(map(str, devices))}"
    if runs_triton(_narrowed(site), site.lowering):
        yield from _objections_to_kernels(site)
    elif any(device.type != "cpu" for device in devices):
        yield from _objections_off_the_cpu(site, next(iter(devices)))
    if site.outputs[0].target is aten.scaled_dot_product_attention.default and _is_flash_already(site):
        yield Cost("it has no mask tensor: torch's flash kernel runs here already")


def _narrowed(site: Site) -> Tensor:
    """A query as the op will see it."""
    return site.value("query").new_empty(0, dtype=site.inputs["compute_dtype"])


def _objections_to_kernels(site: Site) -> Iterator[str]:
    """What generated kernels cannot do; the rest of attention they can."""
    programs = dict(site.inputs["programs"])
    reason = unsupported(programs.get("program", ""), programs.get("predicate", ""))
    if reason:
        yield f"no kernel can be generated: {reason}"
    for name in ("query", "value"):
        size = _entries(site, name)
        if type(size) is not int or size > MOST_WIDTH:
            yield f"no kernel can be generated: heads of {name} have {size} entries, and {MOST_WIDTH} fit in a tile"


def _objections_off_the_cpu(site: Site, device: torch.device) -> Iterator[str]:
    """By ATen there, what `scaled_dot_product_attention` has a flag for goes to it, and the rest has no lowering."""
    if not _has_flags(site):
        yield f"by ATen on {device} only plain and causal attention is rewritten: more needs kernels='auto' and CUDA"


_FLAGGED = ((None, None), (None, 0))
"""Bands that SDPA knows as ``is_causal=False`` and ``is_causal=True``."""

_INTERVALS = {"documents": "q", "keep": "k", "rows": "q", "lengths": "", "prefix": ""}
"""Programs by which intervals are made, and the axis along which each is asked."""


def _has_flags(site: Site) -> bool:
    """Whether SDPA has arguments for all that the site does to scores."""
    programs = dict(site.inputs["programs"])
    return _factor(programs) is not None and not set(programs) - {"program"} and site.inputs["band"] in _FLAGGED


def _factor(programs: dict[str, str]) -> float | None:
    """The factor by which the program multiplies scores, if that is all it does."""
    factor, bias = _score(programs).split_affine() or (None, None)
    return factor if bias is None else None


def _is_flash_already(site: Site) -> bool:
    node = site.outputs[0]
    mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    return mask is None and not site.inputs["dropout"]


# --- measuring sites ---------------------------------------------------------------------------------------------


def candidates(site: Site) -> dict[str, Callable[..., Tensor]]:
    """Torch's own kernels, by the backend of SDPA, on CUDA and where they compute the same.

    Their causal masks end at the last key or at the first query as the backend has it: only squares are the same.
    """
    query, queries, keys = site.value("query"), *_lengths(site)
    square = site.inputs["band"][1] is None or str(queries) == str(keys)
    if query.device.type != "cuda" or site.inputs["dropout"] or not square or not _has_flags(site):
        return {}
    return {name: functools.partial(replacement, backend=name) for name in backends_for(site.inputs["compute_dtype"])}


def _lengths(site: Site) -> tuple[Any, Any]:
    """How many queries and keys there are."""
    operands = zip(("query", "key"), site.inputs["operands"], strict=False)
    queries, keys = (site.value(name).shape[operand.axes.index("row")] for name, operand in operands)
    return queries, keys


def saves_memory(site: Site) -> bool:
    """Where attention is written out, its scores are tensors that the replacement never has; SDPA has none either."""
    return site.outputs[0].target is not aten.scaled_dot_product_attention.default


def integers(site: Site) -> dict[str, tuple[int, int]]:
    """One number for all captured integers and booleans, with which every query attends to all keys of its band.

    Any other would time a mask that the training data need not have. None where the mask cannot be told to be so from
    its programs, or where a number read from a tensor is a place in another.
    """
    names = [name for name in site.inputs if name.startswith("capture")]
    captures = [site.value(name) for name in names]
    exact = [name for name, capture in zip(names, captures, strict=True) if not capture.dtype.is_floating_point]
    texts = dict(site.inputs["programs"])
    if not exact or site.inputs["dense"] or "prefix" in texts or any(map(_looks_up, texts.values())):
        return {}
    queries, keys = _lengths(site)
    for number in (0, 1, keys):
        filled = [torch.full(capture.shape, number, dtype=capture.dtype) for capture in captures]
        tensors = _Tensors(texts, filled, (*site.inputs["sizes"], queries, keys), torch.empty(0))
        if _allows_all(tensors, keys):
            return dict.fromkeys(exact, (int(number), int(number) + 1))
    return {}


def _looks_up(text: str) -> bool:
    """Whether a program loads from a place that it has loaded."""
    loads = [term for term in Program.parse(text).result.walk() if term.op == "load"]
    return any(inner.op == "load" for load in loads for place in load.terms for inner in place.walk())


def _allows_all(tensors: _Tensors, keys: int) -> bool:
    ids, lengths = tensors.values("documents", "q"), tensors.values("lengths", "")
    kept = [tensors.values(name, axis) for name, axis in (("keep", "k"), ("rows", "q"))]
    return (
        (ids is None or bool((ids == ids[:, :1]).all()))
        and (lengths is None or bool((lengths >= keys).all()))
        and all(one is None or bool(one.all()) for one in kept)
    )


# --- what users write --------------------------------------------------------------------------------------------
# Arguments are those that `inputs` draws: q [B, H, S, D], key and value [B, Hk, S, D], and what masks are made of.


def _repeated(x: Tensor, query: Tensor) -> Tensor:
    """`repeat_kv` of transformers."""
    batch, heads, length, depth = x.shape
    group = query.shape[1] // heads
    return x[:, :, None].expand(batch, heads, group, length, depth).reshape(batch, heads * group, length, depth)


def _positions(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of queries [Sq, 1] and of keys [1, Sk]."""
    return torch.arange(query.shape[2])[:, None], torch.arange(key.shape[2])[None, :]


def _weighed(scores: Tensor, value: Tensor, query: Tensor) -> Tensor:
    probabilities = F.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    return (probabilities @ _repeated(value, query)).transpose(1, 2).contiguous()


def _scores(query: Tensor, key: Tensor) -> Tensor:
    return query @ _repeated(key, query).transpose(2, 3) * query.shape[-1] ** -0.5


def sdpa_with_causal_mask(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """transformers: heads repeated because there is a mask tensor."""
    row, column = _positions(query, key)
    key, value = _repeated(key, query), _repeated(value, query)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=(column <= row)[None, None])


def eager_causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """transformers' eager attention with its additive mask."""
    row, column = _positions(query, key)
    mask = torch.where(column <= row, torch.zeros((), dtype=query.dtype), torch.finfo(query.dtype).min)
    return _weighed(_scores(query, key) + mask, value, query)


def tril_masked_fill(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """minGPT: a triangle of ones, -inf elsewhere."""
    triangle = torch.tril(torch.ones(query.shape[2], key.shape[2]))
    return _weighed(_scores(query, key).masked_fill(triangle == 0, float("-inf")), value, query)


def triu_added(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`nn.Transformer.generate_square_subsequent_mask`, added in place."""
    scores = _scores(query, key)
    scores += torch.triu(torch.full((query.shape[2], key.shape[2]), float("-inf"), dtype=query.dtype), diagonal=1)
    return _weighed(scores, value, query)


def windowed(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """mistral: the three newest keys."""
    row, column = _positions(query, key)
    return _weighed(torch.where((column <= row) & (column > row - 3), _scores(query, key), -1e9), value, query)


def window_of_both_sides(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """modernbert: at most two positions away."""
    row, column = _positions(query, key)
    near = ((row - column).abs() <= 2)[None, None]
    return F.scaled_dot_product_attention(query, _repeated(key, query), _repeated(value, query), attn_mask=near)


def softcapped(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """gemma2: scores capped by 20."""
    row, column = _positions(query, key)
    scores = 20.0 * torch.tanh(_scores(query, key) / 20.0)
    return _weighed(scores.masked_fill(column > row, torch.finfo(query.dtype).min), value, query)


def with_sink(query: Tensor, key: Tensor, value: Tensor, sink: Tensor) -> Tensor:
    """gpt_oss: one more logit a head, which takes part in the sum and has no value."""
    column = sink.reshape(1, -1, 1, 1).expand(query.shape[0], -1, query.shape[2], -1)
    logits = torch.cat([_scores(query, key), column], dim=-1)
    logits = logits - logits.max(dim=-1, keepdim=True).values
    probabilities = F.softmax(logits, dim=-1)[..., :-1]
    return (probabilities @ _repeated(value, query)).transpose(1, 2).contiguous()


def with_alibi(query: Tensor, key: Tensor, value: Tensor, slope: Tensor) -> Tensor:
    """bloom: flat heads, a bias of slope times position in baddbmm."""
    batch, heads, length, depth = query.shape
    flat = (batch * heads, -1, depth)
    bias = (slope.detach()[:, None, None] * torch.arange(key.shape[2])).repeat(batch, 1, 1).to(query.dtype)
    keys, values = (_repeated(x, query).reshape(flat) for x in (key, value))
    scores = torch.baddbmm(bias, query.reshape(flat), keys.transpose(1, 2), beta=1.0, alpha=depth**-0.5)
    scores = scores.view(batch, heads, length, -1)
    row, column = _positions(query, key)
    probabilities = F.softmax(scores.masked_fill(column > row, torch.finfo(query.dtype).min), dim=-1)
    return torch.bmm(probabilities.view(batch * heads, length, -1), values)


def with_learned_bias(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """t5: a bias of head, query and key that wants its gradient, no scale."""
    return _weighed(query @ _repeated(key, query).mT + bias[None], value, query)


def with_given_mask(query: Tensor, key: Tensor, value: Tensor, additive: Tensor) -> Tensor:
    """A float mask from outside, of which nothing is known."""
    return F.scaled_dot_product_attention(
        query, _repeated(key, query), _repeated(value, query), attn_mask=additive.to(query.dtype), scale=0.3
    )


def einsum_of_positions_first(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[B, S, H, D] operands and einsum."""
    q, k, v = (x.transpose(1, 2) for x in (query, _repeated(key, query), _repeated(value, query)))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(dim=-1), v)


def grouped_heads(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Five axes: key heads, and the query heads of each."""
    grouped = query.unflatten(1, (key.shape[1], -1)) * query.shape[-1] ** -0.5
    probabilities = (grouped @ key[:, :, None].mT).softmax(-1)
    return probabilities @ value[:, :, None]


def written_out_softmax(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """exp over its sum."""
    scores = _scores(query, key)
    weights = torch.exp(scores - scores.amax(dim=-1, keepdim=True))
    return (weights / weights.sum(dim=-1, keepdim=True)) @ _repeated(value, query)


def packed_documents(query: Tensor, key: Tensor, value: Tensor, positions: Tensor) -> Tensor:
    """transformers with `position_ids` that start again: causal within each document."""
    diff = torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1)
    ids = (diff != 1).cumsum(-1)
    batch = torch.arange(query.shape[0])[:, None, None, None]
    row, column = (x[None, None] for x in _positions(query, key))
    mask = (ids[batch, row] == ids[batch, column]) & (positions[batch, column] <= positions[batch, row])
    return F.scaled_dot_product_attention(query, _repeated(key, query), _repeated(value, query), attn_mask=mask)


def documents_by_pairs(query: Tensor, key: Tensor, value: Tensor, ids: Tensor) -> Tensor:
    """Ids compared pairwise, in both directions; ids need not be in runs."""
    same = ids[:, None, :, None] == ids[:, None, None, :]
    return _weighed(_scores(query, key).masked_fill(~same, float("-inf")), value, query)


def padded(query: Tensor, key: Tensor, value: Tensor, keep: Tensor) -> Tensor:
    """A 2-D attention mask and causality, in transformers' additive spelling; padding queries attend to all keys."""
    row, column = _positions(query, key)
    allowed = (column <= row)[None, None] & keep.bool()[:, None, None, :]
    mask = torch.where(allowed, torch.zeros((), dtype=query.dtype), torch.finfo(query.dtype).min)
    return _weighed(_scores(query, key) + mask, value, query)


def up_to_lengths(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor) -> Tensor:
    """A length for each batch row."""
    mask = torch.arange(key.shape[2]) < lengths[:, None, None, None]
    return F.scaled_dot_product_attention(query, _repeated(key, query), _repeated(value, query), attn_mask=mask)


def prefix_and_causal(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor) -> Tensor:
    """A prefix that everybody sees, causal after it."""
    row, column = _positions(query, key)
    mask = (column <= row)[None, None] | (column < lengths[:, None])[:, None, None, :]
    return F.scaled_dot_product_attention(query, _repeated(key, query), _repeated(value, query), attn_mask=mask)


def in_chunks(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """llama4: causal within chunks of four."""
    row, column = _positions(query, key)
    mask = (column <= row) & (row // 4 == column // 4)
    return F.scaled_dot_product_attention(query, _repeated(key, query), _repeated(value, query), attn_mask=mask)


def cross_attention(query: Tensor, key: Tensor, value: Tensor, memory: Tensor) -> Tensor:
    """Keys and values of another length."""
    return _weighed(_scores(query, memory), memory, query)


def wide_values(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """deepseek: values of another width than keys."""
    row, column = _positions(query, key)
    mask = torch.where(column <= row, 0.0, float("-inf")).to(query.dtype)
    return _weighed(_scores(query, key) + mask, torch.cat([value, value[..., :3]], dim=-1), query)


def inputs(draw: Draw) -> dict[str, Any]:
    """Operands and everything that the spellings' masks are made of."""
    batch, shared, group = draw.size(1, 2), draw.size(1, 2), draw.size(1, 3)
    length, depth, dtype = draw.size(2, 9), draw.choice(4, 8), draw.choice(torch.float32, torch.bfloat16)
    heads = shared * group
    keep = draw.integers(0, 3, batch, length).clamp(max=1)
    return {
        "query": draw.tensor(batch, heads, length, depth, dtype=dtype),
        "key": draw.tensor(batch, shared, length, depth, dtype=dtype),
        "value": draw.tensor(batch, shared, length, depth, dtype=dtype),
        "memory": draw.tensor(batch, shared, draw.size(2, 7), depth, dtype=dtype),
        "sink": draw.tensor(heads, dtype=dtype),
        "slope": draw.tensor(heads, dtype=torch.float32),
        "bias": draw.tensor(heads, length, length, dtype=dtype),
        "additive": draw.tensor(batch, 1, length, length, dtype=dtype, requires_grad=False),
        "positions": _positions_of_documents(draw.integers(0, 3, batch, length)),
        "ids": draw.integers(0, 3, batch, length),
        "keep": keep,
        "lengths": draw.integers(0, length + 1, batch),
    }


def _positions_of_documents(starts: Tensor) -> Tensor:
    """Positions [B, S] that start again where `starts` is 0."""
    index = torch.arange(starts.shape[1]).expand_as(starts)
    begins = torch.where((starts == 0) | (index == 0), index, 0).cummax(dim=1).values
    return index - begins


RULE = Region(
    name="attention",
    version=1,
    anchors=frozenset(
        {
            aten.scaled_dot_product_attention.default,
            aten.softmax.int,
            aten._softmax.default,
            aten.special_softmax.default,
            aten.sum.dim_IntList,
        }
    ),
    grow=grow,
    replacement=replacement,
    objections=objections,
    computed=computed,
    candidates=candidates,
    saves_memory=saves_memory,
    integers=integers,
    spellings=(
        sdpa_with_causal_mask,
        eager_causal,
        tril_masked_fill,
        triu_added,
        windowed,
        window_of_both_sides,
        softcapped,
        with_sink,
        with_alibi,
        with_learned_bias,
        with_given_mask,
        einsum_of_positions_first,
        grouped_heads,
        written_out_softmax,
        packed_documents,
        documents_by_pairs,
        padded,
        up_to_lengths,
        prefix_and_causal,
        in_chunks,
        cross_attention,
        wide_values,
    ),
    inputs=inputs,
)
"""The rule that `fxopt.passes.RULES` lists."""
