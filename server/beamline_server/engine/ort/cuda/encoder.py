"""Runs of the encoder at fixed addresses, whose outputs stay in place until they have been moved into a cache."""

import weakref
from collections.abc import Sequence

import onnxruntime as ort

from beamline_server.engine.backend import Encoded
from beamline_server.engine.ort.cuda.captured_graphs import CapturedGraphs
from beamline_server.engine.ort.cuda.fixed_run import KEPT_RUNS, FixedRun
from beamline_server.engine.ort.cuda.memory import EncodedRows
from beamline_server.engine.ort.cuda.shapes import EncoderShape, encoder_shape
from beamline_server.engine.ort.settings import ENCODER_INPUTS
from beamline_server.engine.pack import EncoderInputs, flat, pack_encoder


class _Loan:
    """Alive as long as somebody may read a run's outputs."""


class _Entry:
    def __init__(self, shape: EncoderShape, run: FixedRun) -> None:
        self.shape = shape
        self.run = run
        self.loan: weakref.ref[_Loan] | None = None

    @property
    def free(self) -> bool:
        return self.loan is None or self.loan() is None

    def lend(self) -> _Loan:
        loan = _Loan()
        self.loan = weakref.ref(loan)
        return loan


class EncoderRuns:
    """Encodes on a device. One thread at a time.

    Args:
        session: Of the encoder.
        outputs: Names of its outputs, in order.
        device: Where it runs.
        graphs: Captured ones, of the encoder.
    """

    def __init__(
        self, session: ort.InferenceSession, outputs: Sequence[str], *, device: str, graphs: CapturedGraphs
    ) -> None:
        self._session = session
        self._outputs = list(outputs)
        self._device = device
        self._graphs = graphs
        # The last used one is the last.
        self._entries: list[_Entry] = []

    def encode(self, sources: Sequence[Sequence[int]]) -> Encoded:
        """As `Backend.encode`."""
        ids, lengths = flat(sources)
        entry = self._entry(encoder_shape(len(lengths), int(lengths.max())))
        run, shape = entry.run, entry.shape
        pack_encoder(ids, lengths, EncoderInputs(*(run.inputs[name] for name in ENCODER_INPUTS)))
        run.send()
        self._graphs.run(run)
        rows = EncodedRows(
            address=run.address_of[self._outputs[0]],
            tensor_rows=shape.sources * shape.source_width,
            source_width=shape.source_width,
            source_length=lengths,
            keeper=(run, entry.lend()),
        )
        return Encoded(rows, shape.sources * shape.source_width - len(ids))

    def _entry(self, shape: EncoderShape) -> _Entry:
        found = next((entry for entry in self._entries if entry.shape == shape and entry.free), None)
        if found is None:
            uncaptured = [entry for entry in self._entries if entry.run.graph is None]
            if len(uncaptured) >= KEPT_RUNS:
                self._entries.remove(uncaptured[0])
            found = _Entry(shape, FixedRun(self._session, self._device, shape.axes()))
        else:
            self._entries.remove(found)
        self._entries.append(found)
        return found
