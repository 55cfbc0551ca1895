"""Linear layer + cross-entropy -> one op that never holds the logits.

A region grown backwards from the loss. In all 48 language models looked at, the loss is the largest transient of a
training step (V / H times the hidden states, in fp32 and several copies), and the logits are read by nobody else.

Where they are read for token accuracy, that argmax comes from the same pass, if it is one of the same logits but for
the order of the sums over H. It is the first of equal logits, and every rounding to 16 bits makes more of them equal:
the operator rounds as the linear layer does, and where the graph rounds again the site is refused. So does logsumexp of
the logits, of which a z-loss is made (PaLM, Chowdhery et al. 2022, section 5), however it is weighed and reduced.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxopt.fake import arguments, bound_arguments, value_of
from fxopt.logit_readers import Argmax, LogSumExp, Reader, common_moves, is_deferrable, readers_of
from fxopt.ops.launch import kernels_on, runs_triton
from fxopt.ops.linear_cross_entropy import linear_cross_entropy_with
from fxopt.ops.loss_costs import chunks_are_small, recomputes
from fxopt.ops.loss_spec import Wanted
from fxopt.projection import MOVES, Move, check_moves, moved_rows, moves_of, projection_of
from fxopt.rule import Cost, Draw, NoSite, Region, Site

aten = torch.ops.aten

_REDUCTIONS = ("none", "mean", "sum")
_NO_INDEX_IGNORED = -(2**63)
"""`gather` ignores no target: this value cannot be one."""


@dataclasses.dataclass(frozen=True)
class Read:
    """A value of each row that somebody reads besides the loss: the argmax, or logsumexp.

    moves: which rows it is of; axis: that of the classes, which stays, or None; detached: whether it has no gradient.
    """

    moves: tuple[Move, ...]
    axis: int | None
    dtype: torch.dtype
    detached: bool

    @property
    def is_lse(self) -> bool:
        return self.dtype.is_floating_point

    def of(self, values: Tensor, moves: tuple[Move, ...]) -> Tensor:
        """It, in memory of its own, from the `values` [...] of rows that `moves` lead on from."""
        found = moved_rows((values.detach() if self.detached else values).unsqueeze(-1), moves).squeeze(-1)
        found = found if self.axis is None else found.unsqueeze(self.axis)
        return found.to(self.dtype).clone(memory_format=torch.contiguous_format)


def grow(anchor: fx.Node) -> Site | None:
    """From the loss (or the logsumexp or gather of a hand-written one) back to the linear layer."""
    loss = _LOSSES[anchor.target](anchor)
    if loss is None:
        return None
    classes_at = -1 if loss.pop("classes_last", False) else 1
    try:
        found = projection_of(loss.pop("logits"))
    except NoSite as no:
        raise NoSite(str(no), no.agreed + 1) from None
    moves = (*found.moves(), *moves_of(loss.pop("later", ())))
    check_moves(moves, value_of(found.linear).dim(), classes_at)
    scale, softcap = _scale_and_softcap(found.pointwise)
    branches, readers = readers_of(found, set(loss["nodes"]))
    readers += [LogSumExp(node, node) for node in loss.pop("shared", ())]
    readers.sort(key=lambda one: one.output.name)
    nodes = sorted({*found.nodes, *branches, *loss.pop("nodes")}, key=_position(anchor.graph))
    output = loss.pop("output")
    compute_dtype = value_of(found.linear).dtype
    inputs = loss | {
        "hidden": found.hidden,
        "weight": found.weight,
        "transposed": found.transposed,
        "moves": moves,
        "scale": scale,
        "softcap": softcap,
        "compute_dtype": compute_dtype,
        "loss_dtype": value_of(output).dtype,
        "loss_rank": value_of(output).dim(),
        "readers": tuple(_read(one, scale, softcap) for one in readers),
    }
    if found.bias is not None:
        inputs["bias"] = found.bias
    rows, vocabulary = _text(value_of(found.hidden).shape[:-1]), found.vocabulary
    detail = f"{rows} rows x {vocabulary} classes, {str(compute_dtype).removeprefix('torch.')}"
    outputs = (output, *(one.output for one in readers))
    deferrable = [node for node in nodes if node not in outputs and is_deferrable(node)]
    detail += "".join(f", {name} too" for name in sorted({one.name for one in readers}))
    return Site(RULE.name, outputs, tuple(nodes), inputs, tuple(deferrable), detail)


def replacement(
    *,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    transposed: bool,
    moves: tuple[Move, ...],
    scale: float,
    softcap: float | None,
    compute_dtype: torch.dtype,
    loss_dtype: torch.dtype,
    loss_rank: int,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    negate: bool = False,
    readers: tuple[Read, ...] = (),
    recompute: bool | None = None,
    lowering: str = "auto",
) -> tuple[Tensor, ...]:
    """The loss of the moved rows of `hidden`, and what `readers` read; casts that autocast would make are made here.

    The operator goes over the rows that all of them come from, of which the loss ignores those it does not read.

    recompute: which of the kernels' two ways is taken (`fxopt.ops.loss_costs`); lowering: how the op is computed
    (`fxopt.ops.launch`).
    """
    shared = common_moves((moves, *(one.moves for one in readers)))
    rows = moved_rows(hidden, shared)
    read = _rows_read(rows, moves[len(shared) :])
    targets = target.reshape(-1)
    if read is not None:
        targets = targets.new_full((math.prod(rows.shape[:-1]),), ignore_index).scatter(0, read, targets)
    operands = (
        rows.reshape(-1, rows.shape[-1]).to(compute_dtype),
        (weight.t() if transposed else weight).to(compute_dtype),
        None if bias is None else bias.to(compute_dtype),
        targets,
    )
    constants: dict[str, Any] = {
        "scale": scale,
        "softcap": softcap,
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
        "reduction": reduction,
        "recompute": recompute,
        "lowering": lowering,
    }
    lse, argmax = (any(one.is_lse is kind for one in readers) for kind in (True, False))
    made = linear_cross_entropy_with(*operands, argmax=argmax, lse=lse, **constants)
    found = []
    for one in readers:
        values = made.lse if one.is_lse else made.argmax
        assert values is not None
        found.append(one.of(values.reshape(rows.shape[:-1]), one.moves[len(shared) :]))
    loss = made.loss.to(loss_dtype)
    if reduction == "none":
        loss = loss if read is None else loss.index_select(0, read)
        loss = loss.reshape(target.shape if target.dim() == loss_rank else target.shape[:-1])
    return -loss if negate else loss, *found


def _rows_read(rows: Tensor, moves: tuple[Move, ...]) -> Tensor | None:
    """[n]: which of the rows [..., H], counted in order, `moves` lead to, in their order; None for all as they are."""
    if all(move.kind == "reshape" for move in moves):
        return None
    numbers = torch.arange(math.prod(rows.shape[:-1]), device=rows.device)
    return moved_rows(numbers.reshape(*rows.shape[:-1], 1), moves).reshape(-1)


def computed(site: Site) -> str:
    """By kernels, of whose two ways (`fxopt.ops.loss_costs`) sizes at run time decide, or by ATen."""
    hidden = site.value("hidden")
    if runs_triton(hidden.new_empty(0, dtype=site.inputs["compute_dtype"]), site.lowering):
        return kernels_on(hidden.device)
    return "chunks of logits by ATen"


def objections(site: Site) -> Iterator[str]:
    """Every reason to leave the loss alone."""
    hidden, weight, target = (site.value(name) for name in ("hidden", "weight", "target"))
    if not (hidden.dtype.is_floating_point and weight.dtype.is_floating_point):
        yield f"hidden states are {hidden.dtype} and the weight {weight.dtype}: only floating point is fused"
    if target.dtype != torch.int64:
        yield f"targets are {target.dtype}: only int64 class indices are fused"
    if len({value.device for value in (hidden, weight, target)}) > 1:
        yield f"hidden states, weight and targets are on {hidden.device}, {weight.device} and {target.device}"
    width, vocabulary = hidden.shape[-1], weight.shape[1 if site.inputs["transposed"] else 0]
    if type(width) is int and type(vocabulary) is int and vocabulary <= width:
        yield Cost(
            f"{vocabulary} classes for hidden states of {width}: the logits are no larger than what they come from"
        )


def candidates(site: Site) -> dict[str, Callable[..., tuple[Tensor, ...]]]:
    """The way through the vocabulary that the cost model does not take, where there is a choice: its rates are guesses.

    Chunks only where they hold little beside the logits: being faster is no reason to hold more there.
    """
    hidden, weight = site.value("hidden"), site.value("weight")
    weight = weight.t() if site.inputs["transposed"] else weight
    bias = site.value("bias") if "bias" in site.inputs else None
    wanted = Wanted(*(one is not None and one.requires_grad for one in (hidden, weight, bias)))
    like = hidden.new_empty(0, dtype=site.inputs["compute_dtype"])
    by_row = any(one.is_lse for one in site.inputs["readers"])
    by_row |= site.inputs["reduction"] == "none" and (wanted.weight or wanted.bias)
    if not wanted or by_row or site.lowering == "interpret" or not runs_triton(like, site.lowering):
        return {}
    tokens = hidden.numel() // hidden.shape[-1]
    if recomputes(like, weight.to(like.dtype), tokens, wanted, site.lowering):
        chunks = partial(replacement, recompute=False)
        return {"chunks": chunks} if chunks_are_small(weight, tokens, wanted) else {}
    return {"tiles": partial(replacement, recompute=True)}


def saves_memory(site: Site) -> bool:
    """Always: that is what the rule is for."""
    return True


def integers(site: Site) -> dict[str, tuple[int, int]]:
    """Targets are classes."""
    return {"target": (0, site.value("weight").shape[1 if site.inputs["transposed"] else 0])}


def _scale_and_softcap(steps: list[fx.Node]) -> tuple[float, float | None]:
    """``softcap * tanh(scale * x / softcap)`` from the pointwise steps, read in order. Raises `NoSite`."""
    before, after, capped = 1.0, 1.0, False
    for step in steps:
        if step.target is aten.to.dtype:
            if not value_of(step).dtype.is_floating_point:
                raise NoSite(f"{step.name} casts the logits to {value_of(step).dtype}")
        elif step.target is aten.tanh.default:
            if capped:
                raise NoSite(f"{step.name} is a second tanh over the logits")
            capped = True
        else:
            factor = _factor(step)
            before, after = (before, after * factor) if capped else (before * factor, after)
    if not capped:
        return before, None
    if after <= 0:
        raise NoSite(f"the logits are capped by {after}, which is not positive")
    return before * after, after


def _factor(step: fx.Node) -> float:
    if step.target is aten.neg.default:
        return -1.0
    constant = arguments(step)[1]
    if len(step.args) != 2 or step.kwargs or type(constant) not in (int, float) or constant == 0:
        raise NoSite(f"{step.name} ({step.target}) scales the logits by {constant}, not by a constant")
    return 1.0 / constant if step.target in (aten.div.Tensor, aten.div.Scalar) else constant


def _read(reader: Reader, scale: float, softcap: float | None) -> Read:
    """What the replacement is to know of `reader`. Raises `NoSite` where it is not one of the loss's logits."""
    moves = reader.moves()
    theirs = _scale_and_softcap(reader.logits().pointwise)
    if theirs != (scale, softcap):
        raise NoSite(
            f"{reader.taken.name} reads logits with scale and cap {theirs}, the loss some with {(scale, softcap)}"
        )
    if isinstance(reader, Argmax):
        reader.check_values()
    return Read(moves, reader.axis if reader.keepdim else None, value_of(reader.output).dtype, reader.detached)


