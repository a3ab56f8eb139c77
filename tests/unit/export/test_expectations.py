"""A file of expected outputs: what is wrong with it is told by line, all at once."""

import json
from pathlib import Path
from typing import Any

import pytest

from beamline_export.expectations import MOST_LINES, Example, Expectations, read_expectations, resolve
from beamline_export.spec import ExportError
from beamline_server.bundle import Bundle
from doubles.service import DECODER_START, EOS, make_manifest

GOOD = {"source_ids": [5, 6, EOS], "target_ids": [7, 8, EOS]}


def written(folder: Path, *lines: object) -> Path:
    """A file with these lines: objects as JSON, text and bytes as they are."""
    file = folder / "expected.jsonl"
    texts = [line if isinstance(line, str | bytes) else json.dumps(line) for line in lines]
    file.write_bytes(b"\n".join(text if isinstance(text, bytes) else text.encode() for text in texts))
    return file


def refused(file: Path) -> str:
    with pytest.raises(ExportError) as caught:
        read_expectations(file)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"\xff", "is not UTF-8 text"),
        ("{", "is not JSON ("),
        ("[" * 99_999, "is not JSON ("),
        ("[1]", "is no JSON object: write one object per line"),
        ("7", "is no JSON object: write one object per line"),
        (f'{{"source_ids": [{"9" * 5000}]}}', "has an integer of 5,000 digits, which is no token id"),
        (f'{{"source_ids": [-{"9" * 20}]}}', "has an integer of 20 digits, which is no token id"),
        ('{"source_ids": [1], "source_ids": [2]}', "has a key twice"),
        ("{}", "give source_ids or source, give target_ids or target"),
        ({**GOOD, "source": "x"}, "give source_ids or source, not both"),
        ({**GOOD, "target": "x"}, "give target_ids or target, not both"),
        ({**GOOD, "souce_ids": [1]}, "'souce_ids' is unknown (did you mean source_ids?)"),
        ({**GOOD, "colour": 1}, "'colour' is unknown; known: source, source_ids, target, target_ids, logprobs, "),
        ({**GOOD, "source_ids": "5 6"}, "source_ids: input should be a valid list"),
        ({**GOOD, "source_ids": [5, 6.5]}, "source_ids.1: input should be a valid integer"),
        ({**GOOD, "source_ids": [5, True]}, "source_ids.1: input should be a valid integer"),
        ({**GOOD, "target_ids": [-1]}, "target_ids.0: input should be greater than or equal to 0"),
        ({**GOOD, "target_ids": []}, "target_ids: list should have at least 1 item"),
        ({**GOOD, "beam_size": 17}, "beam_size: input should be less than or equal to 16"),
        ({**GOOD, "beam_size": "4"}, "beam_size: input should be a valid integer"),
        ({**GOOD, "beam_size": 4, "length_penalty": 11}, "length_penalty: input should be less than or equal to 10"),
        ({**GOOD, "length_penalty": 1.0}, "length_penalty has no effect on a greedy search"),
        ({**GOOD, "max_new_tokens": 0}, "max_new_tokens: input should be greater than or equal to 1"),
        ({**GOOD, "logprobs": [-1.0]}, "1 logprobs for 3 target_ids; give one for each"),
        ({**GOOD, "logprobs": [-1.0, -2.0, float("nan")]}, "logprobs.2: input should be a finite number"),
        ({**GOOD, "logprobs": [0.5, -1.0, -1.0]}, "logprobs has 0.5: natural logarithms of probabilities are not"),
        ({"source_ids": [1], "target": "x", "logprobs": [-1.0]}, "logprobs belong to target_ids"),
        ({"source": "a\ud800", "target_ids": [1]}, "source has half of a surrogate pair"),
        ({"source_ids": [1], "target": "\udc00b"}, "target has half of a surrogate pair"),
    ],
)
def test_what_is_wrong_with_a_line_is_told(line: object, problem: str, tmp_path: Path) -> None:
    file = written(tmp_path, GOOD, line)
    assert refused(file).startswith(f"{file}: line 2: {problem}")


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "with-a-mark"])
def test_a_line_that_is_too_long_ends_the_reading(mark: str, tmp_path: Path) -> None:
    file = tmp_path / "expected.jsonl"
    file.write_text(f"{mark}{json.dumps(GOOD)}\n{' ' * (3 << 20)}\n{{\n", "utf-8")
    assert refused(file) == f"{file}: line 2 is longer than 1,048,576 bytes; leave it out"
    file.write_text(f"{mark}{' ' * (1 << 20)}\n", "utf-8")
    assert refused(file).startswith(f"{file}: line 1 is longer")


