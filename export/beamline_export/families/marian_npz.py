"""Marian's own files: `model.npz`, which holds its options, too; docs/from-other-toolkits.md describes the folder."""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from beamline_export.checkpoint import MOST_LAYERS, Fields, check_file, read_json
from beamline_export.families.plain_reference import PlainReference
from beamline_export.families.positions import stretched_positions
from beamline_export.families.toolkit import (
    check_all,
    find_models,
    piece_tokenizer,
    read_pieces,
    read_positions,
    read_search,
    rows,
    take_product,
    take_vector,
)
from beamline_export.npz_file import read_npz, read_text
from beamline_export.reference import Reference
from beamline_export.renamer import Renamer
from beamline_export.spec import (
    Activation,
    Array,
    Checkpoint,
    ExportError,
    NormPlacement,
    SpecialTokenIds,
    TransformerSpec,
)
from beamline_export.tokenizer_files import TokenizerFiles, without_tokenizer
from beamline_export.tokenizer_json import unreadable_tokenizer
from beamline_export.yaml_file import read_yaml, read_yaml_texts
from beamline_server.tokenizer import read_sentencepiece

FILE = "model.npz"
_OPTIONS = "special:model.yml"
_EOS, _UNK = 0, 1
_EPSILON = 1e-6
"""What Marian's norms add."""
_ACTIVATIONS = {"relu": Activation.RELU, "swish": Activation.SILU}
"""Marian's "gelu" is another function, x * sigmoid(1.702 x)."""
_ONLY: Mapping[str, object] = {
    "type": "transformer",
    "transformer-decoder-autoreg": "self-attention",
    "transformer-ffn-depth": 2,
    "lemma-dim-emb": 0,
    "factors-dim-emb": 0,
    "factors-combine": "sum",
    "right-left": False,
    "transformer-tied-layers": [],
    "input-types": [],
    **dict.fromkeys(("transformer-no-projection", "transformer-no-bias", "transformer-no-affine"), False),
    **dict.fromkeys(("transformer-pool", "ulr", "output-omit-bias", "transformer-rnn-projection"), False),
}
"""Options that change the model, and the only value of each that is supported."""
_ADVICE = "the options within the file must be those of a plain transformer"


def read(folder: Path) -> Checkpoint:
    """Read a folder with Marian's files.

    Raises:
        ExportError: config, weights, their options or vocabularies are missing or contradict each other.
    """
    data = read_json(folder / "config.json")
    state, texts = read_npz(folder / FILE, (_OPTIONS,))
    text = read_text(texts, _OPTIONS)
    if text is None:
        raise ExportError(f"{folder / FILE} holds no {_OPTIONS}; take the file that Marian wrote")
    fields, options = Fields(data, "config.json"), Fields(read_yaml(text, _OPTIONS), _OPTIONS)
    spec, learned = _read_spec(options, read_positions(fields))
    check_all(options)
    names = Renamer(state)
    spec = _take_weights(names, spec, learned=learned)
    start = spec.target_vocabulary - 1
    vocabulary, contents, (eos, unknown) = _tokenizer(folder, start)
    ids = {"decoder_start_token_id": start, "eos_token_id": eos, "pad_token_id": start}
    generation = read_search(
        fields, data, ids, options, max_positions=spec.max_target_positions, banned=(start, *unknown)
    )
    tokens = dataclasses.replace(generation.tokens, source_eos=eos)
    return Checkpoint(
        spec,
        names.weights,
        tokens,
        generation.defaults,
        vocabulary.kind,
        vocabulary.files,
        tuple(sorted({*generation.removed, start})),
        names.names,
        names.foreign(),
        advice=_ADVICE,
        tokenizer_settings=vocabulary.settings,
        notices=tuple(names.notices),
        tokenizer_contents=contents,
    )


