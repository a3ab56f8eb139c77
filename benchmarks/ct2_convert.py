"""Converts a MarianMT checkpoint for CTranslate2 so that it computes what transformers compute.

    python benchmarks/ct2_convert.py models/fr-en FOLDER --precision int8

CTranslate2's own converter lets the decoder start from a zero embedding, as Marian's models do. A checkpoint that was
trained with transformers starts from the embedding of its padding token, which is not zero: the model would begin every
sentence wrongly, and end it elsewhere. Here that embedding is added to the decoder's first position, where nothing else
ever stands, so that zero and position come to the same. Needs ctranslate2, torch and transformers.
"""

import argparse
from pathlib import Path
from typing import Any

QUANTIZATIONS = {"fp32": None, "int8": "int8"}
"""As CTranslate2 calls them, by the precision of a bundle."""


def add_start_to_first_position(model: Any) -> None:
    """Add the scaled embedding of the decoder's start token to the decoder's first position, in a MarianMTModel."""
    decoder = model.model.decoder
    scale = model.config.d_model**0.5 if model.config.scale_embedding else 1.0
    start = model.model.shared.weight[model.config.decoder_start_token_id]
    decoder.embed_positions.weight.data[0] += scale * start.data


def convert(checkpoint: Path, target: Path, precision: str) -> Path:
    """Convert a checkpoint; returns the target, which must not exist yet."""
    from ctranslate2.converters import TransformersConverter

    class Converter(TransformersConverter):  # type: ignore[misc]  # has no type information
        def load_model(self, *arguments: Any, **options: Any) -> Any:
            model = super().load_model(*arguments, **options)
            add_start_to_first_position(model)
            return model

    Converter(str(checkpoint)).convert(str(target), quantization=QUANTIZATIONS[precision])
    return target


def main() -> None:
    """Read the arguments and convert."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    parser.add_argument("target", type=Path, metavar="FOLDER")
    parser.add_argument("--precision", choices=sorted(QUANTIZATIONS), default="fp32", help="default: %(default)s")
    arguments = parser.parse_args()
    convert(arguments.checkpoint, arguments.target, arguments.precision)


if __name__ == "__main__":
    main()
