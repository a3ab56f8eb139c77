"""The languages of a request: which a model has, where they go, and what is told of those that cannot be given."""

from typing import Any

import pytest

from beamline.v1 import generation_pb2 as pb
from beamline_server.engine.request import SearchOptions
from beamline_server.languages import Languages, ModelLanguages, near_names
from beamline_server.manifest import Manifest
from beamline_server.rpc.converters import Limits, Order, RequestReader
from beamline_server.rpc.desk import Source
from beamline_server.rpc.errors import InvalidRequest
from doubles.service import EOS, VOCABULARY, ByteTokenizer, make_manifest, serving

# No byte of UTF-8.
EN, FR, DE = 250, 251, 252
SPECIAL = {"decoder_start": 257, "eos": [EOS], "source_eos": EOS}
LIMITS = Limits(
    max_inputs=3,
    max_text_bytes=40,
    max_source_tokens=8,
    max_new_tokens=10,
    max_target_tokens=12,
    max_beam_size=4,
    max_request_cost=1000,
)


def described(marked: str, begins: str, **more: Any) -> dict[str, Any]:
    codes = {"en_XX": EN, "fr_XX": FR, "de_DE": DE}
    sides = {"source": marked.startswith("source"), "target": marked == "target_before" or begins != "none"}
    entries = {name: {"token": token, **sides} for name, token in codes.items()}
    return {"codes": entries, "source_marked": marked, "target_begins": begins, **more}


MBART_50 = described("source_before", "forced_first")
MBART = described("source_after", "decoder_start")
OPUS = described("target_before", "none")


def reader(languages: dict[str, Any] | None, *, tokenizer: bool = True, **special: Any) -> RequestReader:
    manifest = make_manifest(languages=languages, special_tokens={**SPECIAL, **special})
    return RequestReader(
        model_name="m",
        limits=LIMITS,
        defaults=SearchOptions(max_new_tokens=10),
        manifest=manifest,
        tokenizer=ByteTokenizer() if tokenizer else None,
    )


def asked(source: str | None = None, target: str | None = None, *inputs: pb.Input, **more: Any) -> pb.GenerateRequest:
    entries = inputs or (pb.Input(text="ab"),)
    return pb.GenerateRequest(inputs=entries, source_language=source, target_language=target, **more)


def read(of: RequestReader, request: pb.GenerateRequest) -> Source:
    order: Order = of.generate(request)
    return order.sources[0]


def refused(of: RequestReader, request: pb.GenerateRequest) -> dict[str, str]:
    with pytest.raises(InvalidRequest) as caught:
        of.generate(request)
    return {violation.field: violation.problem for violation in caught.value.violations}


@pytest.mark.parametrize(
    ("languages", "names", "tokens", "start", "first"),
    [
        (MBART_50, ("fr_XX", "en_XX"), (FR, *b"ab", EOS), None, EN),
        (MBART, ("fr_XX", "en_XX"), (*b"ab", EOS, FR), EN, None),
        (OPUS, (None, "de_DE"), (DE, *b"ab", EOS), None, None),
        (OPUS, (None, None), (*b"ab", EOS), None, None),
        (None, (None, None), (*b"ab", EOS), None, None),
    ],
)
def test_languages_go_where_the_model_has_them(
    languages: dict[str, Any], names: tuple[str, str], tokens: tuple[int, ...], start: int | None, first: int | None
) -> None:
    found = read(reader(languages), asked(*names))
    assert (found.tokens, found.decoder_start, found.forced_first) == (tokens, start, first)


def test_a_stream_has_languages_as_well() -> None:
    request = pb.GenerateStreamRequest(input=pb.Input(text="ab"), source_language="fr_XX", target_language="en_XX")
    (found,) = reader(MBART_50).stream(request).sources
    assert (found.tokens, found.forced_first) == ((FR, *b"ab", EOS), EN)


def test_what_the_checkpoint_fixes_is_the_default() -> None:
    with_source = {**MBART_50, "default_source": "de_DE"}
    found = read(reader(with_source, forced_bos=EN), asked())
    # The first token that the model forces is its own anyway.
    assert (found.tokens, found.forced_first) == ((DE, *b"ab", EOS), None)
    assert read(reader(with_source, forced_bos=EN), asked(target="fr_XX")).forced_first == FR
    started = read(reader({**MBART, "default_source": "de_DE"}, decoder_start=FR), asked())
    assert (started.tokens, started.decoder_start) == ((*b"ab", EOS, DE), None)


