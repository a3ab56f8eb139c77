"""Writes a transformer-base with random weights as a MarianMT checkpoint, for measurements of speed.

    python benchmarks/random_model.py -o FOLDER [--vocabulary 16000] [--seed 0]

6 + 6 layers, 512 wide, 8 heads, 2048 in the feed-forward layers. transformers, CTranslate2's converter and
`beamline export` read the folder alike. The tokenizer is the embedded model's, with words added that no text has, so
that every id has a name.
"""

import argparse
import json
import shutil
from pathlib import Path

from beamline_export.reference import quiet_transformers
from beamline_export.testing import EOS as SHARPENED
from beamline_export.testing import randomize

TOKENIZER = Path(__file__).parent.parent / "models" / "fr-en"
TOKENIZER_FILES = ("source.spm", "target.spm", "tokenizer_config.json")
EOS = 0
POSITIONS = 512
SHARPNESS = 0.3
"""Of the weights: as sharp as the gate of an export lets int8 be."""
BIASES = 0.1
"""Of the biases: with larger ones every sentence soon repeats the same few tokens."""


def write_random_model(folder: Path, vocabulary: int, *, seed: int = 0) -> None:
    """Write the checkpoint.

    Args:
        folder: Where to; is created.
        vocabulary: Tokens, end of sequence and padding included; at least the embedded tokenizer's 6,000.
        seed: Of the weights.

    Raises:
        ValueError: the vocabulary is smaller than the tokenizer's.
    """
    import torch
    import transformers

    words = _vocabulary(vocabulary)
    pad = words["<pad>"]
    sides = {"layers": 6, "attention_heads": 8, "ffn_dim": 2048}
    sizes = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in sides.items()}
    ids = {"eos_token_id": EOS, "pad_token_id": pad, "bos_token_id": None, "decoder_start_token_id": pad}
    with quiet_transformers():
        config = transformers.MarianConfig(
            d_model=512,
            vocab_size=vocabulary,
            decoder_vocab_size=vocabulary,
            max_position_embeddings=POSITIONS,
            activation_function="relu",
            scale_embedding=True,
            forced_eos_token_id=None,
            **ids,
            **sizes,
        )
        model = transformers.MarianMTModel(config)
        randomize(model, seed, sharpness=SHARPNESS)
        with torch.no_grad():
            # Marian's decoder starts from a zero embedding, which transformers keep in the row of the padding.
            model.get_input_embeddings().weight[pad] = 0
            model.final_logits_bias[..., [SHARPENED, pad]] = 0
            for name, tensor in model.state_dict().items():
                if name.endswith("bias"):
                    tensor.mul_(BIASES)
        model.generation_config = transformers.GenerationConfig(
            num_beams=4, max_length=256, early_stopping=True, bad_words_ids=[[pad]], **ids
        )
        model.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copyfile(TOKENIZER / name, folder / name)
    (folder / "vocab.json").write_text(json.dumps(words, ensure_ascii=False), "utf-8")


def _vocabulary(size: int) -> dict[str, int]:
    """The embedded model's pieces, then words without a meaning, then padding: ids from 0 on."""
    known: dict[str, int] = json.loads((TOKENIZER / "vocab.json").read_text("utf-8"))
    pieces = sorted(known, key=known.__getitem__)
    if pieces[EOS] != "</s>" or pieces[-1] != "<pad>":
        raise ValueError(f"{TOKENIZER} holds an unexpected tokenizer")
    if size < len(pieces):
        raise ValueError(f"the vocabulary needs at least {len(pieces)} tokens, not {size}")
    words = [*pieces[:-1], *(f"▁word{i}" for i in range(size - len(pieces))), "<pad>"]
    return {word: number for number, word in enumerate(words)}


def main() -> None:
    """Write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--vocabulary", type=int, default=16_000, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    arguments = parser.parse_args()
    write_random_model(arguments.output, arguments.vocabulary, seed=arguments.seed)


if __name__ == "__main__":
    main()
