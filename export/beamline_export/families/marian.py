"""MarianMT / OPUS-MT checkpoints (Hugging Face `MarianMTModel`): post-norm, sinusoidal positions, tied embeddings."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from beamline_export.checkpoint import Fields, read_json, read_optional_json, read_state_dict
from beamline_export.families.bart_like import Ties, read_spec, take_embeddings, take_layers
from beamline_export.families.positions import sinusoidal_positions
from beamline_export.generation import read_generation
from beamline_export.known_settings import CONFIG, contradictions, without_effect
from beamline_export.reference import HuggingFaceReference, Reference
from beamline_export.renamer import Renamer
from beamline_export.spec import Array, Checkpoint, ExportError, SpecialTokenIds, TransformerSpec
from beamline_export.tokenizer_config import read_tokenizer_config
from beamline_export.tokenizer_files import TokenizerFiles, read_marian_tokenizer, without_tokenizer

_MOST_COMPARED = 512
"""Positions of the model that an export is compared with: transformers compute a table number by number."""


def read(folder: Path) -> Checkpoint:
    """Read a MarianMT folder.

    Raises:
        ExportError: config, weights or tokenizer files are missing or contradict each other.
    """
    config = read_json(folder / "config.json")
    fields = Fields(config, "config.json")
    fields.must_be("static_position_embeddings", True)
    ties = Ties(
        head=fields.flag("tie_word_embeddings", True), sides=fields.flag("share_encoder_decoder_embeddings", True)
    )
    target = None if ties.sides else fields.integer("decoder_vocab_size", fields.integer("vocab_size"), least=2)
    spec = read_spec(fields, "marian", target)
    fields.problems += contradictions(config)
    fields.check()
    generation = read_generation(
        config, read_optional_json(folder / "generation_config.json"), max_positions=spec.max_target_positions
    )
    tokenizer = _tokenizer(folder, spec, generation.tokens, separate=not ties.sides)
    names = _rename(spec, ties, read_state_dict(folder))
    return Checkpoint(
        spec,
        names.weights,
        tokenizer.tokens,
        generation.with_ignored(without_effect(config, CONFIG["marian"], name_unknown=False), tokenizer.without_effect),
        tokenizer.kind,
        tokenizer.files,
        generation.removed,
        names.names,
        names.foreign(),
        tokenizer_settings=tokenizer.settings,
        notices=(*names.notices, *tokenizer.notices),
        languages=tokenizer.languages,
    )


def _rename(spec: TransformerSpec, ties: Ties, state: Mapping[str, Array]) -> Renamer:
    names = Renamer(state)
    take_embeddings(names, ties)
    # transformers leave it out where it is zero.
    bias = names.weights.get("head.bias", np.zeros(spec.target_vocabulary, np.float32))
    names.weights["head.bias"] = bias.reshape(-1)
    # Some checkpoints carry the tables, which transformers then reads; for the others it computes them.
    for side, positions in (("encoder", "source_positions"), ("decoder", "target_positions")):
        if names.has(table := f"model.{side}.embed_positions.weight"):
            names.take(positions, table)
    names.share_equal("source_positions", "target_positions")
    names.compute_positions(spec.max_source_positions, spec.d_model, sinusoidal_positions)
    take_layers(names, spec)
    return names


def _tokenizer(folder: Path, spec: TransformerSpec, tokens: SpecialTokenIds, *, separate: bool) -> TokenizerFiles:
    wanted = ["source.spm", "target.spm", "vocab.json"]
    if not any((folder / name).exists() for name in wanted):
        return without_tokenizer(tokens)
    config = read_tokenizer_config(folder, "marian")
    # The tokenizer's own word counts; a model may have two tables for one vocabulary.
    if config.flags.get("separate_vocabs", separate):
        wanted.append("target_vocab.json")
    if missing := [name for name in wanted if not (folder / name).exists()]:
        why = _why_separate(spec, told="separate_vocabs" in config.flags) if missing == wanted[3:] else ""
        raise ExportError(
            f"{folder} lacks {', '.join(missing)} of its tokenizer{why}; copy all of {', '.join(wanted)} or none"
        )
    return read_marian_tokenizer(folder, {name: name for name in wanted}, config, tokens)


def _why_separate(spec: TransformerSpec, *, told: bool) -> str:
    if told:
        return ", whose separate_vocabs is true"
    return (
        f" (share_encoder_decoder_embeddings is false: {spec.source_vocabulary} source and {spec.target_vocabulary} "
        "target tokens; if vocab.json is for both sides, say separate_vocabs: false in tokenizer_config.json)"
    )


def reference(folder: Path, checkpoint: Checkpoint) -> Reference:
    """The model as transformers runs it."""
    computed = {"source_positions", "target_positions"}.isdisjoint(checkpoint.weight_names)
    most = _MOST_COMPARED if computed else None
    return HuggingFaceReference("MarianMTModel", folder, checkpoint.removed_tokens, most_positions=most)
