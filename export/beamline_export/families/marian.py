"""MarianMT / OPUS-MT checkpoints (Hugging Face `MarianMTModel`): post-norm, sinusoidal positions, tied embeddings."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from beamline_export.checkpoint import Fields, Renamer, read_json, read_optional_json, read_state_dict
from beamline_export.families.bart_like import Ties, read_spec, take_embeddings, take_layers
from beamline_export.families.positions import sinusoidal_positions
from beamline_export.generation import read_generation
from beamline_export.reference import HuggingFaceReference, Reference
from beamline_export.spec import Array, Checkpoint, ExportError, TransformerSpec


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
    fields.check()
    generation = read_generation(
        config, read_optional_json(folder / "generation_config.json"), max_positions=spec.max_target_positions
    )
    files = _tokenizer_files(folder, separate=not ties.sides)
    names = _rename(spec, ties, read_state_dict(folder))
    return Checkpoint(
        spec,
        names.weights,
        dataclasses.replace(generation.tokens, source_eos=generation.tokens.eos[0]),
        generation.defaults,
        "marian" if files else "none",
        files,
        generation.removed,
        names.names,
        names.foreign(),
        notices=tuple(names.notices),
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


def _tokenizer_files(folder: Path, *, separate: bool) -> dict[str, str]:
    wanted = ["source.spm", "target.spm", "vocab.json"]
    files = {name: name for name in wanted if (folder / name).exists()}
    if not files:
        return {}
    if separate and (folder / "target_vocab.json").exists():
        wanted.append("target_vocab.json")
        files["target_vocab.json"] = "target_vocab.json"
    if missing := [name for name in wanted if name not in files]:
        raise ExportError(
            f"{folder} lacks {', '.join(missing)} of its tokenizer; copy all of {', '.join(wanted)} or none"
        )
    return files


def reference(folder: Path, checkpoint: Checkpoint) -> Reference:
    """The model as transformers runs it."""
    return HuggingFaceReference("MarianMTModel", folder, checkpoint.removed_tokens)
