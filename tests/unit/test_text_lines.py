"""One definition of a line, and everything that reads lines keeps to it."""

import gzip
import io
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beamline.text_lines import NotText, TextLine, read_lines
from beamline_client.load.sentences import read_sentences as read_load_sentences
from beamline_client.main import main
from beamline_client.testing import FakeServer
from beamline_export.calibration import read_sentences as read_calibration_sentences

NO_LINE_ENDS = "\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
"""What `str.splitlines` splits at, but for `\\n`."""
CONTENT = f"\ufeffun{'-'.join(NO_LINE_ENDS)}un\n\ndeux\r\ntrois\r\r\nquatre".encode()
LINES = (f"un{'-'.join(NO_LINE_ENDS)}un", "", "deux", "trois\r", "quatre")

texts = st.lists(st.text(st.characters(exclude_characters="\n", exclude_categories=["Cs"])), min_size=1)


def read(content: bytes) -> list[str]:
    return [line.text() for line in read_lines(io.BytesIO(content))]


def by_read_lines(file: Path) -> tuple[str, ...]:
    with file.open("rb") as stream:
        return tuple(line.text() for line in read_lines(stream))


def by_load(file: Path) -> tuple[str, ...]:
    return tuple(sentence.source for sentence in read_load_sentences(file))


def by_calibration(file: Path) -> tuple[str, ...]:
    return tuple(text for _, text in read_calibration_sentences(file).lines)


def by_translate(file: Path) -> tuple[str, ...]:
    with FakeServer() as server:
        assert main(["translate", "--server", server.target, "--file", str(file), "--batch-size", "100"]) == 0
        return tuple(source.text for source in server.calls[-1].request.inputs)


@pytest.mark.parametrize("reader", [by_read_lines, by_load, by_calibration, by_translate])
def test_every_reader_finds_the_same_lines(reader: Callable[[Path], tuple[str, ...]], tmp_path: Path) -> None:
    """Some leave out empty lines or white space around a text; nothing else differs."""
    (tmp_path / "lines.txt").write_bytes(CONTENT)

    found = reader(tmp_path / "lines.txt")

    assert [line.strip() for line in found if line] == [line.strip() for line in LINES if line]


def test_packed_sentences_have_the_same_lines(tmp_path: Path) -> None:
    (tmp_path / "lines.txt.gz").write_bytes(gzip.compress(CONTENT))
    (tmp_path / "lines.txt").write_bytes(CONTENT)

    assert by_load(tmp_path / "lines.txt.gz") == by_load(tmp_path / "lines.txt")


def test_lines_end_with_line_feeds_alone() -> None:
    assert tuple(read(CONTENT)) == LINES


@given(texts)
def test_lines_are_read_as_they_were_written(written: list[str]) -> None:
    kept = [text.removeprefix("\ufeff") if place == 0 else text for place, text in enumerate(written)]

    assert read("".join(f"{text}\n" for text in written).encode()) == [text.removesuffix("\r") for text in kept]
    assert read("".join(f"{text}\r\n" for text in written).encode()) == kept


@pytest.mark.parametrize(
    ("content", "lines"),
    [(b"", []), (b"\xef\xbb\xbf", []), (b"\n", [""]), (b"\r", ["\r"]), (b"a\n\xef\xbb\xbfb", ["a", "\ufeffb"])],
)
def test_ends_of_files(content: bytes, lines: list[str]) -> None:
    assert read(content) == lines


def test_a_line_that_is_no_text_does_not_hide_the_others() -> None:
    first, second, third = read_lines(io.BytesIO(b"un\nd\xe9ux\ntrois"))

    with pytest.raises(NotText, match=r"^line 2 is not UTF-8 text \(byte 2 of it: .*\): convert it to UTF-8$"):
        second.text()
    assert (first, third) == (TextLine(1, b"un"), TextLine(3, b"trois"))
