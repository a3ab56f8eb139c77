"""GPT-2 (Hugging Face `GPT2LMHeadModel`): learned positions, pre-norm, one product for queries, keys and values."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from beamline_export.checkpoint import MOST_LAYERS, MOST_POSITIONS, Fields
from beamline_export.families.activations import ACTIVATIONS
from beamline_export.families.decoder_only import DecoderOnly, DecoderSizes
from beamline_export.renamer import Renamer
from beamline_export.spec import TransformerSpec


def _sizes(fields: Fields) -> DecoderSizes:
    width = fields.integer("n_embd")
    for name in ("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn"):
        fields.flag(name, name == "scale_attn_weights")
    return DecoderSizes(
        vocabulary=fields.integer("vocab_size", least=2),
        width=width,
        layers=fields.integer("n_layer", most=MOST_LAYERS),
        heads=fields.integer("n_head"),
        ffn=fields.integer("n_inner", 4 * width),
        positions=fields.integer("n_positions", least=2, most=MOST_POSITIONS),
        activation=fields.choice("activation_function", ACTIVATIONS),
        norm_epsilon=fields.number("layer_norm_epsilon", 1e-5, least=0.0),
    )


def _take(names: Renamer, spec: TransformerSpec, config: Mapping[str, Any]) -> None:
    take_blocks(names, spec, "transformer", transposed=True)
    head_size = spec.d_model // spec.decoder_heads
    for i in range(spec.decoder_layers):
        # Attention here divides scores by the root of a head's size, and by nothing else.
        factor = 1.0 if config["scale_attn_weights"] else math.sqrt(head_size)
        if config["scale_attn_by_inverse_layer_idx"]:
            factor /= i + 1
        query = f"decoder.{i}.self_attention.query"
        for name in (f"{query}.weight", f"{query}.bias"):
            if factor != 1.0 and name in names.weights:
                names.weights[name] = names.weights[name] * np.float32(factor)


def take_blocks(names: Renamer, spec: TransformerSpec, base: str, *, transposed: bool) -> None:
    """The layers of GPT-2 and of what is written after it.

    Args:
        names: Receives them.
        spec: The architecture.
        base: What the names begin with.
        transposed: Whether the weights of products are (in, out), as in transformers.
    """
    names.take("target_positions", f"{base}.wpe.weight")
    for i in range(spec.decoder_layers):
        here, there = f"decoder.{i}", f"{base}.h.{i}"
        projections = [f"{here}.self_attention.{name}" for name in ("query", "key", "value")]
        if transposed:
            for name in _PRODUCTS:
                names.change(f"{there}.{name}.weight", np.transpose)
        names.thirds(projections, f"{there}.attn.c_attn.")
        names.module(f"{here}.self_attention.output", f"{there}.attn.c_proj")
        names.module(f"{here}.ffn.up", f"{there}.mlp.c_fc")
        names.module(f"{here}.ffn.down", f"{there}.mlp.c_proj")
        names.module(f"{here}.self_attention_norm", f"{there}.ln_1")
        names.module(f"{here}.ffn_norm", f"{there}.ln_2")
    names.module("decoder.final_norm", f"{base}.ln_f")


_PRODUCTS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
GPT2 = DecoderOnly(
    model_type="gpt2",
    model_class="GPT2LMHeadModel",
    base="transformer.",
    embedding="transformer.wte.weight",
    sizes=_sizes,
    take=_take,
    # Masks, which older files have.
    ignored=r"transformer\.h\.\d+\.attn\.(masked_)?bias",
    aliases={
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    },
    defaults={
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "activation_function": "gelu_new",
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
    },
    fixed={"add_cross_attention": False},
)
