"""Whatever is sent, the server says what the caller should change: no message and no bytes are its own fault."""

import math
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from beamline.v1 import generation_pb2 as pb
from beamline.v1.generation_pb2_grpc import GenerationServiceStub
from beamline_server.bundle import Bundle
from beamline_server.process import ServerProcess
from beamline_server.rpc.converters import EARLY_STOPPINGS, LENGTH_PENALTY_KINDS

SERVICE = "/beamline.v1.GenerationService"
EXAMPLES = 300
# Limits that random values reach from both sides, and answers that take little time.
SMALL_LIMITS = ("--max-inputs", "3", "--max-text-bytes", "48", "--max-beam-size", "5", "--max-new-tokens", "9")
EXPECTED = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}

examples = settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.function_scoped_fixture])

numbers = st.one_of(st.integers(0, 10), st.sampled_from([255, 256, 257, 2**31 - 1, 2**31, 2**32 - 1]))
VALUES: dict[int, st.SearchStrategy[Any]] = {
    FieldDescriptor.TYPE_STRING: st.one_of(
        st.text(max_size=60), st.sampled_from(["", " ", "Bonjour.", "fr-en", "\x00", ">>fra<<"])
    ),
    FieldDescriptor.TYPE_UINT32: numbers,
    FieldDescriptor.TYPE_INT32: st.one_of(st.integers(-2, 6001), st.integers(-(2**31), 2**31 - 1)),
    FieldDescriptor.TYPE_DOUBLE: st.one_of(
        st.floats(),
        st.floats(-3, 3),
        st.sampled_from([0.0, -0.0, 1e308, -1e308, 5e-324, math.inf, -math.inf, math.nan]),
    ),
    FieldDescriptor.TYPE_BOOL: st.booleans(),
    FieldDescriptor.TYPE_ENUM: st.one_of(st.integers(0, 4), st.integers(-(2**31), 2**31 - 1)),
}


def messages(kind: Any) -> st.SearchStrategy[Message]:
    """Messages of a kind, by its descriptor, each field of it unset or anything that its type holds, valid or not."""
    fields = {field.name: st.none() | values(field) for field in kind.fields}
    make = GetMessageClass(kind)
    # Of a oneof, the last field that is set stays.
    return st.fixed_dictionaries(fields).map(
        lambda chosen: make(**{name: value for name, value in chosen.items() if value is not None})
    )


