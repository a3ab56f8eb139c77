"""Requests: what is valid, what unset means, and that all violations are told at once."""

import dataclasses
import math
from typing import Any

import pytest

from beamline.v1 import generation_pb2 as pb
from beamline_server.bundle import GenerationDefaults
from beamline_server.engine.request import EarlyStopping, LengthPenaltyKind, SearchOptions
from beamline_server.rpc.converters import Limits, Order, RequestReader, default_search, limits_of
from beamline_server.rpc.errors import InvalidRequest, ModelNotFound
from beamline_server.settings import Settings, SettingsError
from doubles.service import EOS, VOCABULARY, ByteTokenizer, make_manifest

LIMITS = Limits(max_inputs=3, max_text_bytes=20, max_source_tokens=10, max_new_tokens=50, max_beam_size=8)
DEFAULTS = SearchOptions(beam_size=4, max_new_tokens=40, min_new_tokens=2, length_penalty=0.6)


def make_reader(**changes: Any) -> RequestReader:
    fields: dict[str, Any] = {
        "model_name": "test-model",
        "limits": LIMITS,
        "defaults": DEFAULTS,
        "source_vocabulary": VOCABULARY,
        "source_eos": EOS,
        "tokenizer": ByteTokenizer(),
    }
    return RequestReader(**{**fields, **changes})