def test_all_lines_are_told_at_once_up_to_a_count(tmp_path: Path) -> None:
    file = written(tmp_path, *(["{"] * 10), {**GOOD, "beam_size": 0, "max_new_tokens": "x"})
    assert [part.split(":")[0] for part in refused(file).removeprefix(f"{file}: ").split("; line ")][1:] == [
        str(n) for n in range(2, 9)
    ]
    assert refused(file).endswith("; and 3 more")
    assert "beam_size: input should be greater than or equal to 1, max_new_tokens: input should" in refused(
        written(tmp_path, {**GOOD, "beam_size": 0, "max_new_tokens": "x"})
    )


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_a_file_without_lines_is_refused(content: str, tmp_path: Path) -> None:
    assert "is empty; write some inputs and your model's outputs" in refused(written(tmp_path, content))


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    assert "cannot be read (No such file or directory)" in refused(tmp_path / "none")
    assert "cannot be read (Is a directory)" in refused(tmp_path)


def test_the_number_of_lines_is_bounded(tmp_path: Path) -> None:
    assert len(read_expectations(written(tmp_path, *[GOOD] * MOST_LINES)).lines) == MOST_LINES
    assert "has more than 1,000 lines" in refused(written(tmp_path, *[GOOD] * (MOST_LINES + 1)))
    assert "has more than 1,000 lines" in refused(written(tmp_path, *["{"] * (MOST_LINES + 1)))


def test_empty_lines_are_not_counted(tmp_path: Path) -> None:
    file = written(tmp_path, "", *[GOOD, " "] * MOST_LINES, "")
    assert [number for number, _ in read_expectations(file).lines] == list(range(2, 2 * MOST_LINES + 1, 2))


def test_empty_lines_and_a_byte_order_mark_are_skipped(tmp_path: Path) -> None:
    file = written(tmp_path, b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), "", GOOD)
    assert [number for number, _ in read_expectations(file).lines] == [1, 3]


def resolved(folder: Path, *lines: object, **changes: Any) -> list[Example]:
    manifest = make_manifest(tokenizer={"kind": "none", "files": []}, **changes)
    return resolve(read_expectations(written(folder, *lines)), Bundle(folder, manifest, "f" * 64))


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (
            {"source": "je", "target": "I"},
            "source is text, but the model has no tokenizer: give source_ids, target is ",
        ),
        ({**GOOD, "source_ids": [999]}, "source_ids has 999, the source vocabulary ends before "),
        ({**GOOD, "target_ids": [7, 999]}, "target_ids has 999, the target vocabulary ends before "),
        ({**GOOD, "source_ids": [5] * 513}, "the source has 513 tokens (the model takes 1 to 512)"),
        ({**GOOD, "target_ids": [5] * 129}, "target_ids has 129 tokens, the search ends at 128; give max_new_tokens"),
        ({**GOOD, "target_ids": [5] * 129, "beam_size": 2}, "target_ids has 129 tokens, the search ends at 128;"),
        ({**GOOD, "max_new_tokens": 2}, "target_ids has 3 tokens, the search ends at 2; give max_new_tokens"),
        ({**GOOD, "max_new_tokens": 257}, "max_new_tokens 257 is beyond the model's 256 positions"),
        (
            {**GOOD, "target_ids": [7, EOS, 0, 0]},
            f"target_ids goes on after the end of sequence ({EOS}); leave out what follows, padding too, or correct "
            "eos_token_id in config.json",
        ),
    ],
)
def test_what_a_model_cannot_read_is_told(line: object, problem: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError) as caught:
        resolved(tmp_path, GOOD, line)
    assert str(caught.value).startswith(f"{tmp_path / 'expected.jsonl'}: line 2: {problem}")


def test_outputs_that_all_begin_with_the_decoders_start_are_told(tmp_path: Path) -> None:
    """One may: a model can generate that token."""
    started = {**GOOD, "target_ids": [DECODER_START, 7, EOS]}
    with pytest.raises(ExportError, match=rf"every target_ids begins with the decoder's start \({DECODER_START}\)"):
        resolved(tmp_path, started, started)
    assert len(resolved(tmp_path, started, GOOD)) == 2


def test_a_line_says_how_to_search_and_the_model_the_rest(tmp_path: Path) -> None:
    defaults = {"beam_size": 6, "length_penalty": 0.5, "early_stopping": "never", "max_new_tokens": 90}
    greedy, beam, said = resolved(
        tmp_path,
        GOOD,
        {**GOOD, "beam_size": 4},
        {**GOOD, "beam_size": 2, "length_penalty": 2, "max_new_tokens": 30},
        generation_defaults=defaults,
    )
    assert (greedy.options.beam_size, greedy.options.max_new_tokens) == (1, 90)
    options = beam.options
    assert (options.beam_size, options.length_penalty, options.max_new_tokens) == (4, 0.5, 90)
    assert options.early_stopping.value == "never"
    assert (said.options.beam_size, said.options.length_penalty, said.options.max_new_tokens) == (2, 2.0, 30)
    assert isinstance(read_expectations(tmp_path / "expected.jsonl"), Expectations)
