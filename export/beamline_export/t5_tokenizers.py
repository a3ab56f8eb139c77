"""Tokenizers of T5 and its kin: a tokenizer.json of pieces, or ByT5's bytes. Both end a source with `</s>`."""

import dataclasses
import re
from pathlib import Path

from beamline_export.sentencepiece_files import tokenizer_json_of_pieces
from beamline_export.spec import ExportError, SpecialTokenIds
from beamline_export.tokenizer_config import CONFIG_FILE, TokenizerConfig, read_tokenizer_config
from beamline_export.tokenizer_files import (
    JsonFiles,
    TokenizerFiles,
    entry_settings,
    settings_without_effect,
    with_around,
    without_tokenizer,
)
from beamline_export.tokenizer_json import TokenizerJson, added_around, find_tokenizer_json
from beamline_server.token_ids import default_special_ids

BYTE_CLASS = "ByT5Tokenizer"
_T5 = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
_T5_CLASS = "T5Tokenizer"
_OTHER_CLASSES = ("PreTrainedTokenizer", "TokenizersBackend")
_EXTRA_ID = re.compile(r"<extra_id_\d+>")
_MODEL = "spiece.model"
_CLASSES_OF_MODELS = {"t5": (_T5_CLASS,), "mt5": (_T5_CLASS,)}
"""Those that make a tokenizer.json of a SentencePiece model; transformers make none for UMT5."""
_PADDING, _END, _UNKNOWN = range(3)
_NORMALIZERS = ("Precompiled", "NoneType")
_PRE_TOKENIZER = (
    'Sequence(pretokenizers=[WhitespaceSplit(), Metaspace(replacement="\u2581", prepend_scheme=always, split=True)])'
)


def read_t5_tokenizer(folder: Path, tokens: SpecialTokenIds, family: str, class_: str) -> TokenizerFiles:
    """The tokenizer of a folder, if it has one.

    Args:
        folder: The checkpoint.
        tokens: Special tokens as the decoder's settings have them.
        family: What the settings are known by.
        class_: The tokenizer's class in transformers, as the checkpoint names it or by default.

    Raises:
        ExportError: it cannot be read, or is there in part.
    """
    if class_.removesuffix("Fast") == BYTE_CLASS:
        return _bytes(folder, tokens, family)
    found = find_tokenizer_json(folder)
    if found is None and (folder / _MODEL).exists():
        found = tokenizer_json_of_pieces(folder, _MODEL, class_, _CLASSES_OF_MODELS.get(family, ()))
    if found is None:
        return without_tokenizer(tokens)
    return _pieces(found, read_tokenizer_config(folder, family), tokens, class_)


def _bytes(folder: Path, tokens: SpecialTokenIds, family: str) -> TokenizerFiles:
    """ByT5: padding, end and unknown are the first ids, bytes follow, and no id beyond them is text."""
    config = read_tokenizer_config(folder, family)
    special = {_PADDING, _END, _UNKNOWN}
    wrong = [name for name, text in _T5.items() if config.token(name, text) != text]
    if wrong:
        raise ExportError(
            f"{folder / CONFIG_FILE}: {', '.join(wrong)} of a {BYTE_CLASS} must be {', '.join(_T5.values())}, which "
            "are its first ids; remove them if the model was trained without"
        )
    return TokenizerFiles(
        "bytes",
        {},
        entry_settings(
            special,
            default_special_ids(dataclasses.asdict(tokens)),
            clean=config.flags.get("clean_up_tokenization_spaces", False),
        ),
        with_around(tokens, None, _END),
        settings_without_effect(config, (), None, (BYTE_CLASS,)),
    )


def _pieces(found: TokenizerJson, config: TokenizerConfig, tokens: SpecialTokenIds, class_: str) -> TokenizerFiles:
    """A tokenizer.json; T5's own class builds one of its pieces anew, and ends a source with `</s>` in any case."""
    config = dataclasses.replace(config, tokenizer_class=config.tokenizer_class or class_)
    tokenizer = found.tokenizer
    known: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    own = class_.removesuffix("Fast") == _T5_CLASS
    before, after = added_around(tokenizer)
    notices = []
    end = known.get(config.token("eos_token", _T5["eos_token"]))
    if own and not before and not after:
        if end is None:
            raise ExportError("tokenizer.json has no </s>, which T5 has behind a text; add it")
        after = [end]
        notices.append("tokenizer.json has no post-processor; </s> is added, as by transformers' T5Tokenizer")
    elif own and (before, after) != ([], [end]):
        around = " and ".join(str(tokenizer.id_to_token(i)) for i in (*before, *after))
        notices.append(
            f"tokenizer.json puts {around} around a text, which is done here; transformers' T5Tokenizer puts </s> "
            f"behind it: name a tokenizer_class in {CONFIG_FILE} (PreTrainedTokenizerFast)"
        )
    if own and not _is_of_t5(tokenizer):
        notices.append(
            "tokenizer.json is read as it is; transformers' T5Tokenizer would build its own of the pieces: name "
            f"another tokenizer_class in {CONFIG_FILE}, such as PreTrainedTokenizerFast"
        )
    read = JsonFiles(found, config, tokens, _T5 if own else {}, (_T5_CLASS, *_OTHER_CLASSES))
    extra = [i for token, i in known.items() if own and _EXTRA_ID.fullmatch(token)]
    return read.with_around(before, after, notices, special=extra)


def _is_of_t5(tokenizer: object) -> bool:
    """Whether a tokenizer.json is of the kind that T5's own class builds."""
    model, normalizer, splits = (getattr(tokenizer, name) for name in ("model", "normalizer", "pre_tokenizer"))
    kinds = type(model).__name__ == "Unigram" and type(normalizer).__name__ in _NORMALIZERS
    return kinds and repr(splits) == _PRE_TOKENIZER
