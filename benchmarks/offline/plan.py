"""How much is measured: all of it, or as little as shows that everything works."""

import math
from dataclasses import dataclass

from offline.models import RANDOM_SENTENCES


@dataclass(frozen=True, slots=True)
class Plan:
    """How much to measure.

    Attributes:
        repetitions: Of everything, interleaved.
        search: Whether each contender's best setting is looked for; else the first one is taken.
        file_sentences: Of the test file; None: all.
        search_sentences: Of the test file, for a first look at a setting.
        batch_sentences: Of the test file, by batch.
        random_s: How long a contender is to compute at a time with a random model, in seconds; at least one batch.
        settle_s: Between two contenders, for the threads of the one before to fall asleep.
    """

    repetitions: int
    search: bool
    file_sentences: int | None
    search_sentences: int
    batch_sentences: dict[int, int]
    random_s: float
    settle_s: float = 0.3

    def random_sentences(self, batch: int, sentences_per_s: float, *, slow: bool) -> int:
        """Sentences of a random model for one repetition, a multiple of the batch."""
        wanted = batch if slow else sentences_per_s * self.random_s
        return min(RANDOM_SENTENCES, max(1, math.ceil(wanted / batch)) * batch)


BATCHES = (1, 8, 32)
FULL = Plan(5, True, None, 512, {1: 200, 8: 200, 32: 512}, 1.2)
QUICK = Plan(1, False, 100, 50, {1: 10, 8: 16, 32: 32}, 0.0)
GATE = Plan(5, True, 768, 256, {1: 100, 8: 200, 32: 512}, 1.5)
