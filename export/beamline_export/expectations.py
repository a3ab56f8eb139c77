"""Reads what the user's own model answered: a file of JSON lines, one input and its output each.

An export compares the ONNX graphs with PyTorch, but both follow the same config.json: if that is wrong, they agree on
wrong outputs. Only outputs of the model itself tell (`beamline export --expect`).
"""

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from beamline.text_lines import NotText, TextLine, read_lines
from beamline_export.agreement import Tokens
from beamline_export.languages import default_around, require_default_target
from beamline_export.spec import ExportError
from beamline_server.bundle import Bundle
from beamline_server.engine.request import (
    MAX_BEAMS,
    MAX_LENGTH_PENALTY,
    EarlyStopping,
    LengthPenaltyKind,
    SearchOptions,
)
from beamline_server.likeness import did_you_mean
from beamline_server.manifest import GenerationDefaults, Manifest
from beamline_server.tokenizer import Tokenizer, load_tokenizer
from beamline_server.word_tokenizer import UnreadableText

MOST_LINES = 1000
"""Lines that a file may have, empty ones apart: a hundred settle whether a config is right."""

_MOST_LINE_BYTES = 1 << 20
_MOST_PROBLEMS = 8
_MOST_DIGITS = 18

_Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class Line(BaseModel):
    """One line of the file.

    Attributes:
        source: The input as text, or
        source_ids: as token ids, with what the model expects around a source.
        target: The output as text, or
        target_ids: as token ids, all of them but the decoder's start; with or without the end of sequence.
        logprobs: Natural log-probability of each of `target_ids`.
        beam_size: How the output was searched for: 1 is greedy.
        length_penalty: Of a beam search; by default the model's.
        max_new_tokens: Where the search ended at the latest; by default the model's.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    source: str | None = None
    source_ids: _Ids | None = None
    target: str | None = None
    target_ids: _Ids | None = None
    logprobs: list[float] | None = None
    beam_size: int = Field(default=1, ge=1, le=MAX_BEAMS)
    length_penalty: float | None = Field(default=None, ge=-MAX_LENGTH_PENALTY, le=MAX_LENGTH_PENALTY)
    max_new_tokens: int | None = Field(default=None, ge=1)

    def problems(self) -> Iterator[str]:
        """What contradicts itself although each field is valid."""
        for name in ("source", "target"):
            given = [key for key in (name, f"{name}_ids") if getattr(self, key) is not None]
            if len(given) != 1:
                yield f"give {name}_ids or {name}" + (", not both" if given else "")
            if not is_text(getattr(self, name)):
                yield f"{name} has half of a surrogate pair, which is no character; write the text as UTF-8"
        if self.logprobs is not None:
            yield from self._logprob_problems(self.logprobs)
        if self.length_penalty is not None and self.beam_size == 1:
            yield "length_penalty has no effect on a greedy search; give the beam_size as well, or leave it out"

    def _logprob_problems(self, logprobs: Sequence[float]) -> Iterator[str]:
        if self.target_ids is None:
            yield "logprobs belong to target_ids"
        elif len(logprobs) != len(self.target_ids):
            yield f"{len(logprobs)} logprobs for {len(self.target_ids)} target_ids; give one for each"
        if above := [value for value in logprobs if value > 1e-3]:
            yield f"logprobs has {above[0]:g}: natural logarithms of probabilities are not above 0"


def is_text(text: object) -> bool:
    """Whether a tokenizer can read it: JSON may escape what is no character."""
    whole = isinstance(text, str) and not any("\ud800" <= character <= "\udfff" for character in text)
    return text is None or whole


@dataclass(frozen=True, slots=True)
class Expectations:
    """What a file holds.

    Attributes:
        file: Where they are from.
        lines: Line number, from 1, and content of each.
    """

    file: Path
    lines: tuple[tuple[int, Line], ...]


@dataclass(frozen=True, slots=True)
class Example:
    """One line, as the model takes it.

    Attributes:
        line: Its number, from 1.
        source: Source ids.
        target: Ids of the output, its end of sequence there or not; None where `text` is given.
        text: Text of the output, or None.
        logprobs: Log-probability of each id of `target`; none if they were not given.
        options: The search that gave the output.
    """

    line: int
    source: Tokens
    target: Tokens | None
    text: str | None
    logprobs: tuple[float, ...]
    options: SearchOptions


def read_expectations(file: Path) -> Expectations:
    """Read the file; empty lines are skipped.

    Raises:
        ExportError: the file cannot be read, or names the lines that are not usable.
    """
    lines: list[tuple[int, Line]] = []
    problems: list[str] = []
    try:
        with file.open("rb") as stream:
            written = (line for line in read_lines(bounded_lines(stream, file)) if line.content.strip())
            for count, line in enumerate(written, 1):
                if count > MOST_LINES:
                    raise ExportError(f"{file} has more than {MOST_LINES:,} lines; a hundred settle it, leave some out")
                try:
                    lines.append((line.number, _parsed(line)))
                except NotText as error:
                    problems.append(f"line {line.number}: {error.problem}")
                except ValueError as error:
                    problems.append(f"line {line.number}: {error}")
    except OSError as error:
        raise ExportError(f"{file} cannot be read ({error.strerror}); give a file of JSON lines") from error
    _check(file, problems)
    if not lines:
        raise ExportError(f"{file} is empty; write some inputs and your model's outputs, a JSON object per line")
    return Expectations(file, tuple(lines))


def bounded_lines(stream: BinaryIO, file: Path) -> Iterator[bytes]:
    """The lines of a file as they stand there; ends at one that is too long to be read at all."""
    for number in itertools.count(1):
        raw = stream.readline(_MOST_LINE_BYTES + 1)
        if len(raw) > _MOST_LINE_BYTES:
            raise ExportError(f"{file}: line {number} is longer than {_MOST_LINE_BYTES:,} bytes; leave it out")
        if not raw:
            return
        yield raw


def _check(file: Path, problems: Sequence[str]) -> None:
    if problems:
        more = f"; and {len(problems) - _MOST_PROBLEMS} more" if len(problems) > _MOST_PROBLEMS else ""
        raise ExportError(f"{file}: {'; '.join(problems[:_MOST_PROBLEMS])}{more}")


def _parsed(text: TextLine) -> Line:
    """The line; raises ValueError with all that is wrong with it."""
    try:
        data = json.loads(text.text(), object_pairs_hook=_object, parse_int=_integer)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"is not JSON ({str(error)[:80]}); write one object per line") from error
    try:
        line = Line.model_validate(data)
    except ValidationError as error:
        raise ValueError(", ".join(_told(detail) for detail in error.errors()[:_MOST_PROBLEMS])) from error
    if problems := list(line.problems()):
        raise ValueError(", ".join(problems))
    return line


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("has a key twice")
    return found


def _integer(digits: str) -> int:
    """An integer of any use here; Python itself converts no very long ones."""
    count = len(digits.removeprefix("-"))
    if count > _MOST_DIGITS:
        raise ValueError(f"has an integer of {count:,} digits, which is no token id")
    return int(digits)


def _told(detail: Any) -> str:
    """A problem that pydantic found, in words."""
    if not detail["loc"]:
        return "is no JSON object: write one object per line"
    name = ".".join(str(part) for part in detail["loc"])[:60]
    if detail["type"] == "extra_forbidden":
        return f"{name!r} is unknown" + (did_you_mean(name, _KEYS) or f"; known: {', '.join(_KEYS)}")
    return f"{name}: {detail['msg'][0].lower()}{detail['msg'][1:]}"


_KEYS = tuple(Line.model_fields)


def resolve(expectations: Expectations, bundle: Bundle) -> list[Example]:
    """The lines as this model takes them.

    Raises:
        ExportError: names the lines with ids that the model does not have, that are too long for it, or that hold text
            although it has no tokenizer; or the model needs languages and its checkpoint names none.
    """
    require_default_target(bundle.manifest)
    tokenizer, examples, problems = load_tokenizer(bundle), [], []
    for number, line in expectations.lines:
        try:
            source = _source(line, tokenizer, bundle.manifest)
        except UnreadableText as error:
            problems.append(f"line {number}: the source {error}")
            continue
        example = Example(
            number,
            source,
            None if line.target_ids is None else tuple(line.target_ids),
            line.target,
            tuple(line.logprobs or ()),
            _options(line, bundle.manifest, len(source)),
        )
        wrong = list(_problems(line, example, bundle.manifest, has_tokenizer=tokenizer is not None))
        problems += [f"line {number}: {', '.join(wrong)}"] if wrong else []
        examples.append(example)
    start = bundle.manifest.special_tokens.decoder_start
    given = [example.target for example in examples if example.target is not None]
    if given and all(len(target) > 1 and target[0] == start for target in given):
        problems = [f"every target_ids begins with the decoder's start ({start}); leave it out"]
    _check(expectations.file, problems)
    return examples


def _source(line: Line, tokenizer: Tokenizer | None, manifest: Manifest) -> Tokens:
    if line.source is None or tokenizer is None:
        return tuple(line.source_ids or ())
    return tuple(tokenizer.encode(line.source, default_around(manifest)))


def _options(line: Line, manifest: Manifest, source: int) -> SearchOptions:
    """The search of a line, behind so many tokens: what it does not say is as the model's defaults have it."""
    defaults: GenerationDefaults = manifest.generation_defaults
    most = line.max_new_tokens or max(1, min(defaults.max_new_tokens, _room(manifest, source)))
    penalty = defaults.length_penalty if line.length_penalty is None else line.length_penalty
    return SearchOptions(
        beam_size=line.beam_size,
        n_best=line.beam_size,
        length_penalty=penalty,
        length_penalty_kind=LengthPenaltyKind(defaults.length_penalty_kind),
        early_stopping=EarlyStopping(defaults.early_stopping),
        min_new_tokens=min(defaults.min_new_tokens, most),
        max_new_tokens=most,
    )


