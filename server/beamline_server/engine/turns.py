"""Whose sequences a step computes: those of callers with few rows also go in steps of their own.

A step takes as long as its rows take. Beside a caller who holds most rows of a worker, everybody else would get one
token in each of its long steps, however little they ask for. So callers with few rows have steps of their own, short
ones, as long as they have credit: a step of all gives them as many seconds as it takes, and one of their own costs what
it takes. In the long run they have half of the time at most.

Where callers hold about as many rows as each other, all go in every step, which costs least.
"""

from collections.abc import Mapping
from itertools import pairwise

from beamline_server.engine.request import Account

_FEW = 4
"""Few rows are a part of this many: of all rows, together, and of what each of the others holds."""
_MOST_CREDIT_S = 0.1
"""Enough for a usual answer from its first step to its last."""


class Turns:
    """Whether a worker's callers with few rows go alone.

    Attributes:
        credit_s: Seconds that they have for steps of their own.
    """

    def __init__(self) -> None:
        self.credit_s = _MOST_CREDIT_S

    @property
    def of_few(self) -> bool:
        """Whether the next step is theirs alone."""
        return self.credit_s > 0

    def took(self, seconds: float, *, was_of_few: bool) -> None:
        """A step has ended, which was meant for few or for all, whoever went."""
        self.credit_s = self.credit_s - seconds if was_of_few else min(self.credit_s + seconds, _MOST_CREDIT_S)


def accounts_with_few(held: Mapping[Account, int]) -> frozenset[Account]:
    """As many accounts as have few rows, given the rows of each."""
    total, of_few, found = sum(held.values()), 0, 0
    by_rows = sorted(held, key=held.__getitem__)
    for number, (one, following) in enumerate(pairwise(by_rows), 1):
        of_few += held[one]
        if _FEW * of_few > total:
            break
        if _FEW * held[one] <= held[following]:
            found = number
    return frozenset(by_rows[:found])
