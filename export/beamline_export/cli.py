"""`beamline export`: a trained checkpoint in, a bundle out."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_INTERRUPTED = 130


def main(argv: Sequence[str]) -> int:
    """Export; returns the exit status: 0, or 2 if the checkpoint or the arguments are not usable."""
    parser = argparse.ArgumentParser(
        prog="beamline export",
        description="Convert a trained PyTorch Transformer to an ONNX bundle that `beamline serve` reads. The folder "
        "holds config.json and the weights: MarianMT, BART, or a plain torch.nn.Transformer.",
    )
    parser.add_argument("source", type=Path, help="folder of the checkpoint")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the bundle; must not exist yet")
    parser.add_argument("--precision", choices=["fp32", "fp16", "int8"], default="fp32", help="default: %(default)s")
    parser.add_argument(
        "--calibrate",
        type=Path,
        metavar="FILE",
        help="int8 only: measure the ranges of activations with these sentences, one per line, instead of scaling "
        "every row; a few hundred like those to translate (at most 1,000 are used)",
    )
    parser.add_argument("--name", help="name of the model as the server tells it (default: the folder's)")
    parser.add_argument("--replace", action="store_true", help="replace a bundle that is there already")
    arguments = parser.parse_args(argv)
    # PyTorch's threads spin at every barrier; on cores that are busy with something else the parity gate then takes
    # twenty times as long (40 s instead of 2 s for the embedded model). Has to be said before PyTorch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logging.basicConfig(level=logging.ERROR)
    try:
        return _export(arguments)
    except KeyboardInterrupt:
        _failed("interrupted; nothing was written")
        return _INTERRUPTED


def _export(arguments: argparse.Namespace) -> int:
    from beamline_export.bundle_writer import ExportOptions, export
    from beamline_export.progress import Progress
    from beamline_export.spec import ExportError

    options = ExportOptions(arguments.precision, arguments.name, arguments.replace, arguments.calibrate)
    try:
        bundle = export(arguments.source, arguments.output, options, Progress())
    except ExportError as error:
        return _failed(str(error))
    except OSError as error:
        return _failed(f"{error}; check the folder and the free space")
    except MemoryError:
        return _failed("the memory of this machine is not enough for this checkpoint")
    print(report(bundle.manifest.parity, bundle.manifest.precision))
    size = sum(entry.bytes for entry in bundle.manifest.files.values()) / 1e6
    precision, target = bundle.manifest.precision, arguments.output
    calibrated = "" if arguments.calibrate is None else " (calibrated)"
    print(f"wrote {target}: {precision}{calibrated}, {size:.1f} MB; next: beamline serve {target}")
    return 0


def _failed(text: str) -> int:
    print(f"beamline export: {' '.join(text.split())}", file=sys.stderr)
    return 2


def report(parity: dict[str, Any], precision: str) -> str:
    """The parity figures of a bundle in this precision, for people."""
    from beamline_export.parity import TOLERANCES

    forced, search = parity["forced_decode"], parity["beam_search"]
    parted = f"{search['parted_beyond_near_ties']} differ beyond near-ties"
    if search["parted_beyond_near_ties"] and not TOLERANCES[precision].same_search:
        parted += f" (as {precision} may, on random sources)"
    return "\n".join(
        [
            f"parity with PyTorch ({parity['device']})",
            f"  forced decodes     {forced['sources']} sources, {forced['steps']} steps",
            f"    log-probability  differs by at most {forced['max_difference']:.2e} "
            f"(first step {forced['max_difference_first_step']:.2e}, last {forced['max_difference_last_step']:.2e})",
            f"    relative error   {forced['relative_rms']:.2e} rms; same best token {forced['same_top_token']:.1%}",
            f"  beam searches      {search['same']} of {search['searches']} identical, "
            f"{parted}; "
            f"scores differ by at most {search['max_score_difference']:.2e}",
        ]
    )
