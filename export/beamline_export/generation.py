"""Reads Hugging Face generation settings: search defaults and special tokens, and what of them is not supported."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from beamline_export.checkpoint import Fields
from beamline_export.spec import SpecialTokenIds

_EARLY_STOPPING = {"true": "when_full", "false": "heuristic", '"never"': "never"}
_MOST_BEAMS = 16
_MOST_LENGTH_PENALTY = 10.0
_DEFAULT_NEW_TOKENS = 20
"""What `generate` does when nothing is set."""

# Settings that would change results, with the value that changes nothing.
_NEUTRAL: Mapping[str, Any] = {
    "do_sample": False,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "diversity_penalty": 0.0,
    "num_beam_groups": 1,
    "guidance_scale": 1.0,
    "exponential_decay_length_penalty": None,
    "sequence_bias": None,
    "constraints": None,
    "force_words_ids": None,
    "forced_decoder_ids": None,
    "stop_strings": None,
    "max_time": None,
    "penalty_alpha": 0.0,
    "dola_layers": None,
    "watermarking_config": None,
}


@dataclass(frozen=True, slots=True)
class Generation:
    """What a checkpoint says about searching.

    Attributes:
        defaults: By the names of the bundle's `GenerationDefaults`.
        tokens: Special tokens; ids that the tokenizer adds to a source are the family's business.
        removed: As in `Checkpoint.removed_tokens`.
    """

    defaults: dict[str, object]
    tokens: SpecialTokenIds
    removed: tuple[int, ...]


def read_generation(
    config: Mapping[str, Any],
    generation_config: Mapping[str, Any] | None,
    *,
    max_positions: int,
    needs_eos: bool = True,
) -> Generation:
    """Search defaults and special tokens of a Hugging Face checkpoint, as `generate` finds them.

    Where there is a generation_config.json, settings come from it alone; older checkpoints keep them in config.json.
    Ids that it lacks are looked up in config.json.

    Raises:
        ExportError: a setting is invalid, or no decoder start or (unless `needs_eos` is false) no end-of-sequence token
            is given.
    """
    source = "config.json" if generation_config is None else "generation_config.json"
    settings = Fields(config if generation_config is None else generation_config, source)
    given = {k: v for k, v in (generation_config or {}).items() if v is not None}
    ids = Fields({**config, **given}, source)
    start = ids.optional_id("decoder_start_token_id")
    if start is None:
        start = ids.optional_id("bos_token_id")
    eos = ids.ids("eos_token_id")
    if start is None or (needs_eos and not eos):
        ids.problems.append("names no decoder_start_token_id or no eos_token_id; add them")
    ids.check()

    unsupported = _not_neutral(settings)
    forced_bos, forced_eos = settings.optional_id("forced_bos_token_id"), settings.ids("forced_eos_token_id")
    if len(forced_eos) > 1:
        unsupported["forced_eos_token_id"] = f"{list(forced_eos)}; {forced_eos[0]} is used"
    words = settings.id_sequences("bad_words_ids")
    if longer := [word for word in words if len(word) > 1]:
        unsupported["bad_words_ids"] = f"sequences of several tokens: {longer}"
    # `generate` leaves the end of sequence out of the bad words, but not out of the suppressed tokens.
    banned = ({word[0] for word in words if len(word) == 1} - set(eos)) | set(settings.ids("suppress_tokens"))
    banned_at_start = settings.ids("begin_suppress_tokens")
    if banned_at_start and forced_bos is not None:
        unsupported["begin_suppress_tokens"] = f"{list(banned_at_start)}: for the token after forced_bos_token_id"
    defaults = _search_defaults(settings, unsupported, max_positions)
    renormalize = settings.flag("renormalize_logits", False)
    if renormalize and (banned_at_start or defaults["min_new_tokens"]):
        unsupported["renormalize_logits"] = "True: not for begin_suppress_tokens and min_new_tokens"
    settings.check()
    tokens = SpecialTokenIds(
        decoder_start=0 if start is None else start,
        eos=eos,
        pad=ids.optional_id("pad_token_id"),
        forced_bos=forced_bos,
        forced_eos=forced_eos[0] if forced_eos else None,
        banned=tuple(sorted(banned)),
        banned_at_start=tuple(sorted(set(banned_at_start))),
    )
    ids.check()
    return Generation({**defaults, "not_supported": unsupported}, tokens, tokens.banned if renormalize else ())


def _search_defaults(settings: Fields, unsupported: dict[str, str], max_positions: int) -> dict[str, object]:
    beams = settings.integer("num_beams", 1)
    if beams > _MOST_BEAMS:
        unsupported["num_beams"] = f"{beams}; {_MOST_BEAMS} is used"
    # Lengths count the decoder's start token.
    least = settings.integer("min_new_tokens", max(0, settings.integer("min_length", 0, least=0) - 1), least=0)
    length = settings.integer("max_length", _DEFAULT_NEW_TOKENS + 1)
    most = settings.integer("max_new_tokens", max(1, length - 1))
    return {
        "beam_size": min(beams, _MOST_BEAMS),
        "length_penalty": settings.number("length_penalty", 1.0, most=_MOST_LENGTH_PENALTY),
        "early_stopping": settings.json_choice("early_stopping", _EARLY_STOPPING, "false"),
        "min_new_tokens": least,
        "max_new_tokens": min(most, max_positions),
    }


def _not_neutral(settings: Fields) -> dict[str, str]:
    found = {name: settings.raw(name) for name in _NEUTRAL}
    return {name: json.dumps(value) for name, value in found.items() if value not in (None, [], {}, _NEUTRAL[name])}