def _read_spec(options: Fields, positions: int) -> tuple[TransformerSpec, bool]:
    """The spec, but for what the weights show, and whether positions are learned."""
    for name, value in _ONLY.items():
        options.must_be(name, value)
    d_model, ffn = options.integer("dim-emb"), options.integer("transformer-dim-ffn")
    for name, same in (("transformer-decoder-dim-ffn", ffn), ("transformer-decoder-ffn-depth", 2)):
        if options.raw(name) not in (None, 0, same):
            options.must_be(name, same)
    learned = options.flag("transformer-train-positions", False)
    heads = options.integer("transformer-heads")
    pre_norm = _read_norms(options)
    top = _operations(options, "transformer-postprocess-top", "")
    embedding = _operations(options, "transformer-postprocess-emb", "")
    for name, found in (("transformer-postprocess-top", top), ("transformer-postprocess-emb", embedding)):
        if found not in ("", "n"):
            options.problems.append(f"{name} {found!r} is not supported (only n and d are)")
    spec = TransformerSpec(
        architecture="marian_npz",
        d_model=d_model,
        encoder_layers=options.integer("enc-depth", most=MOST_LAYERS),
        decoder_layers=options.integer("dec-depth", most=MOST_LAYERS),
        encoder_heads=heads,
        decoder_heads=heads,
        encoder_ffn=ffn,
        decoder_ffn=ffn,
        norm_placement=NormPlacement.PRE if pre_norm else NormPlacement.POST,
        activation=options.choice("transformer-ffn-activation", _ACTIVATIONS, "swish"),
        source_vocabulary=1,
        target_vocabulary=2,
        max_source_positions=positions,
        max_target_positions=positions,
        embedding_scale=1.0 if learned else math.sqrt(d_model),
        embedding_norm=embedding == "n",
        encoder_final_norm=top == "n",
        decoder_final_norm=top == "n",
        norm_epsilon=_EPSILON,
    )
    return spec, learned


def _read_norms(options: Fields) -> bool:
    """Whether norms stand before the sub-layers."""
    before = _operations(options, "transformer-preprocess", "")
    after = _operations(options, "transformer-postprocess", "dan")
    if (before, after) not in (("", "an"), ("n", "a")):
        options.problems.append(
            f"transformer-preprocess {before!r} with transformer-postprocess {after!r} is not supported (only '' with "
            "'dan', and 'n' with 'da', are)"
        )
    return before == "n"


def _operations(options: Fields, name: str, default: str) -> str:
    """What is done to a layer's input or output, by Marian's letters, without dropout."""
    value = options.raw(name)
    if not isinstance(value, str | None):
        options.problems.append(f"{name} must be a text, not a {type(value).__name__}")
        return default
    return (default if value is None else value)[:20].replace("d", "")


def _take_weights(names: Renamer, spec: TransformerSpec, *, learned: bool) -> TransformerSpec:
    """All weights under their canonical names; returns the spec with sizes as the weights have them."""
    _take_embeddings(names)
    if learned:
        names.take("source_positions", "Wpos")
        names.take("target_positions", "Wpos")
        most = min(rows(names, "source_positions"), spec.max_source_positions)
        if "source_positions" in names.weights:
            table = names.weights["source_positions"][:most]
            names.weights |= {"source_positions": table, "target_positions": table}
        spec = dataclasses.replace(spec, max_source_positions=most, max_target_positions=most)
    else:
        names.compute_positions(spec.max_source_positions, spec.d_model, stretched_positions)
    for stack, layers in (("encoder", spec.encoder_layers), ("decoder", spec.decoder_layers)):
        if spec.embedding_norm:
            _take_norm(names, f"{stack}.embedding_norm", f"{stack}_emb", "_pre")
        if spec.encoder_final_norm:
            _take_norm(names, f"{stack}.final_norm", f"{stack}_top", "")
        for i in range(layers):
            _take_layer(names, stack, i, "_pre" if spec.norm_placement is NormPlacement.PRE else "")
    return dataclasses.replace(
        spec,
        source_vocabulary=rows(names, "source_embedding"),
        target_vocabulary=max(2, rows(names, "target_embedding")),
    )


def _take_embeddings(names: Renamer) -> None:
    """Tables and logits; the target has one token more, whose embedding is zero: what Marian's decoder begins with."""
    names.take("source_embedding", "encoder_Wemb", "Wemb")
    names.take("target_embedding", "decoder_Wemb", "Wemb")
    if names.has("decoder_ff_logit_out_W"):
        names.take("head.weight", "decoder_ff_logit_out_W")
        names.weights["head.weight"] = np.ascontiguousarray(names.weights["head.weight"].T)
    else:
        names.take("head.weight", "decoder_ff_logit_out_Wt", "decoder_Wemb", "Wemb")
    take_vector(names, "head.bias", "decoder_ff_logit_out_b")
    names.share_equal("source_embedding", "target_embedding", "head.weight")
    longer: dict[int, Array] = {}
    for table in ("target_embedding", "head.weight", "head.bias"):
        if (array := names.weights.get(table)) is not None and array.ndim:
            names.weights[table] = longer.setdefault(
                id(array), np.concatenate([array, np.zeros((1, *array.shape[1:]), np.float32)])
            )


