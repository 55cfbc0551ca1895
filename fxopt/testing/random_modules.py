"""Random training modules: drawn as data, written as Python, and run from that very text.

A `ModuleSpec` is a few choices (JSON), so that it can be drawn by hypothesis or from a seed, kept in a corpus, changed,
and made smaller. `source()` is the module as a user would write it; what a failure prints is what has run.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import linecache
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxopt.rule import Draw
from fxopt.testing.attention_parts import KINDS, LOSS
from fxopt.testing.layouts import LAYOUTS
from fxopt.testing.parts import Params, Writer

SETTING: dict[str, tuple[Any, ...]] = {
    "dtype": ("float64", "float32", "bfloat16"),
    "input": ("floats", "tokens"),
    "layout": (*LAYOUTS, "expanded"),
    "batch": (2, 1, 3, 0),
    "length": (5, 2, 8, 9, 12),
    "width": (16, 8, 24),
    "classes": (31, 7, 48),
    "labels": ("some ignored", "none ignored", "all ignored"),
    "frozen": (False, True),
    "seed": tuple(range(1000)),
}
"""What is chosen of a module besides its parts. frozen: every third parameter wants no gradient."""

_MODULE = """class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * 0.5 * x.cos()


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed({seed})
{init}

    def forward(self, {arguments}):
{body}
"""

_IMPORTS = """import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
"""


@dataclasses.dataclass(frozen=True)
class Part:
    """A kind of part and a choice for each of its parameters."""

    kind: str
    params: Params
    residual: bool = False


@dataclasses.dataclass(frozen=True)
class ModuleSpec:
    """A module that ends in a loss, and its inputs. `setting` has a choice for each key of `SETTING`."""

    setting: Params
    parts: tuple[Part, ...]
    loss: Params

    def source(self) -> str:
        """The module as Python: class `Model`."""
        writer = self._written()
        init = [*writer.init, *(_FREEZE if self.setting["frozen"] else [])] or ["pass"]
        return _MODULE.format(
            seed=self.setting["seed"],
            init="\n".join(f"        {line}" for line in init),
            arguments=", ".join(["x", "labels", *sorted(writer.needs)]),
            body="\n".join(f"        {line}" for line in writer.body),
        )

    def _written(self) -> Writer:
        tokens = self.setting["input"] == "tokens"
        writer = Writer(self.setting["width"], self.setting["classes"], "self.table" if tokens else "")
        if tokens:
            writer.init.append(f"self.table = nn.Parameter(torch.randn({writer.classes}, {writer.width}))")
            writer.write("x = F.embedding(x, self.table)")
        writer.write("h = x")
        for number, part in enumerate(self.parts):
            writer.number = number
            writer.write(f"# {number}: {part.kind}", *(["skip = h"] if part.residual else []))
            KINDS[part.kind].write(part.params, writer)
            writer.write(*(["h = h + skip"] if part.residual else []))
        writer.number = len(self.parts)
        writer.write("# loss")
        LOSS.write(self.loss, writer)
        return writer

    def build(self) -> nn.Module:
        """The module, in train mode, in the setting's dtype; the same every time."""
        name = f"<fxopt random module {abs(hash(self.key()))}>"
        module = types.ModuleType("random_module")
        text = _IMPORTS + "\n\n" + self.source()
        linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
        exec(compile(text, name, "exec"), module.__dict__)
        with torch.random.fork_rng(devices=[]):
            return module.Model().to(getattr(torch, self.setting["dtype"])).train()

    def inputs(self, batch: int | None = None, length: int | None = None) -> dict[str, Tensor]:
        """The keyword arguments of one call, for the setting's sizes or others."""
        batch = self.setting["batch"] if batch is None else batch
        length = self.setting["length"] if length is None else length
        found = {"x": self._x(batch, length), "labels": self._labels(batch, length)}
        draw = torch.Generator().manual_seed(self.setting["seed"] + 2)
        keep = torch.rand(batch, length, generator=draw) < 0.7
        keep[:, 0] = True
        others = {
            "keep": keep,
            "ids": torch.randint(0, 3, (batch, length), generator=draw).sort(1).values,
            "lengths": torch.randint(1, length + 1, (batch,), generator=draw),
            "additive": torch.randn(batch, length, length, generator=draw),
        }
        return found | {name: others[name] for name in sorted(self._written().needs)}

    def _x(self, batch: int, length: int) -> Tensor:
        draw = torch.Generator().manual_seed(self.setting["seed"] + 1)
        if self.setting["input"] == "tokens":
            return torch.randint(0, self.setting["classes"], (batch, length), generator=draw)
        rows = 1 if self.setting["layout"] == "expanded" else batch
        x = torch.randn(rows, length, self.setting["width"], generator=draw).to(getattr(torch, self.setting["dtype"]))
        return laid_out(x, self.setting["layout"], batch)

    def _labels(self, batch: int, length: int) -> Tensor:
        draw = torch.Generator().manual_seed(self.setting["seed"] + 3)
        labels = torch.randint(0, self.setting["classes"], (batch, length), generator=draw)
        share = {"some ignored": 0.3, "none ignored": 0.0, "all ignored": 1.1}[self.setting["labels"]]
        return labels.masked_fill(torch.rand(batch, length, generator=draw) < share, -100)

    @property
    def draws(self) -> bool:
        """Whether the module draws random numbers, so that two compilers need not agree about them."""
        by_attention = any(part.params.get("dropout") for part in self.parts)
        return by_attention or any(p.kind == "dropout" and p.params["p"] and p.params["training"] for p in self.parts)

    def without_draws(self) -> ModuleSpec:
        """The same without a dropout that drops anything."""
        idle = {"dropout": 0.0, "p": 0.0}
        kept = [dataclasses.replace(part, params={n: idle.get(n, v) for n, v in part.params.items()})
                for part in self.parts]  # fmt: skip
        return dataclasses.replace(self, parts=tuple(kept))

    def key(self) -> str:
        """The spec as JSON, equal for equal specs."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModuleSpec:
        """The spec of which `dataclasses.asdict` gave `data`. Raises KeyError for kinds that are none."""
        parts = tuple(Part(**part) for part in data["parts"])
        for part in parts:
            KINDS[part.kind]
        return cls(dict(data["setting"]), parts, dict(data["loss"]))

    def smaller(self) -> Iterator[ModuleSpec]:
        """Specs that are a step simpler: without a part, without a residual, or with an earlier choice."""
        for at in range(len(self.parts)):
            yield dataclasses.replace(self, parts=self.parts[:at] + self.parts[at + 1 :])
        for at, part in enumerate(self.parts):
            simpler = [dataclasses.replace(part, residual=False)] if part.residual else []
            simpler += [dataclasses.replace(part, params=p) for p in _simpler(part.params, KINDS[part.kind].choices)]
            for one in simpler:
                yield dataclasses.replace(self, parts=(*self.parts[:at], one, *self.parts[at + 1 :]))
        for loss in _simpler(self.loss, LOSS.choices):
            yield dataclasses.replace(self, loss=loss)
        for setting in _simpler(self.setting, SETTING):
            yield dataclasses.replace(self, setting=setting)


_FREEZE = [
    "for number, parameter in enumerate(self.parameters()):",
    "    parameter.requires_grad_(number % 3 != 1)",
]


def laid_out(x: Tensor, layout: str, rows: int) -> Tensor:
    """`x` [1 or rows, length, width] as a tensor of its values and of that layout, requiring gradients, a leaf."""
    placed = x.expand(rows, -1, -1) if layout == "expanded" else LAYOUTS[layout](x)
    return placed.detach().requires_grad_()


def _simpler(params: Params, choices: Mapping[str, tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    for name, options in choices.items():
        at = options.index(params[name])
        for earlier in dict.fromkeys([0, at // 2, at - 1][: 3 if at > 1 else at]):
            yield {**params, name: options[earlier]}


def draw_params(draw: Draw, choices: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    """A choice for each parameter: the simplest in half of them, so that rare ones meet in few places at a time."""
    return {name: draw.choice(*itertools.chain([options[0]] * len(options), options)) if len(options) > 2
            else draw.choice(*options) for name, options in choices.items()}  # fmt: skip


def draw_part(draw: Draw, kinds: tuple[str, ...] = tuple(KINDS)) -> Part:
    """A part of any of `kinds`."""
    kind = draw.choice(*kinds)
    return Part(kind, draw_params(draw, KINDS[kind].choices), draw.choice(False, True))


def draw_module(draw: Draw, most: int = 4, kinds: tuple[str, ...] = ("attention", "norm", *KINDS)) -> ModuleSpec:
    """A module of up to `most` parts; attention and norms are twice as likely as others."""
    setting = {name: draw.choice(*options) for name, options in SETTING.items() if name not in ("batch", "seed")}
    setting |= {"batch": draw.choice(2, 2, 3, 1, 1, 0), "seed": draw.size(0, 999)}
    parts = tuple(draw_part(draw, kinds) for _ in range(draw.size(0, most)))
    return ModuleSpec(setting, parts, draw_params(draw, LOSS.choices))
