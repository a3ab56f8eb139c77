"""The most memory that the server comes to is known before traffic comes, and held against what there is."""

import logging
from pathlib import Path

import pytest

from beamline_server.memory import container_limit, require_memory
from beamline_server.rpc.server import most_bytes_of_callers
from beamline_server.settings import Settings, SettingsError

PARTS = {"when warm": 300_000_000, "caches": 500_000_000, "calls": 200_000_000}


def limit_file(folder: Path, text: str) -> Path:
    file = folder / "memory.max"
    file.write_text(text, "ascii")
    return file


@pytest.mark.parametrize(
    ("text", "limit"),
    [("2147483648\n", 2147483648), ("max\n", None), ("9223372036854771712\n", None), ("0\n", 0)],
)
def test_the_limit_of_a_container_is_read(tmp_path: Path, text: str, limit: int | None) -> None:
    file = limit_file(tmp_path, text)
    assert container_limit([tmp_path / "none", file]) == limit


def test_where_there_is_no_container_there_is_no_limit(tmp_path: Path) -> None:
    assert container_limit([tmp_path / "none"]) is None


def test_settings_that_may_need_more_than_is_granted_are_refused() -> None:
    with pytest.raises(SettingsError) as refused:
        require_memory(PARTS, 999_999_999)
    [problem] = refused.value.problems
    assert problem.startswith(
        "memory_limit: at its most the server takes 1000 MB, of which there are 999: when warm 300 MB, caches 500 MB, "
        "calls 200 MB; grant more, or lower max_rows"
    )
    assert require_memory(PARTS, 1_000_000_000) == 1_000_000_000


def test_a_container_that_may_not_suffice_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = limit_file(tmp_path, "500000000")
    monkeypatch.setattr("beamline_server.memory.container_limit", lambda: container_limit([file]))
    with caplog.at_level(logging.INFO):
        assert require_memory(PARTS, None) == 1_000_000_000
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert vars(record)["limit"] == 500_000_000
    assert "of which there are 500" in record.getMessage()


def test_what_is_granted_is_told_with_its_parts(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        require_memory(PARTS, 1 << 40)
    [record] = caplog.records
    assert (vars(record)["event"], vars(record)["bytes"], vars(record)["parts"]) == ("memory_bound", 10**9, PARTS)


def test_each_setting_that_may_be_lowered_lowers_the_bound() -> None:
    def total(**changes: int) -> int:
        return sum(most_bytes_of_callers(Settings(**{"max_connections": 500, **changes})).values())  # type: ignore[arg-type]

    assert total(max_message_bytes=1 << 19) < total()
    assert total(max_queue_rows=16) < total()
    assert total(max_connections=10) < total()
