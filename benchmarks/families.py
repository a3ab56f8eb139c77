"""Exports a checkpoint of random weights of every Hugging Face family, and writes a table: sizes, times, parity.

    python benchmarks/families.py [FAMILY ...]

Checkpoints are of a transformer-base's sizes: 512 wide, 6 layers a stack, 8 heads, vocabulary 8,000. For each family
and precision the table tells the bundle's bytes per parameter, the seconds that the export took, and how far
log-probabilities are from PyTorch's: at most (fp32), or by their root mean square over their spread.
"""

import io
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from beamline_export.bundle_writer import ExportOptions, export
from beamline_export.progress import Progress
from beamline_export.testing import DECODER_ONLY_FAMILIES, HUGGING_FACE_CLASSES, T5_FAMILIES, write_hugging_face

_PRECISIONS = ("fp32", "int8", "int4")
_WIDTH, _INNER, _HEADS, _LAYERS, _VOCABULARY, _POSITIONS = 512, 2048, 8, 6, 8000, 256


def config(family: str) -> Mapping[str, Any]:
    """A transformer-base of a family."""
    sizes: dict[str, Any] = {"vocab_size": _VOCABULARY}
    if family in DECODER_ONLY_FAMILIES:
        sizes |= {"hidden_size": _WIDTH, "num_hidden_layers": _LAYERS, "num_attention_heads": _HEADS}
        sizes |= {"max_position_embeddings": _POSITIONS, "tie_word_embeddings": True}
        if family == "opt":
            return sizes | {"ffn_dim": _INNER, "word_embed_proj_dim": _WIDTH}
        grouped = {} if family in ("gpt2", "gpt_neox") else {"num_key_value_heads": 2}
        return sizes | {"intermediate_size": _INNER, **grouped}
    if family in T5_FAMILIES:
        sizes |= {"d_model": _WIDTH, "d_ff": _INNER, "d_kv": _WIDTH // _HEADS, "num_heads": _HEADS}
        return sizes | {"num_layers": _LAYERS, "n_positions": _POSITIONS}
    sizes |= {"d_model": _WIDTH, "max_position_embeddings": _POSITIONS}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": _LAYERS, f"{side}_attention_heads": _HEADS, f"{side}_ffn_dim": _INNER}
    vocabularies = {"src_vocab_size": _VOCABULARY, "tgt_vocab_size": _VOCABULARY} if family == "fsmt" else {}
    return sizes | vocabularies


def parameters(checkpoint: Path) -> int:
    """Numbers in the file; tables that are tied are there once."""
    with safe_open(checkpoint / "model.safetensors", "np") as weights:
        return sum(weights.get_tensor(name).size for name in weights.keys())  # noqa: SIM118 - it is no mapping


def rows(family: str, folder: Path) -> Iterator[str]:
    """The cells of a family."""
    checkpoint = write_hugging_face(folder / family, family, config(family), {"max_new_tokens": 32}, sharpness=0.5)
    count = parameters(checkpoint)
    yield f"`{family}`"
    yield f"{count / 1e6:.1f} M"
    for precision in _PRECISIONS:
        began = time.monotonic()
        options = ExportOptions(precision=precision)
        bundle = export(checkpoint, folder / f"{family}-{precision}", options, Progress(io.StringIO()))
        seconds = time.monotonic() - began
        size = sum(entry.bytes for entry in bundle.manifest.files.values())
        figures: Any = bundle.manifest.parity["forced_decode"]
        apart = f"{figures['max_difference']:.0e}" if precision == "fp32" else f"{figures['relative_rms']:.3f}"
        yield f"{size / count:.2f}, {seconds:.0f} s, {apart}"


def main() -> None:
    """Write the table to stdout, a family at a time."""
    wanted = sys.argv[1:] or list(HUGGING_FACE_CLASSES)
    print("| family | parameters |", " | ".join(_PRECISIONS), "|")
    print("|---" * (2 + len(_PRECISIONS)) + "|")
    for family in wanted:
        with tempfile.TemporaryDirectory() as folder:
            print("|", " | ".join(rows(family, Path(folder))), "|", flush=True)


if __name__ == "__main__":
    main()
