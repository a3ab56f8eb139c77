"""Makes the checkpoints and bundles that the other parts measure."""

import io
import time
import traceback
from pathlib import Path
from typing import Any
from unittest import mock

from gpu_model import write_model

from beamline_export import bundle_writer
from beamline_export.bundle_writer import ExportOptions, export
from beamline_export.progress import Progress
from gpu_parts.setting import FR_EN, Setting, vocabulary_of


def bundles(setting: Setting) -> dict[str, Any]:
    """The embedded model in fp32 and fp16, and the first random one in fp16."""
    return {
        **make(setting, FR_EN, "fp16"),
        **make(setting, FR_EN, "fp32"),
        **make(setting, setting.names[1], "fp16"),
    }


def large_bundle(setting: Setting) -> dict[str, Any]:
    """The random model with the large vocabulary in fp16."""
    return make(setting, setting.names[2], "fp16")


def make(setting: Setting, name: str, precision: str) -> dict[str, Any]:
    """A model's bundle, unless it is there: how long that took, and what went wrong on the device."""
    began, problem = time.perf_counter(), None
    target, checkpoint = setting.work / f"{name}-{precision}", setting.checkpoint(name)
    if not target.exists():
        if not checkpoint.exists():
            scale = setting.scale
            vocabulary = vocabulary_of(name, scale.vocabularies[0])
            write_model(
                checkpoint,
                vocabulary=vocabulary,
                layers=scale.layers,
                width=scale.width,
                heads=scale.heads,
                ffn=scale.ffn,
            )
        problem = _export(checkpoint, target, precision)
    bundle = setting.bundle(name, precision)
    return {
        target.name: {
            "failed_on_the_device": problem,
            "seconds": round(time.perf_counter() - began, 1),
            "bytes": sum(file.stat().st_size for file in target.iterdir()),
            "parity": bundle.manifest.parity,
        }
    }


def _export(checkpoint: Path, target: Path, precision: str) -> str | None:
    """Export; what was wrong with it on the device, if anything: then the gate runs on the CPU.

    Without bundles nothing can be measured, and what is wrong with the device is what the other parts are to tell.
    """
    options = ExportOptions(precision)
    try:
        export(checkpoint, target, options, Progress(io.StringIO()))
    except Exception:
        with mock.patch.object(bundle_writer, "choose_device", return_value="cpu"):
            export(checkpoint, target, options, Progress(io.StringIO()))
        return traceback.format_exc()
    return None
