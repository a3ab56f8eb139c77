"""The page: one file, well-formed, the same for the same report, and whatever is not there is left out."""

import re
from collections import Counter
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beamline_client.load.histograms import latency, new_histogram, record
from beamline_client.load.html_page import html_page
from beamline_client.load.plots import percentile_spectrum
from beamline_client.load.report import FindMaxReport, Point, RunReport, Verdict, Window
from beamline_client.load.testing import example_find_max, example_run

VOID = {"meta", "br", "link", "img", "hr", "input"}
HOSTILE = "\"><script>alert('x')</script><img src=http://example.com/a.png>$\\frac{&amp;\x00\x1b"


class Page(HTMLParser):
    """Reads a page; fails on elements that are not closed."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: Counter[str] = Counter()
        self.ids: list[str] = []
        self.references: list[str] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        for key, value in attrs:
            assert not key.startswith("on")
            if key == "id":
                self.ids.append(value or "")
            elif key in ("src", "href", "xlink:href", "data", "action"):
                self.references.append(value or "")
            self.references += re.findall(r"url\(([^)]*)\)", value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def run() -> RunReport:
    return example_run()


@pytest.fixture(scope="module")
def find_max() -> FindMaxReport:
    return example_find_max()


def test_a_page_is_well_formed_and_needs_nothing_else(run: RunReport, find_max: FindMaxReport) -> None:
    for report, figures in ((run, 5), (find_max, 6)):
        text = html_page(report)
        page = Page(text)
        assert page.tags["svg"] == page.tags["figure"] == figures
        assert len(page.ids) == len(set(page.ids)) > 0
        assert {reference.removeprefix("#") for reference in page.references} == set(page.ids)
        assert not page.tags.keys() & {"script", "link", "img", "iframe", "object", "embed", "image"}
        assert page.tags["style"] == 1  # none inside the figures: it would hold for the whole page
        assert not re.search(r"https?://|@import|\burl\((?!#)", text)


def test_same_report_same_page(run: RunReport, find_max: FindMaxReport) -> None:
    assert html_page(run) == html_page(example_run())
    assert html_page(find_max) == html_page(find_max)


@pytest.mark.parametrize(
    ("valid", "interrupted", "failures", "word", "state"),
    [
        (True, False, [], "VALID", "good"),
        (True, True, [], "VALID, INTERRUPTED", "doubtful"),
        (True, False, ["the SLO was missed"], "VALID, FAILED", "doubtful"),
        (False, False, [], "INVALID", "bad"),
        (False, True, ["the SLO was missed"], "INVALID, INTERRUPTED, FAILED", "bad"),
    ],
)
def test_the_verdict_is_the_heading(valid: bool, interrupted: bool, failures: list[str], word: str, state: str) -> None:
    reasons = [] if valid else ["worker 0 used 97% of its core"]
    verdict = Verdict(
        valid=valid, invalid_because=reasons, interrupted=interrupted, failures=failures, remarks=["books differ"]
    )
    text = html_page(example_run(verdict=verdict, windows=[], server_samples=[], latency=None))

    assert f"<h1>{word}</h1>" in text
    assert f'class="banner {state}"' in text
    for said in (*reasons, *failures, *verdict.remarks):
        assert f">{said}</li>" in text


def test_hostile_text_stays_text(run: RunReport) -> None:
    assert run.server is not None
    assert run.slo is not None
    hostile = example_run(
        server=run.server.model_copy(update={"model": HOSTILE, "versions": {HOSTILE: HOSTILE}}),
        configuration=run.configuration.model_copy(update={"workload": {HOSTILE: HOSTILE}, "target": HOSTILE}),
        messages={HOSTILE: 1},
        classes=[kind.model_copy(update={"name": HOSTILE}) for kind in run.classes],
        slo=run.slo.model_copy(update={"text": HOSTILE}),
        phases={HOSTILE: run.phases["queue"]},
    )
    page = Page(html_page(hostile))

    assert page.tags["script"] == page.tags["img"] == 0
    assert page.text.count("<script>alert('x')</script>") >= 9
    assert not {"\x00", "\x1b"} & set(page.text)


def test_the_tiles_say_the_reports_figures(run: RunReport) -> None:
    assert run.latency is not None
    text = Page(html_page(run)).text

    assert f"latency p99 {run.latency.percentiles_ms['99']:.0f} ms" in text
    assert f"answered {run.throughput.answered_per_s:.1f} /s" in text
    assert "BLEU 38.2" in text


def test_without_measurements_there_is_still_a_page(run: RunReport) -> None:
    generator = run.generator.model_copy(update={"pinning": None, "lag": None, "processes": []})
    bare = example_run(
        slo=None,
        latency=None,
        latency_from_send=None,
        latency_with_failures=None,
        first_piece=None,
        phases={},
        classes=[],
        quality=None,
        books=None,
        windows=[],
        server_samples=[],
        server=None,
        outcomes={},
        codes={},
        messages={},
        retries_seen=None,
        generator=generator,
        verdict=Verdict(valid=True, invalid_because=[], interrupted=True, failures=[], remarks=[]),
    )
    page = Page(html_page(bare))

    assert page.tags["svg"] == 0
    assert "None" not in page.text


FIELDS: dict[str, Any] = {
    "slo": None,
    "latency": None,
    "latency_from_send": None,
    "latency_with_failures": None,
    "phases": {},
    "quality": None,
    "windows": [],
    "server_samples": [],
}


@pytest.mark.parametrize("field", FIELDS)
def test_any_part_may_be_missing(field: str) -> None:
    page = Page(html_page(example_run(**{field: FIELDS[field]})))

    assert "None" not in page.text


def test_windows_without_answers_are_gaps() -> None:
    silent = Window(
        start_s=0.0,
        seconds=1.0,
        offered=3,
        answered=0,
        failed=3,
        tokens=0,
        p50_ms=None,
        p99_ms=None,
        queue_ms=None,
        encode_ms=None,
        decode_ms=None,
        histogram=None,
    )
    page = Page(html_page(example_run(windows=[silent])))

    assert "failures (3)" in page.text
    assert page.tags["svg"] == 4  # no plot of phases


@settings(max_examples=20)
@given(st.lists(st.floats(1e-6, 4000.0), min_size=1, max_size=3))
def test_few_values_of_any_size_have_a_spectrum(seconds: list[float]) -> None:
    histogram = new_histogram()
    record(histogram, np.array(seconds))
    few = latency(histogram)

    assert percentile_spectrum(example_run(latency=few, latency_from_send=few, latency_with_failures=few))


def test_a_search_page_shows_its_answer_and_every_point(find_max: FindMaxReport) -> None:
    page = Page(html_page(find_max))

    assert f"{find_max.highest_rate_per_s:g}/s ± {find_max.step_per_s:g}/s met {find_max.slo}" in page.text
    assert f"highest: {find_max.highest_rate_per_s:g}/s" in page.text
    for point in find_max.points:
        assert f"{point.rate_per_s:g}/s" in page.text


@pytest.mark.parametrize("points", [0, 1])
def test_a_search_that_found_nothing_has_a_page(points: int) -> None:
    point = Point(
        rate_per_s=10.0,
        met=False,
        stable=False,
        valid=False,
        seconds=5.0,
        answered_per_s=0.0,
        p50_ms=None,
        p99_ms=None,
        failed_share=1.0,
        why="no answers",
    )
    nothing = example_find_max(
        points=[point] * points, highest_rate_per_s=None, step_per_s=None, best=None, configuration=None, server=None
    )
    page = Page(html_page(nothing))

    assert page.tags["svg"] == points
    assert "no rate that was tried" in page.text
    assert "None" not in page.text
