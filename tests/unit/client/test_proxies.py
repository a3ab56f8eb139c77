"""A server on this machine is reached directly; on the way to another, a proxy that fails is named."""

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import grpc
import pytest

from beamline.v1 import generation_pb2 as pb
from beamline_client import Client, DeadlineExceeded, Unavailable
from beamline_client.main import main
from beamline_client.proxies import NO_PROXY_VARIABLES, PROXY_VARIABLES, proxy_for
from beamline_client.testing import Failure, FakeServer, RecordingProxy

Call: TypeAlias = Callable[..., Any]

ELSEWHERE = "server.onion:8001"
"""By RFC 7686 gRPC's resolver knows, without asking anybody, that such a name has no address."""
UNREACHABLE = "233.252.0.7:8001"
"""For documentation, and multicast: no TCP connection to it leaves the machine, it fails at once."""


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[RecordingProxy]:
    """A proxy that every variable of the environment names."""
    with RecordingProxy() as running:
        for name, value in running.environment.items():
            monkeypatch.setenv(name, value)
        yield running


class TestOnThisMachine:
    @pytest.mark.parametrize("method", ["generate_one", "stream"])
    @pytest.mark.parametrize(
        "address", ["127.0.0.1:{}", "localhost:{}", "dns:///localhost:{}", "ipv4:127.0.0.1:{}", "0.0.0.0:{}"]
    )
    def test_a_server_is_called_directly(
        self, server: FakeServer, proxy: RecordingProxy, call: Call, method: str, address: str
    ) -> None:
        port = server.target.rpartition(":")[2]

        assert call(address.format(port), method, "x")
        assert proxy.requests == []

    @pytest.mark.parametrize("arguments", [[], ["--stream"]])
    def test_translate_calls_it_directly(
        self, server: FakeServer, proxy: RecordingProxy, arguments: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["translate", "x", "--server", server.target, *arguments]) == 0
        assert (capsys.readouterr().out, proxy.requests) == ("X\n", [])

    @pytest.mark.parametrize("arguments", [[], ["--retries"]])
    def test_load_calls_it_directly(
        self, server: FakeServer, proxy: RecordingProxy, arguments: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        line = ["--metrics", "off", "--concurrency", "1", "--duration", "0.2s", "--warm-up", "0s", "--workers", "2"]

        main(["load", "--server", server.target, *line, *arguments])

        assert "cannot" not in capsys.readouterr().err
        assert [call for call in server.calls if call.method == "Generate"]
        assert proxy.requests == []

    def test_nobody_there_is_not_the_proxys_fault(self, proxy: RecordingProxy, call: Call) -> None:
        with FakeServer() as stopped:
            target = stopped.target

        with pytest.raises(Unavailable) as failed:
            call(target, "generate_one", "x")

        assert "proxy" not in str(failed.value)
        assert "nothing listens there" in str(failed.value)


class TestElsewhere:
    def test_a_proxy_that_fails_is_named_with_the_way_round_it(self, proxy: RecordingProxy, call: Call) -> None:
        with pytest.raises(Unavailable) as failed:
            call(ELSEWHERE, "generate_one", "x")

        text = str(failed.value)
        assert f"through the proxy {proxy.address} of grpc_proxy" in text
        assert "add server.onion to no_grpc_proxy" in text
        assert "secret" not in text
        assert set(proxy.requests) == {f"CONNECT {ELSEWHERE} HTTP/1.1"}

    def test_waiting_in_vain_names_it_too(self, proxy: RecordingProxy, call: Call) -> None:
        with pytest.raises(Unavailable, match=f"through the proxy {proxy.address}"):
            call(ELSEWHERE, "wait_ready", 0.5)

    @pytest.mark.parametrize("command", ["translate", "load"])
    def test_commands_name_it_in_one_line(
        self, proxy: RecordingProxy, command: str, capfd: pytest.CaptureFixture[str]
    ) -> None:
        arguments = ["x"] if command == "translate" else []
        status = main([command, "--server", ELSEWHERE, *arguments])

        (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("beamline ")]
        assert status == (1 if command == "translate" else 2)
        assert f"cannot reach a server at {ELSEWHERE}" in line
        assert f"through the proxy {proxy.address} of grpc_proxy" in line
        assert "secret" not in line

    def test_a_proxy_that_never_answers_is_named(self, monkeypatch: pytest.MonkeyPatch, call: Call) -> None:
        with FakeServer() as silent:  # it waits for more than a line of HTTP
            monkeypatch.setenv("http_proxy", f"http://{silent.target}")
            with pytest.raises((DeadlineExceeded, Unavailable), match=f"{silent.target} of http_proxy"):
                call(ELSEWHERE, "generate_one", "x", timeout_s=0.5)

    @pytest.mark.parametrize("method", ["generate_one", "stream"])
    def test_a_server_that_gives_up_is_not_the_proxys_fault(
        self, server: FakeServer, monkeypatch: pytest.MonkeyPatch, call: Call, method: str
    ) -> None:
        server.fail(Failure(grpc.StatusCode.DEADLINE_EXCEEDED, "the search took longer than 30 s"))
        with RecordingProxy(leads_to=server.target) as proxy:
            monkeypatch.setenv("http_proxy", f"http://{proxy.address}")
            with pytest.raises(DeadlineExceeded, match="took longer") as failed:
                call(ELSEWHERE, method, "x")

        assert failed.value.hint is None

    @pytest.mark.parametrize("first", ["info", "generate_one", "stream"])
    def test_a_server_that_has_answered_and_becomes_slow_is_not_the_proxys_fault(
        self, server: FakeServer, monkeypatch: pytest.MonkeyPatch, first: str
    ) -> None:
        with RecordingProxy(leads_to=server.target) as proxy:
            monkeypatch.setenv("http_proxy", f"http://{proxy.address}")
            with Client(ELSEWHERE) as client:
                answer = getattr(client, first)(*(() if first == "info" else ("x",)))
                list(answer) if first == "stream" else None
                server.generate = server.hang
                with pytest.raises(DeadlineExceeded) as failed:
                    client.generate_one("x", timeout_s=0.3)

        assert failed.value.hint is None

    def test_a_stream_that_stops_on_its_way_is_not_the_proxys_fault(
        self, server: FakeServer, monkeypatch: pytest.MonkeyPatch, call: Call
    ) -> None:
        def one_piece(_request: pb.GenerateStreamRequest, _context: grpc.ServicerContext) -> Iterator[Any]:
            yield pb.GenerateStreamResponse(piece=pb.Piece(text="X"))
            server.stopping.wait(10)

        server.stream = one_piece
        with RecordingProxy(leads_to=server.target) as proxy:
            monkeypatch.setenv("http_proxy", f"http://{proxy.address}")
            with pytest.raises(DeadlineExceeded) as failed:
                call(ELSEWHERE, "stream", "x", timeout_s=2.0)

        assert failed.value.hint is None

    def test_translate_does_not_blame_it_for_a_slow_server(
        self, server: FakeServer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        server.generate = server.hang
        with RecordingProxy(leads_to=server.target) as proxy:
            monkeypatch.setenv("http_proxy", f"http://{proxy.address}")
            assert main(["translate", "x", "--server", ELSEWHERE, "--timeout", "1"]) == 1

        err = capfd.readouterr().err
        assert "raise --timeout" in err
        assert "proxy" not in err.split("beamline translate: ", 1)[1]


@pytest.mark.parametrize(
    ("variables", "target", "proxied"),
    [
        ({"http_proxy": "http://{}"}, ELSEWHERE, True),
        ({"https_proxy": "http://{}"}, ELSEWHERE, True),
        ({"grpc_proxy": "http://{}"}, ELSEWHERE, True),
        ({"http_proxy": "http://{}/"}, ELSEWHERE, True),
        ({"http_proxy": "http://{}"}, f"dns:///{ELSEWHERE}", True),
        ({"HTTP_PROXY": "http://{}"}, ELSEWHERE, False),
        ({"all_proxy": "http://{}"}, ELSEWHERE, False),
        ({"http_proxy": "{}"}, ELSEWHERE, False),
        ({"http_proxy": "https://{}"}, ELSEWHERE, False),
        ({"https_proxy": "", "http_proxy": "http://{}"}, ELSEWHERE, False),
        ({"http_proxy": "http://{}", "no_proxy": ""}, ELSEWHERE, True),
        ({"http_proxy": "http://{}", "no_proxy": "a.example, server.onion"}, ELSEWHERE, False),
        ({"http_proxy": "http://{}", "no_proxy": ".ONION"}, ELSEWHERE, False),
        ({"http_proxy": "http://{}", "no_proxy": "*"}, ELSEWHERE, True),
        ({"http_proxy": "http://{}", "no_proxy": "server.onion:8001"}, ELSEWHERE, True),
        ({"http_proxy": "http://{}", "no_proxy": "onion", "no_grpc_proxy": "example"}, ELSEWHERE, True),
        ({"http_proxy": "http://{}", "no_grpc_proxy": "onion"}, ELSEWHERE, False),
        ({"http_proxy": "http://{}", "no_proxy": "233.252.0.0/24"}, UNREACHABLE, False),
        ({"http_proxy": "http://{}", "no_proxy": "233.252.1.0/24"}, UNREACHABLE, True),
        ({"http_proxy": "http://{}"}, "127.0.0.1:1", False),
        ({"http_proxy": "http://{}"}, "unix:///nowhere/socket", False),
    ],
)
def test_we_know_of_a_proxy_exactly_when_grpc_uses_it(
    variables: dict[str, str], target: str, proxied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (*PROXY_VARIABLES, *NO_PROXY_VARIABLES):
        monkeypatch.delenv(name, raising=False)
    with RecordingProxy() as proxy:
        for name, value in variables.items():
            monkeypatch.setenv(name, value.format(proxy.address))

        with Client(target) as client, pytest.raises(Unavailable):
            client.info(timeout_s=30.0)  # whoever is asked refuses at once

        assert (bool(proxy.requests), proxy_for(target) is not None) == (proxied, proxied)
