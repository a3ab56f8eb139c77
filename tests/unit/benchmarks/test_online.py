"""The parts of the online comparison that need no server: what is asked, what is tried next, what is made of it."""

import os
import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from online_comparison import effort, estimated_s, same_share
from online_plot import plot
from online_results import (
    BEGIN,
    END,
    Machine,
    Results,
    Search,
    Tuning,
    complete,
    markdown,
    placed,
    ratios,
    search_of,
    spread,
    summary,
    with_figures,
)
from online_servers import Models, System, command, instruction_sets, on_cores
from online_tuning import Batching, Try, best, candidates, first, next_try, rounds
from online_workloads import LONG_TOKENS, joined, mixed, single_sentences

from beamline_client.load.report import Point
from beamline_client.load.sentences import Sentence, default_sentences, read_sentences
from beamline_client.load.testing import example_find_max
from beamline_server.models.load import EngineOptions
from offline.document import read_online
from offline.results import Results as OfflineResults
from offline.targets import TARGETS as OFFLINE_TARGETS

DOCS = Path(__file__).parents[3] / "docs"
A, B, C = Batching(32, 5, 1), Batching(16, 5, 1), Batching(64, 5, 1)


def words(text: str) -> int:
    return len(text.split())


def sentences(count: int, *, longest: int = 12) -> list[Sentence]:
    rng = random.Random(1)
    made = [" ".join(f"w{n}.{i}" for i in range(rng.randint(1, longest))) for n in range(count)]
    return [Sentence(source, (source.upper(),)) for source in made]


# -- workloads --------------------------------------------------------------------------------------------------------


def test_joined_texts_have_the_lengths_that_are_asked_for_all_about_as_often() -> None:
    stream = joined(sentences(300), words, random.Random(1))
    lengths = [words(next(stream).source) for _ in range(2000)]
    least, most = LONG_TOKENS
    assert min(lengths) >= least
    assert max(lengths) <= most
    halves = [sum(length < (least + most) / 2 for length in lengths), len(lengths) / 2]
    assert halves[0] == pytest.approx(halves[1], rel=0.15)


def test_joined_texts_are_made_of_sentences_and_of_their_references() -> None:
    some = sentences(50)
    whole = {sentence.source: sentence.references[0] for sentence in some}
    text = next(joined(some, words, random.Random(2)))
    assert text.references == (text.source.upper(),)
    assert any(text.source.startswith(source + " ") for source in whole)


def test_without_a_reference_a_joined_text_has_none() -> None:
    bare = [Sentence(sentence.source) for sentence in sentences(50)]
    assert next(joined(bare, words, random.Random(2))).references == ()


def test_the_mix_is_four_to_one_and_told_apart_by_words() -> None:
    some = sentences(100)
    workload = mixed(some, words)
    assert len(workload.sentences) == 125
    assert list(workload.sentences[:100]) == some
    assert re.fullmatch(r"1-12:80%,(6\d|7\d)-1[012]\d:20%", workload.lengths)
    assert workload == mixed(some, words)


def test_a_mix_that_cannot_be_told_apart_is_refused() -> None:
    with pytest.raises(ValueError, match="a sentence has"):
        mixed([*sentences(100), Sentence(" ".join("x" * 80))], words)


def test_a_workload_survives_its_file(tmp_path: Path) -> None:
    workload = mixed(sentences(100), words)
    assert read_sentences(workload.write(tmp_path)) == list(workload.sentences)


def test_the_test_sentences_are_all_of_them() -> None:
    workload = single_sentences(read_sentences(default_sentences()), words)
    assert (workload.name, workload.lengths, len(workload.sentences)) == ("test", "any", 2037)


# -- tuning -----------------------------------------------------------------------------------------------------------


def tuned(meets: Callable[[Try], bool], rounds_of: list[list[Batching]], base: float = 100.0) -> list[Try]:
    """All tries of a tuning in which this decides what is met."""
    tries = [Try(A, base, met=True)]
    for some in rounds_of:
        while (planned := next_try(some, tries)) is not None:
            tries.append(replace(planned, met=meets(planned)))
            assert len(tries) < 1000
    return tries


def test_a_candidate_that_is_no_better_costs_two_tries() -> None:
    tries = tuned(lambda _: False, [[B, C]])
    assert [each.batching for each in tries] == [A, B, B, C, C]
    assert best(tries).batching == A


