"""The largest batch or sequence whose step fits: few trials, since each traces the model anew."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

__all__ = ["MOST_TRIALS", "Fit", "largest"]

MOST_TRIALS = 16
"""The smallest budget is nearly a line in the size, so four or five trials do."""


@dataclasses.dataclass(frozen=True)
class Fit:
    """size: the largest that fits, 0: not even one does. trials: (size, smallest budget in bytes), as they were made."""

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
        if fails is not None and fails - fits <= 1:
            return
        yield _between(_on_the_line(known, budget), fits, fails)


def _between(guess: int | None, fits: int, fails: int | None) -> int:
    """`guess`, moved to where it can tell something; without one, twice or half of what is known."""
    if fails is None:
        return max(guess if guess is not None else 2 * fits, fits + 1)
    guess = (fits + fails) // 2 if guess is None else guess
    return min(max(guess, fits + 1), fails - 1)


def _on_the_line(known: dict[int, int], budget: int) -> int | None:
    """Where the line through the two sizes nearest to the budget meets it; None where there is no such line."""
    nearest = sorted(known.items(), key=lambda item: abs(item[1] - budget))[:2]
    if len(nearest) < 2:
        return None
    (one, least), (other, most) = nearest
    slope = (most - least) / (other - one)
    return int(one + (budget - least) / slope) if slope > 0 else None