def _position(graph: fx.Graph) -> Callable[[fx.Node], int]:
    order = {node: index for index, node in enumerate(graph.nodes)}
    return order.__getitem__


def _text(shape: Any) -> str:
    return " x ".join(map(str, shape))


# --- what a loss looks like: each reader returns logits, target, the constants, its nodes and its output ---------


def _of_cross_entropy(node: fx.Node) -> dict[str, Any]:
    logits, target, weight, reduction, ignore_index, smoothing = bound_arguments(node).values()
    return _class_loss(logits, target, weight, reduction, ignore_index, smoothing, (node,))


def _of_nll(node: fx.Node) -> dict[str, Any]:
    log_probabilities, target, weight, reduction, ignore_index = bound_arguments(node).values()
    softmax, later = _log_softmax_behind(log_probabilities)
    _check_axis(softmax, -1 if later else 1)
    return _class_loss(softmax.args[0], target, weight, reduction, ignore_index, 0.0, (softmax, *later, node)) | {
        "later": later
    }


def _of_logsumexp(node: fx.Node) -> dict[str, Any] | None:
    """``logsumexp(x, -1) - gather(x, -1, t)`` or its negation, squeezed before or after: a value for each row.

    None where nothing is gathered from x: attention and routers have logsumexps too.
    """
    logits, axes = arguments(node)[:2]
    if not any(user.target is aten.gather.default for user in logits.users):
        return None
    if [dim % value_of(logits).dim() for dim in axes] != [value_of(logits).dim() - 1]:
        raise NoSite(f"{node.name} sums over axes {axes}, not over the last", 1)
    chain = _through_squeezes(node)
    users = list(chain[-1].users)
    differences = [user for user in users if user.target is aten.sub.Tensor and not user.kwargs]
    if len(differences) != 1 or (len(users) > 1 and len(chain) > 1):
        raise NoSite(f"{chain[-1].name} is not read by one subtraction alone", len(chain))
    difference = differences[0]
    negate = difference.args[1] is chain[-1]
    picked = _gathered(difference.args[0 if negate else 1])
    if picked["logits"] is not logits:
        raise NoSite(f"{difference.name} subtracts a value of another tensor", len(chain) + 1)
    found = _row_loss(logits, picked, (*chain, difference), negate)
    return found | {"shared": (node,)} if len(users) > 1 else found  # a z-loss reads it too


