"""Requests: what is valid, what unset means, and that all violations are told at once."""

import math
from dataclasses import replace
from typing import Any

import pytest

from beamline.v1 import generation_pb2 as pb
from beamline_server.engine.request import EarlyStopping, LengthPenaltyKind, Priority, SearchOptions
from beamline_server.languages import NOTHING_AROUND, Around
from beamline_server.manifest import GenerationDefaults
from beamline_server.rpc.converters import Limits, Order, RequestReader, default_search, limits_of
from beamline_server.rpc.errors import InvalidRequest, ModelNotFound
from beamline_server.settings import Settings, SettingsError
from doubles.service import DECODER_START, EOS, VOCABULARY, ByteTokenizer, make_manifest

LIMITS = Limits(
    max_inputs=3,
    max_text_bytes=20,
    max_source_tokens=10,
    max_new_tokens=50,
    max_target_tokens=60,
    max_beam_size=8,
    max_request_cost=3 * 8 * 50,
)
DEFAULTS = SearchOptions(beam_size=4, max_new_tokens=40, min_new_tokens=2, length_penalty=0.6)


def make_reader(**changes: Any) -> RequestReader:
    fields: dict[str, Any] = {
        "model_name": "test-model",
        "limits": LIMITS,
        "defaults": DEFAULTS,
        "manifest": make_manifest(),
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


def options_of(request: pb.GenerateRequest, reader: RequestReader | None = None) -> SearchOptions:
    """The options of a request's one source."""
    [source] = (reader or make_reader()).generate(request).sources
    return source.options


def test_text_is_tokenized_and_unset_options_are_the_defaults() -> None:
    order = read(text("hi", "é"))
    assert [source.tokens for source in order.sources] == [(104, 105, EOS), (0xC3, 0xA9, EOS)]
    assert [source.options for source in order.sources] == [DEFAULTS, DEFAULTS]
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
    assert options_of(search(**options), reader).n_best == expected


def test_the_default_number_of_answers_is_within_the_limits() -> None:
    limits = replace(LIMITS, max_beam_size=2)
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
    assert order.sources[0].options == SearchOptions(8, 8, -1.5, LengthPenaltyKind.GNMT, EarlyStopping.NEVER, 50, 50)
    assert order.output.token_ids
    assert order.output.token_logprobs


def test_zero_differs_from_unset() -> None:
    options = options_of(search(length_penalty=0.0, min_new_tokens=0))
    assert (options.length_penalty, options.min_new_tokens) == (0.0, 0)


def test_unspecified_enum_values_are_as_unset() -> None:
    request = search(
        length_penalty_kind=pb.LENGTH_PENALTY_KIND_UNSPECIFIED, early_stopping=pb.EARLY_STOPPING_UNSPECIFIED
    )
    assert options_of(request) == DEFAULTS


def test_a_default_gives_way_to_what_the_request_sets() -> None:
    options = options_of(search(max_new_tokens=1))
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
        def encode(self, text: str, around: Around = NOTHING_AROUND) -> list[int]:
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
    manifest = make_manifest()
    limits = limits_of(Settings(max_new_tokens=100, max_beam_size=5), manifest)
    assert limits == Limits(
        64,
        65536,
        max_source_tokens=512,
        max_new_tokens=100,
        max_target_tokens=256,
        max_beam_size=5,
        max_request_cost=2 * 64 * 4 * 100,
    )
    assert limits_of(Settings(), manifest).max_new_tokens == 256


def test_one_input_may_ask_for_all_that_an_input_can_ask_for() -> None:
    limits = limits_of(Settings(max_inputs=1), make_manifest())
    assert limits.max_request_cost == 16 * 256


def test_what_a_request_may_cost_can_be_set_but_not_below_one_input() -> None:
    assert limits_of(Settings(max_request_cost=512), make_manifest()).max_request_cost == 512
    with pytest.raises(SettingsError, match=r"max_request_cost: 511 is less than .*; expected at least 512"):
        limits_of(Settings(max_request_cost=511), make_manifest())


@pytest.mark.parametrize(
    ("inputs", "options", "cost"),
    [(2, {"beam_size": 8, "max_new_tokens": 50}, None), (3, {}, None), (3, {"beam_size": 8}, 960)],
)
def test_a_request_that_costs_too_much_is_refused_as_a_whole(
    inputs: int, options: dict[str, Any], cost: int | None
) -> None:
    reader = make_reader(limits=replace(LIMITS, max_request_cost=800))
    request = text(*["hi"] * inputs, search=pb.SearchOptions(**options))
    if cost is None:
        assert len(reader.generate(request).sources) == inputs
        return
    [(field, problem)] = violations(request, reader)
    assert field == "search"
    assert problem.startswith(f"costs {cost} (beam_size * max_new_tokens, over 3 inputs); expected at most 800: ")


@pytest.mark.parametrize(
    ("number", "priority"),
    [
        (pb.PRIORITY_UNSPECIFIED, Priority.NORMAL),
        (pb.PRIORITY_NORMAL, Priority.NORMAL),
        (pb.PRIORITY_BATCH, Priority.BATCH),
    ],
)
def test_all_sources_of_a_request_have_its_priority(number: pb.Priority, priority: Priority) -> None:
    assert [source.priority for source in read(text("a", "b", priority=number)).sources] == [priority] * 2
    [source] = make_reader().stream(pb.GenerateStreamRequest(input=pb.Input(text="a"), priority=number)).sources
    assert source.priority is priority


def test_a_priority_that_there_is_not_is_refused() -> None:
    assert violations(text("a", priority=7)) == [("priority", "is 7; expected a value of the enum")]


def test_settings_cannot_promise_more_than_the_model_has() -> None:
    with pytest.raises(SettingsError, match="max_new_tokens: 257 is more than the model can generate"):
        limits_of(Settings(max_new_tokens=257), make_manifest())


def prefixed(*prefix: int | str, **options: Any) -> pb.GenerateRequest:
    """A request whose target begins with a text, or with these ids."""
    if isinstance(prefix[0], str):
        target_prefix = pb.TargetPrefix(text=prefix[0])
    else:
        target_prefix = pb.TargetPrefix(token_ids=pb.TokenIds(ids=prefix))  # type: ignore[arg-type]  # all are ids
    return pb.GenerateRequest(
        inputs=[pb.Input(text="hi", target_prefix=target_prefix)], search=pb.SearchOptions(**options)
    )


class TestTargetPrefix:
    """The beginning of a target that the caller gives."""

    def test_text_is_read_as_the_targets_with_nothing_added(self) -> None:
        [source] = read(prefixed("é")).sources
        assert (source.tokens, source.target_prefix) == ((104, 105, EOS), (0xC3, 0xA9))

    def test_ids_are_taken_as_they_are(self) -> None:
        assert read(prefixed(5, 0, 5)).sources[0].target_prefix == (5, 0, 5)

    def test_each_input_has_its_own_or_none(self) -> None:
        request = prefixed("a")
        request.inputs.add(text="x")
        request.inputs.add(token_ids=pb.TokenIds(ids=[1])).target_prefix.token_ids.ids.append(7)
        assert [source.target_prefix for source in read(request).sources] == [(97,), (), (7,)]

    def test_a_stream_takes_one_too(self) -> None:
        request = pb.GenerateStreamRequest(input=pb.Input(text="hi", target_prefix=pb.TargetPrefix(text="a")))
        assert make_reader().stream(request).sources[0].target_prefix == (97,)
        request.input.target_prefix.text = ""
        with pytest.raises(InvalidRequest, match=r"^input\.target_prefix\.text: is empty$"):
            make_reader().stream(request)

    def test_ids_are_those_of_the_targets_vocabulary(self) -> None:
        dimensions = make_manifest().dimensions.model_copy(update={"target_vocabulary": 300})
        reader = make_reader(manifest=make_manifest().model_copy(update={"dimensions": dimensions}))
        assert reader.generate(prefixed(299)).sources[0].target_prefix == (299,)
        assert violations(prefixed(300), reader) == [
            ("inputs[0].target_prefix.token_ids", "has the id 300 at index 0; expected 0 to 299")
        ]

    @pytest.mark.parametrize(
        ("prefix", "expected"),
        [
            (("",), ("text", "is empty")),
            (("é" * 11,), ("text", "has 22 bytes; expected at most 20")),
            ((5, -1), ("token_ids", "has the id -1 at index 1; expected 0 to 257")),
            ((5, VOCABULARY), ("token_ids", "has the id 258 at index 1; expected 0 to 257")),
            ((5, EOS), ("token_ids", "has the end-of-sequence id 256 at index 1, where a target ends; leave it out")),
            (
                (DECODER_START, 5),
                ("token_ids", "begins with the decoder's start, id 257, which is put before it anyway; leave it out"),
            ),
            ((9,) * 60, ("token_ids", "has 60 tokens; expected at most 59, to leave room for one to generate")),
            ((9,) * 200, ("token_ids", "has 200 tokens; expected at most 59, to leave room for one to generate")),
        ],
    )
    def test_each_violation_is_named(self, prefix: tuple[Any, ...], expected: tuple[str, str]) -> None:
        field, problem = expected
        assert violations(prefixed(*prefix)) == [(f"inputs[0].target_prefix.{field}", problem)]

    def test_one_without_content_is_no_prefix(self) -> None:
        request = pb.GenerateRequest(inputs=[pb.Input(text="hi", target_prefix=pb.TargetPrefix())])
        missing = ("inputs[0].target_prefix", "is missing; expected text or token_ids")
        assert violations(request) == [missing]
        request.inputs[0].target_prefix.token_ids.SetInParent()
        assert violations(request) == [("inputs[0].target_prefix.token_ids", "is empty")]

    def test_a_text_for_a_model_without_tokenizer(self) -> None:
        request = pb.GenerateRequest(
            inputs=[pb.Input(token_ids=pb.TokenIds(ids=[1]), target_prefix=pb.TargetPrefix(text="a"))]
        )
        problem = "cannot be read: this model has no tokenizer; expected token_ids"
        assert violations(request, make_reader(tokenizer=None)) == [("inputs[0].target_prefix.text", problem)]
        request.inputs[0].target_prefix.token_ids.ids.append(5)
        assert make_reader(tokenizer=None).generate(request).sources[0].target_prefix == (5,)

    def test_a_text_without_tokens(self) -> None:
        class Mute(ByteTokenizer):
            def encode_target(self, text: str) -> list[int]:
                return []

        expected = [("inputs[0].target_prefix.text", "has no tokens")]
        assert violations(prefixed(" "), make_reader(tokenizer=Mute())) == expected

    def test_a_text_that_has_an_end_in_it_is_named_like_ids(self) -> None:
        """Some models end with a word, such as a full stop."""
        tokens = make_manifest().special_tokens.model_copy(update={"eos": (EOS, ord("."))})
        reader = make_reader(manifest=make_manifest().model_copy(update={"special_tokens": tokens}))
        assert violations(prefixed("Hi. A"), reader) == [
            (
                "inputs[0].target_prefix.text",
                "has the end-of-sequence id 46 at index 2, where a target ends; leave it out",
            )
        ]

    def test_a_start_that_is_an_end_too_is_named_as_one(self) -> None:
        tokens = make_manifest().special_tokens.model_copy(update={"decoder_start": EOS})
        reader = make_reader(manifest=make_manifest().model_copy(update={"special_tokens": tokens}))
        [(_, problem)] = violations(prefixed(EOS, 5), reader)
        assert problem == "has the end-of-sequence id 256 at index 0, where a target ends; leave it out"

    def test_the_decoders_start_may_come_again_later(self) -> None:
        assert read(prefixed(5, DECODER_START)).sources[0].target_prefix == (5, DECODER_START)

    @pytest.mark.parametrize(
        ("prefix", "least", "most"), [(1, 2, 40), (20, 2, 40), (21, 2, 39), (58, 2, 2), (59, 1, 1)]
    )
    def test_defaults_give_way_to_it(self, prefix: int, least: int, most: int) -> None:
        options = options_of(prefixed(*[9] * prefix))
        assert (options.min_new_tokens, options.max_new_tokens) == (least, most)

    def test_defaults_give_way_for_its_own_input_alone(self) -> None:
        request = prefixed(*[9] * 50)
        request.inputs.add(text="x")
        assert [source.options.max_new_tokens for source in read(request).sources] == [10, 40]

    def test_what_is_asked_for_does_not_give_way(self) -> None:
        assert options_of(prefixed(*[9] * 10, max_new_tokens=50)).max_new_tokens == 50
        field = "inputs[0].target_prefix.token_ids"
        assert violations(prefixed(*[9] * 11, max_new_tokens=50)) == [
            (field, "has 11 tokens, and search.max_new_tokens is 50; expected at most 60 together")
        ]
        assert options_of(prefixed(*[9] * 30, min_new_tokens=30)).max_new_tokens == 30
        assert violations(prefixed(*[9] * 31, min_new_tokens=30)) == [
            (field, "has 31 tokens, and search.min_new_tokens is 30; expected at most 60 together")
        ]

    def test_it_is_checked_beside_everything_else(self) -> None:
        request = prefixed(5, EOS, max_new_tokens=0)
        request.inputs[0].text = ""
        request.inputs.add(text="x").target_prefix.text = ""
        assert [field for field, _ in violations(request)] == [
            "search.max_new_tokens",
            "inputs[0].text",
            "inputs[0].target_prefix.token_ids",
            "inputs[1].target_prefix.text",
        ]

    def test_truncation_is_for_sources_alone(self) -> None:
        request = prefixed(*[9] * 60)
        request.truncate_source = True
        assert violations(request)[0][0] == "inputs[0].target_prefix.token_ids"
