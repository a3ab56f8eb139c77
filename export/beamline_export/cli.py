"""`beamline export`: a trained checkpoint in, a bundle out."""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from beamline_export.stopping import SIGNALS, Stopped

_WEIGHTS = (".safetensors", ".bin", ".pt", ".npz")
_BY_SIGNAL = 128  # plus its number, as a shell reports it
_IN_WORDS = {
    "fp32": "computes what PyTorch computes",
    "fp16": "for a GPU; numbers are rounded to 16 bits, which few answers show",
    "int8": "for a CPU; weights are rounded to 8 bits, which few answers show",
    "int4": "for a CPU with little memory; weights are rounded to 4 bits: try it on your texts before you rely on it",
}
"""What a bundle of each precision is, for who exports a first one."""
_UNCHECKED_CONFIG = (
    "note: PyTorch was given the same settings, so a wrong number of heads, norm or activation in them does not show;\n"
    "      check it with outputs of your own model: --expect FILE (docs/bring-your-model.md)"
)


def main(argv: Sequence[str]) -> int:
    """Export; returns the exit status: 0, 2 if something given is not usable, 128 + n after signal n."""
    parser = argparse.ArgumentParser(
        prog="beamline export",
        description="Convert a trained PyTorch Transformer to an ONNX bundle that `beamline serve` reads. The folder "
        "holds config.json and the weights: MarianMT, BART, a plain torch.nn.Transformer, or files of fairseq, Marian, "
        "OpenNMT-py or Tensor2Tensor.",
    )
    parser.add_argument("source", type=Path, help="folder of the checkpoint")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the bundle; must not exist yet")
    parser.add_argument(
        "--precision", choices=["fp32", "fp16", "int8", "int4"], default="fp32", help="default: %(default)s"
    )
    parser.add_argument(
        "--calibrate",
        type=Path,
        metavar="FILE",
        help="int8 only: measure the ranges of activations with these sentences, one per line, instead of scaling "
        "every row; a few hundred like those to translate (at most 1,000 are used)",
    )
    parser.add_argument(
        "--expect",
        type=Path,
        metavar="FILE",
        help="outputs of your own model that the bundle has to give, as JSON lines: an object with source_ids (or "
        "source) and target_ids (or target) each; shows that config.json is right (docs/bring-your-model.md)",
    )
    parser.add_argument(
        "--keep-fp32",
        action="append",
        default=[],
        metavar="PATTERN",
        help="int8 and int4 only: weights whose names match stay in fp32, as decoder.*.ffn.* or cross_kv; may be "
        "given several times (a pattern that matches nothing lists the names)",
    )
    parser.add_argument("--name", help="name of the model as the server tells it (default: the folder's)")
    parser.add_argument("--replace", action="store_true", help="replace a bundle that is there already")
    arguments = parser.parse_args(argv)
    # PyTorch's threads spin at every barrier; on cores that are busy with something else the parity gate then takes
    # twenty times as long (40 s instead of 2 s for the embedded model). Has to be said before PyTorch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logging.basicConfig(level=logging.ERROR)
    try:
        with SIGNALS.as_exceptions():
            return _export(arguments)
    except Stopped as stopped:
        by = "interrupted" if stopped.signal is signal.SIGINT else f"stopped by {stopped.signal.name}"
        _failed(f"{by}; nothing was written")
        return _BY_SIGNAL + stopped.signal


def _export(arguments: argparse.Namespace) -> int:
    import numpy as np

    from beamline_export.bundle_writer import ExportOptions, export
    from beamline_export.families.registry import OWN_SETTINGS
    from beamline_export.progress import Progress
    from beamline_export.spec import ExportError

    options = ExportOptions(
        arguments.precision,
        arguments.name,
        arguments.replace,
        arguments.calibrate,
        arguments.expect,
        tuple(arguments.keep_fp32),
    )
    try:
        with np.errstate(all="ignore"):  # the comparison with PyTorch tells in words what is no number
            bundle = export(arguments.source, arguments.output, options, Progress())
    except ExportError as error:
        return _failed(str(error))
    except OSError as error:
        return _failed(f"{error}; check the folder and the free space")
    except RecursionError:
        return _failed("a file of the checkpoint is nested more deeply than any is; download it again")
    except MemoryError:
        return _failed("the memory of this machine is not enough for this checkpoint")
    print(report(bundle.manifest.parity, bundle.manifest.precision))
    if arguments.expect is None and bundle.manifest.architecture in OWN_SETTINGS:
        print(_UNCHECKED_CONFIG)
    size = sum(entry.bytes for entry in bundle.manifest.files.values()) / 1e6
    precision, target = bundle.manifest.precision, arguments.output
    calibrated = "" if arguments.calibrate is None else " (calibrated)"
    of = _checkpoint_size(arguments.source) / 1e6
    print(
        f"wrote {target}: {precision}{calibrated}, {size:.1f} MB (the checkpoint: {of:.1f} MB); {_IN_WORDS[precision]}"
    )
    print(f"next: beamline serve {target}")
    return 0


def _checkpoint_size(source: Path) -> int:
    """Bytes of the files of a checkpoint's folder that hold weights, or the like."""
    return sum(file.stat().st_size for file in source.iterdir() if file.suffix in _WEIGHTS and file.is_file())


def _failed(text: str) -> int:
    from beamline_export.progress import one_line

    print(f"beamline export: {one_line(text)}", file=sys.stderr)
    return 2


def report(parity: dict[str, Any], precision: str) -> str:
    """The parity figures of a bundle in this precision, for people."""
    from beamline_export.parity import TOLERANCES

    forced, search, limits = parity["forced_decode"], parity["beam_search"], TOLERANCES[precision]
    if limits.logprob is None:
        difference = f"{forced['relative_rms']:.1%} of their spread (allowed: {limits.relative:.0%})"
    else:
        difference = f"at most {forced['max_difference']:.1e} (allowed: {limits.logprob:.0e})"
    lines = [
        f"compared with the PyTorch model ({parity['device']}), on {forced['sources']} random sources",
        f"  log-probabilities  differ by {difference}, over {forced['steps']} steps each",
        f"  best next token    the same in {forced['same_top_token']:.1%} of the steps",
        *_stored_told(parity.get("stored_weights")),
        f"  beam searches      {search['same']} of {search['searches']} identical{_searches_told(search, precision)}",
    ]
    if (expected := parity.get("expected")) is not None:
        lines.append(f"  your outputs       {_expected_told(expected, precision)}")
    return "\n".join(lines)


def _stored_told(stored: dict[str, Any] | None) -> list[str]:
    """How far rounding moved the weights."""
    if stored is None:
        return []
    return [f"  stored weights     within {stored['max_relative_error']:.1%} of the checkpoint's (allowed: 25%)"]


def _searches_told(search: dict[str, Any], precision: str) -> str:
    """What the searches that differ mean."""
    from beamline_export.parity import TOLERANCES

    if TOLERANCES[precision].same_search:
        near_ties = search["searches"] - search["same"]
        return f", {near_ties} parted at a near-tie" if near_ties else ""
    return f"; {precision} need not be: random sources are no sentences, and its rounding decides between close choices"


def _expected_told(expected: dict[str, Any], precision: str) -> str:
    told = f"{expected['same']} of {expected['examples']} given in fp32"
    if expected["near_ties"]:
        told += f", {expected['near_ties']} but for a near-tie"
    if (same := expected.get(f"same_in_{precision}")) is not None:
        told += f"; {same} in {precision}, which rounds"
    return told