def test_a_better_candidate_climbs_until_it_misses_twice() -> None:
    tries = tuned(lambda planned: planned.batching == C and planned.rate_per_s < 120, [[B, C]])
    assert best(tries).batching == C
    assert best(tries).rate_per_s == pytest.approx(100 * 1.05**3)
    assert [each.met for each in tries if each.batching == C] == [True, True, True, False, False]


def test_one_bad_moment_does_not_end_a_candidate() -> None:
    numbers = iter(range(100))
    tries = tuned(lambda _: next(numbers) == 1, [[B]])
    assert best(tries).batching == B


@given(st.dictionaries(st.sampled_from([A, B, C, replace(C, part=8)]), st.floats(50, 500), min_size=4))
def test_whoever_is_best_by_far_enough_is_found(limits: dict[Batching, float]) -> None:
    tries = tuned(
        lambda planned: planned.rate_per_s <= limits[planned.batching], [[B, C, replace(C, part=8)]], base=limits[A]
    )
    assert limits[best(tries).batching] >= max(limits.values()) / 1.05 * (1 - 1e-9)


def test_the_grid_is_complete_but_for_the_leader() -> None:
    leader = replace(first(1), part=8)
    found = list(candidates("grid", leader))
    assert {(each.max_batch, each.max_delay_ms) for each in [*found, leader]} == {
        (batch, delay) for batch in (16, 32, 64) for delay in (2, 5, 10)
    }
    assert len(found) == 8
    assert {each.part for each in found} == {8}


def test_continuous_batching_is_tuned_in_how_many_run_at_a_time() -> None:
    leader = first(2, continuous=True)
    assert rounds(continuous=True, isas=["AVX512"]) == ["at a time"]
    assert list(candidates("at a time", leader)) == [Batching(count, None, 2) for count in (4, 8, 16, 64)]


def test_the_other_rounds_change_one_thing_each() -> None:
    assert [each.part for each in candidates("parts", A)] == [8, 16]
    assert [each.isa for each in candidates("isa", A, ["AVX512"])] == ["AVX512"]
    assert list(candidates("workers", A)) == [replace(A, workers=2)]
    with pytest.raises(ValueError, match="no round"):
        list(candidates("other", A))


def test_only_ctranslate2_is_tuned_in_its_own_ways() -> None:
    assert rounds(isas=["AVX512"]) == ["grid", "workers"]
    assert rounds(ct2=True, isas=["AVX512"]) == ["parts", "isa", "grid", "workers"]
    assert rounds(ct2=True) == ["parts", "grid", "workers"]


def test_a_batching_is_told_in_words() -> None:
    assert str(A) == "32 × 5 ms"
    assert str(Batching(16, None, 1)) == "16 at a time"
    assert str(Batching(16, 2.5, 2, part=8, isa="AVX512")) == "16 × 2.5 ms, 2 workers, parts of 8, AVX512"


# -- servers ----------------------------------------------------------------------------------------------------------

MODELS = Models(Path("bundle"), Path("converted"))


def test_beamline_is_started_as_it_comes() -> None:
    _, flags = command(System.CONTINUOUS, first(3, continuous=True), MODELS)
    assert flags == ["--workers", "3", "--threads-per-worker", "1", "--max-rows", str(EngineOptions().rows)]


def test_batches_have_rows_enough() -> None:
    _, flags = command(System.REQUEST_LEVEL, Batching(64, 2, 1), MODELS)
    settings = dict(zip(flags[::2], flags[1::2], strict=True))
    assert settings["--max-rows"] == "256"
    assert (settings["--request-batch"], settings["--request-batch-delay-ms"]) == ("64", "2")
    assert settings["--workers"] == "1"


def test_ctranslate2_is_told_its_model_and_its_ways() -> None:
    program, flags = command(System.CTRANSLATE2, Batching(32, 5, 2, part=8, isa="AVX512"), MODELS)
    settings = dict(zip(flags[::2], flags[1::2], strict=True))
    assert program[-1].endswith("ct2_service.py")
    assert (settings["--ct2-model"], settings["--part"], settings["--isa"]) == ("converted", "8", "AVX512")
    _, plain = command(System.CTRANSLATE2, A, MODELS)
    assert not {"--part", "--isa"} & set(plain)


def test_cores_are_given_back() -> None:
    before = os.sched_getaffinity(0)
    some = {min(before)}
    with on_cores(some):
        assert os.sched_getaffinity(0) == some
    assert os.sched_getaffinity(0) == before


def test_wide_vectors_are_tried_where_they_are() -> None:
    assert instruction_sets("flags : sse avx2 avx512f avx512bw") == ["AVX512"]
    assert instruction_sets("flags : sse avx2") == []