def _of_gather(node: fx.Node) -> dict[str, Any] | None:
    """``gather(log_softmax(x, -1), -1, t)``, negated or not: the log probability of each row's target."""
    try:
        softmax, later = _log_softmax_behind(node.args[0])
    except NoSite:
        return None
    _check_axis(softmax, -1)
    chain = _through_squeezes(node)
    users = list(chain[-1].users)
    negated = len(users) == 1 and users[0].target is aten.neg.default
    picked = _gathered(chain[-1])
    return _row_loss(softmax.args[0], picked, (softmax, *later, *chain, *(users if negated else ())), not negated) | {
        "later": later
    }


def _class_loss(
    logits: Any,
    target: Any,
    weight: Any,
    reduction: int,
    ignore_index: int,
    smoothing: float,
    nodes: tuple[fx.Node, ...],
) -> dict[str, Any]:
    if weight is not None:
        raise NoSite(f"{nodes[-1].name} weighs its classes", len(nodes))
    if value_of(target).dtype.is_floating_point:
        raise NoSite(f"{nodes[-1].name} has class probabilities as targets", len(nodes))
    if value_of(logits).dim() < 2:
        raise NoSite(f"{nodes[-1].name} is the loss of a single row", len(nodes))
    return {
        "logits": logits,
        "target": target,
        "reduction": _REDUCTIONS[reduction],
        "ignore_index": ignore_index,
        "label_smoothing": smoothing,
        "nodes": nodes,
        "output": nodes[-1],
    }


