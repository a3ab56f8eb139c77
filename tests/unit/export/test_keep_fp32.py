"""Weights that stay in fp32 in an int8 bundle."""

from pathlib import Path
from typing import Any

import pytest

from beamline_export.bundle_writer import ExportOptions, export
from beamline_export.cli import main
from beamline_export.progress import Progress
from beamline_export.spec import ExportError
from beamline_export.testing import write_hugging_face
from beamline_server.bundle import Bundle
from beamline_server.manifest import WEIGHTS

SENTENCES = "".join(f"{a} {b} {a} 1\n" for a in range(4, 24) for b in (30, 60, 90))


def size(bundle: Bundle) -> int:
    return bundle.manifest.files[WEIGHTS].bytes


def spread(bundle: Bundle) -> float:
    forced: Any = bundle.manifest.parity["forced_decode"]
    return float(forced["relative_rms"])


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("family", ["bart", "t5"])
def test_what_is_kept_is_in_fp32_and_the_rest_is_not(
    family: str, calibrated: bool, tmp_path: Path, silent: Progress
) -> None:
    checkpoint = write_hugging_face(tmp_path / "checkpoint", family, {}, {}, sharpness=0.5)
    sentences = tmp_path / "sentences.txt"
    sentences.write_text(SENTENCES)
    found: dict[tuple[str, ...], Bundle] = {}
    for patterns in ((), ("decoder.*.ffn.*", "cross_kv"), ("*",)):
        options = ExportOptions("int8", calibrate=sentences if calibrated else None, keep_fp32=patterns)
        found[patterns] = export(checkpoint, tmp_path / f"bundle{len(found)}", options, silent)
    sizes, spreads = [size(bundle) for bundle in found.values()], [spread(bundle) for bundle in found.values()]
    assert sizes == sorted(set(sizes))
    assert spreads[-1] < 1e-5 < spreads[0]


def test_a_tied_table_is_kept_in_both_its_places(pristine: Path, tmp_path: Path, silent: Progress) -> None:
    plain, kept = (
        export(pristine / "bart", tmp_path / name, ExportOptions("int8", keep_fp32=patterns), silent)
        for name, patterns in (("plain", ()), ("kept", ("source_embedding",)))
    )
    dimensions = kept.manifest.dimensions
    numbers = dimensions.source_vocabulary * dimensions.d_model
    assert size(kept) - size(plain) == 3 * numbers  # as small as here, scales are in the graphs


def test_a_pattern_that_matches_nothing_lists_the_names(pristine: Path, tmp_path: Path, silent: Progress) -> None:
    options = ExportOptions("int8", keep_fp32=("decoder.*", "lm_head"))
    with pytest.raises(ExportError, match=r"'lm_head' matches no weight; there are cross_kv, decoder\.N\.cross"):
        export(pristine / "bart", tmp_path / "bundle", options, silent)
    assert not (tmp_path / "bundle").exists()


def test_it_is_for_int8(pristine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(pristine / "bart"), "-o", str(tmp_path / "bundle"), "--keep-fp32", "cross_kv"]
    assert main(arguments) == 2
    assert "--keep-fp32 is for int8 and int4, not for fp32" in capsys.readouterr().err
