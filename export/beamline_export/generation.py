"""Reads Hugging Face generation settings: search defaults and special tokens, and what of them is not supported."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from beamline_export.checkpoint import Fields
from beamline_export.known_settings import GENERATION, without_effect
from beamline_export.spec import SpecialTokenIds
from beamline_server.engine.request import MAX_BEAMS as _MOST_BEAMS
from beamline_server.engine.request import MAX_LENGTH_PENALTY as _MOST_LENGTH_PENALTY

_EARLY_STOPPING = {"true": "when_full", "false": "heuristic", '"never"': "never"}
_PROMPT_COUNTS = ("max_length", "min_length", "forced_bos_token_id", "force_bos_token_to_be_generated")
_DEFAULT_NEW_TOKENS = 20
"""What `generate` does when nothing is set."""


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

    def with_ignored(self, *more: Mapping[str, str]) -> dict[str, object]:
        """The defaults, with further settings that would change answers and have no effect."""
        ignored = self.defaults["not_supported"]
        assert isinstance(ignored, dict)
        return {**self.defaults, "not_supported": {**ignored, **{k: v for part in more for k, v in part.items()}}}


def read_generation(
    config: Mapping[str, Any],
    generation_config: Mapping[str, Any] | None,
    *,
    max_positions: int,
    needs_eos: bool = True,
    decoder_only: bool = False,
) -> Generation:
    """Search defaults and special tokens of a Hugging Face checkpoint, as `generate` finds them.

    Where there is a generation_config.json, settings come from it alone; older checkpoints keep them in config.json.
    Ids that it lacks are looked up in config.json.

    A model without an encoder (`decoder_only`) starts an empty prompt with its begin of sequence, or where it has none
    with its end; what counts the prompt, too, has no effect.

    Raises:
        ExportError: a setting is invalid, or no decoder start or (unless `needs_eos` is false) no end-of-sequence token
            is given.
    """
    source = "config.json" if generation_config is None else "generation_config.json"
    settings = Fields(config if generation_config is None else generation_config, source)
    unsupported = without_effect(
        config if generation_config is None else generation_config,
        GENERATION,
        name_unknown=generation_config is not None,
    )
    given = {k: v for k, v in (generation_config or {}).items() if v is not None}
    ids = Fields({**config, **given}, source)
    start = ids.optional_id("decoder_start_token_id")
    if start is None:
        start = ids.optional_id("bos_token_id")
    eos = ids.ids("eos_token_id")
    if decoder_only:
        start, needs_eos = ids.optional_id("bos_token_id"), False
        start = next(iter(eos), 0) if start is None else start
        unsupported |= _without_prompt(settings)
    lacks = ["decoder_start_token_id"] * (start is None) + ["eos_token_id"] * (needs_eos and not eos)
    if lacks:
        ids.problems.append(f"names no {' and no '.join(lacks)}; add {'it' if len(lacks) == 1 else 'them'}")
    ids.check()
    if generation_config is not None:
        unsupported |= _not_in_generation_config(given, None if decoder_only else start, eos)

    if decoder_only:
        settings = Fields({name: value for name, value in settings.given.items() if name not in _PROMPT_COUNTS}, source)
    forced_bos, forced_eos = settings.optional_id("forced_bos_token_id"), settings.ids("forced_eos_token_id")
    if generation_config is None and settings.flag("force_bos_token_to_be_generated", False):
        forced_bos = settings.optional_id("bos_token_id")
    if len(forced_eos) > 1:
        unsupported["forced_eos_token_id"] = f"{list(forced_eos)}; {forced_eos[0]} is used"
    words = settings.id_sequences("bad_words_ids")
    if longer := [word for word in words if len(word) > 1]:
        unsupported["bad_words_ids"] = f"sequences of several tokens: {longer}"
    # `generate` leaves the end of sequence out of the bad words, but not out of the suppressed tokens.
    banned = ({word[0] for word in words if len(word) == 1} - set(eos)) | set(settings.ids("suppress_tokens"))
    banned_at_start = settings.ids("begin_suppress_tokens")
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


def _without_prompt(settings: Fields) -> dict[str, str]:
    """Settings of a model without an encoder that count the tokens of a prompt, which differ."""
    told = {
        "max_length": "counts the prompt, too; set max_new_tokens",
        "min_length": "counts the prompt, too; set min_new_tokens",
        "forced_bos_token_id": "would follow a prompt of one token alone",
    }
    given = {name: settings.raw(name) for name in told}
    if settings.raw("max_new_tokens") is not None:
        given["max_length"] = None
    if given["min_length"] == 0:
        given["min_length"] = None
    return {name: f"{value}: {told[name]}" for name, value in given.items() if value is not None}


def _not_in_generation_config(given: Mapping[str, Any], start: int | None, eos: Sequence[int]) -> dict[str, str]:
    """Ids of config.json that stand in for those that `generate`, which reads one file alone, would go without."""
    used = {"decoder_start_token_id": start, "eos_token_id": list(eos)}
    bos = given.get("bos_token_id")
    if start is None or ("decoder_start_token_id" not in given and bos == start):
        del used["decoder_start_token_id"]
    if not eos:
        del used["eos_token_id"]
    return {
        name: f"absent from generation_config.json; {value} is used, of config.json, which `generate` does not do"
        for name, value in used.items()
        if name not in given
    }


def _search_defaults(settings: Fields, unsupported: dict[str, str], max_positions: int) -> dict[str, object]:
    beams = settings.integer("num_beams", 1)
    if beams > _MOST_BEAMS:
        unsupported["num_beams"] = f"{beams}; {_MOST_BEAMS} is used"
    answers = settings.integer("num_return_sequences", 1)
    if answers > beams and settings.raw("do_sample"):
        unsupported["num_return_sequences"] = f"{answers}; {beams} is used, as many as there are beams"
    elif answers > beams:
        settings.problems.append(
            f"num_return_sequences {answers} is more than num_beams {beams}; lower it or raise num_beams"
        )
    elif answers > _MOST_BEAMS:
        unsupported["num_return_sequences"] = f"{answers}; {_MOST_BEAMS} is used"
    least, most = _lengths(settings, max_positions)
    defaults: dict[str, object] = {
        "beam_size": min(beams, _MOST_BEAMS),
        "length_penalty": settings.number("length_penalty", 1.0, most=_MOST_LENGTH_PENALTY),
        "early_stopping": settings.json_choice("early_stopping", _EARLY_STOPPING, "false"),
        "min_new_tokens": least,
        "max_new_tokens": most,
    }
    # Left out where there is nothing to tell: servers of before know no such field.
    n_best = min(answers, beams, _MOST_BEAMS)
    return defaults if n_best == 1 else {**defaults, "n_best": n_best}


def _lengths(settings: Fields, max_positions: int) -> tuple[int, int]:
    """The least and the greatest number of new tokens. Lengths count the decoder's start token, too."""
    least_name = "min_length" if settings.raw("min_new_tokens") is None else "min_new_tokens"
    most_name = "max_length" if settings.raw("max_new_tokens") is None else "max_new_tokens"
    given = {
        "min_length": settings.integer("min_length", 0, least=0),
        "min_new_tokens": settings.integer("min_new_tokens", 0, least=0),
        "max_length": settings.integer("max_length", _DEFAULT_NEW_TOKENS + 1),
        "max_new_tokens": settings.integer("max_new_tokens", 1),
    }
    least = given[least_name] - (1 if least_name == "min_length" and given[least_name] else 0)
    most = given[most_name] if most_name == "max_new_tokens" else max(1, given[most_name] - 1)
    most = min(most, max_positions)
    if least > most:
        wanted = f"{least_name} {given[least_name]} is more than"
        if least > max_positions:
            problem = f"{wanted} the model's {max_positions} positions; lower it"
        elif settings.raw(most_name) is None:
            problem = f"{wanted} what is generated where max_length is not set ({most} tokens); set max_length"
        else:
            problem = f"{wanted} {most_name} {given[most_name]}; lower {least_name} or raise {most_name}"
        settings.problems.append(problem)
    return least, most