def _row_loss(logits: Any, picked: dict[str, Any], nodes: tuple[fx.Node, ...], negate: bool) -> dict[str, Any]:
    return {
        "logits": logits,
        "target": picked["target"],
        "reduction": "none",
        "ignore_index": _NO_INDEX_IGNORED,
        "label_smoothing": 0.0,
        "nodes": (*picked["nodes"], *nodes),
        "output": nodes[-1],
        "negate": negate,
        "classes_last": True,
    }


def _log_softmax_behind(node: Any) -> tuple[fx.Node, tuple[fx.Node, ...]]:
    """The log_softmax that `node` is, or is rearranged from, and the steps that rearrange it, in order."""
    later: list[fx.Node] = []
    while isinstance(node, fx.Node) and node.target in MOVES:
        later.append(node)
        node = node.args[0]
    if not isinstance(node, fx.Node) or node.target is not aten.log_softmax.int:
        raise NoSite(f"{getattr(node, 'name', node)} is not a log_softmax", 1)
    return node, tuple(reversed(later))


def _check_axis(softmax: fx.Node, axis: int) -> None:
    rank = value_of(softmax).dim()
    if arguments(softmax)[1] % rank != axis % rank:
        raise NoSite(f"{softmax.name} normalises axis {softmax.args[1]}, the classes are axis {axis % rank}", 2)


