"""What a kernel of attention is generated for, and the parts of its source that follow from the score program."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fxopt.kernels.pointwise import Emitter, why_not
from fxopt.score.access import Access
from fxopt.score.program import Program
from fxopt.score.term import Term, variable

__all__ = ["ACROSS", "DOWN", "MOST_WIDTH", "AttentionKernelSpec", "Emitted", "emitted", "parts_of", "unsupported"]

LOG2E = 1.4426950408889634
"""Exponentials are base 2, which is the instruction that cards have."""

DOWN, ACROSS = "[:, None]", "[None, :]"
"""Indices along the first and the second axis of a tile."""

SMALLEST = 16
"""Rows, columns and depth of a tile of `tl.dot`, at least."""


MOST_WIDTH = 256
"""Entries of a head that a tile holds: with 512 not even 16 rows of q, k and v fit a block's registers."""


@dataclass(frozen=True)
class AttentionKernelSpec:
    """The constants of a site that its kernels are written for; sizes and strides are arguments.

    dtype: of q, k, v and out, "bf16", "fp16" or "fp32". depth, width: D and Dv. captures: the Triton type of the tensor
    in each slot, "" where nobody reads it. sink: its type, "" for none. intervals: whether they are given; then the
    band is in them. grain: rows and columns of a square of `fxopt::query_tiles`. The rest is `AttentionSpec`'s
    (fxopt.ops.attention_call).
    """

    dtype: str
    depth: int
    width: int
    scale: float
    program: str = ""
    predicate: str = ""
    lower: int | None = None
    upper: int | None = None
    dropout: float = 0.0
    empty: str = "zero"
    intervals: bool = False
    sink: str = ""
    captures: tuple[str, ...] = ()
    grain: int = 128

    @property
    def score(self) -> Program:
        """s -> s'."""
        return Program.parse(self.program) if self.program else Program(variable("s"))

    @property
    def condition(self) -> Program | None:
        """What decides within the band, or in rows whose intervals do not say it all."""
        return Program.parse(self.predicate) if self.predicate else None

    @property
    def spreads(self) -> bool:
        """Whether rows without keys take something from all keys."""
        return self.empty != "zero" and not self.sink

    @functools.cached_property
    def loads(self) -> dict[int, Term]:
        """The loads of floats, by slot, whose tensors may want a gradient."""
        return {term.args[0]: term for term in self.score.result.walk() if term.op == "load" and term.kind == "float"}

    def capture_arguments(self) -> list[tuple[str, str]]:
        """Pointers and strides of captured tensors, as a signature has them."""
        ranks = self._ranks()
        pointers = [(f"C{slot}", self.captures[slot]) for slot in ranks]
        return pointers + [(f"c{slot}_{axis}", "i32") for slot, rank in ranks.items() for axis in range(rank)]

    def _ranks(self) -> dict[int, int]:
        terms = [part for program in (self.score, self.condition) if program for part in program.result.walk()]
        found = {term.args[0]: Access.of(term).rank for term in terms if term.op == "load"}
        return dict(sorted(found.items()))

    @property
    def slots(self) -> tuple[int, ...]:
        """The slots that are read."""
        return tuple(self._ranks())


@functools.lru_cache(1024)
def unsupported(program: str, predicate: str) -> str:
    """Why kernels cannot be generated for these programs, "" where they can."""
    terms = [Program.parse(text).result for text in (program, predicate) if text]
    reason = why_not(terms)
    if reason or not program:
        return reason
    slopes = Program.parse(program).derivative()
    return why_not(one.result for one in (slopes.by_s, *slopes.by_load.values()) if one is not None)


def parts_of(size: int) -> list[tuple[int, int, bool]]:
    """(start, length, whether it is masked) of tiles that cover a head of `size` entries.

    Lengths are powers of 2 from 16 on: one tile, or two where that computes less: 80 is 64 and 16, not 128.
    """
    whole = max(SMALLEST, 1 << (size - 1).bit_length())
    first = whole // 2
    rest = max(SMALLEST, 1 << (size - first - 1).bit_length()) if size > first else whole
    if whole == SMALLEST or first + rest >= whole:
        return [(0, whole, whole != size)]
    return [(0, first, False), (first, rest, first + rest != size)]


