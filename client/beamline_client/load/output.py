"""What a run leaves behind: the report as JSON and as a page, the percentile spectrum, the log of requests."""

import gzip
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self, TextIO

from beamline_client.load import histograms
from beamline_client.load.html_page import html_page
from beamline_client.load.records import RECORD, Records
from beamline_client.load.report import FindMaxReport, RunReport, to_json
from beamline_client.load.target import Outcome

JSON_NAME, HTML_NAME, SPECTRUM_NAME = "report.json", "report.html", "latency.hgrm"
_TOLD = [name for name in RECORD.names or () if name != "answer"]


def write_report(report: RunReport | FindMaxReport, folder: Path) -> list[Path]:
    """Writes the report into a folder, which is made if need be; returns the files.

    Raises:
        OSError: It cannot be written.
    """
    folder.mkdir(exist_ok=True)
    texts = {JSON_NAME: to_json(report), HTML_NAME: html_page(report)}
    run = report if isinstance(report, RunReport) else report.best
    if run is not None and run.latency is not None:
        texts[SPECTRUM_NAME] = percentile_spectrum(run.latency.histogram)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in texts]


def percentile_spectrum(histogram: str) -> str:
    """The `.hgrm` text of an encoded histogram of microseconds, its values in milliseconds."""
    text = io.BytesIO()
    histograms.decoded(histogram).output_percentile_distribution(text, 1000.0)
    return text.getvalue().decode("ascii")


class RequestLog:
    """A CSV file with a line per request, in the order of their ends; gzip if its name ends so.

    Its column `intended_s` makes it a trace that `--trace` repeats. A disk that fills up ends the log, not the run.

    Raises:
        OSError: The file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.problem: str | None = None
        """Why the log is not complete; None if it is."""
        self._path = path
        binary = gzip.GzipFile(path, "wb", compresslevel=1) if path.suffix == ".gz" else path.open("wb")
        self._file: TextIO = io.TextIOWrapper(binary, encoding="ascii")  # closes what it wraps
        self._file.write(",".join(_TOLD) + "\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._noting():
            self._file.close()

    def write(self, records: Records) -> None:
        """Adds requests. Times are in seconds, to the microsecond; what is not known is empty."""
        if self.problem is None:
            columns = [_column(records, name) for name in _TOLD]
            with self._noting():
                self._file.writelines(",".join(row) + "\n" for row in zip(*columns, strict=True))

    @contextmanager
    def _noting(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.problem = f"the log of requests is not complete: {self._path}: {error.strerror}"


def _column(records: Records, name: str) -> list[str]:
    values = records[name].tolist()
    if name == "outcome":
        return [Outcome(value).label for value in values]
    if name.endswith("_s"):
        return ["" if value != value else f"{value:.6f}" for value in values]  # noqa: PLR0124 - nan differs from itself
    return [str(value) for value in values]
