"""Reading the server's metrics: the page that the server itself writes, on a clock that the test holds."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest

from beamline_client.load.scrape import (
    MetricsUnreachable,
    Samples,
    Scraper,
    Series,
    default_url,
    fetch,
    parse,
    restarted,
    sample,
)
from beamline_client.testing import FakeServer
from beamline_server.engine.workers import EngineLoad
from beamline_server.metrics import Metrics, Outcome
from beamline_server.metrics_server import MetricsServer

DIGITS = st.integers(0, 10**6)


class Server:
    """A server's metrics without the server."""

    def __init__(self) -> None:
        self.metrics = Metrics(CollectorRegistry())
        self.load = EngineLoad(0, 0, 0, 0, 64, 512, None)
        self.metrics.watch_load(lambda: self.load, clock=lambda: 0.0)

    def samples(self) -> Samples:
        return parse(generate_latest(self.metrics.registry).decode())


class Answer(BaseHTTPRequestHandler):
    """What the test says, to everyone."""

    status = 200
    page = b""

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.send_header("Location", "/elsewhere")
        self.end_headers()
        self.wfile.write(self.page)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def answering(status: int, page: bytes) -> Iterator[str]:
    handler = type("Handler", (Answer,), {"status": status, "page": page})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/metrics"
        server.shutdown()
        thread.join()


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port that is taken and that nothing listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


def test_a_series_is_found_by_its_name_and_all_its_labels(server: Server) -> None:
    server.metrics.request_ended(Outcome.OK, 0.1)
    server.metrics.request_ended(Outcome.OK, 0.1)
    server.metrics.request_ended(Outcome.QUEUE_FULL, 0.1)

    samples = server.samples()

    assert samples.value("beamline_requests_total", outcome="ok") == 2
    assert samples.value("beamline_requests_total") is None
    assert samples.value("no_such_series") is None
    assert samples.total("beamline_requests_total") == 3
    assert samples.total("beamline_requests_total", outcome="queue_full") == 1
    assert samples.total("no_such_series") == 0
    assert samples.by_label("beamline_requests_total", "outcome") == dict.fromkeys(Outcome, 0.0) | {
        "ok": 2.0,
        "queue_full": 1.0,
    }


@given(st.text())
def test_any_text_is_a_page_or_refused(text: str) -> None:
    with suppress(ValueError):
        assert parse(text).values


@pytest.mark.parametrize("text", ["", "# only a comment\n", "<html><body>It works!</body></html>", '{"status": "ok"}'])
def test_other_pages_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"not in Prometheus' text format|without any values"):
        parse(text)


def test_the_servers_own_page_is_read_over_http(server: Server) -> None:
    server.metrics.retry_seen()
    with MetricsServer(server.metrics.registry, "127.0.0.1", 0) as page:
        assert fetch(f"http://127.0.0.1:{page.port}/metrics").value("beamline_retries_seen_total") == 1


def test_proxies_of_the_environment_are_not_asked(
    server: Server, closed_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{closed_port}")
    monkeypatch.setenv("no_proxy", "")
    with MetricsServer(server.metrics.registry, "127.0.0.1", 0) as page:
        assert fetch(f"http://127.0.0.1:{page.port}/metrics").values


def test_where_nothing_listens_there_are_no_metrics(closed_port: int) -> None:
    with pytest.raises(MetricsUnreachable, match=r"^no metrics at http://.* \(.*refused\): .*--metrics off$"):
        fetch(f"http://127.0.0.1:{closed_port}/metrics")


@pytest.mark.parametrize(
    ("status", "page", "words"),
    [
        (200, b"<html>It works!</html>", "is no page of metrics"),
        (200, b"\xff\xfe\x00", "is no page of metrics"),
        (200, b"", "is no page of metrics"),
        (404, b"requests 1\n", "answers with HTTP status 404"),
        (302, b"requests 1\n", "answers with HTTP status 302"),
    ],
)
def test_what_answers_something_else_is_no_page(status: int, page: bytes, words: str) -> None:
    with answering(status, page) as url, pytest.raises(MetricsUnreachable, match=f"{words}.*--metrics off$"):
        fetch(url)


def test_what_does_not_speak_http_is_no_page() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def greet() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"PRI * nonsense\r\n\r\n")

        thread = threading.Thread(target=greet)
        thread.start()
        with pytest.raises(MetricsUnreachable, match="does not speak HTTP"):
            fetch(f"http://127.0.0.1:{listener.getsockname()[1]}/metrics")
        thread.join()


def test_the_port_of_grpc_is_no_page() -> None:
    with FakeServer() as server, pytest.raises(MetricsUnreachable) as caught:
        fetch(f"http://{server.target}/metrics")
    assert "does not speak HTTP, perhaps gRPC: name the server's page with --metrics URL" in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "url", ["", "localhost:8002", "file:///etc/hostname", "ftp://host/metrics", "http://[::1", "http://", "http://a b/"]
)
def test_what_is_no_address_is_one_clear_line(url: str) -> None:
    with pytest.raises(MetricsUnreachable) as caught:
        fetch(url)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("target", "url"),
    [
        ("host:8001", "http://host:8002/metrics"),
        ("127.0.0.1:8001", "http://127.0.0.1:8002/metrics"),
        ("[::1]:8001", "http://[::1]:8002/metrics"),
        ("dns:host:8001", "http://host:8002/metrics"),
        ("dns:///host:8001", "http://host:8002/metrics"),
        ("dns://8.8.8.8/host:8001", "http://host:8002/metrics"),
        ("ipv4:10.0.0.1:8001", "http://10.0.0.1:8002/metrics"),
        ("ipv6:[::1]:8001", "http://[::1]:8002/metrics"),
        ("host:9001", None),
        ("host", None),
        ("ipv4:10.0.0.1:8001,10.0.0.2:8001", None),
        ("unix:/run/beamline.sock", None),
        ("unix:///run/beamline.sock", None),
        ("xds:///service", None),
        ("host:port", None),
        ("host:99999", None),
        ("[::1:8001", None),
        ("", None),
    ],
)
def test_the_default_address_is_the_neighbour_of_the_default_port(target: str, url: str | None) -> None:
    assert default_url(target) == url