def _take_layer(names: Renamer, stack: str, i: int, suffix: str) -> None:
    here, there = f"{stack}.{i}", f"{stack}_l{i + 1}"
    attentions = {"self_attention": "self"} | ({"cross_attention": "context"} if stack == "decoder" else {})
    for attention, name in attentions.items():
        for part, letter in (("query", "q"), ("key", "k"), ("value", "v"), ("output", "o")):
            take_product(names, f"{here}.{attention}.{part}", f"{there}_{name}_W{letter}", f"{there}_{name}_b{letter}")
        _take_norm(names, f"{here}.{attention}_norm", f"{there}_{name}_Wo", suffix)
    take_product(names, f"{here}.ffn.up", f"{there}_ffn_W1", f"{there}_ffn_b1")
    take_product(names, f"{here}.ffn.down", f"{there}_ffn_W2", f"{there}_ffn_b2")
    _take_norm(names, f"{here}.ffn_norm", f"{there}_ffn_ffn", suffix)


def _take_norm(names: Renamer, canonical: str, name: str, suffix: str) -> None:
    take_vector(names, f"{canonical}.weight", f"{name}_ln_scale{suffix}")
    take_vector(names, f"{canonical}.bias", f"{name}_ln_bias{suffix}")


def _tokenizer(folder: Path, start: int) -> tuple[TokenizerFiles, Mapping[str, bytes], tuple[int, tuple[int, ...]]]:
    """The tokenizer, its files that are made, and the ids of the end and of unknown words, which Marian never gives."""
    models = find_models(folder, "vocab.spm")
    listed = next((folder / name for name in ("vocab.yml", "vocab.json") if (folder / name).exists()), None)
    if models is None:
        return without_tokenizer(SpecialTokenIds(start, (_EOS,))), {}, (_EOS, (_UNK,))
    if listed is not None:
        vocabulary = _read_list(listed)
        eos = vocabulary.get("</s>")
        if eos is None:
            raise ExportError(f"{listed} has no '</s>'; copy the vocabulary of this model")
        tokens = SpecialTokenIds(start, (eos,), source_eos=eos, pad=start)
        files, contents = piece_tokenizer(models, (vocabulary, vocabulary), listed.name, tokens, ())
        return files, contents, (eos, tuple(vocabulary[word] for word in ("<unk>",) if word in vocabulary))
    ends = [_special_pieces(folder / name) for name in models]
    if ends[0] != ends[1]:
        raise ExportError(
            f"{folder}: {models[0]} and {models[1]} give </s> and <unk> other numbers; that is not supported"
        )
    files = TokenizerFiles(
        "sentencepiece",
        dict(zip(("source.spm", "target.spm"), models, strict=True)),
        {},
        SpecialTokenIds(start, (ends[0][0],)),
    )
    return files, {}, (ends[0][0], (ends[0][1],))


def _special_pieces(file: Path) -> tuple[int, int]:
    """Numbers of the end and of unknown words in a SentencePiece model."""
    try:
        model = read_sentencepiece(file.name, file.read_bytes())
    except (OSError, ValueError) as error:
        raise unreadable_tokenizer(file, error) from error
    if model.eos_id() < 0:
        raise ExportError(f"{file} has no end of sequence; copy the vocabulary of this model")
    return int(model.eos_id()), int(model.unk_id())


def _read_list(file: Path) -> dict[str, int]:
    """A vocabulary in YAML or JSON: pieces and their ids."""
    if file.suffix == ".json":
        return read_pieces(file)
    check_file(file)
    try:
        found: Mapping[Any, Any] = read_yaml_texts(file.read_text("utf-8"), file.name)
    except (OSError, UnicodeDecodeError) as error:
        raise ExportError(f"{file} cannot be read as text ({error}); copy it again") from error
    if wrong := [piece for piece, i in found.items() if not re.fullmatch(r"[0-9]{1,8}", str(i))]:
        raise ExportError(f"{file}: {str(wrong[0])[:60]!r} has no id; copy the vocabulary of this model")
    return {str(piece): int(i) for piece, i in found.items()}


def reference(folder: Path, checkpoint: Checkpoint) -> Reference:
    """The model in plain PyTorch."""
    return PlainReference(read(folder), checkpoint.removed_tokens)
