"""Attention and losses as parts of random modules: every variation that models were seen to write."""

from __future__ import annotations

from fxopt.testing.parts import LONGEST, SIMPLE, Kind, Params, Writer

# --- attention ---------------------------------------------------------------------------------------------------

_ROW, _COLUMN = "torch.arange(length)[:, None]", "torch.arange(length)[None, :]"
CONDITIONS: dict[str, str] = {
    "none": "",
    "causal": f"({_COLUMN} <= {_ROW})[None, None]",
    "window": f"(({_COLUMN} <= {_ROW}) & ({_COLUMN} > {_ROW} - 3))[None, None]",
    "both sides": f"(({_ROW} - {_COLUMN}).abs() <= 2)[None, None]",
    "triangle": "torch.tril(torch.ones(length, length)).bool()[None, None]",
    "ahead": f"({_COLUMN} >= {_ROW})[None, None]",
    "chunks": f"(({_COLUMN} <= {_ROW}) & ({_ROW} // 4 == {_COLUMN} // 4))[None, None]",
    "padding": "keep[:, None, None, :]",
    "causal and padding": f"({_COLUMN} <= {_ROW})[None, None] & keep[:, None, None, :]",
    "documents": "(ids[:, None, :, None] == ids[:, None, None, :])",
    "causal documents": f"({_COLUMN} <= {_ROW})[None, None] & (ids[:, None, :, None] == ids[:, None, None, :])",
    "lengths": f"({_COLUMN} < lengths[:, None, None])[:, None]",
    "prefix": f"(({_COLUMN} <= {_ROW})[None] | ({_COLUMN} < lengths[:, None, None]))[:, None]",
    "by the scores": "(s.detach() < 1.0)",
    "odd": f"(({_ROW} + {_COLUMN}) % 3 != 1)[None, None]",
}
BIASES: dict[str, str] = {
    "none": "",
    "alibi": "{slope}[:, None, None] * (torch.arange(length)[None, :] - torch.arange(length)[:, None]).to(s.dtype)",
    "learned": "{table}[:, :length, :length]",
    "buckets": "{buckets}[(torch.arange(length)[None, :] - torch.arange(length)[:, None]).clamp(-3, 3) + 3]"
    ".permute(2, 0, 1)",
    "given": "additive[:, None, :length, :length].to(s.dtype)",
}
_NAMES = {"padding": "keep", "document": "ids", "lengths": "lengths", "prefix": "lengths"}


def _attention(p: Params, w: Writer) -> None:
    heads, depth = p["heads"], p["depth"]
    key_heads = heads // p["group"] if heads % p["group"] == 0 else heads
    value_depth = depth + 3 if p["wide values"] else depth
    w.write("batch, length = h.shape[:2]")
    for name, n, d in (("q", heads, depth), ("k", key_heads, depth), ("v", key_heads, value_depth)):
        weight = w.linear(name, n * d, w.width, p["share"])
        w.write(f"{name} = F.linear(h, {weight}).view(batch, length, {n}, {d}).transpose(1, 2)")
    if p["qk norm"]:
        for name in "qk":
            w.write(f"{name} = {name} * torch.rsqrt({name}.pow(2).mean(-1, keepdim=True) + 1e-5)")
    if p["rope"]:
        _rope(depth, w)
    if key_heads != heads:
        for name in "kv":
            w.write(f"{name} = {name}.repeat_interleave({heads // key_heads}, dim=1)")
    for word, name in _NAMES.items():
        if word in p["mask"]:
            w.needed(name)
    if p["style"] == "sdpa" and p["mask"] != "by the scores" and not (p["softcap"] or p["sink"]):
        _by_sdpa(p, w)
    else:
        _by_softmax(p, w)
    inner = heads * value_depth
    w.write(f"h = F.linear(o.reshape(batch, length, {inner}), {w.linear('o', w.width, inner, p['share'])})")


