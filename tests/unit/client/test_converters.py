"""Values become messages and come back; what cannot be converted is refused with its path."""

import pytest
from google.protobuf.duration_pb2 import Duration

from beamline.v1 import generation_pb2 as pb
from beamline_client import (
    EarlyStopping,
    FieldViolation,
    FinishReason,
    Hypothesis,
    Input,
    InvalidRequest,
    LengthPenaltyKind,
    Limits,
    Piece,
    ProtocolError,
    Result,
    SearchOptions,
    Source,
    Timing,
)
from beamline_client import converters as convert

HYPOTHESIS = pb.Hypothesis(text="Hello.", score=-0.5, finish_reason=pb.FINISH_REASON_LENGTH)


@pytest.mark.parametrize(
    "search",
    [
        pytest.param(SearchOptions(), id="nothing-set"),
        pytest.param(SearchOptions(min_new_tokens=0, length_penalty=0.0), id="zero-is-not-unset"),
        *[pytest.param(SearchOptions(length_penalty_kind=kind), id=kind.value) for kind in LengthPenaltyKind],
        *[pytest.param(SearchOptions(early_stopping=stopping), id=stopping.value) for stopping in EarlyStopping],
        pytest.param(
            SearchOptions(8, 4, 0.6, LengthPenaltyKind.GNMT, EarlyStopping.NEVER, 1, 100), id="everything-set"
        ),
    ],
)
def test_search_options_survive_the_round_trip(search: SearchOptions) -> None:
    message = convert.search_to_pb(search)

    assert message is not None
    assert convert.search_from_pb(message) == search
    assert [field.name for field, _ in message.ListFields()] == [
        name for name in SearchOptions.__slots__ if getattr(search, name) is not None
    ]


def test_every_search_option_of_the_api_can_be_set() -> None:
    assert tuple(SearchOptions.__slots__) == tuple(field.name for field in pb.SearchOptions.DESCRIPTOR.fields)


def test_no_search_options_leave_the_field_unset() -> None:
    assert convert.search_to_pb(None) is None


def test_numbers_that_do_not_fit_are_all_named() -> None:
    with pytest.raises(InvalidRequest) as caught:
        convert.search_to_pb(SearchOptions(beam_size=-1, max_new_tokens=1 << 40))

    assert [violation.field for violation in caught.value.violations] == ["search.beam_size", "search.max_new_tokens"]


def test_inputs_are_text_or_token_ids() -> None:
    assert convert.inputs_to_pb(["Bonjour.", [5, 0], (7,)]) == [
        pb.Input(text="Bonjour."),
        pb.Input(token_ids=pb.TokenIds(ids=[5, 0])),
        pb.Input(token_ids=pb.TokenIds(ids=[7])),
    ]


def test_inputs_that_cannot_be_sent_are_all_named() -> None:
    with pytest.raises(InvalidRequest) as caught:
        convert.inputs_to_pb(["fine", "lone \ud800 surrogate", [1 << 31]])

    assert [violation.field for violation in caught.value.violations] == ["inputs[1].text", "inputs[2].token_ids"]
    assert caught.value.violations[0] == FieldViolation("inputs[1].text", "not valid Unicode at character 5")


def test_an_input_may_say_what_its_target_begins_with() -> None:
    prefixes = [None, "Hello", [5, 6], "", ()]
    inputs = [Input("Bonjour.", prefix) for prefix in prefixes]
    assert convert.inputs_to_pb([*inputs, Input([7], "Hello")]) == [
        pb.Input(text="Bonjour."),
        pb.Input(text="Bonjour.", target_prefix=pb.TargetPrefix(text="Hello")),
        pb.Input(text="Bonjour.", target_prefix=pb.TargetPrefix(token_ids=pb.TokenIds(ids=[5, 6]))),
        pb.Input(text="Bonjour.", target_prefix=pb.TargetPrefix(text="")),
        pb.Input(text="Bonjour.", target_prefix=pb.TargetPrefix(token_ids=pb.TokenIds())),
        pb.Input(token_ids=pb.TokenIds(ids=[7]), target_prefix=pb.TargetPrefix(text="Hello")),
    ]


def test_an_empty_target_prefix_is_sent_for_the_server_to_refuse() -> None:
    message = convert.input_to_pb(Input("Bonjour.", ()))
    assert message.target_prefix.WhichOneof("content") == "token_ids"
    assert not convert.input_to_pb(Input("Bonjour.")).HasField("target_prefix")


def test_target_prefixes_that_cannot_be_sent_are_all_named() -> None:
    with pytest.raises(InvalidRequest) as caught:
        convert.inputs_to_pb([Input("\ud800", "\ud800"), "fine", Input("fine", [1 << 31])])

    assert [violation.field for violation in caught.value.violations] == [
        "inputs[0].text",
        "inputs[0].target_prefix.text",
        "inputs[2].target_prefix.token_ids",
    ]
    with pytest.raises(InvalidRequest, match=r"input\.target_prefix\.text: not valid Unicode at character 0"):
        convert.input_to_pb(Input("fine", "\ud800"))


