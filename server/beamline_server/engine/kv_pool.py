"""Which slots of its sentence's key-value pool each beam descends from.

All beams of a sentence share one pool of slots. A step writes every live beam's new key and value into a free slot;
nothing is ever moved when beams are reordered, because a beam is a set of slots: its ancestors.

    beam 0   slots {0, 1, 4}       after a step in which beams 0 and 1 both continue beam 1:
    beam 1   slots {0, 2, 3}       beam 0 {0, 2, 3, 1},  beam 1 {0, 2, 3, 4}: the slots 1 and 4, which no live beam
                                   descends from any more, are used again, lowest first

A new token takes its sentence's lowest slot that no live beam descends from. So slot numbers depend on the sentence's
own history alone, and so do the last bits of its attention, which sums in slot order.

Axes: S sentences of a step, K the widest beam among them, P slots.
"""

import numpy as np

from beamline_server.engine.beam import BoolArray, IntArray

_CHUNK = 64


class SlotTable:
    """Ancestors of all beams of up to `places` sentences."""

    def __init__(self, places: int, beams: int) -> None:
        self._ancestors = np.zeros((places, beams, _CHUNK), np.bool_)
        self._end = np.zeros(places, np.int64)

    def clear(self, place: int) -> None:
        """Start a new sentence at a place."""
        self._ancestors[place] = False
        self._end[place] = 0

    def assign(self, places: IntArray, parent: IntArray, live: BoolArray) -> IntArray:
        """Let each live beam continue its parent and take a slot for its new token.

        Args:
            places: The sentences, (S,).
            parent: The beam that each beam continues, (S, K).
            live: Which beams exist, (S, K). K is at least the width of each search, so that beams which ended are
                forgotten.

        Returns:
            The slot of each live beam's new token, (S, K); meaningless for the others.
        """
        beams = parent.shape[1]
        # Slots from the highest in use on are free, so this many hold all that is in use and a free one per beam.
        slots = int(self._end[places].max(initial=0)) + beams
        self._reserve(slots)
        ancestors = self._ancestors[places[:, None], parent, :slots]
        everybody = bool(live.all())
        if not everybody:
            ancestors &= live[:, :, None]
        free_rank = (~np.logical_or.reduce(ancestors, axis=1)).cumsum(axis=1)
        # Beam j takes the j-th free slot: the first place where the count of free slots reaches j + 1.
        wanted = np.arange(1, beams + 1)[:, None] if everybody else live.cumsum(axis=1)[:, :, None]
        slot: IntArray = (free_rank[:, None, :] >= wanted).argmax(axis=2)
        taken = slot + np.arange(0, ancestors.size, slots).reshape(slot.shape)
        ancestors.reshape(-1)[taken if everybody else taken[live]] = True
        self._ancestors[places, :beams, :slots] = ancestors
        in_use: BoolArray = np.logical_or.reduce(ancestors, axis=1)
        self._end[places] = slots - in_use[:, ::-1].argmax(axis=1)
        return slot

    def ends(self, places: IntArray) -> IntArray:
        """One past the highest slot in use of each sentence, (S,)."""
        return self._end[places]

    def in_use(self) -> int:
        """Number of slots that some beam descends from."""
        return int(self._ancestors.any(axis=1).sum())

    def mask(self, places: IntArray, beams: int, slots: int) -> BoolArray:
        """Ancestors of the first `beams` beams over `slots` slots, (S, 1, beams, slots)."""
        self._reserve(slots)
        return self._ancestors[places, :beams, :slots][:, None]

    def _reserve(self, slots: int) -> None:
        places, beams, present = self._ancestors.shape
        if slots > present:
            wider = np.zeros((places, beams, -(-slots // _CHUNK) * _CHUNK), np.bool_)
            wider[:, :, :present] = self._ancestors
            self._ancestors = wider