def test_a_model_that_forces_another_first_token_needs_no_target_language() -> None:
    assert read(reader(MBART_50, forced_bos=7), asked("fr_XX")).forced_first is None


@pytest.mark.parametrize("languages", [MBART_50, MBART])
def test_a_missing_language_is_told_on_both_sides_at_once(languages: dict[str, Any]) -> None:
    problem = "is missing, and the model has no default; expected one of en_XX, fr_XX, de_DE"
    assert refused(reader(languages), asked()) == {"source_language": problem, "target_language": problem}


def test_ids_have_their_source_language() -> None:
    ids = pb.Input(token_ids=pb.TokenIds(ids=[FR, 97, EOS]))
    found = read(reader(MBART_50, tokenizer=False), asked(None, "en_XX", ids))
    assert (found.tokens, found.forced_first) == ((FR, 97, EOS), EN)
    problem = "is 'fr_XX', but inputs[0].token_ids has ids, which are taken as they are; give text, or leave it out"
    assert refused(reader(MBART_50), asked("fr_XX", "en_XX", ids)) == {"source_language": problem}
    assert refused(reader(OPUS), asked(None, "fr_XX", ids)) == {"target_language": problem}
    assert read(reader(OPUS), asked(None, None, ids)).tokens == (FR, 97, EOS)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("fr", "did you mean fr_XX?"),
        ("FR-xx", "did you mean fr_XX?"),
        ("en_XY", "did you mean en_XX?"),
        ("klingon", "expected one of en_XX, fr_XX, de_DE"),
        ("", "expected one of en_XX, fr_XX, de_DE"),
    ],
)
def test_an_unknown_language_is_told_with_the_near_ones(name: str, told: str) -> None:
    found = refused(reader(MBART_50), asked(name, "en_XX"))
    assert found == {"source_language": f"is {name!r}, which is no source language of the model; {told}"}


def test_a_language_that_the_model_does_not_take_is_refused() -> None:
    assert refused(reader(None), asked("fr", "en")) == {
        "source_language": "is 'fr', but the model takes no languages; leave it out",
        "target_language": "is 'en', but the model takes no languages; leave it out",
    }
    problem = "is 'fr_XX', but the model takes no source language; leave it out"
    assert refused(reader(OPUS), asked("fr_XX", "en_XX")) == {"source_language": problem}


def test_violations_of_languages_stand_beside_all_others() -> None:
    found = refused(reader(MBART_50), asked("fr", None, pb.Input(text=""), search=pb.SearchOptions(beam_size=9)))
    assert set(found) == {"search.beam_size", "source_language", "target_language", "inputs[0].text"}


def test_the_codes_count_to_the_limit_and_stay_when_a_source_is_cut() -> None:
    text = pb.Input(text="abcdefgh")
    assert refused(reader(MBART_50), asked("fr_XX", "en_XX", text)) == {
        "inputs[0].text": "has 10 tokens; expected at most 8, or truncate_source"
    }
    before = read(reader(MBART_50), asked("fr_XX", "en_XX", text, truncate_source=True))
    assert before.tokens == (FR, *b"abcdef", EOS)
    behind = read(reader(MBART), asked("fr_XX", "en_XX", text, truncate_source=True))
    assert behind.tokens == (*b"abcdef", EOS, FR)
    assert before.truncated
    assert behind.truncated


def test_a_language_that_would_be_first_stands_before_the_text_of_a_prefix() -> None:
    given = pb.Input(text="ab", target_prefix=pb.TargetPrefix(text="xy"))
    found = read(reader(MBART_50), asked("fr_XX", "en_XX", given))
    assert (found.target_prefix, found.options.max_new_tokens) == ((EN, *b"xy"), 9)
    default = read(reader({**MBART_50, "default_source": "fr_XX"}, forced_bos=DE), asked(None, None, given))
    assert default.target_prefix == (DE, *b"xy")
    assert read(reader(MBART), asked("fr_XX", "en_XX", given)).target_prefix == (*b"xy",)
    assert read(reader(None, forced_bos=DE), asked(None, None, given)).target_prefix == (*b"xy",)


