"""What is asked, and how patiently: drawn before the run, apart from when.

Letters in shapes: n requests, q questions.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from beamline_client.load.notation import (
    Mix,
    NotationUnusable,
    parse_duration_range_s,
    parse_duration_s,
    parse_mix,
    parse_positive_integer,
    parse_share,
)
from beamline_client.load.sentences import Bucket, Sentence, parse_lengths, pool
from beamline_client.load.target import Question, Request
from beamline_client.results import SearchOptions, ServerInfo

ParsedT = TypeVar("ParsedT")
Indices = npt.NDArray[np.intp]

MAX_CLASSES = 32
_OTHER_CLASSES = "other"
_ONE_CLASS = "all"
_STREAM = 1  # of the seed; arrivals draw from another
_ROUNDING = 1e-6  # of single precision


class WorkloadUnusable(ValueError):
    """The workload cannot be drawn; the text is one line that says all that is wrong."""


@dataclass(frozen=True, slots=True)
class WorkloadOptions:
    """A workload as the user writes it. A mix is one value, or several with weights such as "1:20%,4:80%"."""

    lengths: str = "any"
    """Mix of "any" and ranges such as "60-120", in words."""
    beams: str | None = None
    """Mix of beam widths; None is the server's default."""
    n_best: str | None = None
    """Mix of numbers of hypotheses; None is the server's default."""
    deadlines: str = "30s"
    """Mix of durations."""
    stream: str = "0%"
    """Share of requests that ask for a stream."""
    cancel: str = "0%"
    """Share of requests that are given up."""
    cancel_within: str = "0-200ms"
    """When, after the send: any time in the range is as likely."""
    max_new_tokens: int | None = None
    """None is the server's default."""


@dataclass(frozen=True, slots=True, eq=False)
class Workload:
    """The requests of a run, or of one generator process in it."""

    questions: tuple[Question, ...]
    """All that occur, in order of their numbers, which count from 0."""
    question: npt.NDArray[np.uint32]
    """Number of the question of each request, shape [n]."""
    deadline_s: npt.NDArray[np.float32]
    """From the send, shape [n]."""
    cancel_after_s: npt.NDArray[np.float32]
    """When the caller gives up, from the send; nan is never; shape [n]."""
    class_names: tuple[str, ...]
    """Kinds of questions, at most `MAX_CLASSES`, by what varies; one if nothing does."""
    class_of: npt.NDArray[np.uint16]
    """Index of each question's class, shape [q]."""

    def __len__(self) -> int:
        return len(self.question)

    def request(self, row: int) -> Request:
        """The request of a row, 0 to n - 1."""
        cancel_after_s = float(self.cancel_after_s[row])
        return Request(
            self.questions[self.question[row]],
            float(self.deadline_s[row]),
            None if math.isnan(cancel_after_s) else cancel_after_s,
        )

    def part(self, worker: int, workers: int) -> "Workload":
        """The share of one of several workers: rows worker, worker + workers, …; all questions."""
        rows = slice(worker, None, workers)
        return replace(
            self,
            question=self.question[rows].copy(),
            deadline_s=self.deadline_s[rows].copy(),
            cancel_after_s=self.cancel_after_s[rows].copy(),
        )


@dataclass(frozen=True, slots=True)
class _Plan:
    """Parsed options."""

    lengths: Mix[Bucket]
    beams: Mix[int | None]
    n_best: Mix[int | None]
    deadlines_s: Mix[float]
    stream: float
    cancel: float
    cancel_within_s: tuple[float, float]
    max_new_tokens: int | None


def check_options(options: WorkloadOptions) -> None:
    """Checks options without sentences.

    Raises:
        WorkloadUnusable: They are no workload; the text names all problems.
    """
    _parsed(options)