def text(*texts: str, **fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(inputs=[pb.Input(text=t) for t in texts], **fields)


def ids(*tokens: int, **fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(inputs=[pb.Input(token_ids=pb.TokenIds(ids=tokens))], **fields)


def search(**options: Any) -> pb.GenerateRequest:
    return text("hello", search=pb.SearchOptions(**options))


def violations(request: pb.GenerateRequest, reader: RequestReader | None = None) -> list[tuple[str, str]]:
    with pytest.raises(InvalidRequest) as caught:
        (reader or make_reader()).generate(request)
    return [(violation.field, violation.problem) for violation in caught.value.violations]


def read(request: pb.GenerateRequest) -> Order:
    return make_reader().generate(request)


def test_text_is_tokenized_and_unset_options_are_the_defaults() -> None:
    order = read(text("hi", "é"))
    assert [source.tokens for source in order.sources] == [(104, 105, EOS), (0xC3, 0xA9, EOS)]
    assert order.options == DEFAULTS
    assert not order.output.token_ids
    assert not order.output.token_logprobs


def test_token_ids_are_taken_as_they_are() -> None:
    assert read(ids(1, 0, 257)).sources[0].tokens == (1, 0, 257)


@pytest.mark.parametrize(
    ("options", "expected"), [({}, 3), ({"beam_size": 2}, 2), ({"beam_size": 8}, 3), ({"n_best": 1}, 1)]
)
def test_a_default_number_of_answers_gives_way_to_fewer_beams(options: dict[str, Any], expected: int) -> None:
    defaults = GenerationDefaults(beam_size=4, n_best=3, max_new_tokens=20)
    reader = make_reader(defaults=default_search(defaults, LIMITS))
    assert reader.generate(search(**options)).options.n_best == expected


def test_the_default_number_of_answers_is_within_the_limits() -> None:
    limits = dataclasses.replace(LIMITS, max_beam_size=2)
    assert default_search(GenerationDefaults(beam_size=4, n_best=3, max_new_tokens=20), limits).n_best == 2


def test_every_option_can_be_set() -> None:
    order = read(
        text(
            "hi",
            model="test-model",
            search=pb.SearchOptions(
                beam_size=8,
                n_best=8,
                length_penalty=-1.5,
                length_penalty_kind=pb.LENGTH_PENALTY_KIND_GNMT,
                early_stopping=pb.EARLY_STOPPING_NEVER,
                min_new_tokens=50,
                max_new_tokens=50,
            ),
            output=pb.OutputOptions(token_ids=True, token_logprobs=True),
        )
    )
    assert order.options == SearchOptions(8, 8, -1.5, LengthPenaltyKind.GNMT, EarlyStopping.NEVER, 50, 50)
    assert order.output.token_ids
    assert order.output.token_logprobs


def test_zero_differs_from_unset() -> None:
    options = read(search(length_penalty=0.0, min_new_tokens=0)).options
    assert (options.length_penalty, options.min_new_tokens) == (0.0, 0)


def test_unspecified_enum_values_are_as_unset() -> None:
    request = search(
        length_penalty_kind=pb.LENGTH_PENALTY_KIND_UNSPECIFIED, early_stopping=pb.EARLY_STOPPING_UNSPECIFIED
    )
    assert read(request).options == DEFAULTS


def test_a_default_gives_way_to_what_the_request_sets() -> None:
    options = read(search(max_new_tokens=1)).options
    assert (options.min_new_tokens, options.max_new_tokens) == (1, 1)


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (pb.GenerateRequest(), ("inputs", "has 0 entries; expected 1 to 3")),
        (text("a", "b", "c", "d"), ("inputs", "has 4 entries; expected 1 to 3")),
        (pb.GenerateRequest(inputs=[pb.Input()]), ("inputs[0]", "is missing; expected text or token_ids")),
        (text("a", ""), ("inputs[1].text", "is empty")),
        (text("a" * 21), ("inputs[0].text", "has 21 bytes; expected at most 20")),
        (text("é" * 11), ("inputs[0].text", "has 22 bytes; expected at most 20")),
        (text("a" * 10), ("inputs[0].text", "has 11 tokens; expected at most 10, or truncate_source")),
        (ids(), ("inputs[0].token_ids", "is empty")),
        (ids(5, -1), ("inputs[0].token_ids", "has the id -1 at index 1; expected 0 to 257")),
        (ids(258), ("inputs[0].token_ids", "has the id 258 at index 0; expected 0 to 257")),
        (ids(*range(11)), ("inputs[0].token_ids", "has 11 tokens; expected at most 10, or truncate_source")),
        (search(beam_size=0), ("search.beam_size", "is 0; expected 1 to 8")),
        (search(beam_size=9), ("search.beam_size", "is 9; expected 1 to 8")),
        (search(beam_size=2**32 - 1), ("search.beam_size", "is 4294967295; expected 1 to 8")),
        (search(n_best=0), ("search.n_best", "is 0; expected 1 to 4 (beam_size)")),
        (search(n_best=5), ("search.n_best", "is 5; expected 1 to 4 (beam_size)")),
        (search(n_best=3, beam_size=2), ("search.n_best", "is 3; expected 1 to 2 (beam_size)")),
        (search(max_new_tokens=0), ("search.max_new_tokens", "is 0; expected 1 to 50")),
        (search(max_new_tokens=51), ("search.max_new_tokens", "is 51; expected 1 to 50")),
        (search(min_new_tokens=41), ("search.min_new_tokens", "is 41; expected 0 to 40 (max_new_tokens)")),
        (
            search(min_new_tokens=3, max_new_tokens=2),
            ("search.min_new_tokens", "is 3; expected 0 to 2 (max_new_tokens)"),
        ),
        (search(length_penalty=math.nan), ("search.length_penalty", "is nan; expected a number between -10 and 10")),
        (search(length_penalty=10.5), ("search.length_penalty", "is 10.5; expected a number between -10 and 10")),
        (search(length_penalty=-math.inf), ("search.length_penalty", "is -inf; expected a number between -10 and 10")),
        (search(length_penalty_kind=77), ("search.length_penalty_kind", "is 77; expected a value of the enum")),
        (search(early_stopping=-1), ("search.early_stopping", "is -1; expected a value of the enum")),
    ],
)
def test_each_violation_is_named_with_what_would_be_valid(
    request_: pb.GenerateRequest, expected: tuple[str, str]
) -> None:
    assert violations(request_) == [expected]