@pytest.mark.parametrize(
    "inputs",
    ["a text", [b"bytes"], [3], Input("a text"), [Input("a", b"b")], [Input(3)]],  # type: ignore[arg-type]  # meant
    ids=["bare-text", "bytes", "bare-id", "bare-input", "bytes-prefix", "bare-id-in-an-input"],
)
def test_inputs_of_the_wrong_kind_are_type_errors(inputs: list[Source | Input]) -> None:
    with pytest.raises(TypeError):
        convert.inputs_to_pb(inputs)


def test_a_result_keeps_everything() -> None:
    message = pb.Result(
        hypotheses=[
            pb.Hypothesis(
                text="Hello.",
                score=-0.5,
                finish_reason=pb.FINISH_REASON_END_OF_SEQUENCE,
                token_ids=[4, 0],
                token_logprobs=[-0.25, -0.5],
            ),
            HYPOTHESIS,
        ],
        source_tokens=3,
        source_truncated=True,
        timing=pb.Timing(
            queue=Duration(nanos=1_500_000), encode=Duration(seconds=1), decode=Duration(seconds=2, nanos=500), steps=2
        ),
    )

    result = convert.result_from_pb(message)

    assert result == Result(
        hypotheses=(
            Hypothesis("Hello.", -0.5, FinishReason.END_OF_SEQUENCE, (4, 0), (-0.25, -0.5)),
            Hypothesis("Hello.", -0.5, FinishReason.LENGTH, None, None),
        ),
        source_tokens=3,
        source_truncated=True,
        timing=Timing(queue_s=0.0015, encode_s=1.0, decode_s=2.0, steps=2),
    )
    assert result.best is result.hypotheses[0]
    assert result.text == "Hello."


def test_an_unknown_finish_reason_is_none() -> None:
    result = convert.result_from_pb(pb.Result(hypotheses=[pb.Hypothesis(text="x")]))

    assert result.best.finish_reason is None


@pytest.mark.parametrize(
    "response",
    [
        pytest.param(pb.GenerateResponse(), id="too-few-results"),
        pytest.param(pb.GenerateResponse(results=[pb.Result()]), id="no-hypothesis"),
    ],
)
def test_a_response_that_breaks_the_api_is_a_protocol_error(response: pb.GenerateResponse) -> None:
    with pytest.raises(ProtocolError):
        convert.results_from_pb(response, inputs=1)


def test_events_are_pieces_and_a_result() -> None:
    piece = convert.event_from_pb(pb.GenerateStreamResponse(piece=pb.Piece(text="Hel", token_ids=[4])))
    result = convert.event_from_pb(pb.GenerateStreamResponse(result=pb.Result(hypotheses=[HYPOTHESIS])))

    assert piece == Piece("Hel", (4,))
    assert isinstance(result, Result)
    with pytest.raises(ProtocolError):
        convert.event_from_pb(pb.GenerateStreamResponse())


def test_server_info_keeps_everything() -> None:
    model = pb.ModelInfo(
        name="fr-en",
        architecture="marian",
        precision="int8",
        device="cpu",
        source_vocabulary_size=10,
        target_vocabulary_size=11,
        has_tokenizer=True,
        fingerprint="ab",
        ignored_settings={"do_sample": "true"},
        source_languages=["fra", "deu"],
        target_languages=["eng"],
        default_source_language="fra",
        default_target_language="eng",
    )
    limits = pb.Limits(
        max_inputs=1,
        max_text_bytes=2,
        max_source_tokens=3,
        max_new_tokens=4,
        max_beam_size=5,
        max_message_bytes=6,
        max_duration=Duration(seconds=7),
        max_target_tokens=8,
        max_request_cost=9,
    )

    info = convert.info_from_pb(
        pb.GetInfoResponse(
            model=model, limits=limits, default_search=pb.SearchOptions(beam_size=4), versions={"beamline": "0.1.0"}
        )
    )

    for field in pb.ModelInfo.DESCRIPTOR.fields:
        value = getattr(info.model, field.name)
        assert (list(value) if isinstance(value, tuple) else value) == getattr(model, field.name)
    assert info.limits == Limits(1, 2, 3, 4, 5, 6, 7.0, 8, 9)
    assert info.default_search == SearchOptions(beam_size=4)
    assert info.versions == {"beamline": "0.1.0"}
    none = convert.info_from_pb(pb.GetInfoResponse()).model
    assert (none.source_languages, none.target_languages) == ((), ())
    assert none.default_source_language is none.default_target_language is None
