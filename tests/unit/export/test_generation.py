"""Generation settings are read as `generate` finds them; what is not supported is told and recorded."""

from typing import Any

import pytest

from beamline_export.generation import Generation, read_generation
from beamline_export.spec import ExportError

IDS = {"decoder_start_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}


def read(settings: dict[str, Any], config: dict[str, Any] | None = None, positions: int = 100) -> Generation:
    return read_generation({**IDS, **(config or {})}, {**IDS, **settings}, max_positions=positions)


def test_nothing_set_means_what_generate_does() -> None:
    assert read({}).defaults == {
        "beam_size": 1,
        "length_penalty": 1.0,
        "early_stopping": "heuristic",
        "min_new_tokens": 0,
        "max_new_tokens": 20,
        "not_supported": {},
    }


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"max_length": 50}, 49),
        ({"max_new_tokens": 50}, 50),
        ({"max_new_tokens": 50, "max_length": 30}, 50),
        ({"max_length": None}, 20),
        ({"max_length": 1}, 1),
        ({"max_length": 1000}, 100),
        ({"max_new_tokens": 1000}, 100),
    ],
)
def test_length_limits_count_new_tokens_within_the_positions(settings: dict[str, Any], expected: int) -> None:
    assert read(settings).defaults["max_new_tokens"] == expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"min_length": 0}, 0),
        ({"min_length": 5}, 4),
        ({"min_new_tokens": 5}, 5),
        ({"min_length": 9, "min_new_tokens": 3}, 3),
    ],
)
def test_least_lengths_count_new_tokens(settings: dict[str, Any], expected: int) -> None:
    assert read(settings).defaults["min_new_tokens"] == expected


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"min_length": 40, "max_length": 20}, "min_length 40 is more than max_length 20; lower min_length or raise"),
        ({"min_new_tokens": 9, "max_length": 9}, "min_new_tokens 9 is more than max_length 9; lower min_new_tokens"),
        ({"min_length": 9, "max_new_tokens": 5}, "min_length 9 is more than max_new_tokens 5; lower min_length"),
        ({"min_length": 30}, r"min_length 30 is more than what is generated where max_length is not set \(20 tokens\)"),
        (
            {"min_new_tokens": 101, "max_length": 500},
            "min_new_tokens 101 is more than the model's 100 positions; lower",
        ),
    ],
)
def test_lengths_that_contradict_each_other_are_named_as_they_are_given(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ExportError, match=rf"^generation_config\.json: {problem}"):
        read(settings)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"num_beams": 4, "num_return_sequences": 3}, 3),
        ({"num_beams": 4, "num_return_sequences": 1}, None),
        ({"num_beams": 20, "num_return_sequences": 18}, 16),
    ],
)
def test_several_answers_are_a_default_of_their_own(settings: dict[str, Any], expected: int | None) -> None:
    """One is left out: servers of before know no such field."""
    assert read(settings).defaults.get("n_best") == expected


def test_more_answers_than_beams_are_refused_or_named_if_they_would_be_sampled() -> None:
    with pytest.raises(
        ExportError, match=r"num_return_sequences 3 is more than num_beams 2; lower it or raise num_beams"
    ):
        read({"num_beams": 2, "num_return_sequences": 3})
    sampled = read({"num_return_sequences": 3, "do_sample": True}).defaults
    assert "n_best" not in sampled
    assert sampled["not_supported"] == {
        "do_sample": "true",
        "num_return_sequences": "3; 1 is used, as many as there are beams",
    }


@pytest.mark.parametrize(("bos", "forced"), [({"bos_token_id": 7}, 7), ({}, None)])
def test_the_forced_beginning_of_old_configs_is_their_bos(bos: dict[str, int], forced: int | None) -> None:
    """As in transformers: only where there is no generation_config.json, and before any forced_bos_token_id."""
    config = {**IDS, **bos, "force_bos_token_to_be_generated": True, "forced_bos_token_id": 9}
    assert read_generation(config, None, max_positions=9).tokens.forced_bos == forced
    assert read_generation(config, {}, max_positions=9).tokens.forced_bos is None


