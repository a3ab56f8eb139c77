"""What a caller gets for a valid request, through the client library and a real server."""

import asyncio
import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from beamline_client import AsyncClient, Client, FinishReason, LengthPenaltyKind, Piece, Result, SearchOptions
from beamline_client.results import EarlyStopping, Timing
from beamline_server.bundle import Bundle
from beamline_server.process import ServerProcess

EOS = 0


def answer(result: Result) -> Result:
    """A result without what differs from call to call."""
    return replace(result, timing=Timing(0, 0, 0, 0))


def test_one_input_is_translated(client: Client) -> None:
    result = client.generate_one("Ai-je le choix ?")

    assert result.text == "Do I have a choice?"
    assert result.best.finish_reason is FinishReason.END_OF_SEQUENCE
    assert not result.source_truncated


def test_many_inputs_give_as_many_results_in_their_order(client: Client, sentences: Sequence[str]) -> None:
    some = sentences[:32]

    together = client.generate(some)

    assert [answer(result) for result in together] == [answer(client.generate_one(text)) for text in some]
    assert len({result.text for result in together}) > 20


def test_the_n_best_come_best_first(client: Client, sentences: Sequence[str]) -> None:
    for result in client.generate(sentences[:8], search=SearchOptions(beam_size=6, n_best=6), token_ids=True):
        scores = [hypothesis.score for hypothesis in result.hypotheses]
        assert scores == sorted(scores, reverse=True)
        assert len({hypothesis.token_ids for hypothesis in result.hypotheses}) == 6


@pytest.mark.parametrize("kind", LengthPenaltyKind)
@pytest.mark.parametrize("penalty", [0.0, 0.6, 2.0])
def test_scores_are_the_penalized_sums_of_the_log_probabilities(
    client: Client, kind: LengthPenaltyKind, penalty: float
) -> None:
    search = SearchOptions(beam_size=4, n_best=4, length_penalty=penalty, length_penalty_kind=kind)
    result = client.generate_one("Il fait beau aujourd'hui.", search=search, token_ids=True, token_logprobs=True)

    for hypothesis in result.hypotheses:
        assert hypothesis.token_ids is not None
        assert hypothesis.token_logprobs is not None
        length = len(hypothesis.token_ids)
        divisor = length if kind is LengthPenaltyKind.POWER else (5 + length) / 6
        assert len(hypothesis.token_logprobs) == length
        assert all(logprob <= 0 for logprob in hypothesis.token_logprobs)
        assert hypothesis.score == pytest.approx(sum(hypothesis.token_logprobs) / divisor**penalty, rel=1e-5)


def test_token_ids_and_log_probabilities_come_only_if_asked_for(client: Client) -> None:
    plain = client.generate_one("Bonjour.").best
    full = client.generate_one("Bonjour.", token_ids=True, token_logprobs=True).best

    assert (plain.token_ids, plain.token_logprobs) == (None, None)
    assert full.token_ids is not None
    assert full.token_ids[-1] == EOS
    assert (plain.text, plain.score) == (full.text, full.score)


def test_token_ids_of_a_text_give_what_the_text_gives(client: Client, fr_en_int8: Bundle) -> None:
    from beamline_server.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(fr_en_int8)
    assert tokenizer is not None
    text = "Où est la gare ?"

    by_text, by_ids = client.generate([text, tokenizer.encode(text)])

    assert answer(by_text) == answer(by_ids)
    assert by_text.source_tokens == len(tokenizer.encode(text))


def test_a_length_limit_ends_hypotheses_and_is_told(client: Client) -> None:
    search = SearchOptions(beam_size=2, n_best=2, max_new_tokens=3)
    result = client.generate_one("Il fait beau aujourd'hui, allons nous promener.", search=search, token_ids=True)

    assert [len(hypothesis.token_ids or ()) for hypothesis in result.hypotheses] == [3, 3]
    assert result.timing.steps <= 3


def test_min_new_tokens_holds_back_the_end(client: Client) -> None:
    result = client.generate_one("Oui.", search=SearchOptions(min_new_tokens=20), token_ids=True)

    assert result.best.token_ids is not None
    assert len(result.best.token_ids) >= 20
    assert EOS not in result.best.token_ids[:19]


def test_a_text_of_spaces_alone_is_an_empty_sentence(client: Client) -> None:
    """It is not the empty text, so it is answered: with what the model makes of end-of-sequence alone."""
    result = client.generate_one("   \n\t ")

    assert result.source_tokens == 1
    assert len(result.hypotheses) == 1


@pytest.mark.parametrize(
    "text",
    ["\x00", "😀" * 20, "e\u0301 \u202egare", "\ufffd", ">>fra<< gare", "<unk></s><pad>", "a" * 100, "\u2028\u2029"],
    ids=["nul", "emoji", "combining", "replacement", "language code", "special pieces", "long word", "separators"],
)
def test_strange_texts_are_answered(client: Client, text: str) -> None:
    assert client.generate_one(text, search=SearchOptions(max_new_tokens=8)).hypotheses