@dataclass(frozen=True)
class Emitted:
    """The program's lines in one kernel, by level: 0 to be computed once, the last for every tile of scores.

    lines: of score and slopes. allowed: of the predicate, for tiles that are masked. score2: the expression of
    ``s' * log2(e)``. inside: the predicate's result, "" without one. by_s: the program's slope by the score, "" where
    that is the constant `factor`. by_load: its slopes by captured elements. calls: all lines, which may call helpers.
    terms: what the variables that the lines assign hold.
    """

    lines: tuple[list[str], ...]
    allowed: tuple[list[str], ...]
    score2: str
    inside: str
    by_s: str
    by_load: dict[int, str]
    factor: float
    calls: str
    terms: Mapping[str, Term]


def emitted(spec: AttentionKernelSpec, rows: str, levels: Sequence[str], slots: Sequence[int] | None) -> Emitted:
    """The programs as lines.

    rows: "[:, None]" or "[None, :]", how rows are shaped in a tile; columns are the other way round. levels: for each
    level but the last, the variables that are known there, "bhq" say. slots: those whose slopes are wanted beside the
    slope by the score; None for a forward, which wants none.
    """
    row, column = (rows, ACROSS) if rows == DOWN else (rows, DOWN)
    names = {variable(name): name for name in "sbh"}
    names |= {variable("q"): f"rows{row}", variable("k"): f"columns{column}"}
    emitter = Emitter(names, lambda term, index: _load(term, index, row, column))
    known = [_known_in(names) for names in levels] + [lambda term: True]
    score, affine = spec.score, spec.score.split_affine()
    slopes = score.derivative() if slots is not None else None
    by_s = slopes.by_s if slopes is not None and affine is None else None
    by_load = {slot: slopes.by_load[slot] for slot in slots or () if slopes is not None and slot in slopes.by_load}
    plain = affine is not None and affine[1] is None
    wanted = [one.result for one in (*([] if plain else [score]), *([by_s] if by_s else []), *by_load.values())]
    lines = tuple(emitter.emit(wanted, only=level) for level in known)
    inside = [spec.condition.result] if spec.condition else []
    allowed = tuple(emitter.emit(inside, only=level) for level in known)
    return Emitted(
        lines,
        allowed,
        score2=_score2(spec, "" if plain else emitter.name_of(score.result), row),
        inside=emitter.name_of(inside[0]) if inside else "",
        by_s=emitter.name_of(by_s.result) if by_s else "" if affine else "0.0",
        by_load={slot: emitter.name_of(one.result) for slot, one in by_load.items()},
        factor=affine[0] if affine else 1.0,
        calls="\n".join(emitter.lines),
        terms=emitter.assigned,
    )


def _score2(spec: AttentionKernelSpec, name: str, row: str) -> str:
    """The score in units of log(2), from the variable of s', or from the product where s' is a multiple of that."""
    if not name:
        affine = spec.score.split_affine()
        assert affine is not None
        return f"product * {spec.scale * affine[0] * LOG2E!r}"
    if "s" in spec.score.reads:
        return f"{name} * {LOG2E}"
    shape = "BLOCK_Q, BLOCK_K" if row == DOWN else "BLOCK_K, BLOCK_Q"
    return f"{name} * {LOG2E} + tl.zeros([{shape}], tl.float32)"


def _known_in(names: str) -> Callable[[Term], bool]:
    return lambda term: term.reads <= set(names)


def _load(term: Term, index: list[str], row: str, column: str) -> str:
    """``tl.load`` of a captured element, masked where it may be one of rows or columns that are not there."""
    slot, *terms = term.args
    offsets = [
        f"({name}).to(tl.int64) * c{slot}_{axis}" if item.op != "const" else f"{item.value} * c{slot}_{axis}"
        for axis, (item, name) in enumerate(zip(terms, index, strict=True))
        if item.value != 0
    ]
    masks = [f"(rows < queries){row}"] * ("q" in term.reads) + [f"(columns < keys){column}"] * ("k" in term.reads)
    address = " + ".join([f"C{slot}", *offsets])
    masked = f", mask={' & '.join(masks)}, other=0" if masks else ""
    found = f"tl.load({address}{masked})"
    return {"float": f"{found}.to(tl.float32)", "bool": f"{found} != 0", "int": found}[term.kind]