# -- results ----------------------------------------------------------------------------------------------------------


def point(rate_per_s: float, *, met: bool = True, p99_ms: float | None = 200.0) -> Point:
    return Point(
        rate_per_s=rate_per_s, met=met, stable=True, valid=True, seconds=15.0, answered_per_s=rate_per_s,
        p50_ms=50.0, p99_ms=p99_ms, failed_share=0.0, why="",
    )  # fmt: skip


def search(workload: str, system: System, repetition: int, rate_per_s: float | None, *, valid: bool = True) -> Search:
    return Search(
        workload=workload, system=system, repetition=repetition,
        batching=Batching(64, None if system is System.CONTINUOUS else 2.0, 1), highest_per_s=rate_per_s,
        step_per_s=5.0, valid=valid, failures=[],
        points=[point(rate_per_s or 10.0), point(900.0, met=False, p99_ms=9e9)],
        p50_ms=50.0, p99_ms=450.0, class_p99_ms={"all": 450.0}, tokens_per_answer=9.25, bleu=53.0, inconsistent=0,
    )  # fmt: skip


def results(searches: list[Search]) -> Results:
    machine = Machine(
        cpu="A CPU", cores=2, server_cores=[0], generator_cores=[1], platform="Linux", versions={"python": "3.11"},
        commit="0123456789abcdef",
    )  # fmt: skip
    chosen = Tuning(
        workload="test", system=System.REQUEST_LEVEL, tries=[Try(A, 90.0, met=True, p99_ms=400.0)], chosen=A
    )
    return Results(
        started_at="2026-01-02T03:04:05+00:00", quick=False, slo="p99<=500ms,errors<=0.1%", beam=4, max_new_tokens=128,
        precision="int8", machine=machine, workloads={"test": "short ones", "mixed": "short and long ones"},
        same_answers={System.CTRANSLATE2: 0.95}, tunings=[chosen], searches=searches,
    )  # fmt: skip


@pytest.fixture
def three() -> Results:
    rates = {
        System.CONTINUOUS: [150.0, 120.0, 180.0],
        System.REQUEST_LEVEL: [100.0] * 3,
        System.CTRANSLATE2: [75.0] * 3,
    }
    return results(
        [
            search(workload, system, repetition, rate)
            for workload in ("test", "mixed")
            for system, found in rates.items()
            for repetition, rate in enumerate(found)
        ]
    )


def test_ratios_are_of_the_same_repetition(three: Results) -> None:
    assert ratios(three.searches, "test", System.REQUEST_LEVEL) == [1.5, 1.2, 1.8]
    assert ratios(three.searches, "mixed", System.CTRANSLATE2) == [2.0, 1.6, 2.4]


def test_the_page_of_the_offline_benchmark_finds_the_ratios(three: Results, tmp_path: Path) -> None:
    """It has them among its figures to reach, by names of its own."""
    whole = with_figures(three)
    assert Results.model_validate_json(whole.model_dump_json()) == whole
    (tmp_path / "online.json").write_text(whole.model_dump_json(), "utf-8")
    online = read_online(tmp_path / "online.json")
    found = [target.measured(OfflineResults(), online) for target in OFFLINE_TARGETS if "online" in target.title]
    assert [value and value.median for value in found] == [1.5, 1.5, 2.0, 2.0]


def test_a_search_that_found_nothing_has_no_ratio(three: Results) -> None:
    searches = [*three.searches[1:], search("test", System.CONTINUOUS, 0, None)]
    assert ratios(searches, "test", System.REQUEST_LEVEL) == [1.2, 1.8]


def test_a_spread_is_the_median_and_the_range() -> None:
    assert spread([3.0, 1.0, 2.0], 1) == "2.0 (1.0-3.0)"
    assert spread([2.0], 2) == "2.00"
    assert spread([], 2) == "-"


def test_results_survive_their_file(three: Results) -> None:
    assert Results.model_validate_json(three.model_dump_json(indent=1)) == three


def test_a_repetition_that_was_interrupted_is_measured_again(three: Results) -> None:
    interrupted = three.model_copy(update={"searches": three.searches[:-1]})
    kept = complete(interrupted).searches
    assert {(each.workload, each.repetition) for each in three.searches} - {
        (each.workload, each.repetition) for each in kept
    } == {("mixed", 2)}
    assert len(kept) == 15


