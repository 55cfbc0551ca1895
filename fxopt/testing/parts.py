"""What random modules are made of: parts as data, each written out as the lines of PyTorch that a user would write.

Every part takes `h` [batch, length, width] to another `h` of that shape, so any sequence of parts is a module. A part
is a kind and a choice for each of its parameters; the first choice is the simplest, which is what shrinking tends to.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

Params = Mapping[str, Any]
LONGEST = 16
"""Positions that learned biases have; sequences are no longer."""


class Writer:
    """The lines of one module.

    number: that of the part being written; names of parameters carry it. table: the embedding [classes, width], if any.
    """

    def __init__(self, width: int, classes: int, table: str = ""):
        self.width, self.classes, self.table, self.number = width, classes, table, 0
        self.init: list[str] = []
        self.body: list[str] = []
        self.needs: set[str] = set()
        self._kept: dict[tuple[str, str], str] = {}

    def parameter(self, name: str, value: str, share: bool = False) -> str:
        """A parameter made by the expression `value`; with `share` the newest of that name and value serves again."""
        if share and (name, value) in self._kept:
            return self._kept[name, value]
        self.init.append(f"self.p{self.number}_{name} = nn.Parameter({value})")
        return self._kept.setdefault((name, value), f"self.p{self.number}_{name}")

    def linear(self, name: str, rows: int, columns: int, share: bool = False) -> str:
        """A weight [rows, columns] for `F.linear`."""
        return self.parameter(name, f"torch.randn({rows}, {columns}) / {columns**0.5:.3f}", share)

    def needed(self, name: str) -> str:
        """An input of the module besides `h`: keep, ids, lengths, additive."""
        self.needs.add(name)
        return name

    def write(self, *lines: str) -> None:
        """Add lines to the forward."""
        self.body.extend(lines)


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of part: its parameters with their choices, the simplest first, and how it is written."""

    choices: Mapping[str, tuple[Any, ...]]
    write: Callable[[Params, Writer], None]


# --- norms -------------------------------------------------------------------------------------------------------

_RMS = "{x} * torch.rsqrt({x}.pow(2).mean(-1, keepdim=True) + {eps})"
_CENTRED = "({x} - {x}.mean(-1, keepdim=True))"
NORMS: dict[str, str] = {
    "rms": f"{_RMS}",
    "rms in fp32": "(lambda f: (" + _RMS.format(x="f", eps="{eps}") + ").to(h.dtype))({x}.float())",
    "rms left wide": "(lambda f: " + _RMS.format(x="f", eps="{eps}") + ")({x}.float())",
    "rms eps outside": "{x} / ({x}.pow(2).mean(-1, keepdim=True).sqrt() + {eps})",
    "rms by power": "{x} * ({x}.square().mean(-1, True) + {eps}) ** -0.5",
    "layer": f"{_CENTRED} / torch.sqrt(({_CENTRED}).pow(2).mean(-1, keepdim=True) + {{eps}})",
    "layer by var": "({x} - {x}.mean(-1, True)) * torch.rsqrt({x}.var(-1, keepdim=True, unbiased=False) + {eps})",
    "layer by var of n - 1": "({x} - {x}.mean(-1, True)) * torch.rsqrt({x}.var(-1, keepdim=True) + {eps})",
    "over positions": "{x} * torch.rsqrt({x}.pow(2).mean(1, keepdim=True) + {eps})",
    "F.rms_norm": "F.rms_norm({x}, {x}.shape[-1:], eps={eps})",
    "F.layer_norm": "F.layer_norm({x}, {x}.shape[-1:], eps={eps})",
    "F.normalize": "F.normalize({x}, dim=-1)",
}


def _norm(p: Params, w: Writer) -> None:
    value = NORMS[p["style"]].format(x="h", eps=p["eps"])
    if p["weight"] != "none":
        weight = w.parameter("weight", f"1 + 0.1 * torch.randn({w.width})", p["share"])
        factor = {"plain": weight, "plus one": f"(1.0 + {weight})", "in fp32": f"{weight}.float()"}[p["weight"]]
        value = f"{factor} * ({value})"
    if p["bias"]:
        value = f"{value} + {w.parameter('bias', f'0.1 * torch.randn({w.width})', p['share'])}"
    w.write(f"h = ({value}).to(h.dtype)" if p["cast back"] or p["weight"] == "in fp32" else f"h = {value}")
    w.write("h = h.to(x.dtype)")


# --- mlps, linears, views ----------------------------------------------------------------------------------------


def _mlp(p: Params, w: Writer) -> None:
    inner = 2 * w.width
    if p["style"] == "gated":
        up, gate = (w.linear(name, inner, w.width, p["share"]) for name in ("up", "gate"))
        w.write(f"m = F.silu(F.linear(h, {gate})) * F.linear(h, {up})")
    elif p["style"] == "fused":
        both = w.linear("both", 2 * inner, w.width, p["share"])
        w.write(f"a, b = F.linear(h, {both}).chunk(2, dim=-1)", "m = F.gelu(a, approximate='tanh') * b")
    else:
        act = {"gelu": "F.gelu({})", "swish": "(lambda u: u * torch.sigmoid(1.7 * u))({})", "relu2": "F.relu({}) ** 2"}
        up = w.linear("up", inner, w.width, p["share"])
        w.write("m = " + act[p["style"]].format(f"F.linear(h, {up})"))
    w.write(f"h = F.linear(m, {w.linear('down', w.width, inner, p['share'])})")


def _linear(p: Params, w: Writer) -> None:
    bias = w.parameter("bias", f"0.1 * torch.randn({w.width})", p["share"]) if p["bias"] else "None"
    w.write(f"h = F.linear(h, {w.linear('weight', w.width, w.width, p['share'])}, {bias})")


