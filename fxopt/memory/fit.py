"""The largest batch or sequence whose step fits: few trials, since each traces the model anew."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

__all__ = ["MOST_TRIALS", "Fit", "largest"]

MOST_TRIALS = 32
STRAIGHT = 4
"""The smallest budget is nearly a line in the size, so four trials do; after them every other one is a bisection."""
GROWTH = 8
"""Times what fits is the most that is tried next: scores of attention grow with the square of a sequence."""


@dataclasses.dataclass(frozen=True)
class Fit:
    """size: the largest that fits, 0 where not even one does. trials: (size, smallest budget in bytes), in order."""

    size: int
    trials: tuple[tuple[int, int], ...]


def largest(minimum: Callable[[int], int], budget: int, start: int) -> Fit:
    """The largest size n with ``minimum(n) <= budget``, which grows with n. start: the size that is tried first."""
    known: dict[int, int] = {}
    for size in _guesses(known, budget, start):
        known[size] = minimum(size)
    fitting = [size for size, least in known.items() if least <= budget]
    return Fit(max(fitting, default=0), tuple(known.items()))


def _guesses(known: dict[int, int], budget: int, start: int) -> Iterator[int]:
    """Sizes to try, each once, until two neighbours are known of which one fits. `known` is filled in between."""
    yield max(start, 1)
    while len(known) < MOST_TRIALS:
        fits = max((size for size, least in known.items() if least <= budget), default=0)
        fails = min((size for size, least in known.items() if least > budget), default=None)
        if fails is None:
            guess = _on_the_line(known, sorted(known)[-2:], budget)
            yield max(min(guess if guess is not None else 2 * fits, GROWTH * fits), fits + 1)
        elif fails - fits <= 1:
            return
        else:
            bent = len(known) > STRAIGHT and len(known) % 2
            guess = None if bent else _on_the_line(known, _nearest(known, fits, fails), budget)
            yield min(max(guess if guess is not None else (fits + fails) // 2, fits + 1), fails - 1)


def _nearest(known: dict[int, int], fits: int, fails: int) -> list[int]:
    """The two sizes around the budget; where none fits, the two smallest."""
    return [fits, fails] if fits else sorted(known)[:2]


def _on_the_line(known: dict[int, int], sizes: list[int], budget: int) -> int | None:
    """Where the line through two sizes meets the budget; None where there is no such line."""
    if len(sizes) < 2:
        return None
    one, other = sizes
    slope = (known[other] - known[one]) / (other - one)
    return int(one + (budget - known[one]) / slope) if slope > 0 else None
