"""Reads YAML mappings without trusting them: plain values alone, in time and memory that follow their size."""

from collections.abc import Iterator
from typing import Any

import yaml

from beamline_export.spec import ExportError

# In C, where it is there: a second instead of ten for a vocabulary.
_TYPED: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TEXTS: Any = getattr(yaml, "CBaseLoader", yaml.BaseLoader)
_DEEPEST, _LONGEST_SCALAR = 32, 4096


def read_yaml(text: str, source: str) -> dict[str, Any]:
    """A mapping out of a YAML text.

    Raises:
        ExportError: it is none; `source` says what it is, in the message.
    """
    try:
        for event in _events(text, source):
            if isinstance(event, yaml.ScalarEvent) and len(event.value) > _LONGEST_SCALAR:
                raise ExportError(f"{source} holds a value of {len(event.value):,} characters; copy it again")
        data = yaml.load(text, _TYPED)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise _unreadable(source, error) from error
    if not isinstance(data, dict):
        raise ExportError(f"{source} holds no YAML mapping; copy it again")
    return data


def read_yaml_texts(text: str, source: str) -> dict[str, str]:
    """A YAML mapping of texts to texts, `on` and `1.0` as well; errors are those of `read_yaml`."""
    found: dict[str, str] = {}
    key: str | None = None
    depth = 0
    try:
        for event in _events(text, source):
            if isinstance(event, yaml.ScalarEvent) and depth == 1:
                if key is None:
                    key = event.value
                else:
                    found[key], key = event.value, None
            elif isinstance(event, yaml.MappingStartEvent) and depth == 0:
                depth = 1
            elif isinstance(event, yaml.MappingEndEvent):
                depth = 0
            elif isinstance(event, (yaml.ScalarEvent, yaml.CollectionStartEvent)):
                raise ExportError(f"{source} holds no YAML mapping of texts; copy it again")
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise _unreadable(source, error) from error
    return found


def _events(text: str, source: str) -> Iterator[Any]:
    """What a text is made of, piece by piece, until something is in it that could take any time or memory.

    Lists of aliases of lists of aliases, a few lines long, would fill any memory; brackets in brackets take a time that
    grows with the square of their depth.
    """
    depth = 0
    for event in yaml.parse(text, _TEXTS):
        if isinstance(event, yaml.AliasEvent):
            raise ExportError(f"{source} holds YAML aliases, which no such file needs; copy it again")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            raise ExportError(f"{source} is nested more than {_DEEPEST} deep; copy it again")
        yield event


def _unreadable(source: str, error: Exception) -> ExportError:
    return ExportError(f"{source} cannot be read as YAML ({' '.join(str(error).split())[:200]}); copy it again")
