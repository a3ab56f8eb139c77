"""At which position of its sequence the token of each slot stands: a step of relative positions takes it.

Slots are not in the order of positions, and are taken again. The numbers stay on the host, which knows them all, and go
over with the other inputs of a step.
"""

from collections.abc import Sequence

import numpy as np

from beamline_server.engine.ort.cuda.fixed_run import FixedRun
from beamline_server.engine.table import IntArray

SLOT_POSITIONS = "slot_positions"
"""What the graph calls them."""


class SlotPositions:
    """Those of a bucket.

    Attributes:
        numbers: (S, P); of slots that nobody attends to they may be anything.
    """

    def __init__(self) -> None:
        self.numbers: IntArray = np.zeros((1, 0), np.int64)

    def arrange(
        self, origins: Sequence[tuple["SlotPositions", int] | None], batch_index: IntArray, batch: int, slots: int
    ) -> None:
        """Arrange sequences anew.

        Args:
            origins: Where each was before, this bucket or another one, and its batch index there; None if it is new.
            batch_index: Where each is from now on.
            batch: S.
            slots: P.
        """
        numbers = np.zeros((batch, slots), np.int64)
        for origin, now in zip(origins, batch_index.tolist(), strict=True):
            if origin is not None:
                there, before = origin
                kept = there.numbers[before, :slots]
                numbers[now, : len(kept)] = kept
        self.numbers = numbers

    def write(self, run: FixedRun, rows: int) -> None:
        """Take in where the rows of a step stand, and write all into its inputs, which have been packed."""
        slot = run.inputs["slot"].reshape(len(run.inputs["slot"]), -1)[:rows]
        self.numbers[slot[:, 0], slot[:, 1]] = run.inputs["positions"][:rows]
        run.inputs[SLOT_POSITIONS][:] = self.numbers
