"""The languages of a model: what a request that names some puts around a source, and what its target begins with."""

import difflib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from beamline_server import bounds

Side = Literal["source", "target"]

_LIKENESS = 0.7  # from which on a name may be meant by another one
_MOST_SHOWN = 3


class Language(bounds.Model):
    """A language in a manifest: its code, an id, and on which sides requests can name it."""

    token: bounds.TokenId
    source: bool = False
    target: bool = False


class Languages(bounds.Model):
    """The languages in a manifest.

    Attributes:
        codes: By the names that users give.
        source_marked: What is put around the text of a source: nothing; the code of its language, `source_before` all
            else (mBART-50, M2M100, NLLB) or `source_after` its end of sequence (mBART, PLBart); or the code of the
            target's language, `target_before` all else (OPUS-MT).
        target_begins: What the code of the target's language is: the first token that is generated, `forced_first`
            (mBART-50, M2M100, NLLB), the decoder's first input, `decoder_start` (mBART, PLBart), or neither. Without
            a language in a request, the manifest's `special_tokens` say it, as for any model.
        default_source: The language of a source whose request names none.
    """

    codes: Annotated[dict[bounds.LanguageName, Language], Field(min_length=1, max_length=bounds.MOST_LANGUAGES)]
    source_marked: Literal["none", "source_before", "source_after", "target_before"] = "none"
    target_begins: Literal["none", "forced_first", "decoder_start"] = "none"
    default_source: bounds.LanguageName | None = None

    @property
    def marks_sources(self) -> bool:
        """Whether the code of its own language stands beside the text of a source."""
        return self.source_marked in ("source_before", "source_after")

    @property
    def begins_targets(self) -> bool:
        """Whether the code of its language stands at the beginning of a target."""
        return self.target_begins != "none"

    @property
    def ids(self) -> frozenset[int]:
        """All codes."""
        return frozenset(code.token for code in self.codes.values())

    @property
    def marks_targets(self) -> bool:
        """Whether the code of the target's language stands anywhere."""
        return self.source_marked == "target_before" or self.begins_targets

    def problems(self, source_vocabulary: int, target_vocabulary: int, eos: Collection[int]) -> Iterator[str]:
        """What contradicts itself, or what else is known of the model."""
        in_target = self.begins_targets
        if len(self.ids) < len(self.codes):
            yield "languages: some have one code"
        for name, code in self.codes.items():
            if code.source > self.marks_sources or code.target > self.marks_targets:
                yield f"languages: {name} can be named, but nothing is marked with it"
            if (code.source or not in_target) and code.token >= source_vocabulary:
                yield f"languages: {code.token} is outside the source vocabulary of {source_vocabulary}"
            if code.target and in_target and code.token >= target_vocabulary:
                yield f"languages: {code.token} is outside the target vocabulary of {target_vocabulary}"
            if code.token in eos:
                yield f"languages: the code of {name} ends the sequence"
        default = self.default_source
        if default is not None and not (default in self.codes and self.codes[default].source):
            yield f"languages: default_source {default} is no source language"


@dataclass(frozen=True, slots=True)
class Around:
    """Ids of languages around the text of a source.

    Attributes:
        before: In front of all else.
        after: Behind all else, the end of sequence too.
    """

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()


NOTHING_AROUND = Around()


@dataclass(frozen=True, slots=True)
class Marks:
    """What the languages of a request come to.

    Attributes:
        around: What stands around the text of each source.
        decoder_start: The decoder's first input; None is the model's.
        forced_first: The first token that is generated; None is the model's.
    """

    around: Around = NOTHING_AROUND
    decoder_start: int | None = None
    forced_first: int | None = None


