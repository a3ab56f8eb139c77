"""What is looked at of a call before anything is made of it: its metadata, and the raw bytes of its request.

A parser makes a kilobyte of what two bytes may say, and takes whatever comes. So whoever means harm is known here.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from beamline_server.engine.errors import Violation
from beamline_server.rpc.errors import InvalidRequest, MalformedMessage, MetadataTooLarge, ServerFull

MOST_METADATA_BYTES = 16 * 1024
"""As gRPC's own limit, which callers can do without: until they acknowledge a connection's settings, there is none."""
_OVERHEAD_BYTES = 32
"""Of an entry, as HTTP/2 counts (RFC 9113, 6.5.2)."""
_INPUTS_FIELD = 2
"""Of GenerateRequest; GenerateStreamRequest has its one input there."""
_OTHER_FIELDS = 64
"""More fields than a request has beside its inputs."""
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_LONGEST_VARINT = 10


class RequestMemory:
    """The bytes of all requests that are being handled.

    Args:
        most_bytes: There may be.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._bytes = 0

    @contextmanager
    def held(self, size_bytes: int) -> Iterator[None]:
        """Within it, a request of this size is held.

        Raises:
            ServerFull: there are too many bytes already.
        """
        if self._bytes + size_bytes > self._most_bytes:
            raise ServerFull("the requests that are being handled have too many bytes")
        self._bytes += size_bytes
        try:
            yield
        finally:
            self._bytes -= size_bytes


def refused_metadata(metadata: Iterable[tuple[str, str | bytes]]) -> MetadataTooLarge | None:
    """Why a call with this metadata is refused; None if it is not."""
    size = sum(len(key) + len(value) + _OVERHEAD_BYTES for key, value in metadata)
    return MetadataTooLarge(size, MOST_METADATA_BYTES) if size > MOST_METADATA_BYTES else None


def refused_request(raw: bytes, most_inputs: int) -> InvalidRequest | MalformedMessage | None:
    """Why a request is refused unparsed: it has more inputs than this, or is no message; None if it may be parsed.

    Whatever the bytes are, no more than some fields are looked at.
    """
    if len(raw) <= 2 * most_inputs:  # no input has fewer bytes than two
        return None
    inputs = others = at = 0
    try:
        while at < len(raw) and inputs <= most_inputs and others <= _OTHER_FIELDS:
            number, at = _next_field(raw, at)
            inputs, others = inputs + (number == _INPUTS_FIELD), others + (number != _INPUTS_FIELD)
    except ValueError:
        return MalformedMessage()
    if inputs > most_inputs:
        return InvalidRequest((Violation("inputs", f"has more than {most_inputs} entries; send fewer at once"),))
    return MalformedMessage() if others > _OTHER_FIELDS else None


def _next_field(raw: bytes, at: int) -> tuple[int, int]:
    """The number of the field that begins at this place, and where the next one does.

    Raises:
        ValueError: there is no field of a kind that requests have.
    """
    tag, at = _varint(raw, at)
    kind = tag & 7
    if kind == _VARINT:
        _, at = _varint(raw, at)
    elif kind == _BYTES:
        size, at = _varint(raw, at)
        at += size
    elif kind in (_FIXED64, _FIXED32):
        at += 8 if kind == _FIXED64 else 4
    else:
        raise ValueError
    return tag >> 3, at


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits per byte, the lowest first, and where it ends.

    Raises:
        ValueError: it does not end.
    """
    value = 0
    for i, byte in enumerate(raw[at : at + _LONGEST_VARINT]):
        value |= (byte & 0x7F) << (7 * i)
        if byte < 0x80:  # the bit that says that more bytes follow
            return value, at + i + 1
    raise ValueError
