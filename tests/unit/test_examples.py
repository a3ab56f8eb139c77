"""Examples of Python, in the documentation and in docstrings: they are Python."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest

REPOSITORY = Path(__file__).parents[2]
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
SOURCES = [
    path
    for folder in ("server", "client", "export", "benchmarks", "models")
    for path in sorted((REPOSITORY / folder).rglob("*.py"))
]
FENCED = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
BEGINS_LIKE_CODE = re.compile(
    r"(async with|with|for|def|async def|class)\b.*:$|from \S+ import |import \S+$|\w+ = \w+\("
)
DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def fenced(page: Path) -> Iterator[str]:
    yield from FENCED.findall(page.read_text("utf-8"))


def examples(path: Path) -> Iterator[str]:
    """The paragraphs of a file's docstrings that begin as code does."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, DOCUMENTED) and (text := ast.get_docstring(node)):
            paragraphs = map(dedent, re.split(r"\n[ ]*\n", text))
            yield from (each for each in paragraphs if BEGINS_LIKE_CODE.match(each.partition("\n")[0]))


FOUND = [
    *((path.relative_to(REPOSITORY).as_posix(), example) for path in PAGES for example in fenced(path)),
    *((path.relative_to(REPOSITORY).as_posix(), example) for path in SOURCES for example in examples(path)),
]


@pytest.mark.parametrize(("origin", "example"), FOUND, ids=[origin for origin, _ in FOUND])
def test_an_example_is_valid_python(origin: str, example: str) -> None:
    compile(example, origin, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


def test_examples_are_found() -> None:
    origins = {origin for origin, _ in FOUND}
    assert {"README.md", "server/beamline_server/process.py"} <= origins