def values(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    one = VALUES[field.type] if field.message_type is None else messages(field.message_type)
    return st.lists(one, max_size=4) if field.is_repeated else one


@pytest.fixture(scope="module")
def small_server(fr_en_int8: Bundle) -> Iterator[ServerProcess]:
    with ServerProcess(fr_en_int8.path, *SMALL_LIMITS) as running:
        running.wait_until_serving()
        yield running
        samples = running.samples()
        assert samples['beamline_requests_total{outcome="error"}'] == 0
        assert samples["beamline_running_rows"] == samples["beamline_queued_rows"] == 0
        assert running.stop() == 0
        assert {record["event"] for record in running.log.records()} <= {
            *(
                "device_chosen",
                "memory_bound",
                "listening",
                "engine_compiling",
                "engine_compiled",
                "serving",
                "request_ended",
                "draining",
                "stopping",
                "stopped",
            )
        }


@pytest.fixture(scope="module")
def small_channel(small_server: ServerProcess) -> Iterator[Any]:
    with grpc.insecure_channel(small_server.target, options=[("grpc.enable_retries", 0)]) as opened:
        yield opened


@pytest.fixture(scope="module")
def small_stub(small_channel: Any) -> Any:
    return GenerationServiceStub(small_channel)  # type: ignore[no-untyped-call]  # generated


def check_refusal(call: Any) -> None:
    """It is one that callers understand, and invalid fields are named."""
    assert call.code() in EXPECTED, (call.code(), call.details())
    if call.code() == grpc.StatusCode.INVALID_ARGUMENT:
        (packed,) = rpc_status.from_call(call).details
        bad_request = error_details_pb2.BadRequest()
        assert packed.Unpack(bad_request)
        assert bad_request.field_violations
        assert all(violation.field and violation.description for violation in bad_request.field_violations)


def check_result(result: pb.Result, search: pb.SearchOptions, output: pb.OutputOptions) -> None:
    """It is what the request asks for."""
    scores = [hypothesis.score for hypothesis in result.hypotheses]
    wanted = search.n_best if search.HasField("n_best") else 1
    # The embedded model forces end-of-sequence at the last token: of one token there is one hypothesis.
    assert len(scores) == (1 if search.max_new_tokens == 1 else wanted)
    assert scores == sorted(scores, reverse=True)
    assert not any(map(math.isnan, scores))
    for hypothesis in result.hypotheses:
        assert bool(hypothesis.token_ids) == output.token_ids
        assert bool(hypothesis.token_logprobs) == output.token_logprobs
        assert len(hypothesis.token_ids) <= 9
        assert hypothesis.finish_reason in (pb.FINISH_REASON_END_OF_SEQUENCE, pb.FINISH_REASON_LENGTH)


@examples
@given(request=messages(pb.GenerateRequest.DESCRIPTOR))
def test_generate_answers_any_message(small_stub: Any, request: pb.GenerateRequest) -> None:
    try:
        response = small_stub.Generate(request, timeout=30)
    except grpc.RpcError as error:
        check_refusal(error)
        return
    assert len(response.results) == len(request.inputs)
    for result in response.results:
        check_result(result, request.search, request.output)


@examples
@given(request=messages(pb.GenerateStreamRequest.DESCRIPTOR))
def test_generate_stream_answers_any_message(small_stub: Any, request: pb.GenerateStreamRequest) -> None:
    try:
        *pieces, last = small_stub.GenerateStream(request, timeout=30)
    except grpc.RpcError as error:
        check_refusal(error)
        return
    check_result(last.result, request.search, request.output)
    best = last.result.hypotheses[0]
    assert "".join(message.piece.text for message in pieces) == best.text
    assert [token for message in pieces for token in message.piece.token_ids] == list(best.token_ids)


def contents(texts: st.SearchStrategy[str], ids: st.SearchStrategy[int]) -> st.SearchStrategy[dict[str, Any]]:
    """What sources and target prefixes are made with."""
    return st.one_of(
        st.builds(lambda text: {"text": text}, texts),
        st.builds(lambda ids: {"token_ids": {"ids": ids}}, st.lists(ids, min_size=1, max_size=12)),
    )


valid_sources = contents(st.text(min_size=1, max_size=12), st.integers(0, 5999))
# A text of spaces has no tokens; 0 ends a target, and 5999 is the decoder's start.
valid_prefixes = contents(st.text(max_size=11).map("a{}".format), st.integers(1, 5998))
valid_inputs = st.builds(
    lambda source, prefix: pb.Input(**source, target_prefix=prefix), valid_sources, st.none() | valid_prefixes
)


@st.composite
def valid_requests(draw: st.DrawFn) -> pb.GenerateRequest:
    """Requests without a fault, with options as far out as they may be."""
    beam_size, most = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    search = pb.SearchOptions(
        beam_size=beam_size,
        n_best=draw(st.integers(1, beam_size)),
        length_penalty=draw(st.floats(-10, 10)),
        length_penalty_kind=draw(st.sampled_from(list(LENGTH_PENALTY_KINDS))),
        early_stopping=draw(st.sampled_from(list(EARLY_STOPPINGS))),
        min_new_tokens=draw(st.integers(0, most)),
        max_new_tokens=most,
    )
    output = pb.OutputOptions(token_ids=draw(st.booleans()), token_logprobs=draw(st.booleans()))
    return pb.GenerateRequest(inputs=draw(st.lists(valid_inputs, min_size=1, max_size=3)), search=search, output=output)


@examples
@given(request=valid_requests())
def test_every_valid_request_is_answered(small_stub: Any, request: pb.GenerateRequest) -> None:

    response = small_stub.Generate(request, timeout=30)

    assert len(response.results) == len(request.inputs)
    for result in response.results:
        check_result(result, request.search, request.output)


@examples
@given(
    raw=st.one_of(
        st.binary(max_size=200),
        messages(pb.GenerateRequest.DESCRIPTOR).map(lambda message: message.SerializeToString()),
    )
)
@pytest.mark.parametrize("method", ["Generate", "GenerateStream", "GetInfo"])
def test_any_bytes_are_answered(small_channel: Any, method: str, raw: bytes) -> None:
    """Bytes of no message, and of a message of another method."""
    try:
        if method == "GenerateStream":
            list(small_channel.unary_stream(f"{SERVICE}/{method}")(raw, timeout=30))
        else:
            small_channel.unary_unary(f"{SERVICE}/{method}")(raw, timeout=30)
    except grpc.RpcError as error:
        assert error.code() in EXPECTED  # noqa: PT017 - it may also be answered
