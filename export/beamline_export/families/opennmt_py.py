"""Transformers of OpenNMT-py, versions 1 to 3; docs/from-other-toolkits.md says what the folder holds."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from beamline_export.checkpoint import MOST_LAYERS, Fields, read_json, read_state_dict
from beamline_export.families.buffers import as_table
from beamline_export.families.plain_reference import PlainReference
from beamline_export.families.positions import interleaved_positions
from beamline_export.families.subword_nmt import MosesWords, find_pieces, read_moses_words, toolkit_tokenizer
from beamline_export.families.toolkit import (
    check_all,
    read_pieces,
    read_positions,
    read_search,
    rows,
)
from beamline_export.reference import Reference
from beamline_export.renamer import Renamer
from beamline_export.spec import (
    Activation,
    Checkpoint,
    ExportError,
    NormPlacement,
    SpecialTokenIds,
    TransformerSpec,
)
from beamline_export.state_names import name_state
from beamline_export.tokenizer_files import TokenizerFiles, without_tokenizer

OPTIONS = "opt.json"
_PAD, _BOS, _EOS = 1, 2, 3
_IDS: Mapping[str, object] = {"decoder_start_token_id": _BOS, "eos_token_id": _EOS, "pad_token_id": _PAD}
_ACTIVATIONS = {"relu": Activation.RELU, "gelu": Activation.GELU, "silu": Activation.SILU}
_ONLY: Mapping[str, object] = {
    **dict.fromkeys(("encoder_type", "decoder_type"), "transformer"),
    **dict.fromkeys(("copy_attn", "aan_useffn", "parallel_residual", "multiquery", "shared_layer_norm"), False),
    **dict.fromkeys(("max_relative_positions", "num_kv", "num_experts", "sliding_window"), 0),
    "position_encoding": True,
    "position_encoding_type": "SinusoidalInterleaved",
    "self_attn_type": "scaled-dot",
    "generator_function": "softmax",
    "layer_norm": "standard",
    "model_task": "seq2seq",
}
"""Options that change the model, and the only value of each that is supported."""
_SAME = {"self_attn_type": "scaled-dot-flash", "generator_function": "log_softmax"}
"""Values of some of them that compute the same."""
_EPSILON = 1e-6
_SAME_TABLE = 4e-3
"""What half precision, and fp32's angles of late positions, make of a position table."""
_EMBEDDING = "embeddings.make_embedding.emb_luts.0.weight"
_ADVICE = f"{OPTIONS} must be that of this model"


def read(folder: Path) -> Checkpoint:
    """Read a folder with a Transformer of OpenNMT-py.

    Raises:
        ExportError: config, options, weights or vocabularies are missing or contradict each other.
    """
    data = read_json(folder / "config.json")
    fields, options = Fields(data, "config.json"), Fields(read_json(folder / OPTIONS), OPTIONS)
    around = [fields.optional_id(f"source_{end}_token_id") for end in ("bos", "eos")]
    words = read_moses_words(fields, {})
    spec = _read_spec(options, read_positions(fields))
    check_all(options)
    state = name_state(read_state_dict(folder), {})
    names = Renamer(state.tensors, state.origins)
    spec = _take_weights(names, spec, tied=options.flag("share_decoder_embeddings", False))
    generation = read_search(fields, data, _IDS, options, max_positions=spec.max_target_positions)
    tokens = dataclasses.replace(generation.tokens, source_bos=around[0], source_eos=around[1])
    tokenizer, contents = _tokenizer(folder, words, tokens)
    return Checkpoint(
        spec,
        names.weights,
        tokens,
        generation.defaults,
        tokenizer.kind,
        tokenizer.files,
        generation.removed,
        names.names,
        names.foreign(),
        advice=_ADVICE,
        tokenizer_settings=tokenizer.settings,
        notices=(*state.notices, *names.notices),
        tokenizer_contents=contents,
    )


def _read_spec(options: Fields, positions: int) -> TransformerSpec:
    """The spec, but for what the weights show."""
    if options.raw("position_encoding") is None:  # by default such a model has none
        options.problems.append("position_encoding is missing")
    for name, value in _ONLY.items():
        if options.raw(name) != _SAME.get(name, value):
            options.must_be(name, value)
    both = options.raw("layers")
    encoder, decoder = (
        options.integer(f"{side}_layers", both if isinstance(both, int) and both > 0 else None, most=MOST_LAYERS)
        for side in ("enc", "dec")
    )
    width = "hidden_size" if options.raw("hidden_size") is not None else "rnn_size"
    if options.raw(width) in (None, -1):
        width = "enc_hid_size" if options.raw("enc_hid_size") is not None else "enc_rnn_size"
    d_model, heads, ffn = options.integer(width), options.integer("heads"), options.integer("transformer_ff")
    return TransformerSpec(
        architecture="opennmt_py",
        d_model=d_model,
        encoder_layers=encoder,
        decoder_layers=decoder,
        encoder_heads=heads,
        decoder_heads=heads,
        encoder_ffn=ffn,
        decoder_ffn=ffn,
        norm_placement=NormPlacement.PRE,
        activation=options.choice("pos_ffn_activation_fn", _ACTIVATIONS, "relu"),
        source_vocabulary=1,
        target_vocabulary=2,
        max_source_positions=positions,
        max_target_positions=positions,
        embedding_scale=math.sqrt(d_model),
        encoder_final_norm=True,
        decoder_final_norm=True,
        norm_epsilon=options.number("norm_eps", _EPSILON, least=0),
    )


