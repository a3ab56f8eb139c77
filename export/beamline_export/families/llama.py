"""Llama and its kin (Hugging Face `LlamaForCausalLM`, …): RMS norms, rotary positions, grouped queries."""

from collections.abc import Mapping
from typing import Any

from beamline_export.checkpoint import MOST_LAYERS, Fields
from beamline_export.families.activations import ACTIVATIONS
from beamline_export.families.decoder_only import DecoderOnly, DecoderSizes
from beamline_export.families.rotary import read_rotary
from beamline_export.renamer import Renamer
from beamline_export.spec import Norm, TransformerSpec

_PROJECTIONS = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}
_FEED_FORWARD = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


def _sizes(fields: Fields) -> DecoderSizes:
    width, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    for name in ("attention_bias", "mlp_bias"):
        fields.flag(name, False)
    size = fields.integer("head_dim", max(1, width // heads))
    positions, notices = _positions(fields)
    return DecoderSizes(
        vocabulary=fields.integer("vocab_size", least=2),
        width=width,
        layers=fields.integer("num_hidden_layers", most=MOST_LAYERS),
        heads=heads,
        ffn=fields.integer("intermediate_size"),
        positions=positions,
        activation=fields.choice("hidden_act", ACTIVATIONS),
        norm_epsilon=fields.number("rms_norm_eps", 1e-6, least=0.0),
        norm=Norm.RMS,
        gated=True,
        key_value_heads=fields.integer("num_key_value_heads", heads),
        head_size=size,
        rotary=read_rotary(fields, size),
        notices=notices,
    )


def _positions(fields: Fields) -> tuple[int, tuple[str, ...]]:
    """How far the model counts while all that came before is attended to."""
    positions = fields.integer("max_position_embeddings", least=2)
    if not _has_window(fields):
        return positions, ()
    window = fields.integer("sliding_window", least=2)
    if window >= positions:
        return positions, ()
    told = (
        f"the model looks back {window} tokens (sliding_window), which the graphs cannot limit: prompts and what "
        f"follows them have up to {window} tokens together, for which nothing is out of sight"
    )
    return window, (told,)


def _has_window(fields: Fields) -> bool:
    """Whether a layer looks back a part of the way alone; a Llama knows no such thing."""
    family, used = fields.raw("model_type"), fields.flag("use_sliding_window", False)
    if family == "llama" or fields.raw("sliding_window") is None:
        return False
    if family == "mistral":
        return True
    kinds, layers = fields.raw("layer_types"), fields.integer("num_hidden_layers", most=MOST_LAYERS)
    some = layers > fields.integer("max_window_layers", 28, least=0)
    if isinstance(kinds, list):
        some = any(kind != "full_attention" for kind in kinds)
    return used and some


def _take(names: Renamer, spec: TransformerSpec, config: Mapping[str, Any]) -> None:
    with_bias = {
        **dict.fromkeys(_PROJECTIONS, config["attention_bias"]),
        **dict.fromkeys(_FEED_FORWARD, config["mlp_bias"]),
        **(dict.fromkeys(("query", "key", "value"), True) if config["model_type"] == "qwen2" else {}),
    }
    for i in range(spec.decoder_layers):
        here, there = f"decoder.{i}", f"model.layers.{i}"
        parts = {f"self_attention.{name}": f"self_attn.{its_name}" for name, its_name in _PROJECTIONS.items()}
        parts |= {f"ffn.{name}": f"mlp.{its_name}" for name, its_name in _FEED_FORWARD.items()}
        for name, its_name in parts.items():
            linear = names.module if with_bias[name.rpartition(".")[2]] else names.weight_alone
            linear(f"{here}.{name}", f"{there}.{its_name}")
        names.take(f"{here}.self_attention_norm.weight", f"{there}.input_layernorm.weight")
        names.take(f"{here}.ffn_norm.weight", f"{there}.post_attention_layernorm.weight")
    names.take("decoder.final_norm.weight", "model.norm.weight")


def _kin(model_type: str, model_class: str, **defaults: object) -> DecoderOnly:
    return DecoderOnly(
        model_type=model_type,
        model_class=model_class,
        base="model.",
        embedding="model.embed_tokens.weight",
        sizes=_sizes,
        take=_take,
        # Wavelengths, which older files have.
        ignored=r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
        defaults={
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "attention_bias": False,
            "mlp_bias": False,
            **defaults,
        },
    )


LLAMA_LIKE = (
    _kin("llama", "LlamaForCausalLM", vocab_size=32000, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2),
    _kin(
        "mistral",
        "MistralForCausalLM",
        vocab_size=32000,
        max_position_embeddings=4096 * 32,
        num_key_value_heads=8,
        sliding_window=4096,
        bos_token_id=1,
        eos_token_id=2,
    ),
    _kin("qwen2", "Qwen2ForCausalLM", vocab_size=151936, max_position_embeddings=32768, use_sliding_window=False),
)
