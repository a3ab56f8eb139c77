"""Runs given targets instead of searching for them: what the model says after each of their tokens.

They enter as prefixes that nothing is generated after, so they take the way of every request.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from beamline_server.engine.admission import MOST_ROWS
from beamline_server.engine.backend import Backend, Bucket
from beamline_server.engine.request import GenerationRequest, RequestId, SearchOptions, prompted
from beamline_server.engine.search import feed, start
from beamline_server.engine.table import FloatArray, IntArray, SequenceTable


class ForcedRow(NamedTuple):
    """What the model says after one token.

    Attributes:
        top_logprob: The best log-probabilities, best first, (C,).
        top_token: Their tokens, (C,).
        logprob: Those of all tokens, (V,), if they were asked for.
    """

    top_logprob: FloatArray
    top_token: IntArray
    logprob: FloatArray | None


def forced_rows(
    backend: Backend,
    sources: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
    *,
    logprobs: bool = False,
    part: int = MOST_ROWS,
) -> Iterator[tuple[int, int, ForcedRow]]:
    """What the model says after every token of some targets, which begin with the decoder start.

    A model without an encoder reads a source before its target.

    Args:
        backend: Computes.
        sources: One per target; empty ones only for a model without an encoder.
        targets: Token ids, none empty.
        logprobs: Whether the log-probabilities of all tokens are wanted, too.
        part: Tokens of a target that a step takes at most.

    Yields:
        The number of the target, the position of the token, and what comes after it.
    """
    table, cache, encoded = SequenceTable(len(sources), ()), backend.new_cache(), backend.encode(sources)
    first: list[int] = []
    for i, (source, target) in enumerate(zip(sources, targets, strict=True)):
        prefix, before = tuple(target[1:]), 0
        request = GenerationRequest(RequestId(i), tuple(source), SearchOptions(), target_prefix=prefix)
        if not backend.has_encoder:
            before = len(source)
            request = prompted(replace(request, source=(*source, target[0])))
        first.append(before)
        table.enter(i, request, target[0], part=part)
        table.reserve(slots=before + len(target), steps=1)
        start(table.arrays, i)
        cache.enter(i, encoded, i)
    left = len(targets)
    while left:
        buckets = cache.place(table.arrays)
        for bucket in buckets:
            for index, position, row in _run(bucket, table, logprobs=logprobs):
                if position >= first[index]:
                    yield index, position - first[index], row
        for index in (index for bucket in buckets for index in bucket.members.tolist()):
            sequence = table.arrays.sequences[index]
            if sequence.fed < sequence.prefix_length:
                feed(table.arrays, index)
            else:
                cache.leave(index)
                left -= 1


def _run(bucket: Bucket, table: SequenceTable, *, logprobs: bool) -> Iterator[tuple[int, int, ForcedRow]]:
    result = bucket.run(table.arrays, 1, logprobs=logprobs)
    # Copies: rows may be kept, and the next step may overwrite the result.
    top_logprob, top_token = result.top_logprob.copy(), result.top_token.copy()
    every = None if result.logprob is None else result.logprob.copy()
    row = 0
    for index in bucket.members.tolist():
        sequence = table.arrays.sequences[index]
        for position in sequence.position[: sequence.rows].tolist():
            yield index, position, ForcedRow(top_logprob[row], top_token[row], None if every is None else every[row])
            row += 1


def forced_decode(backend: Backend, source: Sequence[int], target: Sequence[int]) -> tuple[list[int], list[float]]:
    """The most probable token after each one of a target, and its log-probability."""
    tokens, logprobs = [], []
    for _, _, row in forced_rows(backend, [source], [target]):
        tokens.append(int(row.top_token[0]))
        logprobs.append(float(row.top_logprob[0]))
    return tokens, logprobs
