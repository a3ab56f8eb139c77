"""Search settings in a config.json of ours: under `generation`, or beside the config's own keys."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from beamline_export.checkpoint import Fields
from beamline_export.known_settings import GENERATION


def read_settings(
    fields: Fields, data: Mapping[str, Any], neutral: Collection[str], meant: Mapping[str, str] | None = None
) -> Mapping[str, Any]:
    """What stands in `generation` and beside it, where no key but the config's own and those of `generate` may be.

    Asks for the last of the config's own keys.

    Args:
        fields: Reads `data`; collects what is wrong.
        data: The config.
        neutral: Keys without effect.
        meant: As in `Fields.refuse_unasked`.
    """
    own = fields.mapping("generation")
    inner = Fields(own, "generation")
    fields.refuse_unasked(GENERATION.keys() | set(neutral), meant=meant)
    inner.refuse_unasked(GENERATION.keys(), "generation: ")
    fields.problems.extend([*inner.problems, *_told_twice(own, data)])
    return {**data, **own}


def _told_twice(generation: Mapping[str, Any], data: Mapping[str, Any]) -> Iterator[str]:
    for name in generation.keys() & data.keys():
        if generation[name] != data[name]:
            yield f"{name} is {data[name]!r} at the top level and {generation[name]!r} in generation; keep one"
