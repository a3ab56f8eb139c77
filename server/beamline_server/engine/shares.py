"""Who may start: callers who have little always find room, whatever others hold.

A sequence that runs is not interrupted. So whoever takes all rows with long searches would make everybody wait until
one of these ends, however few others ask. Therefore a worker has a spare part beside its capacity
(`Capacity.spare`): it is for those who hold nothing, or no more than the spare part with what they ask for.
"""

from collections.abc import Iterable, Iterator, Mapping

from beamline_server.engine.admission import Capacity, Cost, Room, cost
from beamline_server.engine.request import Account, GenerationRequest, Priority

_NOTHING = Cost(0, 0)


class Shares:
    """What the callers of a worker hold.

    Args:
        capacity: Of the worker.
    """

    def __init__(self, capacity: Capacity) -> None:
        self._spare = capacity.spare
        self._held: dict[Account, Cost] = {}

    @property
    def rows(self) -> dict[Account, int]:
        """Rows of each account that has any."""
        return {of: held.rows for of, held in self._held.items()}

    def start(self, request: GenerationRequest) -> None:
        """A request takes its rows and slots."""
        self._held[request.account] = self._held.get(request.account, _NOTHING) + cost(request)

    def end(self, request: GenerationRequest, held: Cost) -> None:
        """A request gives back what it still holds."""
        self.give_back(request, held)
        if self._held[request.account] == _NOTHING:
            del self._held[request.account]

    def give_back(self, request: GenerationRequest, part: Cost) -> None:
        """A request needs a part of what it holds no more."""
        self._held[request.account] -= part

    def startable(
        self, queue: Iterable[GenerationRequest], waiting: Mapping[Account, int], room: Room
    ) -> Iterator[GenerationRequest]:
        """Those of a queue for whom the spare part need not be free, or who may take it, in order.

        Each is judged as if those before it started. Behind the first for whom the room is not enough without the spare
        part nobody else takes any of it, or narrow requests would keep a wide one out.

        Args:
            queue: Who waits, in order.
            waiting: How many they are, by account.
            room: What is free, the spare part included.
        """
        held, usual, others_wait = dict(self._held), room.less(self._spare), False
        little = {of for of in waiting if of[1] is Priority.NORMAL and held.get(of, _NOTHING) <= self._spare}
        may_take_more = sum(waiting[of] for of in little)
        for request in queue:
            needed, of = cost(request), request.account
            own = held.get(of, _NOTHING)
            may_take_more -= of in little
            if of not in little or not (own == _NOTHING or own + needed <= self._spare):
                others_wait = others_wait or not usual.fits(needed)
                if others_wait:
                    if not may_take_more:
                        return
                    continue
            held[of] = own + needed
            usual = usual.less(needed)
            yield request