def test_all_violations_are_found_at_once() -> None:
    request = pb.GenerateRequest(
        inputs=[pb.Input(), pb.Input(text=""), pb.Input(token_ids=pb.TokenIds(ids=[999])), pb.Input(text="unread")],
        search=pb.SearchOptions(
            beam_size=99,
            n_best=9,
            length_penalty=math.inf,
            length_penalty_kind=9,  # type: ignore[arg-type]  # not in the enum
            early_stopping=9,  # type: ignore[arg-type]  # not in the enum
            max_new_tokens=99,
            min_new_tokens=99,
        ),
    )
    fields = [field for field, _ in violations(request)]
    assert sorted(fields) == [
        "inputs",
        "inputs[0]",
        "inputs[1].text",
        "inputs[2].token_ids",
        "search.beam_size",
        "search.early_stopping",
        "search.length_penalty",
        "search.length_penalty_kind",
        "search.max_new_tokens",
        "search.min_new_tokens",
        "search.n_best",
    ]


def test_text_for_a_model_without_tokenizer() -> None:
    problem = "cannot be read: this model has no tokenizer; expected token_ids"
    assert violations(text("a"), make_reader(tokenizer=None)) == [("inputs[0].text", problem)]


def test_text_without_tokens() -> None:
    class Mute(ByteTokenizer):
        def encode(self, text: str) -> list[int]:
            return []

    assert violations(text("a"), make_reader(tokenizer=Mute())) == [("inputs[0].text", "has no tokens")]


def test_truncation_keeps_the_end_of_sequence() -> None:
    [source] = read(text("abcdefghijklm", truncate_source=True)).sources
    assert source.tokens == (*b"abcdefghi", EOS)
    assert source.truncated


def test_truncation_of_ids_that_have_no_end_of_sequence() -> None:
    [source] = read(ids(*range(12), truncate_source=True)).sources
    assert source.tokens == tuple(range(10))


def test_a_source_that_fits_is_not_cut() -> None:
    [source] = read(text("abcdefghi", truncate_source=True)).sources
    assert (len(source.tokens), source.truncated) == (10, False)


def test_truncation_does_not_excuse_the_text_limit() -> None:
    assert violations(text("a" * 21, truncate_source=True))[0][0] == "inputs[0].text"


def test_another_model_is_not_found() -> None:
    with pytest.raises(ModelNotFound, match="there is no model 'gpt' here; this server has 'test-model'"):
        read(text("a", model="gpt"))


def test_a_stream_has_one_input() -> None:
    order = make_reader().stream(pb.GenerateStreamRequest(input=pb.Input(text="hi")))
    assert [source.tokens for source in order.sources] == [(104, 105, EOS)]
    with pytest.raises(InvalidRequest, match=r"^input: is missing; expected text or token_ids$"):
        make_reader().stream(pb.GenerateStreamRequest())


def test_defaults_wider_than_the_limits_are_narrowed() -> None:
    defaults = GenerationDefaults(
        beam_size=12,
        max_new_tokens=500,
        min_new_tokens=60,
        length_penalty=2,
        length_penalty_kind="gnmt",
        early_stopping="never",
    )
    assert default_search(defaults, LIMITS) == SearchOptions(
        beam_size=8,
        n_best=1,
        length_penalty=2,
        length_penalty_kind=LengthPenaltyKind.GNMT,
        early_stopping=EarlyStopping.NEVER,
        min_new_tokens=50,
        max_new_tokens=50,
    )


def test_limits_follow_from_settings_and_model() -> None:
    dimensions = make_manifest().dimensions
    limits = limits_of(Settings(max_new_tokens=100, max_beam_size=5), dimensions)
    assert limits == Limits(64, 65536, max_source_tokens=512, max_new_tokens=100, max_beam_size=5)
    assert limits_of(Settings(), dimensions).max_new_tokens == 256


def test_settings_cannot_promise_more_than_the_model_has() -> None:
    with pytest.raises(SettingsError, match="max_new_tokens: 257 is more than the model can generate"):
        limits_of(Settings(max_new_tokens=257), make_manifest().dimensions)
