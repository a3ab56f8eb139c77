"""What a caller is told about a request that cannot be answered."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from beamline.v1 import generation_pb2 as pb
from beamline_server.process import ServerProcess

SERVICE = "/beamline.v1.GenerationService"
FINE = pb.Input(text="Bonjour.")
Refuse = Callable[..., Any]
"""Sends a request that is to be refused; returns the ended call."""


@pytest.fixture
def refuse(stub: Any) -> Refuse:
    """Sends a request that is to be refused, by the method it belongs to; returns the ended call."""

    def call(request: Message) -> Any:
        streams = isinstance(request, pb.GenerateStreamRequest)
        with pytest.raises(grpc.RpcError) as refused:
            list(stub.GenerateStream(request, timeout=10)) if streams else stub.Generate(request, timeout=10)
        return refused.value

    return call


@pytest.fixture
def refuse_raw(channel: Any) -> Refuse:
    """Sends bytes to a method, which is to refuse them; returns the ended call."""

    def call(method: str, raw: bytes) -> Any:
        path, streams = f"{SERVICE}/{method}", method == "GenerateStream"
        with pytest.raises(grpc.RpcError) as refused:
            list(channel.unary_stream(path)(raw, timeout=10)) if streams else channel.unary_unary(path)(raw, timeout=10)
        return refused.value

    return call


def details(call: Any) -> list[Message]:
    """The google.rpc details of a refusal."""
    status = rpc_status.from_call(call) or status_pb2.Status()
    kinds = (error_details_pb2.BadRequest, error_details_pb2.ErrorInfo, error_details_pb2.RetryInfo)
    found: list[Message] = []
    for packed in status.details:
        message = next(kind for kind in kinds if packed.Is(kind.DESCRIPTOR))()
        packed.Unpack(message)
        found.append(message)
    return found


def violations(call: Any) -> dict[str, str]:
    """The problem of each field that a refusal names."""
    assert call.code() == grpc.StatusCode.INVALID_ARGUMENT
    (bad_request,) = details(call)
    assert isinstance(bad_request, error_details_pb2.BadRequest)
    assert len({v.field for v in bad_request.field_violations}) == len(bad_request.field_violations)
    return {violation.field: violation.description for violation in bad_request.field_violations}


def test_every_invalid_field_is_named_at_once(refuse: Refuse) -> None:
    request = pb.GenerateRequest(
        inputs=[
            pb.Input(text=""),
            FINE,
            pb.Input(),
            pb.Input(token_ids=pb.TokenIds()),
            pb.Input(token_ids=pb.TokenIds(ids=[5, -1])),
            pb.Input(token_ids=pb.TokenIds(ids=[6000])),
            pb.Input(text="gare " * 10_000),
            pb.Input(text="a" * 65_537),
        ],
        search=pb.SearchOptions(
            beam_size=17,
            n_best=18,
            length_penalty=math.nan,
            length_penalty_kind=99,  # type: ignore[arg-type]  # what a newer client may send
            early_stopping=-1,  # type: ignore[arg-type]  # as above
            min_new_tokens=257,
            max_new_tokens=0,
        ),
    )

    assert violations(refuse(request)) == {
        "inputs[0].text": "is empty",
        "inputs[2]": "is missing; expected text or token_ids",
        "inputs[3].token_ids": "is empty",
        "inputs[4].token_ids": "has the id -1 at index 1; expected 0 to 5999",
        "inputs[5].token_ids": "has the id 6000 at index 0; expected 0 to 5999",
        "inputs[6].text": "has 10001 tokens; expected at most 256, or truncate_source",
        "inputs[7].text": "has 65537 bytes; expected at most 65536",
        "search.beam_size": "is 17; expected 1 to 16",
        "search.n_best": "is 18; expected 1 to 16 (beam_size)",
        "search.length_penalty": "is nan; expected a number between -10 and 10",
        "search.length_penalty_kind": "is 99; expected a value of the enum",
        "search.early_stopping": "is -1; expected a value of the enum",
        "search.min_new_tokens": "is 257; expected 0 to 1 (max_new_tokens)",
        "search.max_new_tokens": "is 0; expected 1 to 256",
    }


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        pytest.param(pb.GenerateRequest(), "inputs", id="no input"),
        pytest.param(pb.GenerateRequest(inputs=[FINE] * 65), "inputs", id="65 inputs"),
        pytest.param(pb.GenerateStreamRequest(), "input", id="no input to stream"),
        pytest.param(pb.GenerateStreamRequest(input=pb.Input(text="")), "input.text", id="empty text to stream"),
        pytest.param(
            pb.GenerateRequest(inputs=[FINE], search=pb.SearchOptions(beam_size=0)), "search.beam_size", id="beam 0"
        ),
        pytest.param(
            pb.GenerateRequest(inputs=[FINE], search=pb.SearchOptions(beam_size=2, n_best=3)),
            "search.n_best",
            id="more hypotheses than beams",
        ),
        pytest.param(
            pb.GenerateRequest(inputs=[FINE], search=pb.SearchOptions(length_penalty=10.001)),
            "search.length_penalty",
            id="extreme penalty",
        ),
        pytest.param(
            pb.GenerateStreamRequest(input=FINE, search=pb.SearchOptions(max_new_tokens=2**32 - 1)),
            "search.max_new_tokens",
            id="largest number of tokens",
        ),
        pytest.param(
            pb.GenerateRequest(inputs=[pb.Input(token_ids=pb.TokenIds(ids=[-(2**31)]))]),
            "inputs[0].token_ids",
            id="least token id",
        ),
    ],
)
def test_an_invalid_field_is_named(refuse: Refuse, request_: Message, field: str) -> None:
    assert list(violations(refuse(request_))) == [field]


@pytest.mark.parametrize("text", ["a" * 65_536, "é" * 32_768], ids=["ascii", "accents"])
def test_a_text_of_the_most_bytes_is_taken(stub: Any, text: str) -> None:
    request = pb.GenerateRequest(
        inputs=[pb.Input(text=text)], truncate_source=True, search=pb.SearchOptions(beam_size=1, max_new_tokens=2)
    )

    assert stub.Generate(request, timeout=10).results[0].source_truncated


def test_a_flood_of_violations_fits_into_the_answer(refuse: Refuse) -> None:
    """More would make the trailing metadata too large for clients, who would then not even see the status."""
    inputs = [pb.Input(token_ids=pb.TokenIds(ids=[-(2**31)])) for _ in range(64)]

    named = violations(refuse(pb.GenerateRequest(inputs=inputs, search=pb.SearchOptions(beam_size=2**32 - 1))))

    assert "search.beam_size" in named
    assert named.get("", "").endswith("more violations") or len(named) == 65


@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(b"\xff\xff\xff\xff", id="no tag"),
        pytest.param(b"\x0a\x05ab", id="shorter than it says"),
        pytest.param(b"\x12\xff\xff\xff\xff\x0f", id="length of 4 GiB"),
        pytest.param(b"\x1a" * 100_000, id="100,000 tags"),
        pytest.param(b"\x0a\x02\xc3\x28", id="model that is not UTF-8"),
        pytest.param(b"\x12\x04\x0a\x02\xc3\x28", id="text that is not UTF-8"),
        pytest.param(b"\x12\x05\x0a\x03\xed\xa0\x80", id="text with a lone surrogate"),
        pytest.param(b"\x23" * 50_000, id="50,000 nested groups"),
    ],
)
def test_malformed_bytes_are_refused_without_internals(refuse_raw: Refuse, method: str, raw: bytes) -> None:
    refused = refuse_raw(method, raw)

    assert (refused.code(), refused.details()) == (grpc.StatusCode.INVALID_ARGUMENT, "malformed protobuf message")


@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
def test_half_a_million_inputs_are_refused_unread(refuse_raw: Refuse, method: str) -> None:
    refused = refuse_raw(method, b"\x12\x00" * 500_000)

    assert refused.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert refused.details() == "inputs: has more than 256 entries; send fewer at once"


def test_malformed_bytes_for_get_info_are_refused(refuse_raw: Refuse) -> None:
    assert refuse_raw("GetInfo", b"\xff").code() == grpc.StatusCode.INVALID_ARGUMENT


def test_fields_that_a_newer_client_may_send_are_ignored(channel: Any) -> None:
    unknown_field = b"\xa2\x06\x03new"  # number 100
    call = channel.unary_unary(f"{SERVICE}/Generate", response_deserializer=pb.GenerateResponse.FromString)

    assert call(pb.GenerateRequest(inputs=[FINE]).SerializeToString() + unknown_field, timeout=10).results


@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
def test_an_oversized_message_is_resource_exhausted(refuse_raw: Refuse, method: str) -> None:
    refused = refuse_raw(method, b"\x12\x80\x80\x40" + bytes(2**20))

    assert refused.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "larger than max" in (refused.details() or "")


def test_a_compressed_bomb_is_stopped_by_the_same_limit(channel: Any) -> None:
    raw = pb.GenerateRequest(inputs=[pb.Input(text="a" * 50_000_000)]).SerializeToString()
    with pytest.raises(grpc.RpcError) as refused:
        channel.unary_unary(f"{SERVICE}/Generate")(raw, timeout=10, compression=grpc.Compression.Gzip)

    assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_compressed_request_is_answered(stub: Any) -> None:
    request = pb.GenerateRequest(inputs=[FINE])
    plain = stub.Generate(request, timeout=10)
    compressed = stub.Generate(request, timeout=10, compression=grpc.Compression.Gzip)

    assert compressed.results[0].hypotheses == plain.results[0].hypotheses


@pytest.mark.parametrize("path", [f"{SERVICE}/Translate", "/no.such.Service/Generate", "/", "nonsense"])
def test_an_unknown_method_is_unimplemented(channel: Any, path: str) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        channel.unary_unary(path)(b"", timeout=10)

    assert refused.value.code() == grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("name", ["en-fr", "fr-en ", "\x00", "a\r\nb", "é" * 5_000], ids=ascii)
def test_an_unknown_model_is_not_found(refuse: Refuse, name: str) -> None:
    refused = refuse(pb.GenerateRequest(model=name, inputs=[FINE]))

    assert refused.code() == grpc.StatusCode.NOT_FOUND
    (info,) = details(refused)
    assert isinstance(info, error_details_pb2.ErrorInfo)
    assert (info.reason, info.domain) == ("MODEL_NOT_FOUND", "beamline")


def test_the_served_model_can_be_named(stub: Any) -> None:
    assert stub.Generate(pb.GenerateRequest(model="fr-en", inputs=[FINE]), timeout=10).results


@pytest.mark.parametrize(("sent", "echoed"), [("mine-1", "mine-1"), ("x" * 200, "x" * 128)], ids=["short", "long"])
def test_the_request_id_is_echoed(stub: Any, sent: str, echoed: str) -> None:
    request = pb.GenerateRequest(inputs=[pb.Input(text="")])
    with pytest.raises(grpc.RpcError) as refused:
        stub.Generate(request, timeout=10, metadata=(("x-request-id", sent),))
    ended: Any = refused.value

    assert dict(ended.trailing_metadata())["x-request-id"] == echoed


def test_metadata_beyond_the_limit_is_refused_and_the_next_call_is_answered(stub: Any) -> None:
    request = pb.GenerateRequest(inputs=[FINE])
    with pytest.raises(grpc.RpcError) as refused:
        stub.Generate(request, timeout=10, metadata=(("x-request-id", "x" * 20_000),))

    assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert stub.Generate(request, timeout=10).results


def test_invented_names_make_no_new_series(server: ServerProcess, channel: Any, refuse: Refuse) -> None:
    """Who calls must not be able to fill the memory of what scrapes."""
    refuse(pb.GenerateRequest(model="warm-up", inputs=[FINE]))
    with pytest.raises(grpc.RpcError):
        channel.unary_unary(f"{SERVICE}/WarmUp")(b"", timeout=10)
    before = set(server.samples())

    for i in range(200):
        refuse(pb.GenerateRequest(model=f"model-{i}", inputs=[FINE]))
        with pytest.raises(grpc.RpcError):
            channel.unary_unary(f"{SERVICE}/Method{i}")(b"", timeout=10)

    assert set(server.samples()) == before


def test_refusals_are_quick(refuse: Refuse, stub: Any) -> None:
    """A message full of trouble costs no more than a small fraction of a translation."""
    awkward: Sequence[pb.GenerateRequest] = [
        pb.GenerateRequest(inputs=[pb.Input(token_ids=pb.TokenIds(ids=[-1] * 100_000))]),
        pb.GenerateRequest(inputs=[pb.Input(text=">>" + "a" * 65_000)]),
        pb.GenerateRequest(inputs=[pb.Input(text=" " * 65_000), pb.Input(text="\u0301" * 30_000)]),
        pb.GenerateRequest(inputs=[pb.Input()] * 10_000),
    ]
    for request in awkward:
        began = time.perf_counter()
        try:
            stub.Generate(request, timeout=10)
        except grpc.RpcError as error:
            assert error.code() == grpc.StatusCode.INVALID_ARGUMENT  # noqa: PT017 - some are fine
        assert time.perf_counter() - began < 1