def test_a_prefix_of_ids_has_its_language() -> None:
    given = pb.Input(text="ab", target_prefix=pb.TargetPrefix(token_ids=pb.TokenIds(ids=[EN, 97])))
    assert read(reader(MBART_50), asked("fr_XX", None, given)).target_prefix == (EN, 97)
    found = refused(reader(MBART_50), asked("fr_XX", "en_XX", given))
    assert found["target_language"].startswith("is 'en_XX', but inputs[0].target_prefix.token_ids has ids")
    started = refused(reader(MBART), asked("fr_XX", "en_XX", given))
    assert started["inputs[0].target_prefix.token_ids"].startswith(f"begins with the decoder's start, id {EN}")


@pytest.mark.parametrize(
    ("name", "known", "near"),
    [
        ("fr", ["en_XX", "fr_XX"], ["fr_XX"]),
        ("fra", ["fra_Latn", "eng_Latn", "fry_Latn"], ["fra_Latn"]),
        ("fra_Latin", ["fra_Latn", "eng_Latn"], ["fra_Latn"]),
        ("zho", ["zho_Hans", "zho_Hant", "eng_Latn"], ["zho_Hans", "zho_Hant"]),
        ("eng_US", ["en_XX", "eng_Latn"], ["eng_Latn"]),
        ("port", ["portuguese", "english"], ["portuguese"]),
        (">>fra<<", ["fra", "deu"], ["fra"]),
        ("__fr__", ["fr", "de"], ["fr"]),
        ("xyz", ["fra", "deu"], []),
        ("", ["fra", "deu"], []),
        ("fra_" + 1000 * "x", ["fra", "deu"], []),
    ],
)
def test_near_names(name: str, known: list[str], near: list[str]) -> None:
    assert near_names(name, known) == near


def problems(languages: dict[str, Any], **special: Any) -> list[str]:
    manifest: Manifest = make_manifest(languages=languages, special_tokens={**SPECIAL, **special})
    return [problem for problem in manifest.problems() if problem.startswith("languages: ")]


def test_a_manifest_of_languages_is_held_to_itself() -> None:
    assert not problems(MBART_50)
    assert not problems(MBART)
    assert not problems(OPUS)
    assert "no source language" in problems({**MBART_50, "default_source": "it"})[0]
    assert "nothing is marked with it" in problems({**MBART_50, "source_marked": "none"})[0]
    assert "nothing is marked with it" in problems({**OPUS, "source_marked": "none"})[0]
    far = {"codes": {"en": {"token": VOCABULARY, "source": True, "target": True}}}
    assert len(problems({**MBART_50, **far})) == 2
    assert "ends the sequence" in problems({**MBART_50, "codes": {"en": {"token": EOS, "target": True}}})[0]
    assert "ends the sequence" in problems({**OPUS, "codes": {"en": {"token": EOS, "target": True}}})[0]
    twice = {"en": {"token": 7, "target": True}, "fr": {"token": 7, "target": True}}
    assert problems({**OPUS, "codes": twice}) == ["languages: some have one code"]


@pytest.mark.parametrize(
    "codes", [{}, {"x": {"token": -1}}, *({name: {"token": 1}} for name in ("", "x" * 65, "a\x1bb", " ", "<x>"))]
)
def test_a_manifest_of_languages_has_bounds(codes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="codes"):
        Languages.model_validate({"codes": codes, "source_marked": "source_before"})


def test_a_model_without_languages_has_none() -> None:
    found = ModelLanguages(None, forced_bos=3, decoder_start=2)
    assert not any(found.names.values())
    assert not found.needed
    assert found.marks().forced_first is None


async def test_the_service_tells_languages_and_hands_them_to_the_engine() -> None:
    manifest = make_manifest(languages={**MBART_50, "default_source": "fr_XX"}, special_tokens=SPECIAL)
    async with serving(manifest=manifest) as service:
        model = (await service.stub.GetInfo(pb.GetInfoRequest(), timeout=9)).model
        assert list(model.source_languages) == list(model.target_languages) == ["en_XX", "fr_XX", "de_DE"]
        assert (model.default_source_language, model.default_target_language) == ("fr_XX", "")
        await service.stub.Generate(asked(None, "en_XX"), timeout=9)
        (request,) = await service.engine.submitted()
        assert (request.source, request.forced_first, request.decoder_start) == ((FR, *b"ab", EOS), EN, None)
    async with serving(manifest=make_manifest(languages=MBART, special_tokens=SPECIAL)) as service:
        await service.stub.Generate(asked("fr_XX", "en_XX"), timeout=9)
        (request,) = await service.engine.submitted()
        assert (request.source, request.forced_first, request.decoder_start) == ((*b"ab", EOS, FR), None, EN)
