"""What the server tells of itself before, during and after a run: its metrics, and whether the books balance."""

import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass

from beamline_client.load import scrape
from beamline_client.load.aside import stand_aside
from beamline_client.load.books import balance, settled
from beamline_client.load.report import Books, ServerSample
from beamline_client.load.target import Outcome

_SETTLED_WITHIN_S = 2.0
_LOOK_EVERY_S = 0.1


@dataclass(frozen=True, slots=True)
class Seen:
    """What the server's metrics told."""

    samples: tuple[ServerSample, ...] = ()
    books: Books | None = None
    retries: int | None = None
    remarks: tuple[str, ...] = ()


class Watch:
    """Reads the server's metrics before, during and after a run; without a URL it sees nothing."""

    def __init__(self, url: str | None, *, is_aside: bool) -> None:
        """With `is_aside`, scraping lets the generator go first."""
        self._url = url
        prepare = stand_aside if is_aside else None
        self._scraper = None if url is None else scrape.Scraper(url, time.monotonic, prepare=prepare)
        self._before: scrape.Samples | None = None

    def __enter__(self) -> "Watch":
        if self._url is not None:
            with contextlib.suppress(scrape.MetricsUnreachable):
                self._before = scrape.fetch(self._url)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._scraper is not None:
            self._scraper.stop()

    def start(self, began: float) -> None:
        """The run begins: `began` is its zero on `time.monotonic`."""
        if self._scraper is not None:
            self._scraper.start(began)

    def finish(self, outcomes: Mapping[Outcome, int], *, retries: bool) -> Seen:
        """The run has ended with these outcomes of ours; `retries` is whether gRPC sent calls again by itself."""
        if self._scraper is None or self._url is None:
            return Seen()
        samples = self._scraper.stop()
        remarks = []
        if self._scraper.failed:
            remarks.append(f"{self._scraper.failed} readings of the server's metrics failed")
        try:
            after = self._when_settled(self._url)
        except scrape.MetricsUnreachable as error:
            return Seen(samples, remarks=(*remarks, f"the books could not be compared: {error}"))
        if self._before is None:
            return Seen(samples, remarks=(*remarks, "the books could not be compared: no metrics before the run"))
        seen_again = after.total("beamline_retries_seen_total") - self._before.total("beamline_retries_seen_total")
        books = balance(outcomes, self._before, after, retries=retries)
        ends = time.monotonic() + _SETTLED_WITHIN_S
        while not books.balanced and time.monotonic() < ends:  # an end is counted just after its answer has gone out
            time.sleep(_LOOK_EVERY_S)
            with contextlib.suppress(scrape.MetricsUnreachable):
                books = balance(outcomes, self._before, scrape.fetch(self._url), retries=retries)
        return Seen(samples, books, max(int(seen_again), 0), tuple(remarks))  # a server that restarted counts anew

    def _when_settled(self, url: str) -> scrape.Samples:
        """The metrics once the server has nothing in work, or soon."""
        ends = time.monotonic() + _SETTLED_WITHIN_S
        while not settled(samples := scrape.fetch(url)) and time.monotonic() < ends:
            time.sleep(_LOOK_EVERY_S)
        return scrape.fetch(url) if settled(samples) else samples  # counters are read before gauges: once more
