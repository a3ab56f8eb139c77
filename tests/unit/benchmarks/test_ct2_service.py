"""Between Beamline's messages and CTranslate2, which the tests do without."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
from ct2_convert import add_start_to_first_position
from ct2_service import Translator, Vocabulary, hypotheses, search_arguments

from beamline_server.engine.request import EarlyStopping, Finish, LengthPenaltyKind, SearchOptions

VOCABULARY = Vocabulary(["</s>", "<unk>", "a", "b"])
WHEN_FULL = SearchOptions(beam_size=4, n_best=2, max_new_tokens=9, early_stopping=EarlyStopping.WHEN_FULL)


@dataclass
class Result:
    """As CTranslate2's."""

    hypotheses: list[list[str]]
    scores: list[float]


@dataclass
class Echo:
    """A translator that answers with the source, and keeps what it was asked."""

    asked: dict[str, Any]

    def translate_batch(self, sources: list[list[str]], **search: Any) -> list[Result]:
        self.asked.update(search)
        return [Result([source], [-0.25]) for source in sources]


def test_pieces_and_ids_are_each_others_inverse() -> None:
    assert VOCABULARY.pieces((2, 3, 0)) == ["a", "b", "</s>"]
    assert VOCABULARY.ids(["a", "b", "</s>"]) == (2, 3, 0)


def test_a_search_is_asked_for_as_it_is_meant() -> None:
    asked = search_arguments(WHEN_FULL)
    assert (asked["beam_size"], asked["num_hypotheses"], asked["max_decoding_length"]) == (4, 2, 9)
    assert (asked["patience"], asked["length_penalty"]) == (1, 1.0)


@pytest.mark.parametrize(
    "options",
    [
        SearchOptions(early_stopping=EarlyStopping.NEVER),
        SearchOptions(early_stopping=EarlyStopping.HEURISTIC),
        SearchOptions(early_stopping=EarlyStopping.WHEN_FULL, length_penalty_kind=LengthPenaltyKind.GNMT),
    ],
)
def test_a_search_that_ctranslate2_does_not_have_is_refused(options: SearchOptions) -> None:
    with pytest.raises(ValueError, match="CTranslate2 has no"):
        search_arguments(options)


def test_hypotheses_tell_how_they_ended() -> None:
    ended, cut = hypotheses(Result([["a", "</s>"], ["b", "a"]], [-0.5, -1.0]), VOCABULARY, (0,))
    assert (ended.tokens, ended.score, ended.finish) == ((2, 0), -0.5, Finish.END_OF_SEQUENCE)
    assert (cut.tokens, cut.finish) == ((3, 2), Finish.LENGTH)
    assert len(cut.token_logprobs) == 2
    assert all(map(math.isnan, cut.token_logprobs))


def test_a_translator_takes_ids_and_gives_ids() -> None:
    echo = Echo({})
    answers = Translator(echo, VOCABULARY, (0,))([(2, 0), (3, 3, 0)], WHEN_FULL)
    assert [hypothesis.tokens for (hypothesis,) in answers] == [(2, 0), (3, 3, 0)]
    assert echo.asked["beam_size"] == 4


def test_a_converted_model_starts_where_the_checkpoint_does() -> None:
    """From a zero embedding at the first position, with what stands there else left out, to the same."""
    import torch
    from transformers import MarianConfig, MarianMTModel

    torch.manual_seed(1)
    sizes = {f"{side}_{what}": 1 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    config = MarianConfig(
        vocab_size=9, d_model=8, max_position_embeddings=6, pad_token_id=8, decoder_start_token_id=8, eos_token_id=0,
        encoder_ffn_dim=8, decoder_ffn_dim=8, scale_embedding=True, **sizes,
    )  # fmt: skip
    model = MarianMTModel(config)
    shared, positions = model.model.shared.weight.data, model.model.decoder.embed_positions.weight.data
    shared[8] = torch.randn(8)
    start, second = positions[0] + math.sqrt(8) * shared[8], positions[1].clone()
    others = model.model.encoder.embed_positions.weight.data.clone()

    add_start_to_first_position(model)

    torch.testing.assert_close(positions[0], start)
    torch.testing.assert_close(positions[1], second)
    torch.testing.assert_close(model.model.encoder.embed_positions.weight.data, others)
