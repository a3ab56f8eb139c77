"""Relatives of BART, each in several shapes, against transformers' `generate` and its log-probabilities."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from beamline_export.agreement import Tokens
from beamline_export.bundle_writer import ExportOptions, export
from beamline_export.families.bart_relatives import ROWS
from beamline_export.families.registry import detect
from beamline_export.generate_oracle import GenerateOracle
from beamline_export.parity import all_logprobs, random_sources
from beamline_export.progress import Progress
from beamline_export.reference import HuggingFaceReference
from beamline_export.testing import EOS, HUGGING_FACE_CLASSES, write_hugging_face
from beamline_server.bundle import Bundle
from beamline_server.engine.request import EarlyStopping, SearchOptions
from beamline_server.models.load import build_backend, model_rules

pytestmark = pytest.mark.parity

PAD = 0
FAMILIES = [row.model_type for row in ROWS]

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaled": {"scale_embedding": True, "activation_function": "relu", "encoder_layers": 1, "decoder_layers": 3},
    "unscaled": {"scale_embedding": False, "activation_function": "gelu", "encoder_attention_heads": 1},
    "untied": {"tie_word_embeddings": False, "decoder_ffn_dim": 20, "decoder_attention_heads": 8},
    "tied": {"tie_word_embeddings": True, "d_model": 24, "activation_function": "gelu_new", "decoder_layers": 1},
    "swish": {"activation_function": "swish", "d_model": 16, "max_position_embeddings": 27, "encoder_layers": 3},
}
GENERATION: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaled": {"forced_bos_token_id": 7, "forced_eos_token_id": EOS},
    "unscaled": {"bad_words_ids": [[PAD], [11], [30]], "forced_bos_token_id": 5},
    "untied": {"suppress_tokens": [5, 9], "begin_suppress_tokens": [EOS, 20]},
    "tied": {"eos_token_id": [EOS, 7], "bad_words_ids": [[PAD]]},
    "swish": {"forced_eos_token_id": EOS, "bad_words_ids": [[8]], "renormalize_logits": True},
}
SEARCHES = [
    SearchOptions(1, 1, max_new_tokens=16),
    SearchOptions(1, 1, max_new_tokens=12, min_new_tokens=5),
    SearchOptions(4, 4, max_new_tokens=14, early_stopping=EarlyStopping.WHEN_FULL, length_penalty=1.4),
    SearchOptions(4, 4, max_new_tokens=12, early_stopping=EarlyStopping.NEVER, length_penalty=-0.5),
    SearchOptions(4, 2, max_new_tokens=10, min_new_tokens=4, length_penalty=0.6),
]


def sizes(family: str, shape: str) -> Mapping[str, Any]:
    """The config of one shape; FSMT has a vocabulary for each side, which are of one size where they are tied."""
    config = SHAPES[shape]
    if family != "fsmt":
        return config
    target = 120 if config.get("tie_word_embeddings") else 90
    # Its vocab_size is another name of tgt_vocab_size.
    return {**config, "src_vocab_size": 120, "tgt_vocab_size": target, "vocab_size": target}


def exported(checkpoint: Path, options: ExportOptions = ExportOptions()) -> Bundle:  # noqa: B008 - a frozen value
    return export(checkpoint, checkpoint.with_name("bundle"), options, Progress(io.StringIO()))


def with_padding(sources: Sequence[Tokens]) -> list[Tokens]:
    """The same, and two with the padding's id among their tokens."""
    return [*sources, (PAD, 9, PAD, PAD, 12, 40, EOS), (17, PAD, EOS)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_searches_equal_generate(family: str, shape: str, tmp_path: Path) -> None:
    seed = list(SHAPES).index(shape)
    checkpoint = write_hugging_face(tmp_path / "checkpoint", family, sizes(family, shape), GENERATION[shape], seed=seed)
    bundle = exported(checkpoint)
    parity: Any = bundle.manifest.parity
    assert parity["beam_search"]["parted_beyond_near_ties"] == 0
    assert parity["forced_decode"]["max_difference"] < 1e-3
    rules, backend = model_rules(bundle.manifest), build_backend(bundle, "cpu", threads=1)
    oracle = GenerateOracle(HuggingFaceReference(HUGGING_FACE_CLASSES[family], checkpoint, computed=".*").model, rules)
    sources = with_padding(random_sources(bundle.manifest.dimensions.source_vocabulary, EOS, 20, count=6, seed=seed))
    compared = 0
    for options in SEARCHES:
        # What min_new_tokens bans is not renormalized; docs/bring-your-model.md says so.
        if GENERATION[shape].get("renormalize_logits") and options.min_new_tokens and options.beam_size > 1:
            continue
        comparisons = list(oracle.compare(backend, sources, options))
        compared += sum(c.same for c in comparisons)
        assert all(c.agrees for c in comparisons), [c.parting for c in comparisons if not c.agrees]
        assert max(c.score_difference for c in comparisons) < 1e-4
    assert compared > 20


@pytest.mark.parametrize(
    ("family", "precision"),
    [
        *((family, "int8") for family in FAMILIES),
        *((family, "fp16") for family in ("m2m_100", "blenderbot-small", "fsmt")),
    ],
)
def test_smaller_precisions_pass_their_gate(family: str, precision: str, tmp_path: Path) -> None:
    """int8 with calibrated ranges, and fp16, for those whose embeddings differ in the graphs."""
    config = sizes(family, "plain")
    checkpoint = write_hugging_face(tmp_path / "checkpoint", family, config, {}, seed=1, sharpness=0.5)
    sentences = tmp_path / "sentences.txt"
    sources = random_sources(90, EOS, 30, count=40, seed=1)
    sentences.write_text("".join(f"{' '.join(map(str, source))}\n" for source in sources))
    bundle = exported(checkpoint, ExportOptions(precision, calibrate=sentences if precision == "int8" else None))
    forced: Any = bundle.manifest.parity["forced_decode"]
    assert forced["same_top_token"] > 0.9


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_in_a_target_is_where_the_model_has_it(family: str, tmp_path: Path) -> None:
    """Its log-probabilities are those of transformers' steps with a cache, as `generate` takes them."""
    checkpoint = write_hugging_face(tmp_path / "checkpoint", family, sizes(family, "plain"), {}, seed=7)
    bundle = exported(checkpoint)
    row = detect(checkpoint)
    reference = row.reference(checkpoint, row.read(checkpoint))
    start = bundle.manifest.special_tokens.decoder_start
    forced = np.array([[start, 7, PAD, 9, PAD, PAD, 12, 5], [start, PAD, 4, 5, 6, PAD, 9, 11]])
    sources = [(5, PAD, 6, EOS), (PAD, EOS)]
    vocabulary = bundle.manifest.dimensions.target_vocabulary
    ours = all_logprobs(build_backend(bundle, "cpu", threads=1), sources, forced, vocabulary)
    for i, source in enumerate(sources):
        expected = reference.logprobs(source, [forced[i].tolist()])[0]
        assert np.abs(ours[i] - expected).max() < 1e-4


@pytest.mark.parametrize("family", ["pegasus", "fsmt", "marian"])
def test_tables_that_a_file_lacks_are_computed(family: str, tmp_path: Path) -> None:
    """By the formula of transformers, which the export's own gate compares with."""
    config = {**sizes(family, "plain"), "max_position_embeddings": 600, "d_model": 28}
    checkpoint = write_hugging_face(tmp_path / "checkpoint", family, config, {}, seed=3)
    state = load_file(checkpoint / "model.safetensors")
    kept = {name: tensor for name, tensor in state.items() if "embed_positions" not in name}
    assert (len(kept) < len(state)) == (family != "marian")
    save_file(kept, checkpoint / "model.safetensors", metadata={"format": "pt"})
    row = detect(checkpoint)
    read = row.read(checkpoint)
    reference: Any = row.reference(checkpoint, read)
    positions = reference.model.get_encoder().embed_positions.weight.detach().numpy()
    first = read.spec.unnumbered_padding.token + 1 if read.spec.unnumbered_padding else 0
    table = read.weights["source_positions"]
    assert len(table) == 600
    assert np.abs(table[: len(positions) - first] - positions[first:]).max() < 1e-6 * len(positions)
    parity: Any = exported(checkpoint).manifest.parity
    assert parity["beam_search"]["parted_beyond_near_ties"] == 0
