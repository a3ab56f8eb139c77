"""BART checkpoints (Hugging Face `BartForConditionalGeneration`): post-norm, learned positions with an offset of 2."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from beamline_export.checkpoint import Fields, read_json, read_optional_json, read_state_dict
from beamline_export.families.bart_like import Ties, read_spec, take_embeddings, take_layers
from beamline_export.generation import read_generation
from beamline_export.known_settings import CONFIG, contradictions, without_effect
from beamline_export.reference import HuggingFaceReference, Reference
from beamline_export.renamer import Renamer
from beamline_export.spec import Array, Checkpoint, ExportError, SpecialTokenIds, TransformerSpec
from beamline_export.tokenizer_config import read_tokenizer_config, tokenizer_class
from beamline_export.tokenizer_files import TokenizerFiles, read_bart_tokenizer, without_tokenizer

_POSITION_OFFSET = 2
"""Rows 0 and 1 of BART's position tables are never read: positions begin at row 2."""


def read(folder: Path) -> Checkpoint:
    """Read a BART folder.

    Raises:
        ExportError: config, weights or tokenizer are missing or contradict each other.
    """
    config = read_json(folder / "config.json")
    fields = Fields(config, "config.json")
    # mBART-like variants of the same config class; their own families will read them.
    fields.must_be("normalize_before", False)
    fields.must_be("add_final_layer_norm", False)
    fields.must_be("normalize_embedding", True)
    fields.must_be("static_position_embeddings", False)
    tied = fields.flag("tie_word_embeddings", True)
    spec = read_spec(fields, "bart", None, embedding_norm=True)
    source_bos = fields.optional_id("bos_token_id")
    fields.problems += contradictions(config)
    fields.check()
    generation = read_generation(
        config, read_optional_json(folder / "generation_config.json"), max_positions=spec.max_target_positions
    )
    tokenizer = _tokenizer(folder, generation.tokens, tokenizer_class(config, "config.json"), source_bos)
    names = _rename(spec, Ties(head=tied, sides=tied), read_state_dict(folder))
    return Checkpoint(
        spec,
        names.weights,
        tokenizer.tokens,
        generation.with_ignored(without_effect(config, CONFIG["bart"], name_unknown=False), tokenizer.without_effect),
        tokenizer.kind,
        tokenizer.files,
        generation.removed,
        names.names,
        names.foreign(),
        tokenizer_settings=tokenizer.settings,
        notices=(*names.notices, *tokenizer.notices),
    )


def _tokenizer(folder: Path, tokens: SpecialTokenIds, class_: str | None, source_bos: int | None) -> TokenizerFiles:
    if (folder / "tokenizer.json").exists():
        config = read_tokenizer_config(folder, "bart")
        config = dataclasses.replace(config, tokenizer_class=config.tokenizer_class or class_)
        return read_bart_tokenizer(folder, {"tokenizer.json": "tokenizer.json"}, config, tokens)
    if (folder / "merges.txt").exists():
        raise ExportError(
            f"{folder} has merges.txt but no tokenizer.json; write it with "
            "transformers.AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    return without_tokenizer(tokens, source_bos=source_bos)


def _rename(spec: TransformerSpec, ties: Ties, state: Mapping[str, Array]) -> Renamer:
    if "shared.weight" in state:  # saved as a bare BartModel, as the pretrained ones are
        state = {f"model.{name}": array for name, array in state.items()}
    names = Renamer(state)
    take_embeddings(names, ties)
    names.take("head.bias", "final_logits_bias")
    # fairseq's own conversions leave it out where it is zero.
    bias = names.weights.get("head.bias", np.zeros(spec.target_vocabulary, np.float32))
    names.weights["head.bias"] = bias.reshape(-1)
    names.ignore(r"model\.(encoder|decoder)\.version")
    for side, positions in (("encoder", "source_positions"), ("decoder", "target_positions")):
        names.take(positions, f"model.{side}.embed_positions.weight")
        if names.weights.get(positions, np.float32(0)).ndim:
            names.weights[positions] = names.weights[positions][_POSITION_OFFSET:]
        names.module(f"{side}.embedding_norm", f"model.{side}.layernorm_embedding")
    take_layers(names, spec)
    return names


def reference(folder: Path, checkpoint: Checkpoint) -> Reference:
    """The model as transformers runs it."""
    return HuggingFaceReference("BartForConditionalGeneration", folder, checkpoint.removed_tokens)
