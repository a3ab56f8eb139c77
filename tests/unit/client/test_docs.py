"""docs/api.md: what it says of the Python client is what there is, and its program runs."""

import inspect
import re
from pathlib import Path

import pytest
from google.protobuf import json_format

from beamline.v1 import generation_pb2 as pb
from beamline_client import AddressUnusable, AsyncClient, CallOptions, Client
from beamline_client.testing import FakeServer

PAGE = (Path(__file__).parents[3] / "docs" / "api.md").read_text("utf-8")
SECTION = PAGE.partition("## The Python client")[2].partition("\n## ")[0]


def first_column(header: str) -> set[str]:
    """The names in the first column of the section's table with this header."""
    [table] = re.findall(rf"^\| {header} \|.*\n\|[-|]+\n((?:\|.*\n)+)", SECTION, re.MULTILINE)
    return set(re.findall(r"^\| `(\w+)", table, re.MULTILINE))


def test_the_program_runs(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    [program] = re.findall(r"^```python\n(.*?)^```", SECTION, re.DOTALL | re.MULTILINE)

    exec(program.replace("localhost:8001", server.target), {})

    assert capsys.readouterr().out.startswith("BONJOUR. (")


def test_the_program_with_a_target_prefix_runs(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    section = PAGE.partition("## Target prefixes")[2].partition("\n## ")[0]
    [program] = re.findall(r"^```python\n(.*?)^```", section, re.DOTALL | re.MULTILINE)

    exec(program.replace("localhost:8001", server.target), {})

    assert capsys.readouterr().out == "I have JE NE SAIS PAS.\n"


def test_the_program_with_languages_runs(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    section = PAGE.partition("## Languages")[2].partition("\n## ")[0]
    [program] = re.findall(r"^```python\n(.*?)^```", section, re.DOTALL | re.MULTILINE)

    exec(program.replace("localhost:8001", server.target), {})

    assert capsys.readouterr().out == "JE NE SAIS PAS.\n"
    assert (server.requests()[0].source_language, server.requests()[0].target_language) == ("fra", "eng")


@pytest.mark.parametrize("body", re.findall(r"^grpcurl .*-d '(\{\"inputs\".*?)'", PAGE, re.MULTILINE))
def test_what_is_sent_from_a_shell_is_a_request(body: str) -> None:
    assert json_format.Parse(body, pb.GenerateRequest()).inputs


def test_all_options_and_methods_are_told_and_no_others() -> None:
    assert first_column("option") == CallOptions.__annotations__.keys()
    for face in (Client, AsyncClient):
        public = {name for name, _ in inspect.getmembers(face, inspect.isfunction) if not name.startswith("_")}
        assert first_column("method") == public


def test_what_a_client_is_made_with_is_told() -> None:
    assert "`AddressUnusable`" in SECTION
    assert issubclass(AddressUnusable, ValueError)
    for face in (Client, AsyncClient):
        _, *named = inspect.signature(face).parameters
        assert all(f"`{name}`" in SECTION for name in named)
