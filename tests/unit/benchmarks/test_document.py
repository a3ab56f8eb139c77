"""docs/benchmarks.md: what is generated stands between the markers, and everything else stays."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offline.contenders import BEAMLINE_INT8, CTRANSLATE2_INT8, SERVED
from offline.document import BEGIN, END, read_online, replaced, section, write_report
from offline.models import FR_EN
from offline.ratios import Spread
from offline.results import Results

Compared = Callable[[str, int | None, Mapping[str, Sequence[float]]], Results]

TEXT = st.text().filter(lambda text: "<!--" not in text)


@given(before=TEXT, old=TEXT, after=TEXT, new=TEXT)
def test_what_is_written_by_hand_stays(before: str, old: str, after: str, new: str) -> None:
    page = replaced(f"{before}{BEGIN}\n{old}\n{END}{after}", new)

    assert page.startswith(before)
    assert page.endswith(after)
    assert page == f"{before}{BEGIN}\n{new.strip()}\n{END}{after}"
    assert replaced(page, new) == page


def test_without_markers_it_comes_at_the_end() -> None:
    page = replaced("# Measurements\n\nby hand\n", "new")

    assert page == f"# Measurements\n\nby hand\n\n{BEGIN}\nnew\n{END}\n"
    assert replaced(page, "newer") == f"# Measurements\n\nby hand\n\n{BEGIN}\nnewer\n{END}\n"


@pytest.mark.parametrize("page", [BEGIN, END])
def test_half_a_pair_of_markers_is_refused(page: str) -> None:
    with pytest.raises(ValueError, match="markers is missing"):
        replaced(page, "new")


def test_the_section_tells_ratios_and_who_is_missing(compared: Compared) -> None:
    results = compared(FR_EN, None, {BEAMLINE_INT8: [1200.0, 1500.0], CTRANSLATE2_INT8: [1000.0, 1000.0]})
    results.missing["optimum-onnx"] = "it wants another torch"

    text = section(results, {}, {})

    assert "| Beamline int8 / CTranslate2 int8 | 1.35 (1.20–1.50) |" in text
    assert "| fr-en test file, int8 / CTranslate2 int8 | ≥ 1.5 × | 1.35 × (1.20–1.50) | short |" in text
    assert "optimum-onnx did not take part: it wants another torch." in text
    assert "### transformer-base 16k" not in text


def test_who_only_answers_single_sentences_is_in_the_latencies_alone(compared: Compared) -> None:
    results = compared(FR_EN, 1, {BEAMLINE_INT8: [250.0], SERVED: [200.0]})

    lines = [line for line in section(results, {}, {}).splitlines() if line.startswith(f"| {SERVED} |")]

    assert lines == [f"| {SERVED} | 5.00 (5.00–5.00) |"]


def test_a_report_is_the_page_and_its_plots(compared: Compared, tmp_path: Path) -> None:
    (tmp_path / "benchmarks.md").write_text("# Measurements\n", "utf-8")
    results = compared(FR_EN, None, {BEAMLINE_INT8: [1200.0, 1500.0], CTRANSLATE2_INT8: [1000.0, 1000.0]})

    write_report(tmp_path, results)
    first = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    write_report(tmp_path, results)

    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == first
    page = (tmp_path / "benchmarks.md").read_text("utf-8")
    assert page.startswith("# Measurements\n")
    for name in ("tokens-per-s-fr-en", "times-as-fast-fr-en"):
        assert f"(benchmarks/{name}.svg)" in page
        assert (tmp_path / "benchmarks" / f"{name}.svg").read_text("utf-8").rstrip().endswith("</svg>")


def test_a_report_without_measurements_has_the_targets(tmp_path: Path) -> None:
    write_report(tmp_path, Results())

    assert "not measured" in (tmp_path / "benchmarks.md").read_text("utf-8")


def test_figures_of_the_service_are_read_if_they_are_there(tmp_path: Path) -> None:
    assert read_online(tmp_path / "online.json") == {}
    content = {"figures": {"x": {"median": 2, "low": 1, "high": 3, "unit": "x"}}, "more": 1}
    (tmp_path / "online.json").write_text(json.dumps(content), "utf-8")

    assert read_online(tmp_path / "online.json") == {"x": Spread(2, 1, 3)}