def draw_workload(sentences: Sequence[Sentence], options: WorkloadOptions, requests: int, seed: int) -> Workload:
    """Draws what a run asks: the same for the same arguments.

    Each option is drawn apart from the others and from the arrivals, so changing one leaves the rest as it was, and a
    longer run begins like a shorter one. The
    sentences of a bucket are drawn in random order without replacement, and over again when all were drawn.

    Args:
        sentences: What may be asked.
        options: The mix.
        requests: How many, n.
        seed: 0 or above.

    Raises:
        WorkloadUnusable: The options are no workload, there are no requests, or the seed is negative.
        SentencesUnusable: There are no sentences of a length that is asked for.
    """
    plan = _parsed(options)
    if requests < 1:
        raise WorkloadUnusable("a workload without requests: raise the rate or run longer")
    if seed < 0:
        raise WorkloadUnusable(f"the seed {seed} is negative: choose 0 or above")
    pools = [pool(sentences, bucket) for bucket in plan.lengths.values]
    # One generator for each thing that is drawn.
    seeds = np.random.SeedSequence([seed, _STREAM]).spawn(7)
    of_bucket, of_sentence, of_beam, of_n_best, of_stream, of_deadline, of_cancel = map(np.random.default_rng, seeds)
    bucket = _chosen(of_bucket, plan.lengths, requests)
    sentence = _sentences_in_turn(of_sentence, bucket, [len(members) for members in pools])
    searches = list(itertools.product(plan.beams.values, plan.n_best.values, (False, True)))
    search = _chosen(of_beam, plan.beams, requests) * len(plan.n_best.values)
    search = (search + _chosen(of_n_best, plan.n_best, requests)) * 2 + (of_stream.random(requests) < plan.stream)
    keys = sentence * len(searches) + search
    drawn, question, asked = np.unique(keys, return_inverse=True, return_counts=True)
    everything = [
        (member, bucket_of_it.name)
        for bucket_of_it, members in zip(plan.lengths.values, pools, strict=True)
        for member in members
    ]
    questions = tuple(
        _question(number, everything[key // len(searches)], searches[key % len(searches)], plan.max_new_tokens)
        for number, key in enumerate(drawn.tolist())
    )
    class_names, class_of = _classes(questions, asked)
    deadlines_s = np.array(plan.deadlines_s.values, np.float32)
    return Workload(
        questions,
        question.astype(np.uint32),
        deadlines_s[_chosen(of_deadline, plan.deadlines_s, requests)],
        _cancellations(of_cancel, plan, requests),
        class_names,
        class_of,
    )


def check_limits(workload: Workload, info: ServerInfo) -> list[str]:
    """What the server would refuse in a workload, one sentence for each kind of problem; empty if nothing."""
    limits, default = info.limits, info.default_search
    searches = {question.search for question in workload.questions}
    problems = []
    if not info.model.has_tokenizer:
        problems.append(
            "the model has no tokenizer and takes token ids, but a load is of texts: serve one with a tokenizer"
        )

    def refuse_above(what: str, values: Iterable[float | None], limit: float, unit: str) -> None:
        highest = max((value for value in values if value is not None), default=0)
        if highest > limit * (1 + _ROUNDING):
            problems.append(f"{what} of {highest:,g}{unit} is above the server's limit of {limit:,g}{unit}")

    refuse_above("a beam", (search.beam_size for search in searches), limits.max_beam_size, "")
    refuse_above("max_new_tokens", (search.max_new_tokens for search in searches), limits.max_new_tokens, "")
    lengths = (len(question.source.encode()) for question in workload.questions)
    refuse_above("a source", lengths, limits.max_text_bytes, " bytes")
    refuse_above("a deadline", [float(workload.deadline_s.max(initial=0))], limits.max_duration_s, " s")
    for search in sorted(searches, key=repr):
        beam_size = default.beam_size if search.beam_size is None else search.beam_size
        n_best = default.n_best if search.n_best is None else search.n_best
        if beam_size is not None and n_best is not None and n_best > beam_size:
            problems.append(f"an n-best of {n_best} is more than a beam of {beam_size} finds")
    return list(dict.fromkeys(problems))


def _parsed(options: WorkloadOptions) -> _Plan:
    problems: list[str] = []

    def read(name: str, text: str, parse: Callable[[str], ParsedT], instead: ParsedT) -> ParsedT:
        try:
            return parse(text)
        except NotationUnusable as error:
            problems.append(f"{name}: {error}")
            return instead

    def read_numbers(name: str, text: str | None) -> Mix[int | None]:
        unset: Mix[int | None] = Mix((None,), (1.0,))
        return unset if text is None else read(name, text, _numbers, unset)

    plan = _Plan(
        lengths=read("lengths", options.lengths, parse_lengths, Mix((Bucket("any"),), (1.0,))),
        beams=read_numbers("beams", options.beams),
        n_best=read_numbers("n-best", options.n_best),
        deadlines_s=read("deadlines", options.deadlines, _deadlines, Mix((30.0,), (1.0,))),
        stream=read("stream", options.stream, parse_share, 0.0),
        cancel=read("cancel", options.cancel, parse_share, 0.0),
        cancel_within_s=read("cancel within", options.cancel_within, parse_duration_range_s, (0.0, 0.2)),
        max_new_tokens=options.max_new_tokens,
    )
    narrowest = min((beam for beam in plan.beams.values if beam is not None), default=None)
    most = max((n_best for n_best in plan.n_best.values if n_best is not None), default=None)
    if narrowest is not None and most is not None and most > narrowest:
        problems.append(f"n-best: a beam of {narrowest} finds no {most} hypotheses; widen the beams or ask for fewer")
    if options.max_new_tokens is not None and options.max_new_tokens < 1:
        problems.append(f"max-new-tokens: {options.max_new_tokens} is not above 0")
    if problems:
        raise WorkloadUnusable("; ".join(problems))
    return plan


def _numbers(text: str) -> Mix[int | None]:
    return parse_mix(text, parse_positive_integer)


def _deadlines(text: str) -> Mix[float]:
    return parse_mix(text, _deadline_s)


def _deadline_s(text: str) -> float:
    deadline_s = parse_duration_s(text)
    if deadline_s <= 0:
        raise NotationUnusable(f"{text.strip()!r} leaves no time to answer: write a duration above 0")
    return deadline_s


def _chosen(generator: np.random.Generator, mix: Mix[Any], requests: int) -> Indices:
    """Draws values of a mix by their shares; returns their indices, shape [n]."""
    edges = np.cumsum(mix.shares)[:-1]  # the last share takes what rounding leaves
    return np.searchsorted(edges, generator.random(requests), side="right")


def _sentences_in_turn(generator: np.random.Generator, buckets: Indices, sizes: Sequence[int]) -> Indices:
    """Draws a sentence for each request, as an index into the pools put one after the other.

    Args:
        generator: Where chance comes from.
        buckets: The pool of each request, shape [n].
        sizes: Of the pools.

    Returns:
        Shape [n].
    """
    drawn = np.empty(len(buckets), np.intp)
    first = 0
    for bucket, (size, own) in enumerate(zip(sizes, generator.spawn(len(sizes)), strict=True)):
        rows = np.flatnonzero(buckets == bucket)
        rounds = -(-len(rows) // size)
        shuffled = own.permuted(np.tile(np.arange(first, first + size), (rounds, 1)), axis=1)
        drawn[rows] = shuffled.ravel()[: len(rows)]
        first += size
    return drawn


def _question(
    number: int,
    drawn: tuple[Sentence, str],
    search: tuple[int | None, int | None, bool],
    max_new_tokens: int | None,
) -> Question:
    sentence, bucket = drawn
    beam_size, n_best, stream = search
    options = SearchOptions(beam_size=beam_size, n_best=n_best, max_new_tokens=max_new_tokens)
    return Question(number, sentence.source, options, stream, bucket, sentence.references)


def _cancellations(generator: np.random.Generator, plan: _Plan, requests: int) -> npt.NDArray[np.float32]:
    """When callers give up, in seconds from the send; nan is never; shape [n]."""
    chance = generator.random((requests, 2), np.float32)
    earliest_s, latest_s = plan.cancel_within_s
    after_s = earliest_s + (latest_s - earliest_s) * chance[:, 1]
    return np.where(chance[:, 0] < plan.cancel, after_s, np.float32(np.nan)).astype(np.float32)


def _classes(questions: Sequence[Question], asked: Indices) -> tuple[tuple[str, ...], npt.NDArray[np.uint16]]:
    """Names of the classes, those asked most first, and the index of each question's, shape [q].

    Args:
        questions: All questions.
        asked: How often each is asked, shape [q].
    """
    kinds = [
        (
            "default beam" if question.search.beam_size is None else f"beam {question.search.beam_size}",
            "default n-best" if question.search.n_best is None else f"{question.search.n_best}-best",
            "any length" if question.bucket == "any" else f"{question.bucket} words",
            "stream" if question.stream else "unary",
        )
        for question in questions
    ]
    varying = [place for place in range(4) if len({kind[place] for kind in kinds}) > 1]
    names = [", ".join(kind[place] for place in varying) or _ONE_CLASS for kind in kinds]
    requests = Counter[str]()
    for name, count in zip(names, asked.tolist(), strict=True):
        requests[name] += count
    ranked = [name for name, _ in requests.most_common()]
    if len(ranked) > MAX_CLASSES:
        ranked = [*ranked[: MAX_CLASSES - 1], _OTHER_CLASSES]
    places = {name: place for place, name in enumerate(ranked)}
    return tuple(ranked), np.array([places.get(name, len(ranked) - 1) for name in names], np.uint16)
