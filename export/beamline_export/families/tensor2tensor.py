"""Transformers of Tensor2Tensor, out of a NumPy archive; docs/from-other-toolkits.md says how to write it."""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from beamline_export.checkpoint import MOST_LAYERS, Fields, read_json
from beamline_export.families.plain_reference import PlainReference
from beamline_export.families.positions import stretched_positions
from beamline_export.families.toolkit import check_all, read_positions, read_search, rows, take_product
from beamline_export.npz_file import read_npz
from beamline_export.reference import Reference
from beamline_export.renamer import Renamer
from beamline_export.spec import Activation, Array, Checkpoint, ExportError, NormPlacement, TransformerSpec

FILE, OPTIONS = "model.npz", "hparams.json"
_PAD, _EOS = 0, 1
_IDS: Mapping[str, object] = {"decoder_start_token_id": _PAD, "eos_token_id": _EOS, "pad_token_id": _PAD}
_ONLY: Mapping[str, object] = {
    "layer_preprocess_sequence": "n",
    "layer_postprocess_sequence": "da",
    "norm_type": "layer",
    "self_attention_type": "dot_product",
    "ffn_layer": "dense_relu_dense",
    "pos": "timing",
    "prepend_mode": "none",
    "causal_decoder_self_attention": True,
    **dict.fromkeys(("proximity_bias", "unidirectional_encoder"), False),
    **dict.fromkeys(("attention_key_channels", "attention_value_channels", "hard_attention_k"), 0),
    **dict.fromkeys(("max_area_width", "max_area_height", "memory_height"), 1),
}
"""Hyperparameters that change the model, and the only value of each that is supported."""
_EPSILON = 1e-6
_SCALES = {"sqrt_depth": True, "rescale": False, "none": False}
_SHARD = r"(?:.*/)?(symbol_modality_\d+_\d+(?:_\d+)?/(shared|input_emb|target_emb|softmax))/weights_(\d{1,5})"
_BODY = r"(?:.*/)?body/((?:encoder|decoder)/.*|target_space_embedding/kernel)"
_SPACES = "target_space_embedding/kernel"
_SPACE = "target_space_id"
_NOT_OF_THE_MODEL = ("training/", "losses_avg/", "train_stats/", "global_step")
_ADVICE = f"{OPTIONS} must be that of this model, and its architecture a plain transformer"


def read(folder: Path) -> Checkpoint:
    """Read a folder with a Transformer of Tensor2Tensor.

    Raises:
        ExportError: config, hyperparameters or weights are missing or contradict each other.
    """
    data = read_json(folder / "config.json")
    fields, options = Fields(data, "config.json"), Fields(read_json(folder / OPTIONS), OPTIONS)
    spec = _read_spec(options, read_positions(fields))
    check_all(options)
    state, origins = _named(folder / FILE)
    names = Renamer(state, origins)
    spec = _take_weights(names, spec)
    _take_space(names, fields)
    generation = read_search(fields, data, _IDS, options, max_positions=spec.max_target_positions)
    return Checkpoint(
        spec,
        names.weights,
        dataclasses.replace(generation.tokens, source_eos=_EOS),
        generation.defaults,
        "none",
        removed_tokens=generation.removed,
        weight_names=names.names,
        foreign=names.foreign(),
        advice=_ADVICE,
        notices=tuple(names.notices),
    )


def _read_spec(options: Fields, positions: int) -> TransformerSpec:
    """The spec, but for what the weights show."""
    for name, value in _ONLY.items():
        options.must_be(name, value)
    layers = options.raw("num_hidden_layers")
    layers = layers if isinstance(layers, int) and layers > 0 else None
    encoder, decoder = (_layers(options, f"num_{stack}_layers", layers) for stack in ("encoder", "decoder"))
    d_model, heads, ffn = (options.integer(name) for name in ("hidden_size", "num_heads", "filter_size"))
    scaled: bool = options.choice("multiply_embedding_mode", _SCALES, "sqrt_depth")
    return TransformerSpec(
        architecture="tensor2tensor",
        d_model=d_model,
        encoder_layers=encoder,
        decoder_layers=decoder,
        encoder_heads=heads,
        decoder_heads=heads,
        encoder_ffn=ffn,
        decoder_ffn=ffn,
        norm_placement=NormPlacement.PRE,
        activation=Activation.RELU,
        source_vocabulary=1,
        target_vocabulary=2,
        max_source_positions=positions,
        max_target_positions=positions,
        embedding_scale=math.sqrt(d_model) if scaled else 1.0,
        encoder_final_norm=True,
        decoder_final_norm=True,
        norm_epsilon=options.number("norm_epsilon", _EPSILON, least=0),
    )


def _layers(options: Fields, name: str, default: int | None) -> int:
    """A number of layers; 0 stands for that of both stacks."""
    if options.raw(name) in (None, 0):
        return options.integer("num_hidden_layers", default, most=MOST_LAYERS)
    return options.integer(name, most=MOST_LAYERS)


def _named(file: Path) -> tuple[dict[str, Array], dict[str, str]]:
    """Tensors without the model's scope, the shards of a table put together; and what they are called in the file."""
    arrays, _ = read_npz(file)
    shards: dict[str, dict[int, Array]] = {}
    state: dict[str, Array] = {}
    origins: dict[str, str] = {}
    for name, array in arrays.items():
        if name.startswith(_NOT_OF_THE_MODEL):
            continue
        if shard := re.fullmatch(_SHARD, name):
            shards.setdefault(shard[1], {})[int(shard[3])] = array
            origins[shard[1]] = f"{name.rpartition('/')[0]}/weights_*"
        else:
            body = re.fullmatch(_BODY, name)
            state[new := body[1] if body else name] = array
            origins[new] = name
    for table, parts in shards.items():
        if problem := _problem(parts):
            raise ExportError(f"{file}: the shards of {origins[table]} {problem}; write the archive again")
        state[table] = np.concatenate([parts[i] for i in sorted(parts)])
    return state, origins


