"""M2M100's own tokenizer: one SentencePiece model, a vocabulary of its pieces, and language codes after it."""

import dataclasses

from beamline_export.checkpoint import Fields, read_json, read_optional_json
from beamline_export.families.bart_like import Folder
from beamline_export.spec import ExportError
from beamline_export.tokenizer_config import CONFIG_FILE, read_tokenizer_config
from beamline_export.tokenizer_files import TokenizerFiles, read_marian_tokenizer
from beamline_server.languages import Language, Languages

MODEL_FILE, VOCABULARY_FILE = "sentencepiece.bpe.model", "vocab.json"
_SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "sep_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
_DEFAULT_LANGUAGE = "en"


def read_m2m_100_tokenizer(folder: Folder) -> TokenizerFiles:
    """The files of a folder: `language source </s>`, the language by `src_lang`, as transformers have it.

    Raises:
        ExportError: a file is missing or cannot be read, or the language is none of the tokenizer's.
    """
    if missing := [name for name in (MODEL_FILE, VOCABULARY_FILE) if not (folder.path / name).exists()]:
        raise ExportError(
            f"{folder.path} lacks {missing[0]} of its tokenizer; copy both of {MODEL_FILE}, {VOCABULARY_FILE} or none"
        )
    config = read_tokenizer_config(folder.path, "m2m_100")
    files = {"source.spm": MODEL_FILE, "target.spm": MODEL_FILE, "vocab.json": VOCABULARY_FILE}
    read = read_marian_tokenizer(
        folder.path, files, config, folder.tokens, defaults=_SPECIAL, classes=("M2M100Tokenizer",)
    )
    language = _DEFAULT_LANGUAGE if config.source_language is None else config.source_language
    codes = _language_codes(folder)
    if language not in codes:
        raise ExportError(f"{CONFIG_FILE}: src_lang {language!r} is not known (known: {', '.join(codes)})")
    first = len(read_json(folder.path / VOCABULARY_FILE))
    entries = {code: Language(token=first + i, source=True, target=True) for i, code in enumerate(codes)}
    return dataclasses.replace(
        read,
        notices=[*read.notices, f"the language of sources is {language} where a request names none"],
        languages=Languages(
            codes=entries, source_marked="source_before", target_begins="forced_first", default_source=language
        ),
    )


def _language_codes(folder: Folder) -> list[str]:
    """In the order of their ids, which come after the vocabulary's."""
    from transformers.models.m2m_100.tokenization_m2m_100 import FAIRSEQ_LANGUAGE_CODES

    fields = Fields(read_optional_json(folder.path / CONFIG_FILE) or {}, CONFIG_FILE)
    codes: list[str] = fields.choice("language_codes", FAIRSEQ_LANGUAGE_CODES, "m2m100")
    fields.check()
    return codes
