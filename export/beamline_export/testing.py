"""Small random checkpoints of every family, for tests of an export and of what serves it.

Freshly initialized models give every token nearly the same probability, so that rounding decides: the weights here are
drawn large enough that a search has something to choose, and that every part of the model matters to the result.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from beamline_export.families.bart import BART
from beamline_export.families.bart_relatives import ROWS
from beamline_export.families.gpt2 import GPT2
from beamline_export.families.gpt_neox import GPT_NEOX
from beamline_export.families.llama import LLAMA_LIKE
from beamline_export.families.marian import MARIAN
from beamline_export.families.opt import OPT
from beamline_export.families.t5 import VARIANTS as T5_VARIANTS
from beamline_export.reference import quiet_transformers

EOS, DECODER_START = 1, 2

T5_FAMILIES = tuple(T5_VARIANTS)
HUGGING_FACE_CLASSES = {row.model_type: row.model_class for row in (MARIAN, BART, *ROWS)}
DECODER_ONLY_FAMILIES = {row.model_type: row for row in (GPT2, GPT_NEOX, OPT, *LLAMA_LIKE)}
HUGGING_FACE_CLASSES |= {name: row.model_class for name, row in DECODER_ONLY_FAMILIES.items()}
HUGGING_FACE_CLASSES |= {name: variant.model_class for name, variant in T5_VARIANTS.items()}
"""Classes in transformers, by the families that `write_hugging_face` writes."""

_GAINS = {"embed": 2.0, "lm_head": 2.0, "generator": 2.0, "fc": 4.0, "linear": 4.0, "q_proj": 2.0, "k_proj": 2.0}
# T5 divides no scores, and its relative positions matter from small numbers on.
_GAINS |= {"Attention.q.": 0.5, "relative_attention_bias": 3.0}
_GAINS |= {"wte": 2.0, "c_attn": 2.0, "query_key_value": 2.0}
_OTHER_GAIN = 1.5


def randomize(model: nn.Module, seed: int, *, sharpness: float = 1.0) -> None:
    """Draw all parameters and the logits' bias anew; at full sharpness, int8 and fp16 round too coarsely."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if n.endswith("logits_bias"))]
    with torch.no_grad():
        for name, tensor in tensors:
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("bias"):
                tensor.copy_(0.3 * noise)
            elif tensor.dim() == 1:
                tensor.copy_(1 + 0.2 * noise)
            else:
                gain = next((gain for part, gain in _GAINS.items() if part in name), _OTHER_GAIN)
                # Without a mean, the positive outputs of an activation do not drown what differs between tokens.
                noise -= noise.mean(1, keepdim=True)
                tensor.copy_(sharpness * gain * noise / math.sqrt(tensor.shape[-1]))
            if name in ("final_logits_bias", "generator.bias"):
                tensor[..., EOS] += 3.0


