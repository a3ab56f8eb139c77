"""What addresses of servers say, and what a person is told who has written none."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beamline_client import AsyncClient, Client
from beamline_client.address import AddressUnusable, endpoints, is_on_this_machine, split_target
from beamline_client.main import main


@pytest.mark.parametrize(
    ("target", "found"),
    [
        ("host:8001", [("host", 8001)]),
        ("[::1]:8001", [("::1", 8001)]),
        ("dns:8001", [("dns", 8001)]),
        ("dns:host:8001", [("host", 8001)]),
        ("dns:///host:8001", [("host", 8001)]),
        ("dns://8.8.8.8/host:8001", [("host", 8001)]),
        ("ipv4:10.0.0.1:8001", [("10.0.0.1", 8001)]),
        ("ipv4:10.0.0.1:8001,10.0.0.2:8002", [("10.0.0.1", 8001), ("10.0.0.2", 8002)]),
        ("ipv6:[::1]:8001", [("::1", 8001)]),
        ("unix:/run/beamline.sock", []),
        ("unix:///run/beamline.sock", []),
        ("xds:///service", []),
    ],
)
def test_targets_name_hosts_and_ports(target: str, found: list[tuple[str, int]]) -> None:
    assert endpoints(target) == found
    assert split_target(target) == (found[0] if len(found) == 1 else None)


WRONG = [
    ("", "is empty: write HOST:PORT, such as localhost:8001"),
    (" ", "is empty"),
    ("localhost", "localhost names no port: write localhost:8001, or another port"),
    ("localhost:", "write localhost:8001"),
    ("dns:///localhost", "write localhost:8001"),
    ("[::1]", "write [::1]:8001"),
    ("localhost:0", "localhost:0 has no such port: ports are 1 to 65535"),
    ("localhost:65536", "ports are 1 to 65535"),
    ("localhost:-1", "ports are 1 to 65535"),
    ("localhost:grpc", "ports are 1 to 65535"),
    ("localhost:8001/metrics", "ports are 1 to 65535"),
    (":8001", ":8001 names no host: write HOST:PORT"),
    ("local host:8001", "names no host"),
    ("http://localhost:8001", "is a URL: write the host and the port of gRPC alone, such as localhost:8001"),
    ("https://host/path", "such as host:8001"),
    ("grpc://host:9000", "such as host:9000"),
    ("::1", "write [::1]:8001"),
    ("::1:8001", "write [::1]:8001"),
    ("fe80::2:1%eth0", "write [fe80::2:1%eth0]:8001"),
    ("host:8001:8002", "is no address: write HOST:PORT"),
    ("[host]:8001", "is no address"),
    ("[::1:8001", "is no address"),
]


@pytest.mark.parametrize(("target", "told"), WRONG)
def test_what_is_no_address_is_told_with_one_that_is(target: str, told: str) -> None:
    with pytest.raises(AddressUnusable) as caught:
        endpoints(target)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
    assert split_target(target) is None


@pytest.mark.parametrize("target", ["http://localhost:8001", "localhost"])
async def test_a_client_is_not_made_for_it(target: str) -> None:
    with pytest.raises(ValueError, match="localhost:8001"):
        Client(target)
    with pytest.raises(ValueError, match="localhost:8001"):
        AsyncClient(target)


@pytest.mark.parametrize(("target", "told"), [pair for pair in WRONG if "\n" not in pair[0]])
def test_translate_tells_it_in_one_line(target: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["translate", "x", "--server", target]) == 2

    err = capsys.readouterr().err
    assert err.startswith("beamline translate: --server: ")
    assert told in err
    assert err.count("\n") == 1


@given(st.text())
def test_any_target_splits_or_does_not(target: str) -> None:
    split = split_target(target)

    assert split is None or (split.host and 0 < split.port < 65536)


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "127.8.9.10", "localhost", "LocalHost", "localhost.", "a.localhost", "0.0.0.0", "[::1]", "[::]"],
)
def test_hosts_on_this_machine(host: str) -> None:
    assert is_on_this_machine(f"{host}:8001")
    assert is_on_this_machine(f"dns:///{host}:8001")


def test_ipv4_written_as_ipv6_is_on_this_machine() -> None:
    assert is_on_this_machine("[::ffff:127.0.0.1]:8001")
    assert not is_on_this_machine("[::ffff:10.0.0.1]:8001")


@pytest.mark.parametrize("target", ["unix:socket", "unix:///run/socket", "unix-abstract:name"])
def test_sockets_are_on_this_machine(target: str) -> None:
    assert is_on_this_machine(target)


@pytest.mark.parametrize(
    "target",
    [
        "10.0.0.1:8001",
        "128.0.0.1:8001",
        "localhost.example:8001",
        "notlocalhost:8001",
        "[::2]:8001",
        "[fe80::1]:8001",
        "ipv4:127.0.0.1:8001,10.0.0.1:8001",
        "xds:///localhost:8001",
        "localhost",
        "http://localhost:8001",
    ],
)
def test_others_are_elsewhere(target: str) -> None:
    assert not is_on_this_machine(target)
