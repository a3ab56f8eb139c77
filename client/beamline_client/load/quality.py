"""Whether the answers were right: the same whenever asked, as recorded, and how good by BLEU and chrF.

Letters in shapes: n records, q questions.
"""

import hashlib
from collections.abc import Iterable
from itertools import islice, zip_longest
from pathlib import Path

import numpy as np

from beamline_client.load.golden import GoldenFile, GoldenKey, GoldenUnusable, Texts, read_golden, write_golden
from beamline_client.load.records import Records
from beamline_client.load.report import Golden, Quality
from beamline_client.load.target import Outcome, Question

__all__ = ["AnswerBook", "GoldenFile", "GoldenUnusable", "answer_hash", "read_golden"]

_TEXTS_KEPT = 4
"""Different answers to a question whose texts are kept; more are counted. A server that is right gives one."""
_OTHERS_KEPT = 100_000
"""Different answers beyond the first ones that are told apart; from there on, `Quality.distinct` says too little."""
_EXAMPLES = 5
_EXAMPLE_CHARACTERS = 60


def answer_hash(texts: Texts) -> int:
    """64 bits that stand for the hypotheses of an answer, the same in every process; never 0."""
    digest = hashlib.blake2b(digest_size=8)
    for text in texts:
        encoded = text.encode("utf-8", "surrogatepass")  # recorded answers may hold what no server can send
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    return int.from_bytes(digest.digest(), "little") or 1


