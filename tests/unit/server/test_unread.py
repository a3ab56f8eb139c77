"""What is refused before it is parsed: the right things, at no cost, and nothing that may be read."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beamline.v1 import generation_pb2 as pb
from beamline_server.rpc.errors import InvalidRequest, MalformedMessage, ServerFull
from beamline_server.rpc.unread import MOST_METADATA_BYTES, RequestMemory, refused_metadata, refused_request

MOST = 8
EMPTY_INPUT = b"\x12\x00"
UNKNOWN_NUMBER = b"\xf8\x01\x00"
"""Field 31, a varint."""


def asked(inputs: int, text: str = "Bonjour.") -> bytes:
    request = pb.GenerateRequest(model="m", search=pb.SearchOptions(beam_size=4), truncate_source=True)
    request.priority = pb.PRIORITY_BATCH
    request.output.token_ids = True
    for _ in range(inputs):
        request.inputs.add(text=text)
    return request.SerializeToString()


@pytest.mark.parametrize("inputs", [0, 1, MOST, MOST + 1, 1000])
def test_as_many_inputs_as_may_be_are_read_and_no_more(inputs: int) -> None:
    found = refused_request(asked(inputs), MOST)
    if inputs <= MOST:
        assert found is None
        return
    assert isinstance(found, InvalidRequest)
    [violation] = found.violations
    assert (violation.field, violation.problem) == ("inputs", f"has more than {MOST} entries; send fewer at once")


def test_a_stream_request_is_read() -> None:
    request = pb.GenerateStreamRequest(model="m", input=pb.Input(text="x" * 1000), search=pb.SearchOptions(beam_size=1))
    assert refused_request(request.SerializeToString(), MOST) is None


@given(st.integers(0, 40), st.integers(0, 5000), st.integers(1, 20))
def test_whether_it_is_read_depends_on_the_number_of_inputs_alone(inputs: int, length: int, most: int) -> None:
    assert (refused_request(asked(inputs, "é" * length), most) is None) == (inputs <= most)


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(UNKNOWN_NUMBER * 100, id="many fields"),
        pytest.param(b"\x0b" + EMPTY_INPUT * 100, id="a group"),
        pytest.param(b"\x0f" * 100, id="a kind that there is not"),
        pytest.param(b"\xff" * 100, id="a number without an end"),
        pytest.param(EMPTY_INPUT * MOST + b"\x12\xff", id="a length without an end"),
    ],
)
def test_what_no_request_is_like_is_not_read(raw: bytes) -> None:
    assert isinstance(refused_request(raw, MOST), MalformedMessage)


@pytest.mark.parametrize(
    ("raw", "refused"),
    [
        (EMPTY_INPUT * 500_000, InvalidRequest),
        (UNKNOWN_NUMBER * 300_000, MalformedMessage),
        (EMPTY_INPUT * MOST + UNKNOWN_NUMBER * 300_000, MalformedMessage),
        (b"\x0a" + b"\x00" * 1_000_000, MalformedMessage),
    ],
)
def test_a_megabyte_is_refused_as_soon_as_a_kilobyte(raw: bytes, refused: type) -> None:
    """In CPU time, of which a look at every field would take a hundred times as much."""
    began = time.thread_time()
    assert isinstance(refused_request(raw, MOST), refused)
    assert time.thread_time() - began < 0.01


def test_metadata_counts_as_http2_counts_it() -> None:
    fits = [("k" * 8, "v" * (MOST_METADATA_BYTES // 2 - 40))] * 2
    assert refused_metadata(fits) is None
    assert refused_metadata([]) is None
    too_large = refused_metadata([*fits, ("k", b"")])
    assert too_large is not None
    assert (
        str(too_large) == f"the metadata has {MOST_METADATA_BYTES + 33} bytes; expected at most {MOST_METADATA_BYTES}"
    )


def test_requests_are_held_up_to_a_number_of_bytes() -> None:
    memory = RequestMemory(100)
    with memory.held(60):
        with memory.held(40), pytest.raises(ServerFull, match="too many bytes"), memory.held(1):
            raise AssertionError("there is no room")
        with pytest.raises(ZeroDivisionError), memory.held(40):
            raise ZeroDivisionError
        with memory.held(40):
            pass
    with memory.held(100):
        pass
