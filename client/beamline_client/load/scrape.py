"""What the server's /metrics page tells, once and every second of a run."""

import http.client
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import urlsplit

from prometheus_client.parser import text_string_to_metric_families

from beamline_client.address import GRPC_PORT, split_target
from beamline_client.load.report import ServerSample

METRICS_PORT = 8002
"""The server's default."""
LARGEST_PAGE_BYTES = 16 * 1024 * 1024
_SCRAPE_WITHIN_S = 1.0  # the end of a run waits no longer for a scrape that is under way
_ADVICE = "name the server's page with --metrics URL, or do without with --metrics off"


class MetricsUnreachable(Exception):
    """There is no Prometheus page at that address; the text is one line that says why and what to do."""


class Series(NamedTuple):
    """What identifies a value on the page."""

    name: str
    labels: frozenset[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Samples:
    """The values of a page."""

    values: Mapping[Series, float]

    def value(self, name: str, **labels: str) -> float | None:
        """The value of the series with exactly these labels; None if there is none."""
        return self.values.get(Series(name, frozenset(labels.items())))

    def total(self, name: str, **labels: str) -> float:
        """The sum over all series of this name that have these labels and any others; 0 without such series."""
        wanted = labels.items()
        return sum(value for series, value in self.values.items() if series.name == name and wanted <= series.labels)

    def by_label(self, name: str, label: str) -> dict[str, float]:
        """The sums over all series of this name, by the value of a label."""
        sums: dict[str, float] = {}
        for series, value in self.values.items():
            if series.name == name:
                key = dict(series.labels).get(label, "")
                sums[key] = sums.get(key, 0.0) + value
        return sums


def parse(text: str) -> Samples:
    """Reads a page in Prometheus' text format.

    Raises:
        ValueError: It is none, or it is empty.
    """
    values: dict[Series, float] = {}
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                values[Series(sample.name, frozenset(sample.labels.items()))] = float(sample.value)
    except Exception as error:  # the parser trusts its input: what it raises for another is not documented
        raise ValueError("not in Prometheus' text format") from error
    if not values:
        raise ValueError("without any values")
    return Samples(values)


def fetch(url: str, timeout_s: float = 5.0) -> Samples:
    """Reads a server's page. Goes there directly, whatever proxies the environment names.

    Raises:
        MetricsUnreachable: Nothing answers there in time, or what answers is no such page.
    """
    try:
        if urlsplit(url).scheme not in ("http", "https"):
            raise MetricsUnreachable(f"{url!r} is no address of metrics: write http://HOST:PORT/metrics")
        with _opener().open(url, timeout=timeout_s) as response:
            page = response.read(LARGEST_PAGE_BYTES + 1)
        if len(page) > LARGEST_PAGE_BYTES:
            raise ValueError("larger than any page of metrics")
        return parse(page.decode("utf-8", "replace"))
    except urllib.error.HTTPError as error:
        with error:  # it holds the connection
            raise MetricsUnreachable(f"{url} answers with HTTP status {error.code}: {_ADVICE}") from error
    except http.client.BadStatusLine as error:  # its text is what was sent, whatever that is
        raise MetricsUnreachable(f"what answers at {url} does not speak HTTP, perhaps gRPC: {_ADVICE}") from error
    except (OSError, http.client.HTTPException) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        words = " ".join(str(reason).split()) or type(reason).__name__
        raise MetricsUnreachable(f"no metrics at {url} ({words}): {_ADVICE}") from error
    except ValueError as error:
        raise MetricsUnreachable(f"{url} is no page of metrics ({error}): {_ADVICE}") from error


def _opener() -> urllib.request.OpenerDirector:
    opener = urllib.request.OpenerDirector()
    # Not build_opener: it adds proxies, redirects and schemes such as file.
    for handler in (
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener


def default_url(target: str) -> str | None:
    """Where the server at a gRPC target shows its metrics if its ports are the defaults; None if they are not."""
    split = split_target(target)
    if split is None or split.port != GRPC_PORT:
        return None
    return f"http://{split._replace(port=METRICS_PORT)}/metrics"


def restarted(before: Samples, after: Samples) -> bool:
    """Whether the server began anew between two scrapes, so that its counters cannot be subtracted."""
    started = [samples.value("process_start_time_seconds") for samples in (before, after)]
    return started[0] != started[1] or any(
        after.values.get(series, value) < value
        for series, value in before.values.items()
        if series.name.endswith(("_total", "_count"))
    )


def sample(before: Samples, after: Samples, at_s: float, seconds: float) -> ServerSample | None:
    """What happened between two scrapes.

    Args:
        before: The earlier page.
        after: The later page.
        at_s: When the later one was read, from the start of the run.
        seconds: How long after the earlier one.

    Returns:
        None if the server was restarted in between, or is not Beamline's.
    """
    queued, running = after.value("beamline_queued_requests"), after.value("beamline_running_rows")
    if queued is None or running is None or restarted(before, after):
        return None

    def grown(name: str, **labels: str) -> float:
        return after.total(name, **labels) - before.total(name, **labels)

    def mean(name: str) -> float | None:
        count = grown(f"{name}_count", kind="decode")
        return grown(f"{name}_sum", kind="decode") / count if count else None

    step_s = mean("beamline_step_duration_seconds")
    return ServerSample(
        at_s=at_s,
        rows_per_step=mean("beamline_step_rows"),
        step_ms=None if step_s is None else step_s * 1000,
        queued_requests=queued,
        running_rows=running,
        requests_per_s=grown("beamline_requests_total") / seconds,
    )


class Scraper:
    """Reads the page at each whole second of a run, from a thread of its own.

    A scrape that fails leaves a gap: the next sample covers the time since the last one that did not.

    Args:
        url: The page.
        clock: Monotonic seconds.
        read: Reads the page; raises `MetricsUnreachable`.
        wait: Waits so many seconds; returns early with True when the run has ended.
        prepare: Called once on the thread, before its first scrape.
    """

    def __init__(
        self,
        url: str,
        clock: Callable[[], float],
        *,
        read: Callable[[str, float], Samples] = fetch,
        wait: Callable[[float], bool] | None = None,
        prepare: Callable[[], None] | None = None,
    ) -> None:
        self._prepare = prepare
        self.failed = 0
        """Scrapes that failed so far."""
        self._url = url
        self._clock = clock
        self._read = read
        self._stopping = threading.Event()
        self._wait = self._stopping.wait if wait is None else wait
        self._samples: list[ServerSample] = []
        self._thread: threading.Thread | None = None

    def start(self, began: float) -> None:
        """Begins to scrape; `began` is the start of the run on the clock, now or soon."""
        self._thread = threading.Thread(target=self._run, args=(began,), name="scraper", daemon=True)
        self._thread.start()

    def stop(self) -> tuple[ServerSample, ...]:
        """Ends it at once, or with the scrape that is under way; returns what was seen."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()
        return tuple(self._samples)

    def _run(self, began: float) -> None:
        if self._prepare is not None:
            self._prepare()
        before: Samples | None = None
        before_s = 0.0
        for now_s in self._whole_seconds(began):
            try:
                after = self._read(self._url, _SCRAPE_WITHIN_S)
            except MetricsUnreachable:
                self.failed += 1
                continue
            if before is not None:
                seen = sample(before, after, now_s, now_s - before_s)
                if seen is not None:
                    self._samples.append(seen)
            before, before_s = after, now_s

    def _whole_seconds(self, began: float) -> Iterator[float]:
        """Waits for second 0, 1, … of the run and yields the time from its start; leaves out those that are over."""
        second = 0
        while True:
            now_s = self._clock() - began
            if now_s >= second:
                yield now_s
                now_s = self._clock() - began
                second = int(now_s) + 1
            if self._wait(max(0.0, second - now_s)):
                return
