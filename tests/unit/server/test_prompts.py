"""Prompts, which a model without an encoder has in place of sources: what is read, what has room, what text comes."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beamline.v1 import generation_pb2 as pb
from beamline_server.engine.request import Completed, Finish, Hypothesis, SearchOptions, Timing
from beamline_server.rpc.converters import CONTEXT, Limits, Order, RequestReader, default_search, limits_of
from beamline_server.rpc.desk import Source
from beamline_server.rpc.errors import InvalidRequest
from beamline_server.rpc.responses import ResponseWriter
from beamline_server.rpc.streaming import GrowingText
from beamline_server.settings import Settings
from beamline_server.tokenizer import whole_characters
from beamline_server.word_tokenizer import CharacterTokenizer
from doubles.service import DECODER_START, EOS, VOCABULARY, ByteTokenizer, make_manifest

POSITIONS = 60
DEFAULTS = SearchOptions(max_new_tokens=20)
SIZES = {
    "d_model": 8,
    "decoder_layers": 1,
    "decoder_heads": 2,
    "source_vocabulary": VOCABULARY,
    "target_vocabulary": VOCABULARY,
    "max_source_tokens": POSITIONS - 1,
    "max_target_tokens": POSITIONS,
    "decoder_only": True,
}
PROMPTED = make_manifest(dimensions=SIZES, special_tokens={"decoder_start": DECODER_START, "eos": [EOS]})


class Plain(ByteTokenizer):
    """Bytes with nothing around them."""

    def encode(self, text: str, around: Any = None) -> list[int]:
        return self.encode_target(text)


LIMITS = Limits(
    max_inputs=3,
    max_text_bytes=1000,
    max_source_tokens=POSITIONS - 1,
    max_new_tokens=POSITIONS - 1,
    max_target_tokens=POSITIONS,
    max_beam_size=8,
    max_request_cost=1 << 20,
)


def reader(**changes: Any) -> RequestReader:
    fields = {"limits": LIMITS, "defaults": DEFAULTS, "manifest": PROMPTED, "tokenizer": Plain(), **changes}
    return RequestReader(model_name="test-model", **fields)


def asked(*prompts: str, prefix: str | None = None, **fields: Any) -> pb.GenerateRequest:
    beginning = None if prefix is None else pb.TargetPrefix(text=prefix)
    return pb.GenerateRequest(inputs=[pb.Input(text=p, target_prefix=beginning) for p in prompts], **fields)


def one(request: pb.GenerateRequest, **changes: Any) -> Source:
    order: Order = reader(**changes).generate(request)
    (source,) = order.sources
    return source


def violations(request: pb.GenerateRequest) -> list[tuple[str, str]]:
    with pytest.raises(InvalidRequest) as caught:
        reader().generate(request)
    return [(violation.field, violation.problem) for violation in caught.value.violations]


def test_a_prompt_is_read_as_it_stands_and_an_empty_one_is_the_beginning_of_a_sequence() -> None:
    assert one(asked("hi")) == Source((104, 105), False, DEFAULTS, context=(104, 105))
    assert one(asked("")).tokens == (DECODER_START,)
    ids = pb.Input(token_ids=pb.TokenIds(ids=[EOS, 5]))
    assert one(pb.GenerateRequest(inputs=[ids])).tokens == (EOS, 5)
    assert one(pb.GenerateRequest(inputs=[pb.Input(token_ids=pb.TokenIds())])).tokens == (DECODER_START,)
    assert violations(pb.GenerateRequest(inputs=[pb.Input()])) == [
        ("inputs[0]", "is missing; expected text or token_ids")
    ]


def test_what_text_is_read_behind_is_the_end_of_a_prompt() -> None:
    sizes = {**SIZES, "max_source_tokens": 499, "max_target_tokens": 500}
    manifest = make_manifest(dimensions=sizes, special_tokens={"decoder_start": DECODER_START, "eos": [EOS]})
    limits = replace(LIMITS, max_target_tokens=500, max_source_tokens=499)
    long = one(asked("x" * 300), manifest=manifest, limits=limits)
    assert len(long.tokens) == 300
    assert long.context == long.tokens[-CONTEXT:]
    # One that would begin within a character begins before it; one of such characters alone is read whole.
    odd = one(asked("x" * 100 + "é" + "x" * 63), manifest=manifest, limits=limits)
    assert odd.context == odd.tokens[-2 * CONTEXT :]
    assert one(asked("é" * 100 + "x"), manifest=manifest, limits=limits).context == tuple(("é" * 100 + "x").encode())


def test_defaults_give_way_to_a_prompt_and_what_a_request_sets_does_not() -> None:
    assert one(asked("x" * 55)).options.max_new_tokens == 5
    assert one(asked("x" * 30, prefix="y" * 25)).options.max_new_tokens == 5
    search = pb.SearchOptions(max_new_tokens=20)
    assert one(asked("x" * 40, search=search)).options.max_new_tokens == 20
    assert violations(asked("x" * 41, search=search)) == [
        (
            "inputs[0].text",
            "has 41 tokens, and search.max_new_tokens is 20; expected at most 60 together, or truncate_source",
        )
    ]
    assert violations(asked("x" * 60)) == [
        (
            "inputs[0].text",
            "has 60 tokens; expected at most 59, to leave room for one to generate, or truncate_source",
        )
    ]
    assert violations(asked("x" * 30, prefix="y" * 12, search=search)) == [
        (
            "inputs[0].target_prefix.text",
            "has 12 tokens, and search.max_new_tokens is 20; expected at most 30 together behind a prompt of 30",
        )
    ]
    assert violations(asked("hi", prefix="y" * 70)) == [
        ("inputs[0].target_prefix.text", "has 70 tokens; expected at most 59, to leave room for one to generate")
    ]
    assert violations(asked("hi", search=pb.SearchOptions(max_new_tokens=60)))[0] == (
        "search.max_new_tokens",
        "is 60; expected 1 to 59",
    )


def test_of_a_prompt_that_is_cut_the_end_stays_and_what_it_began_with() -> None:
    text = "".join(chr(ord("a") + number % 26) for number in range(100))
    cut = one(asked(text, truncate_source=True))
    assert (cut.truncated, cut.tokens, cut.options) == (True, tuple(text[-40:].encode()), DEFAULTS)
    with_prefix = one(asked(text, prefix="yyyyy", truncate_source=True))
    assert with_prefix.tokens == tuple(text[-35:].encode())
    # What fits as it is stays, whatever a default would like.
    for short in ("hi", text[:59]):
        assert not one(asked(short, truncate_source=True)).truncated
    greedy = SearchOptions(max_new_tokens=59)
    assert not one(asked(text[:50], truncate_source=True), defaults=greedy).truncated
    assert one(asked(text, truncate_source=True), defaults=greedy).tokens == tuple(text[-30:].encode())
    search = pb.SearchOptions(max_new_tokens=50)
    assert one(asked(text, truncate_source=True, search=search)).tokens == tuple(text[-10:].encode())
    begun = make_manifest(
        dimensions=SIZES, special_tokens={"decoder_start": ord("a"), "eos": [EOS], "source_bos": ord("a")}
    )
    assert one(asked(text, truncate_source=True), manifest=begun).tokens == (ord("a"), *text[-39:].encode())


def test_a_prefix_goes_on_behind_a_prompt() -> None:
    source = one(asked("ab", prefix="cd"))
    assert (source.tokens, source.target_prefix, source.context) == ((97, 98), (99, 100), (97, 98))
    # It has begun already: what a sequence begins with may stand anywhere.
    begun = pb.TargetPrefix(token_ids=pb.TokenIds(ids=[DECODER_START]))
    again = pb.GenerateRequest(inputs=[pb.Input(text="a", target_prefix=begun)])
    assert one(again).target_prefix == (DECODER_START,)


def test_a_prompt_has_no_language() -> None:
    assert [field for field, _ in violations(asked("hi", source_language="fr", target_language="en"))] == [
        "source_language",
        "target_language",
    ]


def test_limits_leave_a_token_to_a_prompt() -> None:
    limits = limits_of(Settings(), PROMPTED)
    assert (limits.max_new_tokens, limits.max_target_tokens) == (POSITIONS - 1, POSITIONS)
    assert default_search(PROMPTED.generation_defaults, limits).max_new_tokens == POSITIONS - 1


class Words:
    """Each token is a word; the first of a text loses its space, as SentencePiece has it."""

    def encode(self, text: str, around: Any = None) -> list[int]:
        return [len(word) for word in text.split()]

    def encode_target(self, text: str) -> list[int]:
        return self.encode(text)

    def decode(self, ids: Any) -> str:
        return "".join(" " + "x" * token for token in ids).removeprefix(" ")

    def settled(self, ids: Any) -> str:
        return self.decode(ids)


def text_of(tokenizer: Any, source: Source, *tokens: int) -> str:
    answer = Completed(
        id=1,  # type: ignore[arg-type]
        hypotheses=(Hypothesis(tokens, 0.0, (0.0,) * len(tokens), Finish.LENGTH),),
        timing=Timing(0, 0, 0, 1),
    )
    order = reader().generate(asked("hi"))
    result = ResponseWriter(tokenizer).response(replace(order, sources=(source,)), [answer]).results[0]
    return str(result.hypotheses[0].text)


def test_the_text_continues_that_of_the_prompt() -> None:
    prompt = Source((2, 3), False, DEFAULTS, context=(2, 3))
    assert text_of(Words(), prompt, 1, 4) == " x xxxx"
    assert text_of(Words(), replace(prompt, target_prefix=(5,)), 1) == " xxxxx x"
    # Half of a character is the prompt's, and the whole of it comes with its other half.
    half = Source((0xC3,), False, DEFAULTS, context=(0xC3,))
    assert text_of(ByteTokenizer(), half, 0xA9, 33) == "é!"


@given(prompt=st.lists(st.integers(0, 255), min_size=1, max_size=9), tokens=st.lists(st.integers(0, 255), max_size=12))
def test_pieces_are_the_text_of_the_result(prompt: list[int], tokens: list[int]) -> None:
    tokenizer = ByteTokenizer()
    growing = GrowingText(tokenizer, (), prompt)
    told = "".join(growing.extend([token]) for token in tokens)
    whole = text_of(tokenizer, Source(tuple(prompt), False, DEFAULTS, context=tuple(prompt)), *tokens)
    assert told + growing.finish(tokens) == whole
    every, begun = tokenizer.decode([*prompt, *tokens]), tokenizer.decode(prompt)
    assert (begun if every.startswith(begun) else whole_characters(begun)) + whole == every


def test_characters_that_a_model_does_not_know_are_refused() -> None:
    manifest = make_manifest(dimensions=SIZES, special_tokens={"decoder_start": 0, "eos": [0], "source_bos": 0})
    tokenizer = CharacterTokenizer(lambda name: b'{"a": 1, "b": 2, "\\u00e9": 3}', manifest)
    assert tokenizer.encode("abé") == [0, 1, 2, 3]
    assert tokenizer.encode("") == [0]
    assert tokenizer.decode([0, 1, 3, 0, 200]) == tokenizer.settled([1, 3]) == "aé"
    known = reader(manifest=manifest, tokenizer=tokenizer)
    with pytest.raises(InvalidRequest) as caught:
        known.generate(asked("abc", prefix="Ä"))
    assert [(v.field, v.problem) for v in caught.value.violations] == [
        ("inputs[0].text", "has the character 'c', which the model has no token for"),
        ("inputs[0].target_prefix.text", "has the character 'Ä', which the model has no token for"),
    ]