VIEWS: dict[str, tuple[str, ...]] = {
    "transposed": ("h = h.transpose(0, 1).contiguous().transpose(0, 1)",),
    "flipped": ("h = h.flip(-1)",),
    "rolled": ("h = torch.roll(h, 1, dims=1)",),
    "halves": ("a, b = h.chunk(2, dim=-1)", "h = torch.cat([-b, a], dim=-1)"),
    "unbound": ("h = torch.stack(h.unbind(-1)[::-1], dim=-1)",),
    "interleaved": ("h = torch.stack([h[..., 0::2], h[..., 1::2]], dim=-1).flatten(-2)",),
    "expanded": ("h = h + h.mean(1, keepdim=True).expand_as(h)",),
    "strided": ("h = torch.stack([h, h], dim=-1)[..., 0]",),
    "offset": ("h = torch.cat([h, h], dim=-1)[..., h.shape[-1]:]",),
    "heads": ("h = h.unflatten(-1, (2, -1)).transpose(1, 2).reshape(h.shape[0], 2, h.shape[1], -1)",
              "h = h.permute(0, 2, 1, 3).flatten(-2)"),
    "as_strided": ("h = h.contiguous()", "h = torch.as_strided(h, h.shape, h.stride())"),
    "outer": ("h = torch.einsum('bth,bsh->bts', h, h).tanh() @ h / h.shape[-1]",),
}  # fmt: skip


def _view(p: Params, w: Writer) -> None:
    w.write(*VIEWS[p["style"]])


WRITES: dict[str, tuple[str, ...]] = {
    "scaled": ("h = h.clone()", "h.mul_(0.5)"),
    "through a view": ("h = h * 1.5", "h[None].add_(0.25)"),
    "a row": ("h = h.clone()", "h[:, :1] = 0.5"),
    "a slice from a slice": ("g = h.clone()", "g[..., 1:] = h[..., :-1] * 0.5", "h = g"),
    "masked": ("h = h.clone()", "h.masked_fill_(h > 1.0, 1.0)"),
    "read before and after": ("g = h.sin()", "a = g * 2", "g.add_(1.0)", "h = a + g"),
    "a buffer": ("self.seen.add_(h.detach().float().mean())", "h = h * (1 + 0 * self.seen.to(h.dtype))"),
    "a norm's input": (
        "g = h.clone()", "f = torch.rsqrt(g.pow(2).mean(-1, keepdim=True) + 1e-5)", "g[None].mul_(2)", "h = g * f",
    ),
    "after a norm": (
        "g = h.clone()", "f = g * torch.rsqrt(g.pow(2).mean(-1, keepdim=True) + 1e-5)", "g.detach().mul_(1)",
        "h = f + g",
    ),
    "by index": ("h = h.clone()", "h.index_add_(1, torch.zeros(1, dtype=torch.long), h[:, -1:] * 0.5)"),
}  # fmt: skip


def _written(p: Params, w: Writer) -> None:
    if p["style"] == "a buffer":
        w.init.append("self.register_buffer('seen', torch.zeros(()))")
    w.write(*WRITES[p["style"]])


# --- grad mode, autocast, bodies ---------------------------------------------------------------------------------

STOPS: dict[str, tuple[str, ...]] = {
    "detached part": ("h = h * h.detach().mean(-1, keepdim=True).tanh()",),
    "factor without grad": (
        "with torch.no_grad():", "    f = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)", "h = h * f",
    ),
    "angle without grad": ("with torch.no_grad():", "    f = torch.arange(h.shape[1]).to(h.dtype).cos()[:, None]",
                           "h = h * f"),
    "autocast off": ("with torch.autocast('cpu', enabled=False):", "    h = h @ self.eye.to(h.dtype)"),
    "straight through": ("h = h + (h.round() - h).detach() * 0.0",),
    "scaled gradient": ("h = Scaled.apply(h)",),
    "checkpointed": (
        "h = checkpoint(lambda a: F.silu(a) * torch.rsqrt(a.pow(2).mean(-1, keepdim=True) + 1e-5), h,"
        " use_reentrant=False)",
    ),
    "checkpointed attention": (
        "h = checkpoint(lambda a: (a @ a.mT * 0.3).softmax(-1) @ a, h, use_reentrant=False)",
    ),
}  # fmt: skip


def _stop(p: Params, w: Writer) -> None:
    if p["style"] == "autocast off":
        w.init.append(f"self.register_buffer('eye', torch.eye({w.width}).flip(0).contiguous())")
    w.write(*STOPS[p["style"]])


def _dropout(p: Params, w: Writer) -> None:
    w.write(f"h = F.dropout(h, {p['p']}, {p['training']})")


SIMPLE: dict[str, Kind] = {
    "linear": Kind({"bias": (False, True), "share": (False, True)}, _linear),
    "norm": Kind(
        {
            "style": tuple(NORMS),
            "weight": ("none", "plain", "plus one", "in fp32"),
            "bias": (False, True),
            "eps": (1e-5, 1e-2),
            "cast back": (True, False),
            "share": (False, True),
        },
        _norm,
    ),
    "mlp": Kind({"style": ("gelu", "gated", "fused", "swish", "relu2"), "share": (False, True)}, _mlp),
    "view": Kind({"style": tuple(VIEWS)}, _view),
    "write": Kind({"style": tuple(WRITES)}, _written),
    "stop": Kind({"style": tuple(STOPS)}, _stop),
    "dropout": Kind({"p": (0.0, 0.3), "training": (True, False)}, _dropout),
}