def _rope(depth: int, w: Writer) -> None:
    w.write(
        f"angle = torch.arange(length)[:, None] * torch.logspace(0, -2, {depth // 2})",
        "angle = torch.cat([angle, angle], -1)",
        "cos, sin = angle.cos().to(h.dtype), angle.sin().to(h.dtype)",
    )
    for name in "qk":
        w.write(f"a, b = {name}.chunk(2, dim=-1)", f"{name} = {name} * cos + torch.cat([-b, a], -1) * sin")


def _scale(p: Params) -> float:
    return p["depth"] ** -0.5 if p["scale"] == "usual" else p["scale"]


def _bias(p: Params, w: Writer) -> str:
    heads, kind = p["heads"], p["bias"]
    made = {
        "alibi": ("slope", f"torch.rand({heads})"),
        "learned": ("table", f"torch.randn({heads}, {LONGEST}, {LONGEST})"),
        "buckets": ("buckets", f"torch.randn(7, {heads})"),
    }
    if kind in made:
        name, value = made[kind]
        return BIASES[kind].format(**{name: w.parameter(name, value, p["share"])})
    if kind == "given":
        w.needed("additive")
    return BIASES[kind]


def _by_sdpa(p: Params, w: Writer) -> None:
    condition, bias, scale, drop = CONDITIONS[p["mask"]], _bias(p, w), _scale(p), p["dropout"]
    if p["mask"] == "causal" and not bias:
        mask = "is_causal=True"
    elif bias:
        w.write("s = q", f"mask = ({bias}).to(q.dtype)" + ("" if bias.startswith("additive") else "[None]"))
        if condition:
            w.write(f"mask = mask.masked_fill(~({condition}), {p['minus']})")
        mask = "attn_mask=mask"
    else:
        mask = f"attn_mask={condition}" if condition else "attn_mask=None"
    call = f"F.scaled_dot_product_attention(q, k, v, {mask}, dropout_p={drop}, scale={scale})"
    w.write(f"o = {call}.transpose(1, 2)" + (".contiguous()" if p["contiguous"] else ""))


def _by_softmax(p: Params, w: Writer) -> None:
    product = "torch.einsum('bhqd,bhkd->bhqk', q, k)" if p["style"] == "einsum" else "q @ k.transpose(2, 3)"
    w.write(f"s = (q * {_scale(p)}) @ k.mT" if p["style"] == "scaled queries" else f"s = {product} * {_scale(p)}")
    if p["softcap"]:
        w.write(f"s = {p['softcap']} * torch.tanh(s / {p['softcap']})")
    bias, condition = _bias(p, w), CONDITIONS[p["mask"]]
    if bias:
        w.write(f"s = s + {bias}")
    if condition:
        masked = {
            "where": f"s = torch.where({condition}, s, {p['minus']})",
            "fill": f"s = s.masked_fill(~({condition}), {p['minus']})",
            "add": f"s = s + torch.where({condition}, torch.zeros((), dtype=s.dtype), {p['minus']})",
        }
        w.write(masked[p["masked by"]])
    if p["sink"]:
        sink = w.parameter("sink", f"torch.randn({p['heads']})", p["share"])
        w.write(f"s = torch.cat([s, {sink}.reshape(1, -1, 1, 1).expand(batch, -1, length, -1).to(s.dtype)], dim=-1)",
                "s = s - s.max(dim=-1, keepdim=True).values")  # fmt: skip
    if p["style"] == "by hand":
        w.write("e = torch.exp(s - s.amax(dim=-1, keepdim=True))", "a = e / e.sum(dim=-1, keepdim=True)")
    else:
        w.write("a = F.softmax(s, dim=-1, dtype=torch.float32).to(q.dtype)" if p["in fp32"] else "a = s.softmax(-1)")
    if p["sink"]:
        w.write("a = a[..., :-1]")
    if p["dropout"]:
        w.write(f"a = F.dropout(a, {p['dropout']}, True)")
    w.write("o = (a @ v).transpose(1, 2)" + (".contiguous()" if p["contiguous"] else ""))