class AnswerBook:
    """Keeps the different answers to each question. Asked in several ways, by stream or not, it is the same question.

    Its memory grows with the number of questions, not with that of requests, whatever the server answers.

    Args:
        questions: All of a workload, in order of their numbers.
        golden: What to compare with.
    """

    def __init__(self, questions: tuple[Question, ...], golden: GoldenFile | None = None) -> None:
        self._questions = questions
        self._golden = golden
        same: dict[object, int] = {}
        numbers = [same.setdefault((question.source, question.search), question.number) for question in questions]
        self._same = np.array(numbers, np.uint32)  # the first question that asks the same, shape [q]
        self._first = np.zeros(len(questions), np.uint64)  # the first answer; 0 is none yet; shape [q]
        self._others: set[tuple[int, int]] = set()
        self._texts: dict[int, dict[int, Texts]] = {}
        self._answered = self._inconsistent = 0
        recorded = {} if golden is None else golden.answers
        expected = [recorded.get(GoldenKey.of(question)) for question in questions]
        self._expected = np.array([0 if texts is None else answer_hash(texts) for texts in expected], np.uint64)
        self._different = self._missing = 0

    def learn(self, question: int, answer: int, texts: Texts) -> None:
        """Takes down what a hash stands for, before the first record that mentions it; again does no harm."""
        known = self._texts.setdefault(int(self._same[question]), {})
        if len(known) < _TEXTS_KEPT:
            known.setdefault(answer, texts)

    def add(self, records: Records) -> None:
        """Counts the answers among records, shape [n]."""
        answered = records[(records["outcome"] == Outcome.OK) & (records["answer"] != 0)]
        questions, answers = self._same[answered["question"]], answered["answer"]
        fresh = self._first[questions] == 0
        numbers, rows = np.unique(questions[fresh], return_index=True)
        self._first[numbers] = answers[fresh][rows]
        others = answers != self._first[questions]
        if len(self._others) < _OTHERS_KEPT:
            self._others.update(zip(questions[others].tolist(), answers[others].tolist(), strict=True))
        self._answered += len(answered)
        self._inconsistent += int(np.count_nonzero(others))
        expected = self._expected[questions]
        self._missing += int(np.count_nonzero(expected == 0))
        self._different += int(np.count_nonzero((expected != 0) & (expected != answers)))

    def quality(self) -> Quality | None:
        """What a report tells of the answers; None if there are none. Computes BLEU and chrF."""
        if not self._answered:
            return None
        bleu, chrf, signature = self._scores()
        return Quality(
            distinct=int(np.count_nonzero(self._first)) + len(self._others),
            inconsistent=self._inconsistent,
            examples=self._inconsistent_examples(),
            bleu=bleu,
            chrf=chrf,
            signature=signature,
            golden=self._compared(self._golden) if self._golden else None,
        )

    def failures(self) -> list[str]:
        """What the server failed at, in words."""
        failures = []
        if self._inconsistent:
            failures.append(
                f"answers that differ from the first one to the same question: {self._inconsistent:,} of "
                f"{self._answered:,}{_such_as(self._inconsistent_examples())}"
            )
        if self._golden and self._different:
            failures.append(
                f"answers that differ from {self._golden.path}: {self._different:,} of "
                f"{self._answered - self._missing:,}{_such_as(self._golden_examples(self._golden))}"
            )
        if self._golden and self._missing:
            failures.append(
                f"answers to questions that {self._golden.path} does not have: {self._missing:,} of "
                f"{self._answered:,}; record it with this workload"
            )
        return failures

    def write_golden(self, path: Path) -> None:
        """Records the first answer to each question.

        Raises:
            GoldenUnusable: There are no answers, or the file cannot be written.
        """
        answers = {}
        for number in np.flatnonzero(self._first).tolist():
            texts = self._first_texts(number)
            if texts is not None:
                answers[GoldenKey.of(self._questions[number])] = texts
        write_golden(path, answers)

    def _first_texts(self, number: int) -> Texts | None:
        return self._texts.get(number, {}).get(int(self._first[number]))

    def _inconsistent_examples(self) -> list[str]:
        found = (
            _example(self._questions[number], texts, "after", first)
            for number, known in sorted(self._texts.items())
            if (first := self._first_texts(number)) is not None
            for texts in known.values()
            if texts != first
        )
        return list(islice(found, _EXAMPLES))

    def _compared(self, golden: GoldenFile) -> Golden:
        return Golden(
            file=str(golden.path),
            compared=self._answered - self._missing,
            different=self._different,
            missing=self._missing,
            examples=self._golden_examples(golden),
        )

    def _golden_examples(self, golden: GoldenFile) -> list[str]:
        found = (
            _example(self._questions[number], texts, "instead of", expected)
            for number, known in sorted(self._texts.items())
            if (expected := golden.answers.get(GoldenKey.of(self._questions[number]))) is not None
            for texts in known.values()
            if texts != expected
        )
        return list(islice(found, _EXAMPLES))

    def _scores(self) -> tuple[float | None, float | None, str | None]:
        """BLEU, chrF and how they were computed, over best hypotheses of different answers that have references."""
        pairs = [
            (texts[0], self._questions[number].references)
            for number, known in sorted(self._texts.items())
            if self._questions[number].references
            for texts in known.values()
            if texts
        ]
        if not pairs:
            return None, None, None
        from sacrebleu.metrics import BLEU, CHRF  # costly to import, and only the coordinator needs it

        hypotheses = [hypothesis for hypothesis, _ in pairs]
        # sacreBLEU wants the first references of all, the second ones, and so on; None where there are no more.
        references = [list(nth) for nth in zip_longest(*(references for _, references in pairs))]
        bleu, chrf = BLEU(force=True), CHRF()  # force: do not warn of answers that end in a spaced full stop
        scores = [round(metric.corpus_score(hypotheses, references).score, 4) for metric in (bleu, chrf)]
        return scores[0], scores[1], f"BLEU {bleu.get_signature()}; chrF {chrf.get_signature()}"


def _example(question: Question, texts: Texts, relation: str, other: Texts) -> str:
    return f"{_short((question.source,))}: {_short(texts)} {relation} {_short(other)}"


def _short(texts: Iterable[str]) -> str:
    """Quoted, on one line."""
    text = " | ".join(texts)
    return repr(text if len(text) <= _EXAMPLE_CHARACTERS else text[: _EXAMPLE_CHARACTERS - 1] + "…")


def _such_as(examples: list[str]) -> str:
    return f", such as {examples[0]}" if examples else ""