def _take_weights(names: Renamer, spec: TransformerSpec, *, tied: bool) -> TransformerSpec:
    """All weights under their canonical names; returns the spec with sizes as the weights have them."""
    names.take("source_embedding", f"encoder.{_EMBEDDING}")
    names.take("target_embedding", f"decoder.{_EMBEDDING}", f"encoder.{_EMBEDDING}")
    # Within a Sequential, or alone, as in version 3.
    own = "generator.0" if any(name.startswith("generator.0.") for name in names.left()) else "generator"
    names.take("head.weight", f"{own}.weight", *((f"decoder.{_EMBEDDING}",) if tied else ()))
    names.share_equal("source_embedding", "target_embedding", "head.weight")
    if tied:
        names.tell_untied("share_decoder_embeddings is true", "target_embedding", "head.weight")
    names.take("head.bias", f"{own}.bias")
    names.weights.setdefault("head.bias", np.zeros(rows(names, "head.weight"), np.float32))
    names.compute_positions(spec.max_source_positions, spec.d_model, interleaved_positions)
    for stack in ("encoder", "decoder"):
        _leave_out_table(names, f"{stack}.embeddings", spec.d_model)
        names.module(f"{stack}.final_norm", f"{stack}.layer_norm")
    for i in range(spec.encoder_layers):
        here, there = f"encoder.{i}", f"encoder.transformer.{i}"
        _take_attention(names, f"{here}.self_attention", f"{there}.self_attn", f"{there}.layer_norm")
        _take_feed_forward(names, here, there)
    for i in range(spec.decoder_layers):
        here, there = f"decoder.{i}", f"decoder.transformer_layers.{i}"
        _take_attention(names, f"{here}.self_attention", f"{there}.self_attn", f"{there}.layer_norm_1")
        _take_attention(names, f"{here}.cross_attention", f"{there}.context_attn", f"{there}.layer_norm_2")
        _take_feed_forward(names, here, there)
        names.ignore(rf"{there}\.mask".replace(".", r"\."))
    names.tell_absent_biases()
    return dataclasses.replace(
        spec,
        source_vocabulary=rows(names, "source_embedding"),
        target_vocabulary=max(2, rows(names, "target_embedding")),
    )


def _leave_out_table(names: Renamer, embeddings: str, width: int) -> None:
    """The position table in the file, if it is the one that is computed."""
    for name in (f"{embeddings}.make_embedding.pe.pe", f"{embeddings}.pe.pe"):
        held = as_table(names.left()[name], width) if names.has(name) else None
        if (
            held is not None
            and len(held)
            and np.abs(held - interleaved_positions(len(held), width)).max() < _SAME_TABLE
        ):
            names.leave_out(name)


def _take_attention(names: Renamer, canonical: str, name: str, norm: str) -> None:
    for part in ("query", "key", "value"):
        plural = {"query": "query", "key": "keys", "value": "values"}[part]
        names.module(f"{canonical}.{part}", f"{name}.linear_{plural}")
    names.module(f"{canonical}.output", f"{name}.final_linear")
    names.module(f"{canonical}_norm", norm)


def _take_feed_forward(names: Renamer, here: str, there: str) -> None:
    names.module(f"{here}.ffn.up", f"{there}.feed_forward.w_1")
    names.module(f"{here}.ffn.down", f"{there}.feed_forward.w_2")
    names.module(f"{here}.ffn_norm", f"{there}.feed_forward.layer_norm")


def _tokenizer(
    folder: Path, words: MosesWords | None, tokens: SpecialTokenIds
) -> tuple[TokenizerFiles, Mapping[str, bytes]]:
    pieces = find_pieces(folder, words, "sentencepiece.model")
    if pieces is None:
        return without_tokenizer(tokens), {}
    source, target = folder / "vocab.json", folder / "target_vocab.json"
    if not source.exists():
        raise ExportError(
            f"{folder} lacks vocab.json, which says what ids the pieces have; write it from the checkpoint"
        )
    vocabulary = read_pieces(source)
    vocabularies = (vocabulary, read_pieces(target) if target.exists() else vocabulary)
    return toolkit_tokenizer(folder, pieces, vocabularies, source.name, tokens, {_BOS})


def reference(folder: Path, checkpoint: Checkpoint) -> Reference:
    """The model in plain PyTorch."""
    return PlainReference(read(folder), checkpoint.removed_tokens)
