"""GPT-NeoX and Pythia (Hugging Face `GPTNeoXForCausalLM`): rotary positions, both sub-layers beside each other."""

from collections.abc import Mapping
from typing import Any

from beamline_export.checkpoint import MOST_LAYERS, Fields
from beamline_export.families.activations import ACTIVATIONS
from beamline_export.families.decoder_only import DecoderOnly, DecoderSizes
from beamline_export.families.rotary import read_rotary
from beamline_export.renamer import Renamer
from beamline_export.spec import Array, TransformerSpec


def _sizes(fields: Fields) -> DecoderSizes:
    width, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    fields.flag("attention_bias", True)
    return DecoderSizes(
        vocabulary=fields.integer("vocab_size", least=2),
        width=width,
        layers=fields.integer("num_hidden_layers", most=MOST_LAYERS),
        heads=heads,
        ffn=fields.integer("intermediate_size"),
        positions=fields.integer("max_position_embeddings", least=2),
        activation=fields.choice("hidden_act", ACTIVATIONS),
        norm_epsilon=fields.number("layer_norm_eps", 1e-5, least=0.0),
        parallel_residual=fields.flag("use_parallel_residual", True),
        rotary=read_rotary(fields, width // heads, part=0.25, theta_name="rotary_emb_base", part_name="rotary_pct"),
    )


def _take(names: Renamer, spec: TransformerSpec, config: Mapping[str, Any]) -> None:
    linear = names.module if config.get("attention_bias") is not False else names.weight_alone
    for i in range(spec.decoder_layers):
        here, there = f"decoder.{i}", f"gpt_neox.layers.{i}"
        projections = [f"{here}.self_attention.{name}" for name in ("query", "key", "value")]
        for kind in ("weight", "bias"):
            names.change(f"{there}.attention.query_key_value.{kind}", lambda array: _by_projection(array, spec))
        names.thirds(projections, f"{there}.attention.query_key_value.")
        linear(f"{here}.self_attention.output", f"{there}.attention.dense")
        names.module(f"{here}.ffn.up", f"{there}.mlp.dense_h_to_4h")
        names.module(f"{here}.ffn.down", f"{there}.mlp.dense_4h_to_h")
        names.module(f"{here}.self_attention_norm", f"{there}.input_layernorm")
        names.module(f"{here}.ffn_norm", f"{there}.post_attention_layernorm")
    names.module("decoder.final_norm", "gpt_neox.final_layer_norm")


def _by_projection(array: Array, spec: TransformerSpec) -> Array:
    """From head by head, each with its query, key and value, to all queries, all keys, all values."""
    if not array.ndim or array.shape[0] % (3 * spec.decoder_heads):  # it will be told that its shape is wrong
        return array
    by_head = array.reshape(spec.decoder_heads, 3, -1, *array.shape[1:])
    return by_head.swapaxes(0, 1).reshape(array.shape)


GPT_NEOX = DecoderOnly(
    model_type="gpt_neox",
    model_class="GPTNeoXForCausalLM",
    base="gpt_neox.",
    embedding="gpt_neox.embed_in.weight",
    heads=("embed_out.weight", "lm_head.weight"),
    sizes=_sizes,
    take=_take,
    # Masks, and wavelengths, which older files have.
    ignored=r"gpt_neox\.layers\.\d+\.attention\.((masked_)?bias|rotary_emb\.inv_freq)",
    defaults={
        "vocab_size": 50432,
        "max_position_embeddings": 2048,
        "hidden_act": "gelu",
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 2,
    },
)
