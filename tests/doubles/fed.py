"""Sequences that are fed given tokens, for tests that drive a memory by hand."""

from collections.abc import Sequence

import numpy as np

from beamline_server.engine.backend import Backend, StepResult
from beamline_server.engine.ort.cuda.buckets import FromEncoder, Memory, Origin
from beamline_server.engine.pack import extent
from beamline_server.engine.request import GenerationRequest, RequestId, SearchOptions
from beamline_server.engine.search import feed, start
from beamline_server.engine.table import FloatArray, SequenceTable, Table
from beamline_server.models.forced import forced_rows

Tokens = tuple[int, ...]


class FedSequences:
    """A table of sequences that are fed targets, some tokens of each at every step.

    Args:
        sources: Token ids of each.
        targets: What each is fed.
        part: Tokens of a target that a step takes at most.
    """

    def __init__(self, sources: Sequence[Tokens], targets: Sequence[Tokens], *, part: int = 1) -> None:
        self._table = SequenceTable(len(sources), ())
        self._table.reserve(slots=max(map(len, targets)), steps=1)
        self._sources, self._targets, self._part = sources, targets, part
        for index in range(len(sources)):
            self.restart(index)

    @property
    def arrays(self) -> Table:
        """The table as compiled loops take it."""
        return self._table.arrays

    def run(self, memory: Memory, members: Sequence[int], *, candidates: int = 3, logprobs: bool = False) -> StepResult:
        """Compute the rows of these sequences, who stand in the memory in this order; copies of what came out."""
        who = np.array(members, np.int64)
        found = memory.run(self.arrays, who, extent(self.arrays, who), candidates, logprobs=logprobs)
        every = None if found.logprob is None else found.logprob.copy()
        return StepResult(found.top_logprob.copy(), found.top_token.copy(), every)

    def restart(self, index: int) -> None:
        """Begin to feed a sequence, anew if it has been."""
        source, target = self._sources[index], self._targets[index]
        request = GenerationRequest(RequestId(index), source, SearchOptions(), target_prefix=target[1:])
        self._table.enter(index, request, target[0], part=self._part)
        start(self.arrays, index)

    def feed(self, members: Sequence[int]) -> None:
        """Let these sequences go on to their next tokens."""
        for index in members:
            feed(self.arrays, index)


def newcomers(backend: Backend, sources: Sequence[Tokens]) -> list[Origin]:
    """What a memory takes sequences from that begin."""
    encoded = backend.encode(sources)
    return [FromEncoder(encoded, number) for number in range(len(sources))]


def logprobs_alone(backend: Backend, source: Tokens, target: Tokens) -> FloatArray:
    """Log-probabilities of all tokens after each token of a target, fed alone and one by one, (T, V)."""
    found: list[FloatArray] = []
    for _, _, row in forced_rows(backend, [source], [target], logprobs=True, part=1):
        assert row.logprob is not None
        found.append(row.logprob.copy())
    return np.stack(found)