def test_a_source_that_is_too_long_is_cut_if_asked_for(client: Client) -> None:
    limit = client.info().limits.max_source_tokens

    result = client.generate_one("gare " * 10_000, truncate=True, search=SearchOptions(beam_size=1, max_new_tokens=4))

    assert result.source_truncated
    assert result.source_tokens == limit


@pytest.mark.parametrize("beam_size", [1, 4])
def test_the_pieces_of_a_stream_are_the_text_and_the_tokens(
    client: Client, sentences: Sequence[str], beam_size: int
) -> None:
    search = SearchOptions(beam_size=beam_size)
    for text in [*sentences[:20], "Il fait beau aujourd'hui, allons nous promener avec les enfants. " * 3]:
        *pieces, result = client.stream(text, search=search, token_ids=True)

        assert isinstance(result, Result)
        assert "".join(piece.text for piece in pieces if isinstance(piece, Piece)) == result.text
        tokens = itertools.chain.from_iterable(piece.token_ids for piece in pieces if isinstance(piece, Piece))
        assert tuple(tokens) == result.best.token_ids
        assert answer(result) == answer(client.generate_one(text, search=search, token_ids=True))


def test_greedy_pieces_come_while_the_search_goes_on(client: Client) -> None:
    """How many depends on who is faster: what becomes certain while the reader is busy comes as one piece."""
    search = SearchOptions(beam_size=1, min_new_tokens=190, max_new_tokens=190)

    *pieces, _ = client.stream("Il fait beau aujourd'hui.", search=search, token_ids=True)

    assert len(pieces) > 1


def test_info_tells_model_limits_and_defaults(client: Client, fr_en_int8: Bundle) -> None:
    info = client.info()
    manifest = fr_en_int8.manifest

    assert (info.model.name, info.model.precision, info.model.device) == ("fr-en", "int8", "cpu")
    assert info.model.fingerprint == fr_en_int8.fingerprint
    assert info.model.source_vocabulary_size == manifest.dimensions.source_vocabulary
    assert info.limits.max_source_tokens == manifest.dimensions.max_source_tokens
    assert info.limits.max_message_bytes == 1024 * 1024
    assert info.default_search.beam_size == manifest.generation_defaults.beam_size
    assert info.default_search.early_stopping is EarlyStopping(manifest.generation_defaults.early_stopping)
    assert {"beamline", "onnxruntime", "grpcio", "python"} <= set(info.versions)


def test_defaults_that_are_spelled_out_change_nothing(client: Client) -> None:
    spelled_out = client.info().default_search

    assert answer(client.generate_one("Où est la gare ?", search=spelled_out)) == answer(
        client.generate_one("Où est la gare ?")
    )


def mixed_searches(count: int) -> list[SearchOptions]:
    """Searches of all widths, with options that change their course."""
    rng = random.Random(20)
    return [
        SearchOptions(
            beam_size=(beam_size := rng.choice([1, 1, 2, 3, 4, 4, 5, 8, 16])),
            n_best=rng.randint(1, beam_size),
            length_penalty=rng.choice([0.0, 0.6, 1.0, 2.0]),
            early_stopping=rng.choice(list(EarlyStopping)),
            min_new_tokens=rng.choice([0, 0, 5]),
            max_new_tokens=rng.choice([5, 20, 100]),
        )
        for _ in range(count)
    ]


async def test_answers_do_not_depend_on_what_runs_beside_them(server: ServerProcess, sentences: Sequence[str]) -> None:
    """Tokens, log-probabilities and scores are the same bits on an idle server and on a busy one."""
    texts = random.Random(10).sample(sentences, 80)
    requests = list(zip(texts, mixed_searches(len(texts)), strict=True))

    async with AsyncClient(server.target) as client:

        async def unary(text: str, search: SearchOptions) -> Result:
            return answer(await client.generate_one(text, search=search, token_ids=True, token_logprobs=True))

        async def streamed(text: str, search: SearchOptions) -> Result:
            events = [e async for e in client.stream(text, search=search, token_ids=True, token_logprobs=True)]
            assert isinstance(events[-1], Result)
            return answer(events[-1])

        alone = [await unary(*request) for request in requests]
        for seed in range(3):
            order = random.Random(seed).sample(range(len(requests)), len(requests))
            calls = [(unary, streamed)[i % 2](*requests[i]) for i in order]
            for i, result in zip(order, await asyncio.gather(*calls), strict=True):
                assert result == alone[i]

    assert all(math.isfinite(hypothesis.score) for result in alone for hypothesis in result.hypotheses)
