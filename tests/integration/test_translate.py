"""`beamline translate` as a user runs it, against a real server."""

import json
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from beamline_client import Client, SearchOptions
from beamline_server.process import BEAMLINE, ServerProcess

TEXTS = ("Ai-je le choix ?", "Où est la gare ?", "Il fait beau aujourd'hui.")
Translate = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def translate(server: ServerProcess) -> Translate:
    """Runs the command with these arguments and this input; the arguments can name another server."""

    def run(*arguments: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
        line = [str(BEAMLINE), "translate", "--server", server.target, *map(str, arguments)]
        return subprocess.run(line, input=stdin, capture_output=True, text=True, check=False, timeout=60)

    return run


def test_texts_become_lines(translate: Translate, client: Client) -> None:
    done = translate(*TEXTS)

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [client.generate_one(text).text for text in TEXTS]


def test_lines_of_stdin_keep_their_places(translate: Translate, client: Client) -> None:
    done = translate(stdin=f"{TEXTS[0]}\n\n   \n{TEXTS[1]}")

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split("\n") == [
        client.generate_one(TEXTS[0]).text,
        "",
        "",
        client.generate_one(TEXTS[1]).text,
        "",
    ]


def test_a_file_is_translated_into_a_file(translate: Translate, sentences: Sequence[str], tmp_path: Path) -> None:
    source, target = tmp_path / "fr.txt", tmp_path / "en.txt"
    source.write_text("\n".join(sentences[:100]) + "\n")

    done = translate("--file", source, "-o", target, "--beam", 1, "--batch-size", 8, "--concurrency", 4)

    assert (done.returncode, done.stdout) == (0, "")
    one_by_one = translate("--beam", 1, "--batch-size", 1, "--concurrency", 1, *sentences[:100])
    assert target.read_text() == one_by_one.stdout
    assert len(target.read_text().splitlines()) == 100


def test_lines_that_cannot_be_translated_are_named_and_the_others_are_not_lost(
    translate: Translate, client: Client, tmp_path: Path
) -> None:
    source = tmp_path / "odd.txt"
    lines = [TEXTS[0].encode(), b"gare " * 300, b"", b"caf\xe9", b"gare " * 20_000, TEXTS[1].encode()]
    source.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines))
    first, last = (client.generate_one(text).text for text in TEXTS[:2])

    stopped = translate("--file", source)
    skipped = translate("--file", source, "--on-error", "skip")
    cut = translate("--file", source, "--on-error", "skip", "--truncate", "--max-new-tokens", "20", "--beam", "1")

    assert (stopped.returncode, stopped.stdout) == (2, f"{first}\n")
    assert "line 2: has 301 tokens; expected at most 256, or --truncate" in stopped.stderr
    assert (skipped.returncode, skipped.stdout) == (3, f"{first}\n\n\n\n\n{last}\n")
    named = [line.split(" is ")[0] for line in skipped.stderr.splitlines() if " is skipped: " in line]
    assert named == [f"beamline translate: line {number}" for number in (2, 4, 5)]
    assert (cut.returncode, [bool(line) for line in cut.stdout.split("\n")]) == (
        *(3, [True, True, False, False, True, True, False]),
    )
    assert "2 cut to what the model reads; 1 skipped" in cut.stderr


def test_json_has_everything_about_each_hypothesis(translate: Translate, client: Client) -> None:
    done = translate("--json", "--beam", 3, "--n-best", 2, TEXTS[0], "")

    assert done.returncode == 0
    first, blank = map(json.loads, done.stdout.splitlines())
    search = SearchOptions(beam_size=3, n_best=2)
    expected = client.generate_one(TEXTS[0], search=search, token_ids=True, token_logprobs=True)
    assert first["source"] == TEXTS[0]
    assert [h["text"] for h in first["hypotheses"]] == [h.text for h in expected.hypotheses]
    assert [h["score"] for h in first["hypotheses"]] == [h.score for h in expected.hypotheses]
    assert [tuple(h["token_ids"]) for h in first["hypotheses"]] == [h.token_ids for h in expected.hypotheses]
    assert blank == {"source": "", "hypotheses": []}


def test_a_streamed_text_is_the_whole_text(translate: Translate, client: Client) -> None:
    done = translate("--stream", "--beam", 1, *TEXTS)

    assert (done.returncode, done.stderr) == (0, "")
    greedy = SearchOptions(beam_size=1)
    assert done.stdout.splitlines() == [client.generate_one(text, search=greedy).text for text in TEXTS]


def test_scores_come_with_the_source(translate: Translate) -> None:
    done = translate("--n-best", 2, TEXTS[0])

    source, *ranked = done.stdout.splitlines()[:3]
    assert source == TEXTS[0]
    scores = [float(line.split("\t")[0]) for line in ranked]
    assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize(
    ("arguments", "status", "told"),
    [
        pytest.param(("--beam", 17, "gare"), 2, "search.beam_size: is 17; expected 1 to 16", id="invalid option"),
        pytest.param(("gare " * 1000,), 2, "expected at most 256, or --truncate", id="long text"),
        pytest.param(("--server", "127.0.0.1:1", "gare"), 1, "cannot reach a server at 127.0.0.1:1", id="no server"),
        pytest.param(("--timeout", "0.001", "gare"), 1, "raise --timeout", id="no time"),
        pytest.param(("--file", "no-such-file"), 2, "no-such-file: No such file or directory", id="no file"),
    ],
)
def test_a_failure_is_one_line_and_a_status(
    translate: Translate, arguments: tuple[object, ...], status: int, told: str
) -> None:
    done = translate(*arguments)

    assert (done.returncode, done.stdout) == (status, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("beamline translate: ")
    assert told in line
