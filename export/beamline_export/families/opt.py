"""OPT (Hugging Face `OPTForCausalLM`): learned positions from row 2 on, and embeddings that may be narrower."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from beamline_export.checkpoint import MOST_LAYERS, MOST_POSITIONS, Fields
from beamline_export.families.activations import ACTIVATIONS
from beamline_export.families.decoder_only import DecoderOnly, DecoderSizes
from beamline_export.renamer import Renamer
from beamline_export.spec import NormPlacement, TransformerSpec

_OFFSET = 2
"""The row of position 0."""
_BASE = "model.decoder"


def _sizes(fields: Fields) -> DecoderSizes:
    pre, width = fields.flag("do_layer_norm_before", True), fields.integer("hidden_size")
    fields.integer("word_embed_proj_dim", width)
    return DecoderSizes(
        vocabulary=fields.integer("vocab_size", least=2),
        width=width,
        layers=fields.integer("num_hidden_layers", most=MOST_LAYERS),
        heads=fields.integer("num_attention_heads"),
        ffn=fields.integer("ffn_dim"),
        positions=fields.integer("max_position_embeddings", least=2, most=MOST_POSITIONS),
        activation=fields.choice("activation_function", ACTIVATIONS),
        norm_epsilon=1e-5,
        norm_placement=NormPlacement.PRE if pre else NormPlacement.POST,
        final_norm=pre and not fields.flag("_remove_final_layer_norm", False),
    )


def _take(names: Renamer, spec: TransformerSpec, config: Mapping[str, Any]) -> None:
    names.take("target_positions", f"{_BASE}.embed_positions.weight")
    table = names.weights.get("target_positions")
    if table is not None and table.ndim:
        names.weights["target_positions"] = table[_OFFSET:]
    for i in range(spec.decoder_layers):
        here, there = f"decoder.{i}", f"{_BASE}.layers.{i}"
        for name, its_name in {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "out_proj"}.items():
            names.module(f"{here}.self_attention.{name}", f"{there}.self_attn.{its_name}")
        names.module(f"{here}.ffn.up", f"{there}.fc1")
        names.module(f"{here}.ffn.down", f"{there}.fc2")
        names.module(f"{here}.self_attention_norm", f"{there}.self_attn_layer_norm")
        names.module(f"{here}.ffn_norm", f"{there}.final_layer_norm")
    if spec.decoder_final_norm:
        names.module("decoder.final_norm", f"{_BASE}.final_layer_norm")
    if (config.get("word_embed_proj_dim") or spec.d_model) != spec.d_model:
        _widen(names, (spec.target_vocabulary, config["word_embed_proj_dim"], spec.d_model))


def _widen(names: Renamer, sizes: tuple[int, int, int]) -> None:
    """Multiply narrow embeddings by what projects them into the model, and the head by what projects out of it.

    `sizes` are those of the vocabulary, of a narrow row and of a row of the model. What is of other ones stays as it
    is, and its shape will be told.
    """
    rows, narrow, wide = sizes
    for canonical, projection in (("target_embedding", "project_in"), ("head.weight", "project_out")):
        names.take(projection, f"{_BASE}.{projection}.weight")
        table, matrix = names.weights.get(canonical), names.weights.pop(projection, None)
        name = names.names.pop(projection)
        if matrix is None:
            names.weights.pop(canonical, None)
            names.names[canonical] = name
        elif table is not None:
            inwards = canonical == "target_embedding"
            if table.shape == (rows, narrow) and matrix.shape == ((wide, narrow) if inwards else (narrow, wide)):
                names.weights[canonical] = np.ascontiguousarray(table @ (matrix.T if inwards else matrix))


OPT = DecoderOnly(
    model_type="opt",
    model_class="OPTForCausalLM",
    base="model.",
    embedding=f"{_BASE}.embed_tokens.weight",
    sizes=_sizes,
    take=_take,
    defaults={
        "vocab_size": 50272,
        "max_position_embeddings": 2048,
        "activation_function": "relu",
        "bos_token_id": 2,
        "eos_token_id": 2,
        "pad_token_id": 1,
    },
    fixed={"enable_bias": True, "layer_norm_elementwise_affine": True},
)