def test_a_sample_tells_what_happened_between_two_scrapes(server: Server) -> None:
    server.metrics.stepped(1.0, 64, 16)
    server.metrics.request_ended(Outcome.OK, 0.1)
    before = server.samples()
    server.metrics.encoded(5.0, 100, 100, 100)
    server.metrics.stepped(0.002, 8, 2)
    server.metrics.stepped(0.004, 16, 4)
    for outcome in (Outcome.OK, Outcome.OK, Outcome.QUEUE_FULL):
        server.metrics.request_ended(outcome, 0.1)
    server.load = EngineLoad(3, 12, 4, 16, 64, 512, None)

    seen = sample(before, server.samples(), at_s=5.0, seconds=2.0)

    assert seen is not None
    assert seen.at_s == 5.0
    assert seen.rows_per_step == pytest.approx(12)
    assert seen.step_ms == pytest.approx(3)
    assert (seen.queued_requests, seen.running_rows) == (3, 16)
    assert seen.requests_per_s == 1.5


def test_without_steps_there_is_no_step_time(server: Server) -> None:
    seen = sample(server.samples(), server.samples(), at_s=1.0, seconds=1.0)

    assert seen is not None
    assert (seen.rows_per_step, seen.step_ms, seen.requests_per_s) == (None, None, 0)


def test_across_a_restart_there_is_no_sample(server: Server) -> None:
    server.metrics.request_ended(Outcome.OK, 0.1)
    before, after = server.samples(), Server().samples()

    assert restarted(before, after)
    assert not restarted(before, before)
    assert sample(before, after, at_s=1.0, seconds=1.0) is None


def test_a_process_that_started_later_is_another(server: Server) -> None:
    before = server.samples()
    started = Series("process_start_time_seconds", frozenset())

    assert restarted(before, Samples({**before.values, started: before.values[started] + 1}))


def test_another_programs_page_gives_no_samples() -> None:
    page = parse("node_load1 0.5\n")

    assert sample(page, page, at_s=1.0, seconds=1.0) is None


class Run:
    """A run of some seconds: waiting takes no time but the clock's, and each scrape what the test says."""

    def __init__(self, ends_s: float, *, scrape_takes_s: float = 0.0, failing: frozenset[int] = frozenset()) -> None:
        self.now_s = 100.0
        self.asked_s: list[float] = []
        self._ends_s = ends_s
        self._takes_s = scrape_takes_s
        self._failing = failing
        self._server = Server()

    def clock(self) -> float:
        return self.now_s

    def wait(self, seconds: float) -> bool:
        assert seconds >= 0
        self.now_s += seconds
        return self.now_s >= self._ends_s

    def read(self, url: str, timeout_s: float) -> Samples:
        number = len(self.asked_s)
        self.asked_s.append(self.now_s)
        self.now_s += self._takes_s
        if number in self._failing:
            raise MetricsUnreachable("not now")
        for _ in range(10):
            self._server.metrics.request_ended(Outcome.OK, 0.1)
        return self._server.samples()

    def scraper(self) -> Scraper:
        return Scraper("http://host/metrics", self.clock, read=self.read, wait=self.wait)


def test_scrapes_are_at_whole_seconds_of_the_run() -> None:
    run = Run(ends_s=104.0)
    scraper = run.scraper()

    scraper.start(100.5)
    samples = scraper.stop()

    assert run.asked_s == pytest.approx([100.5, 101.5, 102.5, 103.5])
    assert [seen.at_s for seen in samples] == pytest.approx([1, 2, 3])
    assert [seen.requests_per_s for seen in samples] == pytest.approx([10, 10, 10])
    assert scraper.failed == 0


def test_a_failed_scrape_is_a_gap_that_the_next_one_covers() -> None:
    scraper = Run(ends_s=105.0, failing=frozenset({2})).scraper()

    scraper.start(100.0)
    samples = scraper.stop()

    assert [seen.at_s for seen in samples] == pytest.approx([1, 3, 4])
    assert [seen.requests_per_s for seen in samples] == pytest.approx([10, 5, 10])
    assert scraper.failed == 1


def test_a_slow_scrape_leaves_seconds_out() -> None:
    run = Run(ends_s=107.0, scrape_takes_s=1.5)
    scraper = run.scraper()

    scraper.start(100.0)
    scraper.stop()

    assert run.asked_s == pytest.approx([100, 102, 104, 106])


def test_a_scraper_that_never_succeeds_still_stops() -> None:
    scraper = Run(ends_s=103.0, failing=frozenset(range(10))).scraper()

    scraper.start(100.0)

    assert scraper.stop() == ()
    assert scraper.failed == 3


def test_stopping_does_not_wait_for_the_next_second(closed_port: int) -> None:
    scraper = Scraper(f"http://127.0.0.1:{closed_port}/metrics", lambda: 0.0)

    scraper.start(3600.0)

    assert scraper.stop() == ()


def test_a_scraper_that_was_not_started_has_seen_nothing() -> None:
    assert Scraper("http://host/metrics", lambda: 0.0).stop() == ()