def test_settings_that_nobody_knows_are_named() -> None:
    """In generation_config.json; config.json has fields of its owner."""
    assert read({"lenght_penalty": 2}).defaults["not_supported"] == {"lenght_penalty": "2 (an unknown name)"}
    assert read_generation({**IDS, "trained_by": "me"}, None, max_positions=9).defaults["not_supported"] == {}


@pytest.mark.parametrize(
    ("value", "expected"), [(True, "when_full"), (False, "heuristic"), (None, "heuristic"), ("never", "never")]
)
def test_early_stopping_has_three_kinds(value: object, expected: str) -> None:
    assert read({"early_stopping": value}).defaults["early_stopping"] == expected


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"early_stopping": "always"}, "early_stopping 'always' is not known"),
        ({"early_stopping": [True]}, "early_stopping"),
        ({"num_beams": 0}, "num_beams"),
        ({"num_beams": "4"}, "num_beams"),
        ({"length_penalty": "1"}, "length_penalty"),
        ({"length_penalty": 1000}, "length_penalty must be a number from -10 to 10"),
        ({"max_length": -3}, "max_length"),
        ({"bad_words_ids": [1, 2]}, "bad_words_ids"),
        ({"bad_words_ids": [[]]}, "bad_words_ids"),
        ({"suppress_tokens": [-1]}, "suppress_tokens"),
        ({"forced_bos_token_id": "x"}, "forced_bos_token_id"),
        ({"eos_token_id": [1, "x"]}, "eos_token_id"),
        ({"renormalize_logits": "yes"}, "renormalize_logits"),
    ],
)
def test_an_invalid_setting_is_named(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ExportError, match=rf"generation_config\.json: .*{problem}"):
        read(settings)


def test_all_invalid_settings_are_named_at_once() -> None:
    with pytest.raises(ExportError, match=r"num_beams .*length_penalty"):
        read({"num_beams": "x", "length_penalty": []})


def test_a_generation_config_replaces_the_settings_of_the_config_but_not_its_ids() -> None:
    """As in transformers: config.json's own settings count only where there is no generation_config.json."""
    config = {"num_beams": 6, "forced_eos_token_id": 1, "bad_words_ids": [[0]]}
    with_file = read({"max_length": 64}, config)
    assert with_file.defaults["beam_size"] == 1
    assert (with_file.tokens.forced_eos, with_file.tokens.banned, with_file.tokens.eos) == (None, (), (1,))
    without = read_generation({**IDS, **config}, None, max_positions=100)
    assert without.defaults["beam_size"] == 6
    assert (without.tokens.forced_eos, without.tokens.banned) == (1, (0,))


def test_ids_may_stand_in_either_file_and_the_generation_config_wins() -> None:
    tokens = read({"eos_token_id": [7, 8], "forced_bos_token_id": 5, "forced_eos_token_id": [7]}).tokens
    assert (tokens.eos, tokens.decoder_start, tokens.pad) == ((7, 8), 2, 0)
    assert (tokens.forced_bos, tokens.forced_eos) == (5, 7)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"decoder_start_token_id": 2, "eos_token_id": 1}, set()),
        ({"bos_token_id": 2, "eos_token_id": 1}, set()),
        ({"bos_token_id": 5, "eos_token_id": 1}, {"decoder_start_token_id"}),
        ({"decoder_start_token_id": None, "bos_token_id": 5, "eos_token_id": 1}, {"decoder_start_token_id"}),
        ({"decoder_start_token_id": 2}, {"eos_token_id"}),
        ({}, {"decoder_start_token_id", "eos_token_id"}),
    ],
)
def test_ids_that_generate_would_go_without_are_named(settings: dict[str, Any], named: set[str]) -> None:
    """It reads generation_config.json alone, and would begin with another token, or never end."""
    read = read_generation(IDS, settings, max_positions=100)
    assert (read.tokens.decoder_start, read.tokens.eos) == (2, (1,))
    assert read.defaults["not_supported"] == {
        name: f"absent from generation_config.json; {IDS[name] if 'start' in name else [1]} is used, of config.json, "
        "which `generate` does not do"
        for name in named
    }