def _problem(parts: Mapping[int, Array]) -> str | None:
    if sorted(parts) != list(range(len(parts))):
        return f"are not all there ({', '.join(map(str, sorted(parts)))})"
    if len({part.shape[1:] for part in parts.values()}) > 1 or any(part.ndim != 2 for part in parts.values()):
        return "are not of one width"
    return None


def _take_weights(names: Renamer, spec: TransformerSpec) -> TransformerSpec:
    """All weights under their canonical names; returns the spec with sizes as the weights have them."""
    _take_embeddings(names)
    names.compute_positions(spec.max_source_positions, spec.d_model, stretched_positions)
    for stack, layers in (("encoder", spec.encoder_layers), ("decoder", spec.decoder_layers)):
        _take_norm(names, f"{stack}.final_norm", stack)
        for i in range(layers):
            _take_layer(names, stack, i)
    return dataclasses.replace(
        spec,
        source_vocabulary=rows(names, "source_embedding"),
        target_vocabulary=max(2, rows(names, "target_embedding")),
    )


def _take_embeddings(names: Renamer) -> None:
    """Tables; whatever stands in it, the embedding of padding is zero, which is what the decoder begins with."""
    tables: dict[str, list[str]] = {
        kind: list(_tables(names, kind)) for kind in ("shared", "input_emb", "target_emb", "softmax")
    }
    if len(tables["shared"]) > 1:
        found = ", ".join(map(names.origin, tables["shared"]))
        raise ExportError(f"the archive holds several shared tables ({found}), which is not supported")
    for canonical, kind in (
        ("source_embedding", "input_emb"),
        ("target_embedding", "target_emb"),
        ("head.weight", "softmax"),
    ):
        names.take(canonical, *(tables[kind] or tables["shared"] or [f"symbol_modality_*/{kind}"]))
    names.share_equal("source_embedding", "target_embedding", "head.weight")
    silent: dict[int, Array] = {}
    for table in ("source_embedding", "target_embedding"):
        if (array := names.weights.get(table)) is not None:
            names.weights[table] = silent.setdefault(id(array), _without_padding(array))
    names.weights["head.bias"] = np.zeros(rows(names, "head.weight"), np.float32)


def _take_space(names: Renamer, fields: Fields) -> None:
    """What stands for the kind of the target is added to every source token, as its position is: one table has both."""
    number = fields.optional_id(_SPACE)
    if not names.has(_SPACES):
        if number is not None:
            fields.problems.append(f"{_SPACE} is {number}, but the archive has no {_SPACES}; remove it")
        return
    table = names.left()[_SPACES]
    names.leave_out(_SPACES)
    positions = names.weights.get("source_positions")
    if number is None or number >= len(table):
        fields.problems.append(
            f"{_SPACE} must be a number below {len(table)}: that of the target_space_id of the problem that the model "
            f"was trained on, since the archive has {_SPACES}"
        )
    elif positions is not None and table.shape[1:] == positions.shape[1:]:
        names.weights["source_positions"] = positions + table[number]
    else:
        fields.problems.append(f"{_SPACES} has shape {list(table.shape)}, which does not fit the embeddings")


def _tables(names: Renamer, kind: str) -> Iterator[str]:
    yield from (name for name in names.left() if name.startswith("symbol_modality_") and name.endswith(f"/{kind}"))


def _without_padding(table: Array) -> Array:
    if not len(table) or not table[_PAD].any():
        return table
    silent = table.copy()
    silent[_PAD] = 0
    return silent


def _take_layer(names: Renamer, stack: str, i: int) -> None:
    here, there = f"{stack}.{i}", f"{stack}/layer_{i}"
    attentions = {"self_attention": "self_attention"}
    attentions |= {"cross_attention": "encdec_attention"} if stack == "decoder" else {}
    for attention, name in attentions.items():
        inner = f"{there}/{name}/multihead_attention"
        for part, its in (("query", "q"), ("key", "k"), ("value", "v"), ("output", "output_transform")):
            take_product(names, f"{here}.{attention}.{part}", f"{inner}/{its}/kernel", None)
        _take_norm(names, f"{here}.{attention}_norm", f"{there}/{name}")
    take_product(names, f"{here}.ffn.up", f"{there}/ffn/conv1/kernel", f"{there}/ffn/conv1/bias")
    take_product(names, f"{here}.ffn.down", f"{there}/ffn/conv2/kernel", f"{there}/ffn/conv2/bias")
    _take_norm(names, f"{here}.ffn_norm", f"{there}/ffn")


def _take_norm(names: Renamer, canonical: str, scope: str) -> None:
    norm = f"{scope}/layer_prepostprocess/layer_norm/layer_norm"
    names.take(f"{canonical}.weight", f"{norm}_scale")
    names.take(f"{canonical}.bias", f"{norm}_bias")


def reference(folder: Path, checkpoint: Checkpoint) -> Reference:
    """The model in plain PyTorch."""
    return PlainReference(read(folder), checkpoint.removed_tokens)