def _gathered(node: Any) -> dict[str, Any]:
    """``gather(x, -1, t.unsqueeze(-1))`` with an optional squeeze: x, t and the nodes."""
    if not isinstance(node, fx.Node):
        raise NoSite(f"{node!r} is not the target's logit")
    nodes = [node]
    while _is_squeeze(node):
        node = node.args[0]
        nodes.append(node)
    if node.target is not aten.gather.default or arguments(node)[1] % value_of(node).dim() != value_of(node).dim() - 1:
        raise NoSite(f"{node.name} ({node.target}) does not gather the target's value along the last axis", len(nodes))
    index = node.args[2]
    if str(value_of(index).shape[-1]) != "1" or _text(value_of(index).shape[:-1]) != _text(
        value_of(node.args[0]).shape[:-1]
    ):
        raise NoSite(f"{node.name} gathers {_text(value_of(index).shape)} values, not one a row", len(nodes))
    return {"logits": node.args[0], "target": index, "nodes": nodes}


def _is_squeeze(node: Any) -> bool:
    """Whether `node` only drops axes of one element: a squeeze, or the first of one (``x[..., 0]``)."""
    if not isinstance(node, fx.Node) or node.target not in (aten.squeeze.dim, aten.select.int):
        return False
    if node.target is aten.squeeze.dim:
        return True
    source, dim, index = arguments(node)
    return str(value_of(source).shape[dim]) == "1" and index in (0, -1)


def _through_squeezes(node: fx.Node) -> list[fx.Node]:
    """`node` and the squeezes that are all that reads it, one after the other."""
    chain = [node]
    while len(chain[-1].users) == 1 and _is_squeeze(next(iter(chain[-1].users))):
        chain.append(next(iter(chain[-1].users)))
    return chain


_LOSSES: dict[Any, Callable[[fx.Node], dict[str, Any] | None]] = {
    aten.cross_entropy_loss.default: _of_cross_entropy,
    aten.nll_loss_nd.default: _of_nll,
    aten.nll_loss.default: _of_nll,
    aten.logsumexp.default: _of_logsumexp,
    aten.gather.default: _of_gather,
}


# --- what users write --------------------------------------------------------------------------------------------


def causal_lm_loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """transformers: logits in fp32, flattened, mean over the tokens that are not ignored."""
    logits = F.linear(hidden, weight).float()
    return F.cross_entropy(logits.view(-1, logits.shape[-1]), target.view(-1), ignore_index=-100)


