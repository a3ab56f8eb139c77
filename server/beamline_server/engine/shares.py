"""Rows that callers leave to each other: the last ones of a worker are for those who have none.

A sequence that runs is not interrupted. So whoever takes all rows with long searches makes everybody wait until one of
these ends, however few others ask, and however soon their turn is. As long as others are about, a caller whose
sequences run already starts no more of them in the last eighth of the rows, and nothing of batch priority starts there.
"""

from collections.abc import Iterable, Iterator

from beamline_server.engine.admission import cost
from beamline_server.engine.request import GenerationRequest, Priority

_LEFT = 8
"""One row of so many is left to others."""
_REMEMBERED_S = 10.0
"""For so long after it has come a caller is about."""


class Shares:
    """What the callers of a worker hold of its rows.

    Args:
        rows: That the worker can run.
    """

    def __init__(self, rows: int) -> None:
        self._most = rows - rows // _LEFT
        self.held: dict[str, int] = {}
        """Rows of each caller who has any."""
        self._came: dict[
            str, float
        ] = {}  # when the last callers came, the latest last; two tell whether others are about

    @property
    def rows(self) -> int:
        """Rows that all of them hold."""
        return sum(self.held.values())

    def came(self, caller: str, now: float) -> None:
        """A caller asks for something."""
        self._came.pop(caller, None)
        self._came[caller] = now
        if len(self._came) > 2:
            del self._came[next(iter(self._came))]

    def start(self, request: GenerationRequest) -> None:
        """A request takes its rows."""
        self.held[request.caller] = self.held.get(request.caller, 0) + cost(request).rows

    def end(self, request: GenerationRequest) -> None:
        """A request gives its rows back."""
        self.held[request.caller] -= cost(request).rows
        if not self.held[request.caller]:
            del self.held[request.caller]

    def startable(self, queue: Iterable[GenerationRequest], now: float) -> Iterator[GenerationRequest]:
        """Those of a queue who may start now, in its order, each supposing that those before it do."""
        held, total = dict(self.held), self.rows
        for request in queue:
            own, rows = held.get(request.caller, 0), cost(request).rows
            counted = own if request.priority is Priority.NORMAL else total
            if counted == 0 or counted + rows <= self._most or not self._others_are_about(request.caller, now):
                held[request.caller] = own + rows
                total += rows
                yield request

    def _others_are_about(self, caller: str, now: float) -> bool:
        return any(other != caller and at > now - _REMEMBERED_S for other, at in self._came.items())
