"""Score programs: a scalar function of a score s and of where it stands (b, h, q, k), with captured tensors.

The text of a program is cache key, dump and operator argument in one; its term is what rewrites work on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxopt.score.access import Access
from fxopt.score.affine import affine
from fxopt.score.algebra import bottom_up, simplified
from fxopt.score.derivative import gradients
from fxopt.score.evaluate import Evaluator
from fxopt.score.place import AXES, Place, block_of, with_four_axes
from fxopt.score.term import Note, Term, load, unnoted, variable
from fxopt.score.text import ProgramError, parsed, printed

__all__ = ["Derivative", "Program", "ProgramError"]


@dataclass(frozen=True, repr=False)
class Program:
    """A term whose loads are from numbered slots. Programs of equal terms are equal.

    Evaluation: floats are computed in one dtype, that of s if there is an s, to which float captures are widened. A
    result has four axes, and size 1 on those it does not depend on; it may alias s or a capture. Autograd
    differentiates it by s and by captures. Indices outside a capture are the caller's error.
    """

    result: Term

    def __post_init__(self) -> None:
        for term in self._loads:
            if type(term.args[0]) is not int or term.args[0] < 0:
                raise ProgramError(f"a program loads from numbered slots, not from {term.args[0]!r}")
            if any(item.kind != "int" for item in term.terms):
                raise ProgramError(f"an index must be an int: {term!r}")

    @classmethod
    def of(cls, term: Term, sources: Sequence[Hashable] = (), note: Note = unnoted) -> tuple[Program, list[Any]]:
        """`term` with its sources numbered in order of first reading, and the sources by slot.

        sources: those that have slots already. Float loads of one source at different indices get slots of their own
        (the source is then listed more than once), so that a slot has one derivative; others share theirs. note: told
        of every term of the program, and which one of `term` it is.
        """
        slots, taken = list(sources), dict[int, Term]()

        def numbered(item: Term) -> Term:
            if item.op != "load":
                return item
            source, *index = item.args
            same = (slot for slot, known in enumerate(slots) if known == source)
            slot = next((one for one in same if item.kind != "float" or taken.get(one, item) is item), len(slots))
            if slot == len(slots):
                slots.append(source)
            taken[slot] = item
            return load(slot, tuple(index), item.kind)

        return cls(bottom_up(term, numbered, note)), slots

    @classmethod
    def parse(cls, text: str) -> Program:
        """The program of a text (`fxopt.score.text`), one object a text. Raises `ProgramError` naming the line."""
        return _parse(text)

    def __str__(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return f"Program.parse({self._text!r})"

    def __reduce__(self) -> Any:
        return Program.parse, (self._text,)

    @functools.cached_property
    def reads(self) -> frozenset[str]:
        """Which of s, b, h, q and k the result depends on."""
        return self.result.reads

    @functools.cached_property
    def captures(self) -> int:
        """How many tensors a call takes: one more than the highest slot."""
        return 1 + max((term.args[0] for term in self._loads), default=-1)

    @property
    def is_identity(self) -> bool:
        """Whether the result is s itself."""
        return self.result is variable("s")

    def __call__(
        self,
        s: Tensor | None,
        b: Tensor,
        h: Tensor,
        q: Tensor,
        k: Tensor,
        captures: Sequence[Tensor] = (),
        *,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """The result at the scores `s`, broadcastable to [nb, nh, nq, nk] (None where the program does not read it).

        b, h, q, k: int64, [nb, 1, 1, 1], [1, nh, 1, 1], [1, 1, nq, 1] and [1, 1, 1, nk]. captures: by slot, any dtype.
        dtype: of floats where s is None. Raises `ProgramError` for s or a capture missing or of another rank.
        """
        indices = dict(zip(AXES, (b, h, q, k), strict=True))
        return self._evaluated(Place(s, captures, dtype if s is None else s.dtype, b.device, indices))

    def on_block(
        self,
        s: Tensor | None,
        b: slice,
        h: slice,
        q: slice,
        k: slice,
        captures: Sequence[Tensor] = (),
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        overwrite: bool = False,
    ) -> Tensor:
        """As a call, on slices with start and stop. Loads at plain indices, as of bias[b, 0, q, k], are views.

        device: where to compute; that of s, else of the first capture, else the CPU. overwrite: the memory of s may be
        written over, which saves a new block's.
        """
        return self._evaluated(block_of(s, (b, h, q, k), captures, dtype, device), overwrite)

    def accumulate(
        self,
        slot: int,
        into: Tensor,
        values: Tensor,
        b: slice,
        h: slice,
        q: slice,
        k: slice,
        captures: Sequence[Tensor] = (),
        *,
        s: Tensor | None = None,
    ) -> None:
        """Add `values` [nb, nh, nq, nk], one a score of the block, to the elements of `into` that slot's load reads.

        into: the shape of the capture in the slot; sums are in the dtype of `values`, then of `into`. With
        ``derivative().by_load[slot]`` times the gradient of the result as values this is the capture's gradient.
        captures, s: what the index itself reads. Raises `ProgramError` for a slot that is read at several indices.
        """
        access, index = self._load_of[slot]
        place = block_of(s, (b, h, q, k), captures, values.dtype, values.device)
        if access.is_block:
            access.add(into, values, place.ranges)
        else:
            access.add_at(into, values, index(place))

    def simplified(self) -> Program:
        """An equal program, smaller or cheaper where there is one; slots keep their numbers."""
        return Program(simplified(self.result))

    def derivative(self) -> Derivative:
        """The derivatives of the result, by autograd, computed once.

        Raises `ProgramError` where the result is no float, or a slot of floats is read at several indices.
        """
        return self._derivative

    def split_affine(self) -> tuple[float, Program | None] | None:
        """(factor, bias) where the result is factor * s + bias and bias does not read s (None: 0), slots kept.

        None where the result is not of this form: s under an operator that is not linear, or times a captured tensor.
        """
        found = affine(self.result)
        if found is None or found[1] is None:
            return found  # type: ignore[return-value]
        bias = simplified(found[1])
        return found[0], None if bias.value == 0 else Program(bias)

    def _evaluated(self, place: Place, overwrite: bool = False) -> Tensor:
        check_captures(self, place.captures)
        evaluate = self._evaluators(bool(place.ranges), overwrite)
        return with_four_axes(*evaluate(place, reuse=not place.is_differentiated))[0]

    @functools.cached_property
    def _text(self) -> str:
        return printed(self.result)

    @functools.cached_property
    def _loads(self) -> tuple[Term, ...]:
        return tuple(term for term in self.result.walk() if term.op == "load")

    @functools.cached_property
    def _evaluators(self) -> Callable[[bool, bool], Evaluator]:
        """Evaluators of the result by (on ranges, s owned)."""
        return functools.cache(lambda blocks, owned: Evaluator([self.result], blocks=blocks, owned=owned))

    @functools.cached_property
    def _load_of(self) -> Mapping[int, tuple[Access, Evaluator]]:
        """Of each slot: its load, and its indices."""
        found: dict[int, tuple[Access, Evaluator]] = {}
        for term in self._loads:
            if term.args[0] in found:
                raise ProgramError(f"slot {term.args[0]} is read at several indices: give each a slot of its own")
            found[term.args[0]] = Access.of(term), Evaluator(term.terms, blocks=True)
        return found

    @functools.cached_property
    def _derivative(self) -> Derivative:
        by_leaf = {leaf: Program(term) for leaf, term in gradients(self.result).items()}
        by_s = by_leaf.pop(variable("s"), None)
        by_load = {leaf.args[0]: program for leaf, program in by_leaf.items()}
        if len(by_load) < len(by_leaf):
            raise ProgramError("a slot is read at several indices: give each a slot of its own (Program.of does)")
        return Derivative(self, by_s, by_load)


@dataclass(frozen=True)
class Derivative:
    """Derivatives of `program`, as programs of the same s, indices and captures; what is missing is 0.

    by_s: by the score. by_load: by the element that a slot's load reads.
    """

    program: Program
    by_s: Program | None
    by_load: Mapping[int, Program]

    def on_block(
        self,
        s: Tensor | None,
        b: slice,
        h: slice,
        q: slice,
        k: slice,
        captures: Sequence[Tensor] = (),
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        overwrite: bool = False,
    ) -> tuple[Tensor, Tensor | None, dict[int, Tensor]]:
        """The program's result, `by_s` and `by_load` at once (arguments as `Program.on_block` has them).

        What they have in common, such as the tanh of a softcap, is computed once.
        """
        check_captures(self.program, captures)
        place = block_of(s, (b, h, q, k), captures, dtype, device)
        evaluate = self._evaluators(overwrite)
        value, *rest = with_four_axes(*evaluate(place, reuse=not place.is_differentiated))
        by_s = rest.pop(0) if self.by_s is not None else None
        return value, by_s, dict(zip(self.by_load, rest, strict=True))

    @functools.cached_property
    def _evaluators(self) -> Callable[[bool], Evaluator]:
        programs = (self.program, *([] if self.by_s is None else [self.by_s]), *self.by_load.values())
        results = [program.result for program in programs]
        return functools.cache(lambda owned: Evaluator(results, blocks=True, owned=owned))


def check_captures(program: Program, captures: Sequence[Tensor]) -> None:
    """Raise `ProgramError` where there are too few."""
    if len(captures) < program.captures:
        raise ProgramError(f"the program reads {program.captures} captured tensors, and {len(captures)} are given")


@functools.lru_cache(maxsize=1024)
def _parse(text: str) -> Program:
    return Program(parsed(text))