def _room(manifest: Manifest, source: int) -> int:
    """Tokens of a target behind a source, or behind a prompt, of so many."""
    sizes = manifest.dimensions
    return sizes.max_target_tokens - (source if sizes.decoder_only else 0)


def _problems(line: Line, example: Example, manifest: Manifest, *, has_tokenizer: bool) -> Iterator[str]:
    dimensions = manifest.dimensions
    for name in ("source", "target"):
        if getattr(line, name) is not None and not has_tokenizer:
            yield f"{name} is text, but the model has no tokenizer: give {name}_ids"
    if (line.source_ids is not None or has_tokenizer) and not 0 < len(example.source) <= dimensions.max_source_tokens:
        yield f"the source has {len(example.source)} tokens (the model takes 1 to {dimensions.max_source_tokens})"
    if (worst := max(line.source_ids or [0])) >= dimensions.source_vocabulary:
        yield f"source_ids has {worst}, the source vocabulary ends before {dimensions.source_vocabulary}"
    if line.max_new_tokens is not None and line.max_new_tokens > _room(manifest, len(example.source)):
        behind = f", behind a prompt of {len(example.source)}" if dimensions.decoder_only else ""
        told = f"is beyond the model's {dimensions.max_target_tokens} positions{behind}"
        yield f"max_new_tokens {line.max_new_tokens} {told}"
    if example.target is not None:
        yield from _target_problems(example.target, example.options, manifest)


def _target_problems(target: Tokens, options: SearchOptions, manifest: Manifest) -> Iterator[str]:
    tokens, vocabulary = manifest.special_tokens, manifest.dimensions.target_vocabulary
    if max(target) >= vocabulary:
        yield f"target_ids has {max(target)}, the target vocabulary ends before {vocabulary}"
    if ends := [token for token in target[:-1] if token in tokens.eos]:
        mend = "leave out what follows, padding too, or correct eos_token_id in config.json"
        yield f"target_ids goes on after the end of sequence ({ends[0]}); {mend}"
    if len(target) > options.max_new_tokens:
        limit = f"the search ends at {options.max_new_tokens}; give max_new_tokens as your model had it"
        yield f"target_ids has {len(target)} tokens, {limit}"


def same_up_to(tokens: Sequence[int], target: Sequence[int]) -> int:
    """How many tokens of the target an output begins with."""
    pairs = zip(tokens, target, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(tokens), len(target)))
