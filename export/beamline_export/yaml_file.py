"""Reads YAML mappings without trusting them: plain values alone."""

from typing import Any

import yaml

from beamline_export.spec import ExportError

# In C, where it is there: a second instead of ten for a vocabulary.
_TYPED: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TEXTS: Any = getattr(yaml, "CBaseLoader", yaml.BaseLoader)


def read_yaml(text: str, source: str, *, typed: bool = True) -> dict[str, Any]:
    """A mapping out of a YAML text; unless `typed`, every value and key in it is text, `on` and `1.0` as well.

    Raises:
        ExportError: it is none; `source` says what it is, in the message.
    """
    try:
        # Lists of aliases of lists of aliases, a few lines long, would fill any message, and any memory.
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, _TEXTS)):
            raise ExportError(f"{source} holds YAML aliases, which no such file needs; copy it again")
        data = yaml.load(text, _TYPED if typed else _TEXTS)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        told = " ".join(str(error).split())[:200]
        raise ExportError(f"{source} cannot be read as YAML ({told}); copy it again") from error
    if not isinstance(data, dict):
        raise ExportError(f"{source} holds no YAML mapping; copy it again")
    return data
