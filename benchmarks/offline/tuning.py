"""Finds the setting in which a contender is fastest."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from offline.task import Setting

FINALISTS = 3
FINAL_TRIES = 2

Try = Callable[[Setting], float]
"""Translates in a setting; returns sentences per second."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The setting that was chosen, its best rate in sentences per second, and how many there were to choose from."""

    setting: Setting
    sentences_per_s: float
    tried: int


def best_setting(settings: Sequence[Setting], quickly: Try, wholly: Try, *, tries: int = FINAL_TRIES) -> Choice:
    """Try all of them quickly, the best few wholly, and take the one with the best single run.

    The best run, for what disturbs a measurement only ever slows it down.

    Args:
        settings: At least one.
        quickly: Translates some of the sentences.
        wholly: Translates all of them.
        tries: Of each of the best few.
    """
    if len(settings) == 1:
        return Choice(settings[0], wholly(settings[0]), 1)
    finalists = list(range(len(settings)))
    if len(settings) > FINALISTS:
        rates = [quickly(setting) for setting in settings]
        finalists = sorted(finalists, key=lambda i: -rates[i])[:FINALISTS]
    best = dict.fromkeys(finalists, 0.0)
    for _ in range(tries):
        for i in finalists:
            best[i] = max(best[i], wholly(settings[i]))
    winner = max(best, key=best.__getitem__)
    return Choice(settings[winner], best[winner], len(settings))
