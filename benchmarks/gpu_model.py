"""Writes a transformer-base with random weights as a MarianMT checkpoint, for measurements of speed."""

from pathlib import Path

from beamline_export.testing import write_hugging_face

SHARPNESS = 0.3
"""Of the weights: sharper ones than trained models have would fail the gate of an fp16 export."""


def write_model(folder: Path, *, vocabulary: int, layers: int, width: int, heads: int, ffn: int) -> None:
    """Write the checkpoint, without a tokenizer; layers, heads and ffn (inner width) are those of either side."""
    sides = {"layers": layers, "attention_heads": heads, "ffn_dim": ffn}
    sizes = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in sides.items()}
    config = {
        **sizes,
        "d_model": width,
        "vocab_size": vocabulary,
        "decoder_vocab_size": vocabulary,
        "max_position_embeddings": 512,
        "activation_function": "relu",
        "scale_embedding": True,
    }
    generation = {"num_beams": 4, "early_stopping": True, "bad_words_ids": [[0]]}
    write_hugging_face(folder, "marian", config, generation, sharpness=SHARPNESS)
