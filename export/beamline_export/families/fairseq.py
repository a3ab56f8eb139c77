"""Checkpoints of fairseq's `transformer` architectures; docs/from-other-toolkits.md says what the folder holds."""

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from beamline_export.checkpoint import MOST_LAYERS, MOST_POSITIONS, Fields, check_file, read_json, read_state_dict
from beamline_export.families.plain_reference import PlainReference
from beamline_export.families.positions import stretched_positions
from beamline_export.families.subword_nmt import MosesWords, find_pieces, read_moses_words, toolkit_tokenizer
from beamline_export.families.toolkit import check_all, read_search, rows
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
from beamline_export.state_names import name_state
from beamline_export.tokenizer_files import TokenizerFiles, without_tokenizer

ARGS = "args.json"
_BOS, _PAD, _EOS = 0, 1, 2
_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
_OVERWRITE = "#fairseq:overwrite"
_FIRST_POSITION = _PAD + 1
"""fairseq numbers positions from behind the id of padding."""
_IDS: Mapping[str, object] = {
    "decoder_start_token_id": _EOS,
    "eos_token_id": _EOS,
    "pad_token_id": _PAD,
    "min_new_tokens": 1,  # fairseq's min_len: an output is not empty
}
_ACTIVATIONS = {
    "relu": Activation.RELU,
    "gelu": Activation.GELU,
    "gelu_fast": Activation.GELU_TANH,
    "gelu_accurate": Activation.GELU_TANH,
    "swish": Activation.SILU,
}
_ONLY: Mapping[str, object] = {
    **dict.fromkeys(("adaptive_softmax_cutoff", "encoder_layers_to_keep", "decoder_layers_to_keep")),
    **dict.fromkeys(("encoder_xformers_att_config", "decoder_xformers_att_config", "encoder_langtok")),
    **dict.fromkeys(("adaptive_input", "cross_self_attention", "no_cross_attention", "char_inputs"), False),
    **dict.fromkeys(("no_token_positional_embeddings", "prepend_bos", "append_source_id", "decoder_langtok"), False),
    **dict.fromkeys(("scale_attn", "scale_heads", "scale_fc", "scale_resids"), False),
}
"""Arguments that change the model, or what is put around a source, and the only value of each that is supported."""
_TASK_OF_MBART = "translation_from_pretrained_bart"
_NORMS = {
    "encoder": ("self_attn_layer_norm", "final_layer_norm"),
    "decoder": ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"),
}
"""Of a layer, in the order in which old checkpoints number them."""
_ADVICE = f"{ARGS} must be that of this model, and its architecture a plain transformer"
_FINAL_NORM_SINCE = {"encoder": 2, "decoder": 3}
"""Version of a stack, a buffer in the file, since which one with norms before its sub-layers ends with a norm."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Model:
    """What args.json and the weights say.

    Attributes:
        names: Tensors by canonical names.
        spec: The architecture.
        notices: About the file's names.
    """

    names: Renamer
    spec: TransformerSpec
    notices: tuple[str, ...]


def read(folder: Path) -> Checkpoint:
    """Read a fairseq folder.

    Raises:
        ExportError: config, arguments, weights or dictionaries are missing or contradict each other.
    """
    data, told = read_json(folder / "config.json"), read_json(folder / ARGS)
    fields, args = Fields(data, "config.json"), Fields(told, ARGS)
    most = fields.integer("max_positions", MOST_POSITIONS, most=MOST_POSITIONS)
    spec = _read_spec(args, most)
    languages = [_language(args, "source_lang", "src"), _language(args, "target_lang", "tgt")]
    words = read_moses_words(fields, told)
    check_all(args)
    model = _rename(spec, args, read_state_dict(folder))
    generation = read_search(fields, data, _IDS, args, max_positions=model.spec.max_target_positions, banned=(_PAD,))
    tokens = dataclasses.replace(generation.tokens, source_eos=_EOS)
    tokenizer, contents = _tokenizer(folder, languages, words, tokens)
    return Checkpoint(
        model.spec,
        model.names.weights,
        tokenizer.tokens,
        generation.defaults,
        tokenizer.kind,
        tokenizer.files,
        generation.removed,
        model.names.names,
        model.names.foreign(),
        advice=_ADVICE,
        tokenizer_settings=tokenizer.settings,
        notices=(*model.notices, *model.names.notices, *tokenizer.notices),
        tokenizer_contents=contents,
    )


def _read_spec(args: Fields, most_positions: int) -> TransformerSpec:
    """The spec, but for what the weights show."""
    arch = args.raw("arch") or "transformer"
    if not isinstance(arch, str) or not re.fullmatch(r"transformer(?!_lm).*", arch):
        args.problems.append(f"arch {arch!r} is not supported (only transformer, and what begins so, is)")
    for name, value in _ONLY.items():
        args.must_be(name, value)
    if args.raw("task") == _TASK_OF_MBART:
        args.problems.append(
            f"task {_TASK_OF_MBART} puts language tokens around sources, which is not supported; export the model as "
            "transformers' mBART"
        )
    d_model = args.integer("encoder_embed_dim")
    for name in ("decoder_embed_dim", "decoder_input_dim", "decoder_output_dim"):
        args.must_be(name, d_model)
    pre_norm = args.flag("encoder_normalize_before", False)
    if args.flag("decoder_normalize_before", False) is not pre_norm:
        args.problems.append("encoder_normalize_before and decoder_normalize_before differ, which is not supported")
    positions = {
        side: min(args.integer(f"max_{side}_positions", 1024), most_positions) for side in ("source", "target")
    }
    return TransformerSpec(
        architecture="fairseq",
        d_model=d_model,
        encoder_layers=args.integer("encoder_layers", most=MOST_LAYERS),
        decoder_layers=args.integer("decoder_layers", most=MOST_LAYERS),
        encoder_heads=args.integer("encoder_attention_heads"),
        decoder_heads=args.integer("decoder_attention_heads"),
        encoder_ffn=args.integer("encoder_ffn_embed_dim"),
        decoder_ffn=args.integer("decoder_ffn_embed_dim"),
        norm_placement=NormPlacement.PRE if pre_norm else NormPlacement.POST,
        activation=args.choice("activation_fn", _ACTIVATIONS, "relu"),
        source_vocabulary=1,
        target_vocabulary=1,
        max_source_positions=positions["source"],
        max_target_positions=positions["target"],
        embedding_scale=1.0 if args.flag("no_scale_embedding", False) else math.sqrt(d_model),
        embedding_norm=args.flag("layernorm_embedding", False),
        encoder_final_norm=pre_norm,
        decoder_final_norm=pre_norm and not args.flag("no_decoder_final_norm", False),
    )


def _rename(spec: TransformerSpec, args: Fields, file: Mapping[str, Array]) -> _Model:
    state = name_state(file, dict(_old_norms(file)))
    names = Renamer(state.tensors, state.origins)
    tied = args.flag("share_decoder_input_output_embed", False) or args.flag("share_all_embeddings", False)
    _take_embeddings(names, tied=tied)
    positions = {side: _take_positions(names, spec, args, side) for side in ("source", "target")}
    _compute_positions(names, spec)
    spec = dataclasses.replace(
        spec,
        source_vocabulary=rows(names, "source_embedding"),
        target_vocabulary=rows(names, "target_embedding"),
        max_source_positions=positions["source"],
        max_target_positions=positions["target"],
        encoder_final_norm=spec.encoder_final_norm and _has_final_norm(names, state.tensors, "encoder"),
        decoder_final_norm=spec.decoder_final_norm and _has_final_norm(names, state.tensors, "decoder"),
    )
    for stack in ("encoder", "decoder"):
        if spec.embedding_norm:
            names.module(f"{stack}.embedding_norm", f"{stack}.layernorm_embedding")
        if spec.encoder_final_norm if stack == "encoder" else spec.decoder_final_norm:
            names.module(f"{stack}.final_norm", f"{stack}.layer_norm")
        for i in range(spec.encoder_layers if stack == "encoder" else spec.decoder_layers):
            _take_layer(names, stack, i)
    names.ignore(r"(encoder|decoder)\.(version|embed_positions\.(_float_tensor|version|weights))")
    names.tell_absent_biases()
    return _Model(names, spec, state.notices)


def _take_embeddings(names: Renamer, *, tied: bool) -> None:
    names.take("source_embedding", "encoder.embed_tokens.weight")
    names.take("target_embedding", "decoder.embed_tokens.weight")
    own = ("decoder.output_projection.weight", "decoder.embed_out")
    names.take("head.weight", *own, *(("decoder.embed_tokens.weight",) if tied else ()))
    names.share_equal("source_embedding", "target_embedding", "head.weight")
    if tied:
        names.tell_untied("share_decoder_input_output_embed is true", "target_embedding", "head.weight")
    names.weights["head.bias"] = np.zeros(rows(names, "target_embedding"), np.float32)


def _take_positions(names: Renamer, spec: TransformerSpec, args: Fields, side: str) -> int:
    """A learned table, without the rows that no position has; returns how many positions there are."""
    stack = "encoder" if side == "source" else "decoder"
    most: int = getattr(spec, f"max_{side}_positions")
    if not args.flag(f"{stack}_learned_pos", False):
        return most
    names.take(f"{side}_positions", f"{stack}.embed_positions.weight")
    table = names.weights.get(f"{side}_positions")
    if table is None or table.ndim != 2 or len(table) <= _FIRST_POSITION:
        return most
    names.weights[f"{side}_positions"] = table = table[_FIRST_POSITION : _FIRST_POSITION + most]
    return len(table)


def _compute_positions(names: Renamer, spec: TransformerSpec) -> None:
    """Sinusoids where no table is learned."""
    most = max(spec.max_source_positions, spec.max_target_positions)
    absent = [side for side in ("source", "target") if f"{side}_positions" not in names.names]
    if not absent:
        return
    scratch = Renamer({})
    scratch.weights, scratch.names = dict(names.weights), names.names
    for side in absent:
        scratch.weights.pop(f"{side}_positions", None)
    scratch.compute_positions(most, spec.d_model, lambda p, width: stretched_positions(p, width, _FIRST_POSITION))
    for side in absent:
        table, wanted = scratch.weights.get(f"{side}_positions"), getattr(spec, f"max_{side}_positions")
        if table is not None:
            names.weights[f"{side}_positions"] = table if len(table) == wanted else table[:wanted]


def _has_final_norm(names: Renamer, state: Mapping[str, Array], stack: str) -> bool:
    """As fairseq, which leaves it out of files of before it was there."""
    version = state.get(f"{stack}.version")
    recent = version is not None and version.size == 1 and float(version.reshape(-1)[0]) >= _FINAL_NORM_SINCE[stack]
    return recent or names.has(f"{stack}.layer_norm.weight")


def _take_layer(names: Renamer, stack: str, i: int) -> None:
    here, there = f"{stack}.{i}", f"{stack}.layers.{i}"
    attentions = {"self_attention": "self_attn"} | ({"cross_attention": "encoder_attn"} if stack == "decoder" else {})
    for attention, name in attentions.items():
        thirds = [f"{here}.{attention}.{part}" for part in ("query", "key", "value")]
        if names.has(f"{there}.{name}.in_proj_weight"):
            names.thirds(thirds, f"{there}.{name}.in_proj_")
        else:
            for canonical, part in zip(thirds, ("q_proj", "k_proj", "v_proj"), strict=True):
                names.module(canonical, f"{there}.{name}.{part}")
        names.module(f"{here}.{attention}.output", f"{there}.{name}.out_proj")
        names.module(f"{here}.{attention}_norm", f"{there}.{name}_layer_norm")
    names.module(f"{here}.ffn.up", f"{there}.fc1")
    names.module(f"{here}.ffn.down", f"{there}.fc2")
    names.module(f"{here}.ffn_norm", f"{there}.final_layer_norm")


def _old_norms(file: Mapping[str, Array]) -> Iterator[tuple[str, str]]:
    """Beginnings of names of norms that were numbered, and those of today."""
    for name in file:
        old = re.match(r"(.*\b(encoder|decoder)\.layers\.\d+\.)layer_norms\.(\d)\.", name)
        if old is not None and int(old[3]) < len(_NORMS[old[2]]):
            yield old[0], f"{old[1][old.start(2) :]}{_NORMS[old[2]][int(old[3])]}."


def _language(args: Fields, name: str, default: str) -> str:
    value = args.raw(name) or default
    if not isinstance(value, str) or not re.fullmatch(r"[\w-]{1,64}", value):
        args.problems.append(f"{name} must be the name of a language, as in dict.en.txt, not {str(value)[:60]!r}")
        return default
    return value


def _tokenizer(
    folder: Path, languages: list[str], words: MosesWords | None, tokens: SpecialTokenIds
) -> tuple[TokenizerFiles, Mapping[str, bytes]]:
    pieces = find_pieces(folder, words, "sentencepiece.bpe.model", "spm.model")
    if pieces is None:
        found = without_tokenizer(tokens)
        return dataclasses.replace(found, tokens=tokens), {}
    dictionaries = [folder / f"dict.{language}.txt" for language in languages]
    if missing := [file.name for file in dictionaries if not file.exists()]:
        raise ExportError(f"{folder} lacks {', '.join(missing)}, which says what ids the pieces have; copy it")
    source, target = (dict(_read_dictionary(file)) for file in dictionaries)
    return toolkit_tokenizer(folder, pieces, (source, target), dictionaries[0].name, tokens, {_BOS})


def _read_dictionary(file: Path) -> Iterator[tuple[str, int]]:
    """The tokens of a dict.*.txt, "token count" a line, with their ids; later ones count."""
    check_file(file)
    yield from ((token, i) for i, token in enumerate(_SPECIAL))
    known = set(_SPECIAL)
    try:
        lines = file.read_text("utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise ExportError(f"{file} cannot be read as text ({error}); copy it again") from error
    while lines and not lines[-1]:
        lines.pop()
    for i, line in enumerate(lines):
        token, _, count = line.rstrip().rpartition(" ")
        if overwrites := count == _OVERWRITE:
            token, _, count = token.rpartition(" ")
        if not token or not count.isdecimal():
            raise ExportError(f"{file}: line {i + 1} is no token and its count: {json.dumps(line[:60])}")
        if token in known and not overwrites:
            raise ExportError(f"{file}: line {i + 1} has {token[:60]!r} again; copy the dictionary of this model")
        known.add(token)
        yield token, i + len(_SPECIAL)


def reference(folder: Path, checkpoint: Checkpoint) -> Reference:
    """The model in plain PyTorch."""
    return PlainReference(read(folder), checkpoint.removed_tokens)