def shifted_loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """The older shift, of logits and labels both; the sum is divided by the number of items."""
    logits = F.linear(hidden, weight)[..., :-1, :].contiguous()
    return F.cross_entropy(logits.view(-1, weight.shape[0]), target[..., 1:].reshape(-1), reduction="sum") / 7


def softcapped_loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """gemma2: capped logits, here with label smoothing."""
    logits = 30.0 * torch.tanh(hidden @ weight.t() / 30.0)
    return F.cross_entropy(logits.transpose(1, 2), target, label_smoothing=0.1)


def nll_loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """log_softmax and nll_loss, with the loss of each token weighed by the caller."""
    scores = F.log_softmax((F.linear(hidden, weight) * 0.5).float(), dim=-1)
    losses = F.nll_loss(scores.flatten(0, 1), target.flatten(), reduction="none")
    return (losses * torch.linspace(0.5, 1.5, losses.shape[0])).sum()


def hand_written_loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """logsumexp minus the target's logit."""
    logits = F.linear(hidden, weight).float()
    chosen = logits.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return (torch.logsumexp(logits, dim=-1) - chosen).mean()


def chosen_log_probabilities(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Preference tuning: the log probability of each target."""
    scores = F.linear(hidden, weight).log_softmax(-1)
    return (-scores.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)).mean()


def loss_and_accuracy(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Beside the loss, how many of the next tokens have the largest logit."""
    logits = F.linear(hidden, weight).float()
    following = F.pad(target, (0, 1), value=-100)[..., 1:]
    loss = F.cross_entropy(logits.view(-1, logits.shape[-1]), following.reshape(-1))
    with torch.no_grad():
        right = logits[:, :-1].argmax(dim=-1) == target[:, 1:]
    return loss, right.float().mean()


def inputs(draw: Draw) -> dict[str, Any]:
    """Hidden states [B, T, H], a weight [V, H] with V > H, and targets [B, T], some ignored."""
    dtype = draw.choice(torch.float32, torch.bfloat16)
    batch, length, width = draw.size(1, 3), draw.size(2, 9), draw.size(1, 12)
    vocabulary = draw.size(width + 1, 40)
    target = draw.integers(0, vocabulary, batch, length)
    if draw.choice(True, False):
        target = target.masked_fill(torch.arange(length) == 0, -100)
    return {
        "hidden": draw.tensor(batch, length, width, dtype=dtype),
        "weight": draw.tensor(vocabulary, width, dtype=dtype),
        "target": target,
    }


def loss_with_z_loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """OLMo: the square of the logits' normaliser, over the tokens that count, keeps them from drifting."""
    logits = F.linear(hidden, weight).float().flatten(0, 1)
    labels = target.flatten()
    counts = labels != -100
    return F.cross_entropy(logits, labels) + 1e-2 * (logits.logsumexp(-1).pow(2) * counts).sum() / counts.sum()


def hand_written_z_loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """T5X and PaLM: loss and z-loss from one logsumexp."""
    logits = F.linear(hidden, weight).float()
    log_z = torch.logsumexp(logits, dim=-1)
    losses = log_z - logits.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return (losses + 1e-2 * log_z.square()).mean()


RULE = Region(
    name="linear_cross_entropy",
    version=2,
    anchors=frozenset(_LOSSES),
    grow=grow,
    replacement=replacement,
    objections=objections,
    candidates=candidates,
    computed=computed,
    saves_memory=saves_memory,
    integers=integers,
    spellings=(
        causal_lm_loss, shifted_loss, softcapped_loss, nll_loss, hand_written_loss, chosen_log_probabilities,
        loss_and_accuracy, loss_with_z_loss, hand_written_z_loss,
    ),
    inputs=inputs,
)  # fmt: skip