class ModelLanguages:
    """The languages that requests for a model can name.

    Args:
        described: In its manifest; None for a model without languages.
        forced_bos: The first token that the model forces by itself.
        decoder_start: The model's own decoder start.

    Attributes:
        names: Of each side, in the manifest's order; none for a side that no request can name a language of.
        default: The language of each side that a request without one gets.
        needed: The sides that every request has to name a language of.
    """

    def __init__(self, described: Languages | None, *, forced_bos: int | None, decoder_start: int) -> None:
        self._codes: Mapping[str, Language] = {} if described is None else described.codes
        self._marked = "none" if described is None else described.source_marked
        self._begins = "none" if described is None else described.target_begins
        self.names: Mapping[Side, tuple[str, ...]] = {
            "source": tuple(name for name, code in self._codes.items() if code.source),
            "target": tuple(name for name, code in self._codes.items() if code.target),
        }
        own = {"forced_first": forced_bos, "decoder_start": decoder_start}.get(self._begins)
        target = next((name for name in self.names["target"] if own == self._codes[name].token), None)
        source = None if described is None else described.default_source
        self.default: Mapping[Side, str | None] = {"source": source, "target": target}
        # A first token that is forced and no language is the model's own way to begin.
        begins = self.starts_decoder or (self.forces_first and forced_bos is None)
        needs = {"source": described is not None and described.marks_sources, "target": begins}
        self.needed = frozenset(side for side in self.names if needs[side] and self.default[side] is None)

    @property
    def ids(self) -> frozenset[int]:
        """The ids of all languages."""
        return frozenset(code.token for code in self._codes.values())

    @property
    def ends_sources(self) -> bool:
        """Whether a language stands behind the end of a source."""
        return self._marked == "source_after"

    @property
    def target_stands_in_source(self) -> bool:
        """Whether the target's language is put before the text of a source."""
        return self._marked == "target_before"

    @property
    def forces_first(self) -> bool:
        """Whether the target's language is the first token that is generated."""
        return self._begins == "forced_first"

    @property
    def starts_decoder(self) -> bool:
        """Whether the target's language is the decoder's first input."""
        return self._begins == "decoder_start"

    def marks(self, source: str | None = None, target: str | None = None) -> Marks:
        """What these languages come to, each of its side; None is the default."""
        source = self.default["source"] if source is None else source
        before: tuple[int, ...] = ()
        after: tuple[int, ...] = ()
        if source is not None and self._marked == "source_before":
            before = (self._codes[source].token,)
        elif source is not None and self.ends_sources:
            after = (self._codes[source].token,)
        elif target is not None and self.target_stands_in_source:
            before = (self._codes[target].token,)
        token = None if target is None else self._codes[target].token
        return Marks(
            Around(before, after),
            token if self.starts_decoder else None,
            token if self.forces_first else None,
        )

    def code_before_prefix(self, marks: Marks) -> tuple[int, ...]:
        """What stands before the text that a target begins with: the language that would be forced without it."""
        if not self.forces_first:
            return ()
        if marks.forced_first is not None:
            return (marks.forced_first,)
        default = self.default["target"]
        return () if default is None else (self._codes[default].token,)


def near_names(name: str, known: Iterable[str]) -> list[str]:
    """The few known names that were probably meant: `fr_XX` by `fr`, `fra_Latn` by `FRA`, `fra` by `>>fra<<`.

    A name that is longer than any gets none: to compare it would take long.
    """
    if len(name) > bounds.LONGEST_LANGUAGE:
        return []
    names = {known_name.casefold(): known_name for known_name in known}
    given = name.casefold().strip("<>_ ").replace("-", "_")
    same_language = [key for key in names if _language(key) == _language(given)]
    begun = [key for key in names if len(given) > 1 and key.startswith(given)]
    like = difflib.get_close_matches(given, list(names), n=_MOST_SHOWN, cutoff=_LIKENESS)
    return [names[key] for key in same_language or begun or like][:_MOST_SHOWN]


def _language(name: str) -> str:
    """The language of a name, without script or country."""
    return name.split("_", maxsplit=1)[0]