def test_decoding_starts_with_bos_where_no_start_is_given() -> None:
    assert read_generation({"bos_token_id": 4, "eos_token_id": 1}, None, max_positions=9).tokens.decoder_start == 4


@pytest.mark.parametrize(
    ("config", "needs_eos", "lacks"),
    [
        ({}, True, "decoder_start_token_id and no eos_token_id; add them"),
        ({"eos_token_id": []}, True, "decoder_start_token_id and no eos_token_id; add them"),
        ({"eos_token_id": 1}, True, "decoder_start_token_id; add it"),
        ({"decoder_start_token_id": 1}, True, "eos_token_id; add it"),
        ({}, False, "decoder_start_token_id; add it"),
    ],
)
def test_what_is_missing_of_start_and_end_is_told(config: dict[str, Any], needs_eos: bool, lacks: str) -> None:
    with pytest.raises(ExportError, match=rf"config\.json: names no {lacks}$"):
        read_generation(config, None, max_positions=9, needs_eos=needs_eos)


def test_bans_come_from_single_bad_words_and_suppressed_tokens() -> None:
    """The end of sequence among the bad words is not meant, as `generate` has it."""
    generation = read({"bad_words_ids": [[9], [1], [4]], "suppress_tokens": [9, 3], "begin_suppress_tokens": [6, 6, 1]})
    assert generation.tokens.banned == (3, 4, 9)
    assert generation.tokens.banned_at_start == (1, 6)
    assert generation.defaults["not_supported"] == {}


@pytest.mark.parametrize(
    ("settings", "recorded"),
    [
        ({"no_repeat_ngram_size": 3}, {"no_repeat_ngram_size": "3"}),
        ({"repetition_penalty": 1.2}, {"repetition_penalty": "1.2"}),
        ({"do_sample": True}, {"do_sample": "true"}),
        ({"stop_strings": ["."]}, {"stop_strings": '["."]'}),
        ({"bad_words_ids": [[4], [5, 6]]}, {"bad_words_ids": "sequences of several tokens: [[5, 6]]"}),
        ({"num_beams": 20}, {"num_beams": "20; 16 is used"}),
        ({"cache_implementation": "quantized"}, {"cache_implementation": '"quantized"'}),
        ({"token_healing": True, "guidance_scale": 2.0}, {"token_healing": "true", "guidance_scale": "2.0"}),
        ({"assistant_ensemble_weight": 0.5}, {"assistant_ensemble_weight": "0.5"}),
        ({"forced_eos_token_id": [1, 5]}, {"forced_eos_token_id": "[1, 5]; 1 is used"}),
        ({"begin_suppress_tokens": [4], "forced_bos_token_id": 3}, {}),
        (
            {"renormalize_logits": True, "min_new_tokens": 2},
            {"renormalize_logits": "True: not for begin_suppress_tokens and min_new_tokens"},
        ),
    ],
)
def test_what_is_not_supported_is_recorded(settings: dict[str, Any], recorded: dict[str, str]) -> None:
    assert read(settings).defaults["not_supported"] == recorded


@pytest.mark.parametrize(
    "settings",
    [
        {"no_repeat_ngram_size": 0, "repetition_penalty": 1, "do_sample": False, "diversity_penalty": 0.0},
        {"temperature": 0.7, "top_k": 50, "use_cache": True, "transformers_version": "5.0", "force_words_ids": []},
        {"sequence_bias": None, "exponential_decay_length_penalty": None, "guidance_scale": 1.0},
    ],
)
def test_neutral_settings_are_not_recorded(settings: dict[str, Any]) -> None:
    assert read(settings).defaults["not_supported"] == {}


def test_renormalized_bans_are_taken_out_of_the_softmax() -> None:
    assert read({"bad_words_ids": [[0], [4]], "renormalize_logits": True}).removed == (0, 4)
    assert read({"bad_words_ids": [[0], [4]]}).removed == ()