def test_the_table_has_rates_ratios_and_targets(three: Results) -> None:
    block = markdown(three, "images/online.svg")
    assert (
        "| test | Beamline, request-level batching | 64 × 2 ms | 100 (100-100) | 1.50 (1.20-1.80) | ≥ 1.3 | 50 | 53.0 |"
        in block
    )
    assert "| test | Beamline | 64 at a time | 150 (120-180) |  |  | 50 | 53.0 |" in block
    assert "medians of 3 interleaved repetitions" in " ".join(block.split())
    assert max(len(line) for line in block.splitlines() if not line.startswith("|")) <= 120
    assert "commit 0123456789ab;" in block
    assert "](images/online.svg)" in block
    assert "95.0% of 256" in block
    assert "INVALID" not in block


def test_what_is_wrong_is_told(three: Results) -> None:
    bad = [*three.searches[1:], search("test", System.CONTINUOUS, 0, None, valid=False)]
    block = markdown(
        results([*bad, search("test", System.CTRANSLATE2, 3, 1.0).model_copy(update={"inconsistent": 2})]), "x"
    )
    assert "1 of 19 searches are INVALID" in block
    assert "1 of 19 searches found no rate" in block
    assert "differed with what ran beside it: CTranslate2, dynamic batching." in block


def test_a_trial_run_says_so(three: Results) -> None:
    assert "whose figures mean nothing" in markdown(three.model_copy(update={"quick": True}), "x")


def test_the_summary_has_a_line_for_each_target(three: Results) -> None:
    lines = list(summary(three))
    assert len(lines) == 4
    assert len(list(summary(three.model_copy(update={"workloads": {"test": ""}})))) == 2
    assert lines[0] == "test: Beamline ÷ Beamline, request-level batching: 1.50 (1.20-1.80), to reach 1.3"


def test_a_block_replaces_what_was_there() -> None:
    page = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    once = placed(page, "new")
    assert once == f"before\n{BEGIN}\nnew\n{END}\nafter\n"
    assert placed(once, "new") == once


@pytest.mark.parametrize("page", ["", BEGIN, END, f"{END} {BEGIN}"])
def test_a_page_without_its_markers_is_refused(page: str) -> None:
    with pytest.raises(ValueError, match="has no"):
        placed(page, "new")


def test_the_documentation_has_a_place_for_the_table() -> None:
    placed((DOCS / "benchmarks.md").read_text("utf-8"), "new")


def test_the_picture_has_a_panel_for_each_workload(three: Results) -> None:
    text = plot(three)
    words_in_it = {element.text for element in ElementTree.fromstring(text).iter() if element.text}
    assert {"test", "mixed", "Beamline", "CTranslate2, dynamic batching", "p99, ms"} <= words_in_it
    assert plot(three) == text


def test_what_is_kept_of_a_search() -> None:
    report = example_find_max()
    kept = search_of(report, "test", System.CTRANSLATE2, A, 2)
    assert report.best is not None
    assert report.best.latency is not None
    assert (kept.highest_per_s, kept.points) == (report.highest_rate_per_s, report.points)
    assert kept.p99_ms == report.best.latency.percentiles_ms["99"]
    assert kept.class_p99_ms.keys() == {each.name for each in report.best.classes}
    assert kept.tokens_per_answer == pytest.approx(
        report.best.throughput.tokens_per_s / report.best.throughput.answered_per_s
    )


def test_what_is_kept_of_a_search_that_found_nothing() -> None:
    report = example_find_max().model_copy(update={"best": None, "highest_rate_per_s": None})
    kept = search_of(report, "test", System.CONTINUOUS, A, 0)
    assert (kept.highest_per_s, kept.p50_ms, kept.bleu, kept.class_p99_ms) == (None, None, None, {})
    assert (kept.tokens_per_answer, kept.inconsistent) == (None, None)


# -- effort -----------------------------------------------------------------------------------------------------------


def test_a_run_in_earnest_takes_longer_than_a_trial() -> None:
    earnest, trial = effort(quick=False, repeat=None), effort(quick=True, repeat=None)
    assert (earnest.repeat, trial.repeat) == (5, 1)
    assert estimated_s(earnest, 2) > 10 * estimated_s(trial, 2) > 0
    assert estimated_s(effort(quick=False, repeat=6), 2) > estimated_s(earnest, 2) > estimated_s(earnest, 1)


def test_answers_are_the_same_or_not() -> None:
    assert same_share(["a", "b", "c", "d"], ["a", "b", "x", "d"]) == 0.75