ATTENTION = Kind(
    {
        "style": ("softmax", "sdpa", "einsum", "by hand", "scaled queries"),
        "mask": tuple(CONDITIONS),
        "masked by": ("fill", "where", "add"),
        "minus": ("float('-inf')", "torch.finfo(s.dtype).min", "-1e9"),
        "bias": tuple(BIASES),
        "softcap": (None, 5.0),
        "sink": (False, True),
        "heads": (2, 4, 1),
        "group": (1, 2),
        "depth": (8, 4, 16),
        "wide values": (False, True),
        "scale": ("usual", 1.0, 0.3),
        "qk norm": (False, True),
        "rope": (False, True),
        "in fp32": (False, True),
        "contiguous": (True, False),
        "dropout": (0.0, 0.25),
        "share": (False, True),
    },
    _attention,
)

# --- losses ------------------------------------------------------------------------------------------------------

LOSSES: dict[str, tuple[str, ...]] = {
    "squares": ("loss = logits.float().square().mean()",),
    "cross entropy": ("loss = F.cross_entropy({flat}, target, ignore_index={ignore}, reduction='{reduction}',"
                      " label_smoothing={smoothing})",),
    "log softmax": ("loss = F.nll_loss(F.log_softmax({flat}, dim=-1), target, ignore_index={ignore},"
                    " reduction='{reduction}')",),
    "logsumexp": ("flat = {flat}", "loss = torch.logsumexp(flat, -1) - flat.gather(-1,"
                  " target.clamp(min=0)[:, None])[:, 0]", "loss = loss.{sum}()"),
    "gather": ("loss = -F.log_softmax({flat}, -1).gather(-1, target.clamp(min=0)[:, None]).squeeze(-1).{sum}()",),
    "sum over items": ("loss = F.cross_entropy({flat}, target, ignore_index={ignore}, reduction='sum') / 11.0",),
}  # fmt: skip


def _loss(p: Params, w: Writer) -> None:
    head = w.table if p["tied"] and w.table else w.linear("head", w.classes, w.width)
    bias = w.parameter("bias", f"torch.randn({w.classes})") if p["bias"] else "None"
    hidden = "h[:, :-1]" if p["shift"] == "before" else "h"
    w.write(f"logits = F.linear({hidden}, {head}, {bias})")
    if p["scale"] != 1.0:
        w.write(f"logits = logits * {p['scale']}")
    if p["softcap"]:
        w.write(f"logits = torch.tanh(logits / {p['softcap']}) * {p['softcap']}")
    shown = "logits[:, :-1]" if p["shift"] == "after" else "logits"
    flat = f"({shown}{'.float()' if p['in fp32'] else ''}).reshape(-1, {w.classes})"
    w.write(f"target = {'labels' if p['shift'] == 'no' else 'labels[:, 1:]'}.reshape(-1)")
    reduction = p["reduction"]
    words = {"flat": flat, "ignore": -100, "smoothing": p["smoothing"], "sum": reduction.replace("none", "mean")}
    for line in LOSSES[p["style"]]:
        w.write(line.format(reduction=reduction, **words))
    w.write("loss = loss.mean() if loss.dim() else loss")
    found = {"loss": (), "loss and logits": ("logits",), "loss and hidden": ("h",),
             "loss and best": ("logits.argmax(-1)",), "loss and both": ("logits", "logits[..., :1]")}  # fmt: skip
    w.write(f"return ({', '.join(('loss', *found[p['returns']]))},)")


LOSS = Kind(
    {
        "style": tuple(LOSSES),
        "reduction": ("mean", "sum", "none"),
        "smoothing": (0.0, 0.1),
        "scale": (1.0, 0.3),
        "softcap": (None, 5.0),
        "bias": (False, True),
        "in fp32": (False, True),
        "shift": ("no", "before", "after"),
        "tied": (False, True),
        "returns": ("loss", "loss and logits", "loss and hidden", "loss and best", "loss and both"),
    },
    _loss,
)

KINDS: dict[str, Kind] = {**SIMPLE, "attention": ATTENTION}
"""Every kind of part that stands between a module's input and its loss."""
