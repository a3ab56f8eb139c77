"""Runs of one shape at fixed addresses: all inputs go to the device in one copy, all outputs come back in one.

A captured CUDA graph reads and writes the addresses that were bound when it was captured. The memory here stays where
it is as long as the object lives, so a run is: write the inputs into host memory, copy them over, run.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

KEPT_RUNS = 16
"""Runs without a captured graph that stay bound, of a cache or of the encoder: the last used ones."""
_ALIGNMENT = 64
_TYPES: dict[str, type[np.generic]] = {
    "tensor(int64)": np.int64,
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(bool)": np.bool_,
}


class DeviceBuffer:
    """Bytes on a device, at an address that stays. They start as zeros, so that no padding is ever NaN."""

    def __init__(self, size: int, device: str) -> None:
        self.size = size
        self._value = ort.OrtValue.ortvalue_from_shape_and_type([size], np.uint8, device, 0)
        self.address: int = self._value.data_ptr()
        self.write(np.zeros(size, np.uint8))

    def write(self, everything: NDArray[np.uint8]) -> None:
        """Overwrite all of it, (size,); returns when the host memory may be used again."""
        self._value.update_inplace(everything)

    def read(self) -> NDArray[np.uint8]:
        """A copy of all of it, (size,)."""
        # On a CPU the array is the buffer itself, which the next run writes to.
        return np.array(self._value.numpy())


class _Layout:
    """Tensors side by side in one buffer."""

    def __init__(self, values: Sequence[Any], axes: Mapping[str, int]) -> None:
        self.size = 0
        self.places: dict[str, tuple[int, tuple[int, ...], np.dtype[Any]]] = {}
        for value in values:
            shape = concrete(value.shape, axes)
            dtype = np.dtype(_TYPES[value.type])
            self.places[value.name] = (self.size, shape, dtype)
            self.size += -(-int(np.prod(shape)) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT

    def views(self, buffer: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        """The tensors in host memory of this layout."""
        return {
            name: buffer[offset : offset + int(np.prod(shape)) * dtype.itemsize].view(dtype).reshape(shape)
            for name, (offset, shape, dtype) in self.places.items()
        }


def concrete(declared: Sequence[str | int], axes: Mapping[str, int]) -> tuple[int, ...]:
    """A shape as the graph declares it, with numbers for letters."""
    return tuple(axes[axis] if isinstance(axis, str) else axis for axis in declared)


class FixedRun:
    """One shape of a session's graph, bound once.

    Args:
        session: Of the graph; its inputs and outputs name their axes.
        device: Where it runs.
        axes: The number of each axis.
        elsewhere: Addresses of inputs and outputs that lie in memory of somebody else, who keeps it.
        host: Inputs that the graph wants in host memory and that never change.
        without: Outputs that nobody wants.

    Attributes:
        inputs: All other inputs, in host memory: write them before `run`.
        uses: How often it has run.
        graph: Number of its captured graph, if it has been given one.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        device: str,
        axes: Mapping[str, int],
        *,
        elsewhere: Mapping[str, int] | None = None,
        host: Mapping[str, NDArray[Any]] | None = None,
        without: Collection[str] = (),
    ) -> None:
        elsewhere, host = elsewhere or {}, host or {}
        self._session = session
        given = [value for value in session.get_inputs() if value.name not in elsewhere and value.name not in host]
        outputs = [value for value in session.get_outputs() if value.name not in without]
        made = [value for value in outputs if value.name not in elsewhere]
        sent, received = _Layout(given, axes), _Layout(made, axes)
        self._received = received
        self._staging = np.zeros(sent.size, np.uint8)
        self.inputs = sent.views(self._staging)
        self._sent_to, self._received_in = DeviceBuffer(sent.size, device), DeviceBuffer(received.size, device)
        self._binding = session.io_binding()
        for name, array in host.items():
            self._binding.bind_cpu_input(name, array)
        starts = {name: self._sent_to.address + offset for name, (offset, *_) in sent.places.items()}
        starts |= {name: self._received_in.address + offset for name, (offset, *_) in received.places.items()}
        starts |= elsewhere
        for bind, values in (
            (self._binding.bind_input, session.get_inputs()),
            (self._binding.bind_output, outputs),
        ):
            for value in values:
                if value.name not in host:
                    shape = concrete(value.shape, axes)
                    bind(value.name, device, 0, _TYPES[value.type], shape, starts[value.name])
        self.address_of = {name: starts[name] for name in received.places}
        self.uses = 0
        self.graph: int | None = None

    def send(self) -> None:
        """Copy what is in `inputs` to the device."""
        self._sent_to.write(self._staging)

    def run(self, options: ort.RunOptions) -> None:
        """Compute from what was sent; returns when the outputs are there."""
        self._session.run_with_iobinding(self._binding, options)
        # A run waits for its stream by default; a replayed graph's outputs must not be read earlier either.
        self._binding.synchronize_outputs()

    def receive(self) -> dict[str, NDArray[Any]]:
        """Copies of the outputs that are not elsewhere."""
        return self._received.views(self._received_in.read())
