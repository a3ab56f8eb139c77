"""The sentences that the embedded model is calibrated with: as many as are used, and none that it is tested with."""

import gzip
from pathlib import Path

MODEL = Path(__file__).parents[2] / "models" / "fr-en"
SENTENCES = (MODEL / "calibration.txt").read_text("utf-8").removesuffix("\n").split("\n")


def test_each_line_is_another_sentence() -> None:
    assert len(SENTENCES) == len(set(SENTENCES)) == 400
    assert all(sentence and sentence == sentence.strip() for sentence in SENTENCES)


def test_none_is_a_test_sentence() -> None:
    with gzip.open(MODEL / "test.tsv.gz", "rt", encoding="utf-8") as lines:
        tested = {line.split("\t")[0].casefold() for line in lines}
    assert not [sentence for sentence in SENTENCES if sentence.casefold() in tested]


def test_the_licence_covers_them() -> None:
    assert "calibration.txt" in (MODEL / "LICENSE").read_text("utf-8")
