"""PLBart's tokenizer: one SentencePiece model, whose pieces have fairseq's numbers, and language codes after them."""

import dataclasses
from collections.abc import Mapping

from beamline_export.checkpoint import Fields, check_file, read_optional_json
from beamline_export.families.bart_like import Folder
from beamline_export.families.toolkit import piece_tokenizer
from beamline_export.spec import ExportError
from beamline_export.tokenizer_config import CONFIG_FILE, read_tokenizer_config
from beamline_export.tokenizer_files import (
    TokenizerFiles,
    settings_without_effect,
    with_around,
    without_tokenizer,
)
from beamline_export.tokenizer_json import unreadable_tokenizer
from beamline_server.languages import Language, Languages
from beamline_server.tokenizer import read_sentencepiece

MODEL_FILE = "sentencepiece.bpe.model"
_FIRST_PIECES = ["<unk>", "<s>", "</s>"]
_FIRST_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")
_OFFSET = len(_FIRST_TOKENS) - len(_FIRST_PIECES)
_SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "sep_token": "</s>", "cls_token": "<s>", "unk_token": "<unk>"}
_SPECIAL |= {"pad_token": "<pad>", "mask_token": "<mask>"}
_BASE_CODES = ("__java__", "__python__", "__en_XX__")
_MORE_CODES = ("__javascript__", "__php__", "__ruby__", "__go__")
_DEFAULT_OF_MULTI = "__en_XX__"


def read_plbart_tokenizer(folder: Folder) -> TokenizerFiles:
    """The tokenizer of a folder, if it has one: `source </s> language`, the language by `src_lang`.

    Raises:
        ExportError: the model cannot be read, or is none of PLBart's, or the language is none of the tokenizer's.
    """
    if not (folder.path / MODEL_FILE).exists():
        return without_tokenizer(folder.tokens)
    config = read_tokenizer_config(folder.path, "plbart")
    fields = Fields(read_optional_json(folder.path / CONFIG_FILE) or {}, CONFIG_FILE)
    of_base = fields.choice("language_codes", {"base": True, "multi": False}, "base")
    fields.check()
    codes = [*_BASE_CODES, *(() if of_base else _MORE_CODES)]
    pieces = _pieces(folder)
    numbers = {code: len(pieces) + _OFFSET + i for i, code in enumerate(codes)}
    vocabulary = {piece: i + _OFFSET for i, piece in enumerate(pieces)}
    vocabulary |= {token: i for i, token in enumerate(_FIRST_TOKENS)} | numbers
    if of_base:
        vocabulary["<mask>"] = len(pieces) + _OFFSET + len(codes)
    end = vocabulary.get(config.token("eos_token", _SPECIAL["eos_token"]))
    if end is None:
        raise ExportError(f"{CONFIG_FILE}: eos_token {config.named['eos_token']!r} is no piece of {MODEL_FILE}")
    special = {vocabulary[token] for token in config.special(_SPECIAL) if token in vocabulary} | set(numbers.values())
    tokens = with_around(folder.tokens, None, end)
    found, contents = piece_tokenizer((MODEL_FILE, MODEL_FILE), (vocabulary, vocabulary), MODEL_FILE, tokens, special)
    clean = {"clean_up_spaces": True} if config.flags.get("clean_up_tokenization_spaces", True) else {}
    default = config.source_language or (None if of_base else _DEFAULT_OF_MULTI)
    languages, notices = _languages(folder, default, numbers)
    return dataclasses.replace(
        found,
        settings={**found.settings, **clean},
        without_effect=settings_without_effect(config, (), "<unk>", ("PLBartTokenizer",)),
        notices=notices,
        languages=languages,
        contents=contents,
    )


def _pieces(folder: Folder) -> list[str]:
    """Those of the model, in the order of their ids."""
    file = folder.path / MODEL_FILE
    check_file(file)
    try:
        model = read_sentencepiece(file.name, file.read_bytes())
    except (OSError, ValueError) as error:
        raise unreadable_tokenizer(file, error) from error
    pieces = [str(model.id_to_piece(i)) for i in range(model.get_piece_size())]
    if pieces[: len(_FIRST_PIECES)] != _FIRST_PIECES:
        raise ExportError(
            f"{file} begins with {', '.join(pieces[: len(_FIRST_PIECES)])}, not with {', '.join(_FIRST_PIECES)}, as "
            "PLBart's numbers of pieces need it; copy the file of this model"
        )
    # <0x41> is what transformers write for such a piece.
    if any(model.is_byte(i) for i in range(len(pieces))):
        raise ExportError(f"{file} has pieces of bytes, which PLBart's do not have; copy the file of this model")
    return pieces


def _languages(folder: Folder, default: str | None, numbers: Mapping[str, int]) -> tuple[Languages | None, list[str]]:
    """The languages that requests can name, and what the user should know of them."""
    names = {code.strip("_"): number for code, number in numbers.items()}
    source = None if default is None else default.strip("_")
    if source is not None and source not in names:
        raise ExportError(f"{CONFIG_FILE}: src_lang {default!r} is not known (known: {', '.join(names)})")
    begins = folder.tokens.decoder_start in names.values()
    notices = [
        "no language stands behind a source, as tokenizer_config.json names no src_lang"
        if source is None
        else f"the language of sources is {source} where a request names none"
    ]
    if not begins:
        notices.append(
            "requests cannot name the language of targets, which begin with decoder_start_token_id "
            f"{folder.tokens.decoder_start}, no code of one"
        )
    if source is None and not begins:
        return None, notices
    entries = {name: Language(token=i, source=source is not None, target=begins) for name, i in sorted(names.items())}
    languages = Languages(
        codes=entries,
        source_marked="none" if source is None else "source_after",
        target_begins="decoder_start" if begins else "none",
        default_source=source,
    )
    return languages, notices
