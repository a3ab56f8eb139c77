"""BART checkpoints (Hugging Face `BartForConditionalGeneration`): post-norm, learned positions with an offset of 2."""

import dataclasses

from beamline_export.checkpoint import Fields
from beamline_export.families.bart_like import BartLike, Folder, LearnedPositions
from beamline_export.spec import ExportError
from beamline_export.tokenizer_config import read_tokenizer_config, tokenizer_class
from beamline_export.tokenizer_files import TokenizerFiles, read_bart_tokenizer, without_tokenizer
from beamline_export.tokenizer_json import find_tokenizer_json


def _tokenizer(folder: Folder) -> TokenizerFiles:
    class_ = tokenizer_class(folder.config, "config.json")
    config = read_tokenizer_config(folder.path, "bart")
    if found := find_tokenizer_json(folder.path):
        config = dataclasses.replace(config, tokenizer_class=config.tokenizer_class or class_)
        return read_bart_tokenizer(found, config, folder.tokens)
    if (folder.path / "merges.txt").exists():
        raise ExportError(
            f"{folder.path} has merges.txt but no tokenizer.json; write it with "
            "transformers.AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    fields = Fields(folder.config, "config.json")
    source_bos = fields.optional_id("bos_token_id")
    fields.check()
    return without_tokenizer(folder.tokens, source_bos=source_bos)


BART = BartLike(
    model_type="bart",
    model_class="BartForConditionalGeneration",
    positions=LearnedPositions(2),
    embedding_norm=True,
    tokenizer=_tokenizer,
)
