"""Converts a checkpoint for a contender, in the contender's own environment.

python -m offline.convert beamline|ctranslate2|optimum CHECKPOINT TARGET '{"option": "value"}'
"""

import json
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parent.parent.parent


def beamline(checkpoint: Path, target: Path, **options: Any) -> None:
    """A bundle; options are fields of ExportOptions, files relative to the repository."""
    from beamline_export.bundle_writer import ExportOptions, export
    from beamline_export.progress import Progress

    if "calibrate" in options:
        options["calibrate"] = REPOSITORY / options["calibrate"]
    export(checkpoint, target, ExportOptions(**options), Progress())


def ctranslate2(checkpoint: Path, target: Path, *, quantization: str) -> None:
    """A model folder with weights in this quantization."""
    from ct2_convert import convert

    convert(checkpoint, target, "int8" if quantization == "int8" else "fp32")


def optimum(checkpoint: Path, target: Path, *, quantization: str) -> None:
    """ONNX graphs as optimum-onnx writes them; only fp32."""
    from optimum.onnxruntime import ORTModelForSeq2SeqLM

    assert quantization == "float32", "optimum-onnx is compared in fp32"
    ORTModelForSeq2SeqLM.from_pretrained(str(checkpoint), export=True).save_pretrained(target)


def main() -> None:
    """Convert."""
    tool, checkpoint, target, options = sys.argv[1:]
    {"beamline": beamline, "ctranslate2": ctranslate2, "optimum": optimum}[tool](
        Path(checkpoint), Path(target), **json.loads(options)
    )


if __name__ == "__main__":
    main()