def write_hugging_face(
    folder: Path,
    family: str,
    config: Mapping[str, Any],
    generation: Mapping[str, Any],
    *,
    seed: int = 0,
    sharpness: float = 1.0,
) -> Path:
    """Write a random checkpoint of a Hugging Face family as transformers do, as safetensors.

    Args:
        folder: Where to; is created.
        family: Its `model_type`.
        config: What differs from a tiny default.
        generation: Settings for generation_config.json.
        seed: Of the weights.
        sharpness: As `randomize`.
    """
    import transformers

    if family in DECODER_ONLY_FAMILIES:
        sizes = {"hidden_size": 32, "vocab_size": 120, "max_position_embeddings": 64, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 4}
        if family not in ("gpt2", "gpt_neox", "opt"):
            sizes |= {"num_key_value_heads": 4}
        sizes |= {"opt": {"ffn_dim": 48, "word_embed_proj_dim": 32}}.get(family, {"intermediate_size": 48})
    elif family not in T5_FAMILIES:
        sizes = {"d_model": 32, "vocab_size": 120, "max_position_embeddings": 48}
        sides = {"layers": 2, "attention_heads": 4, "ffn_dim": 48}
        sizes |= {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in sides.items()}
    else:
        # Heads that are wider together than the model, and distances that end within a short text.
        sizes = {"d_model": 32, "vocab_size": 120, "n_positions": 48, "d_kv": 16, "num_heads": 3, "d_ff": 48}
        sizes |= {"num_layers": 2, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12}
    ids = {"eos_token_id": EOS, "pad_token_id": 0, "bos_token_id": 3, "decoder_start_token_id": DECODER_START}
    if family in DECODER_ONLY_FAMILIES:
        ids = {"eos_token_id": EOS, "pad_token_id": 0, "bos_token_id": 3}
    model_class = getattr(transformers, HUGGING_FACE_CLASSES[family])
    with quiet_transformers():
        model = model_class(model_class.config_class(**{**sizes, **ids, "forced_eos_token_id": None, **config}))
        randomize(model, seed, sharpness=sharpness)
        for name, module in model.named_modules():
            if name.endswith("embed_positions") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
                module.weight.detach()[module.padding_idx] = 0  # as it is in every trained one
        model.generation_config = transformers.GenerationConfig(**{**ids, **generation})
        model.save_pretrained(folder)
    return folder


class TinyTransformer(nn.Module):
    """The model of a folder of the family nn_transformer; its `state_dict` has the names that the folder needs."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        width = config["d_model"]
        self.src_embed = nn.Embedding(config["source_vocab_size"], width)
        self.tgt_embed = nn.Embedding(config["target_vocab_size"], width)
        if config.get("positions") == "learned":
            self.src_positions = nn.Embedding(config["max_positions"], width)
            self.tgt_positions = nn.Embedding(config["max_positions"], width)
        self.transformer = nn.Transformer(
            d_model=width,
            nhead=config["nhead"],
            num_encoder_layers=config["num_encoder_layers"],
            num_decoder_layers=config["num_decoder_layers"],
            dim_feedforward=config["dim_feedforward"],
            activation=config.get("activation", "relu"),
            norm_first=config.get("norm_first", False),
            layer_norm_eps=config.get("layer_norm_eps", 1e-5),
            bias=config.get("bias", True),
            batch_first=True,
        )
        self.generator = nn.Linear(width, config["target_vocab_size"], bias=config.get("bias", True))
        if config.get("tie_embeddings"):
            self.generator.weight = self.tgt_embed.weight
        if config.get("tie_embeddings") == "all":
            self.src_embed.weight = self.tgt_embed.weight


def nn_config(**changes: Any) -> dict[str, Any]:
    """A config.json of the family nn_transformer, with these fields changed."""
    return {
        "model_type": "nn_transformer",
        "d_model": 32,
        "nhead": 4,
        "num_encoder_layers": 2,
        "num_decoder_layers": 2,
        "dim_feedforward": 48,
        "max_positions": 48,
        "source_vocab_size": 90,
        "target_vocab_size": 120,
        "decoder_start_token_id": DECODER_START,
        "eos_token_id": EOS,
        "pad_token_id": 0,
        "source_eos_token_id": EOS,
        **changes,
    }


def write_nn_transformer(
    folder: Path, config: Mapping[str, Any], *, seed: int = 0, sharpness: float = 1.0, file: str = "model.safetensors"
) -> Path:
    """Write a random checkpoint of the family nn_transformer.

    Args:
        folder: Where to; is created.
        config: As `nn_config` makes it.
        seed: Of the weights.
        sharpness: As `randomize`.
        file: model.safetensors or model.pt.
    """
    from safetensors.torch import save_model

    folder.mkdir(parents=True, exist_ok=True)
    with quiet_transformers():  # nn.Transformer, too, gives advice
        model = TinyTransformer(config)
    randomize(model, seed, sharpness=sharpness)
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    if file.endswith(".safetensors"):
        save_model(model, str(folder / file))
    else:
        torch.save(model.state_dict(), folder / file)
    return folder
