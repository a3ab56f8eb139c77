"""How fast a worker is and how long answers become, learnt from its steps and answers; so, how long a newcomer takes.

Work is counted in row-steps: rows of a request times the steps that it is expected to take. A worker whose rows are all
taken ends so many row-steps a second, and a newcomer waits until those that are ahead of it have ended.

    wait      = row-steps that are queued ahead / row-steps per second
    service   = steps of its own × seconds per step

Both are expected values: who decides by them is right more often than not.
"""

import math
from dataclasses import dataclass

from beamline_server.engine.admission import MOST_ROWS
from beamline_server.engine.request import GenerationRequest

_MEMORY_S = 2.0
"""What is so old counts for a third, in seconds of work."""
_ANSWERS = 50
"""As many answers as a new one replaces in what is known of their lengths."""


@dataclass(slots=True)
class Pace:
    """Of one worker that is busy; written by its thread, read by others.

    Attributes:
        row_steps_per_s: Rows that full steps compute a second; 0 before the first one.
        step_s: Seconds of a step, with what stands between two of them.
        steps_per_token: Steps of an answer for each token of its source, those that feed its prefix apart; 0 before
            the first one, and of models without sources.
        steps_per_answer: Steps of an answer, those apart, too.
        work_per_answer: Row-steps of an answer.
    """

    row_steps_per_s: float = 0.0
    step_s: float = 0.0
    steps_per_token: float = 0.0
    steps_per_answer: float = 0.0
    work_per_answer: float = 0.0
    _rows: float = 0.0
    _steps: float = 0.0
    _seconds: float = 0.0
    _aside_s: float = 0.0

    def stepped(self, rows: int, seconds: float, aside_s: float = 0.0) -> None:
        """A step took so long, of so many rows that it tells how long a full one takes.

        Args:
            rows: Of the step.
            seconds: That it took.
            aside_s: That steps of few others took before it.
        """
        kept = math.exp(-(seconds + aside_s) / _MEMORY_S)
        self._rows = kept * self._rows + rows
        self._steps = kept * self._steps + 1.0
        self._seconds = kept * self._seconds + seconds
        self._aside_s = kept * self._aside_s + aside_s
        if self._seconds > 0:
            self.row_steps_per_s = self._rows / (self._seconds + self._aside_s)
            self.step_s = self._seconds / self._steps

    def answered(self, request: GenerationRequest, steps: int) -> None:
        """An answer took so many steps."""
        generating = steps - _feeding(request)
        weight = 1.0 / _ANSWERS if self.steps_per_answer else 1.0
        if request.source:
            self.steps_per_token += weight * (generating / len(request.source) - self.steps_per_token)
        self.steps_per_answer += weight * (generating - self.steps_per_answer)
        work = len(request.target_prefix) + generating * request.options.beam_size
        self.work_per_answer += weight * (work - self.work_per_answer)

    def steps(self, request: GenerationRequest) -> float:
        """How many steps a request is expected to take."""
        return _feeding(request) + self._generating(request)

    def work(self, request: GenerationRequest) -> float:
        """The row-steps of a request."""
        return len(request.target_prefix) + request.options.beam_size * self._generating(request)

    def _generating(self, request: GenerationRequest) -> float:
        """Steps that a request is expected to take, but for those that feed its prefix."""
        expected = self.steps_per_token * len(request.source) if request.source else self.steps_per_answer
        return min(max(expected, request.options.min_new_tokens, 1.0), request.options.max_new_tokens)

    def service_s(self, request: GenerationRequest) -> float:
        """How long a request takes once it has started, in seconds."""
        return self.steps(request) * self.step_s

    @property
    def usual_service_s(self) -> float:
        """How long a request of which nothing is known takes once it has started, in seconds."""
        return self.steps_per_answer * self.step_s

    def wait_s(self, row_steps: float) -> float:
        """How long so much work takes, in seconds."""
        return row_steps / self.row_steps_per_s if self.row_steps_per_s > 0 else 0.0


def _feeding(request: GenerationRequest) -> int:
    """Steps that feed a prefix and generate nothing: the last part of it generates."""
    return -(-(1 + len(request.target_prefix)) // MOST_ROWS) - 1
