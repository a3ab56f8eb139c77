"""The languages that a request names: whether the model has them, and what they come to."""

from collections.abc import Iterator, Sequence

from beamline.v1 import generation_pb2 as pb
from beamline_server.engine.errors import Violation
from beamline_server.languages import Marks, ModelLanguages, Side, near_names

_MOST_LISTED = 10

Request = pb.GenerateRequest | pb.GenerateStreamRequest
NamedInput = tuple[str, pb.Input]
"""An input and its path in the request."""


class LanguageReader:
    """Reads the languages of requests for one model.

    Args:
        languages: The model's.
    """

    def __init__(self, languages: ModelLanguages) -> None:
        self._languages = languages
        self._none = languages.marks()
        self._has_any = any(languages.names.values())

    def read(self, request: Request, inputs: Sequence[NamedInput], violations: list[Violation]) -> Marks:
        """What the languages of a request come to; the defaults where there are violations."""
        source = request.source_language if request.HasField("source_language") else None
        target = request.target_language if request.HasField("target_language") else None
        if source is None and target is None and not self._has_any:  # most requests
            return self._none
        problems = [*self._problems("source", source, inputs), *self._problems("target", target, inputs)]
        violations += problems
        return self._none if problems else self._languages.marks(source, target)

    def _problems(self, side: Side, name: str | None, inputs: Sequence[NamedInput]) -> Iterator[Violation]:
        found = self._missing(side, inputs) if name is None else self._wrong(side, name, inputs)
        if found is not None:
            yield Violation(f"{side}_language", found)

    def _missing(self, side: Side, inputs: Sequence[NamedInput]) -> str | None:
        """Why a language has to be named, if it has: what is given as ids has it already."""
        if side not in self._languages.needed or not any(self._takes(side, entry) for _, entry in inputs):
            return None
        return f"is missing, and the model has no default; expected {_listed(self._languages.names[side])}"

    def _takes(self, side: Side, entry: pb.Input) -> bool:
        """Whether something is made of an input's language."""
        return not self._ids_of(side, "", entry)

    def _wrong(self, side: Side, name: str, inputs: Sequence[NamedInput]) -> str | None:
        """What is wrong with a language that is named, if anything."""
        known = self._languages.names[side]
        if not known:
            what = f"takes no {side} language" if self._has_any else "takes no languages"
            return f"is {_quoted(name)}, but the model {what}; leave it out"
        if name not in known:
            near = near_names(name, known)
            meant = f"did you mean {' or '.join(near)}?" if near else f"expected {_listed(known)}"
            return f"is {_quoted(name)}, which is no {side} language of the model; {meant}"
        given = next(filter(None, (self._ids_of(side, path, entry) for path, entry in inputs)), None)
        if given is not None:
            return f"is {_quoted(name)}, but {given} has ids, which are taken as they are; give text, or leave it out"
        return None

    def _ids_of(self, side: Side, path: str, entry: pb.Input) -> str | None:
        """Where an input has ids in whose place its language would be, if it has."""
        if side == "source" or self._languages.target_stands_in_source:
            return f"{path}.token_ids" if entry.HasField("token_ids") else None
        begun = self._languages.forces_first and entry.HasField("target_prefix")
        return f"{path}.target_prefix.token_ids" if begun and entry.target_prefix.HasField("token_ids") else None


def _quoted(name: str) -> str:
    return repr(name if len(name) <= 64 else f"{name[:64]}…")


def _listed(names: Sequence[str]) -> str:
    if len(names) <= _MOST_LISTED:
        return f"one of {', '.join(names)}"
    return f"one of the {len(names)} that GetInfo lists, such as {', '.join(names[:3])}"
