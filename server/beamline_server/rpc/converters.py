"""From protobuf requests to what the engine takes: checked, tokenized, with every default resolved.

Pure but for the tokenizer. All violations of a request are found before any is reported.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

from beamline.v1 import generation_pb2 as pb
from beamline_server.engine.errors import Violation
from beamline_server.engine.request import (
    MAX_LENGTH_PENALTY,
    EarlyStopping,
    LengthPenaltyKind,
    Priority,
    SearchOptions,
)
from beamline_server.languages import Around, Marks
from beamline_server.manifest import GenerationDefaults, Manifest
from beamline_server.rpc.content import Content, ContentReader
from beamline_server.rpc.desk import Source
from beamline_server.rpc.errors import InvalidRequest, ModelNotFound
from beamline_server.rpc.languages import LanguageReader
from beamline_server.rpc.target_prefix import TargetPrefixReader
from beamline_server.settings import Settings, SettingsError
from beamline_server.tokenizer import Tokenizer

LENGTH_PENALTY_KINDS: Mapping[pb.LengthPenaltyKind, LengthPenaltyKind] = {
    pb.LENGTH_PENALTY_KIND_POWER: LengthPenaltyKind.POWER,
    pb.LENGTH_PENALTY_KIND_GNMT: LengthPenaltyKind.GNMT,
}
EARLY_STOPPINGS: Mapping[pb.EarlyStopping, EarlyStopping] = {
    pb.EARLY_STOPPING_WHEN_FULL: EarlyStopping.WHEN_FULL,
    pb.EARLY_STOPPING_HEURISTIC: EarlyStopping.HEURISTIC,
    pb.EARLY_STOPPING_NEVER: EarlyStopping.NEVER,
}
PRIORITIES: Mapping[pb.Priority, Priority] = {
    pb.PRIORITY_NORMAL: Priority.NORMAL,
    pb.PRIORITY_BATCH: Priority.BATCH,
}
_USUAL_TIMES = 2
"""So many times what a request costs that has all inputs, and the model's defaults, a request may cost by default."""

CONTEXT = 64
"""Tokens of a prompt that the text behind it is read with, or so many more that they begin with a whole character."""

ChoiceT = TypeVar("ChoiceT")


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request may ask for."""

    max_inputs: int
    max_text_bytes: int
    max_source_tokens: int
    max_new_tokens: int
    max_target_tokens: int
    max_beam_size: int
    max_request_cost: int
    """Most of what `search_cost` gives, summed over the inputs of a request."""


@dataclass(frozen=True, slots=True)
class Output:
    """What to return besides the text."""

    token_ids: bool
    token_logprobs: bool


@dataclass(frozen=True, slots=True)
class Order:
    """A checked request."""

    sources: tuple[Source, ...]
    output: Output


def search_cost(options: SearchOptions) -> int:
    """The most that a search can take: tokens of all its hypotheses."""
    return options.beam_size * options.max_new_tokens


def limits_of(settings: Settings, manifest: Manifest) -> Limits:
    """What requests may ask of a model under these settings.

    Raises:
        SettingsError: the settings promise more than the model has, or less than its defaults need.
    """
    dimensions = manifest.dimensions
    # A prompt has a token at least.
    longest = dimensions.max_target_tokens
    wanted, possible = settings.max_new_tokens, longest - 1 if dimensions.decoder_only else longest
    if wanted != "auto" and wanted > possible:
        raise SettingsError(
            [f"max_new_tokens: {wanted} is more than the model can generate; expected at most {possible}"]
        )
    limits = Limits(
        max_inputs=settings.max_inputs,
        max_text_bytes=settings.max_text_bytes,
        max_source_tokens=dimensions.max_source_tokens,
        max_new_tokens=possible if wanted == "auto" else wanted,
        max_target_tokens=longest,
        max_beam_size=settings.max_beam_size,
        max_request_cost=0,  # what is usual depends on the other limits
    )
    usual = search_cost(default_search(manifest.generation_defaults, limits))
    if settings.max_request_cost != "auto":
        if settings.max_request_cost < usual:
            problem = f"{settings.max_request_cost} is less than one input costs by the model's defaults"
            raise SettingsError([f"max_request_cost: {problem}; expected at least {usual}"])
        return replace(limits, max_request_cost=settings.max_request_cost)
    widest = limits.max_beam_size * limits.max_new_tokens
    return replace(limits, max_request_cost=max(_USUAL_TIMES * limits.max_inputs * usual, widest))


def default_search(defaults: GenerationDefaults, limits: Limits) -> SearchOptions:
    """What unset options mean: the model's defaults, as far as the limits allow."""
    max_new_tokens = min(defaults.max_new_tokens, limits.max_new_tokens)
    return SearchOptions(
        beam_size=min(defaults.beam_size, limits.max_beam_size),
        n_best=min(defaults.n_best, limits.max_beam_size),
        length_penalty=defaults.length_penalty,
        length_penalty_kind=LengthPenaltyKind(defaults.length_penalty_kind),
        early_stopping=EarlyStopping(defaults.early_stopping),
        min_new_tokens=min(defaults.min_new_tokens, max_new_tokens),
        max_new_tokens=max_new_tokens,
    )


class RequestReader:
    """Reads requests for one model.

    Args:
        model_name: The name it is served by.
        limits: What requests may ask for.
        defaults: What unset options mean.
        manifest: The model's.
        tokenizer: None for a model that takes token ids alone.
    """

    def __init__(
        self,
        *,
        model_name: str,
        limits: Limits,
        defaults: SearchOptions,
        manifest: Manifest,
        tokenizer: Tokenizer | None,
    ) -> None:
        self._model_name = model_name
        self._limits = limits
        self._defaults = defaults
        self._tokenizer = tokenizer
        # Truncation keeps the id that ends a source, if there is one.
        self._source_eos = manifest.special_tokens.source_eos
        self._source_bos = manifest.special_tokens.source_bos
        sizes, longest_text = manifest.dimensions, limits.max_text_bytes
        of_source, of_target = (None, None) if tokenizer is None else (tokenizer.encode, _target_encoder(tokenizer))
        self._prompted = sizes.decoder_only
        start = manifest.special_tokens.decoder_start if self._prompted else None
        self._sources = ContentReader(sizes.source_vocabulary, longest_text, of_source, start)
        targets = ContentReader(sizes.target_vocabulary, longest_text, of_target)
        languages = manifest.model_languages()
        self._languages = LanguageReader(languages)
        # So it does a language that stands behind that.
        self._behind_source = languages.ids if languages.ends_sources else frozenset[int]()
        self._prefixes = TargetPrefixReader(
            targets, manifest.special_tokens, languages, limits.max_target_tokens, prompted=self._prompted
        )

    def generate(self, request: pb.GenerateRequest) -> Order:
        """Check a request and resolve it.

        Raises:
            ModelNotFound: it asks for another model.
            InvalidRequest: names all violations.
        """
        violations: list[Violation] = []
        count, limit = len(request.inputs), self._limits.max_inputs
        if not 1 <= count <= limit:
            violations.append(Violation("inputs", f"has {count} entries; expected 1 to {limit}"))
        named = [(f"inputs[{index}]", entry) for index, entry in enumerate(request.inputs[:limit])]
        return self._order(request, named, violations)

    def stream(self, request: pb.GenerateStreamRequest) -> Order:
        """As `generate`, with one source."""
        return self._order(request, [("input", request.input)], [])

    def _order(
        self,
        request: pb.GenerateRequest | pb.GenerateStreamRequest,
        inputs: Sequence[tuple[str, pb.Input]],
        violations: list[Violation],
    ) -> Order:
        if request.model not in ("", self._model_name):
            raise ModelNotFound(request.model, self._model_name)
        options = self._defaults
        if request.HasField("search"):
            options = _SearchReader(request.search, self._defaults, self._limits, violations).options()
        marks = self._languages.read(request, inputs, violations)
        sources = [self._source(path, entry, request, options, marks, violations) for path, entry in inputs]
        if (priority := _priority(request.priority)) is None:
            violations.append(Violation("priority", f"is {request.priority}; expected a value of the enum"))
        elif priority is not Priority.NORMAL:
            sources = [replace(source, priority=priority) for source in sources]
        if not violations and (problem := self._too_costly(sources)):
            violations.append(Violation("search", problem))
        if violations:
            raise InvalidRequest(tuple(violations))
        output = Output(self._wants_ids(request.output), request.output.token_logprobs)
        return Order(tuple(sources), output)

    def _too_costly(self, sources: Sequence[Source]) -> str | None:
        """Why a request asks for more than one may, if it does."""
        cost, most = sum(search_cost(source.options) for source in sources), self._limits.max_request_cost
        if cost <= most:
            return None
        return (
            f"costs {cost} (beam_size * max_new_tokens, over {len(sources)} inputs); expected at most {most}: send "
            "fewer inputs at once, or ask for fewer beams or tokens"
        )

    def _wants_ids(self, output: pb.OutputOptions) -> bool:
        """Without a tokenizer there is nothing else to return, so ids are left out only on request."""
        return output.token_ids if output.HasField("token_ids") else self._tokenizer is None

    def _source(
        self,
        path: str,
        entry: pb.Input,
        request: pb.GenerateRequest | pb.GenerateStreamRequest,
        options: SearchOptions,
        marks: Marks,
        violations: list[Violation],
    ) -> Source:
        """The source of one input with its options; an empty one where there are violations."""
        if self._prompted:
            return self._prompt(path, entry, request, options, violations)
        tokens, truncated = self._source_tokens(path, entry, marks.around, request.truncate_source, violations)
        if not entry.HasField("target_prefix"):
            return Source(
                tokens, truncated, options, decoder_start=marks.decoder_start, forced_first=marks.forced_first
            )
        prefix = self._prefixes.read(f"{path}.target_prefix", entry.target_prefix, request.search, marks)
        if prefix.problem is not None:
            violations.append(Violation(prefix.field, prefix.problem))
        options = self._prefixes.leaves(len(prefix.tokens), options)
        # Behind a prefix no first token is forced.
        return Source(tokens, truncated, options, prefix.tokens, decoder_start=marks.decoder_start)

    def _prompt(
        self,
        path: str,
        entry: pb.Input,
        request: pb.GenerateRequest | pb.GenerateStreamRequest,
        options: SearchOptions,
        violations: list[Violation],
    ) -> Source:
        """The prompt of one input with its options: what is generated has the room that it leaves, its prefix too."""
        content, limit = self._sources.read(path, entry), self._limits.max_target_tokens
        tokens, search, prefix = content.tokens, request.search, Content("", ())
        if entry.HasField("target_prefix"):
            prefix = self._prefixes.read(f"{path}.target_prefix", entry.target_prefix, search, Marks())
        room, wanted = limit - len(prefix.tokens), search.max_new_tokens or max(search.min_new_tokens, 1)
        truncated = content.problem is None and request.truncate_source and len(tokens) > room - wanted
        if truncated:
            # What a request asks for has its room, and a default one has up to half of what there is.
            asked = wanted if search.HasField("max_new_tokens") else min(options.max_new_tokens, room // 2)
            tokens = self._end_of(tokens, max(1, room - max(asked, wanted)))
        field, problem = content.field, content.problem
        if problem is None and (wrong := self._prefixes.no_room(len(tokens), search)) is not None:
            problem = f"{wrong}, or truncate_source"
        if problem is None and prefix.tokens and prefix.problem is None:
            field, problem = prefix.field, self._prefixes.no_room(len(prefix.tokens), search, len(tokens))
        found = ((field, problem), (prefix.field, prefix.problem))
        violations += [Violation(where, what) for where, what in found if what is not None]
        options = self._prefixes.leaves(len(tokens) + len(prefix.tokens), options)
        return Source(tokens, truncated, options, prefix.tokens, context=self._context(tokens))

    def _context(self, prompt: tuple[int, ...]) -> tuple[int, ...]:
        """The last tokens of a prompt, from the beginning of a character on."""
        if self._tokenizer is None:
            return ()
        first = max(0, len(prompt) - CONTEXT)
        while first and self._tokenizer.decode(prompt[first:]).startswith("\N{REPLACEMENT CHARACTER}"):
            first = max(0, 2 * first - len(prompt))
        return prompt[first:]

    def _end_of(self, prompt: tuple[int, ...], kept: int) -> tuple[int, ...]:
        """The last tokens of a prompt, which its begin of sequence stays before."""
        begin = prompt[:1] if kept > 1 and prompt[0] == self._source_bos else ()
        return (*begin, *prompt[len(prompt) - kept + len(begin) :])

    def _source_tokens(
        self, path: str, entry: pb.Input, around: Around, truncate: bool, violations: list[Violation]
    ) -> tuple[tuple[int, ...], bool]:
        """The source ids of one input, and whether they were cut."""
        content, limit = self._sources.read(path, entry, around), self._limits.max_source_tokens
        tokens, problem = content.tokens, content.problem
        truncated = len(tokens) > limit
        if problem is None and truncated and not truncate:
            problem = f"has {len(tokens)} tokens; expected at most {limit}, or truncate_source"
        if problem is not None:
            violations.append(Violation(content.field, problem))
        return self._cut(tokens) if truncated else tokens, truncated

    def _cut(self, tokens: tuple[int, ...]) -> tuple[int, ...]:
        limit, kept = self._limits.max_source_tokens, int(tokens[-1] in self._behind_source)
        kept += tokens[-1 - kept] == self._source_eos
        kept = min(kept, limit)
        return (*tokens[: limit - kept], *tokens[len(tokens) - kept :])


def _target_encoder(tokenizer: Tokenizer) -> Callable[[str, Around], list[int]]:
    return lambda text, around: [*around.before, *tokenizer.encode_target(text), *around.after]


def _priority(number: int) -> Priority | None:
    return Priority.NORMAL if number == pb.PRIORITY_UNSPECIFIED else PRIORITIES.get(cast(pb.Priority, number))


class _SearchReader:
    """Reads one request's search options; notes what is not valid and goes on with the nearest value that is."""

    def __init__(
        self, search: pb.SearchOptions, defaults: SearchOptions, limits: Limits, violations: list[Violation]
    ) -> None:
        self._search = search
        self._defaults = defaults
        self._limits = limits
        self._violations = violations

    def options(self) -> SearchOptions:
        """All options, resolved."""
        defaults, limits = self._defaults, self._limits
        beam_size = self._number("beam_size", defaults.beam_size, 1, limits.max_beam_size)
        max_new_tokens = self._number("max_new_tokens", defaults.max_new_tokens, 1, limits.max_new_tokens)
        # A default never contradicts what the request sets: it gives way.
        least, n_best = min(defaults.min_new_tokens, max_new_tokens), min(defaults.n_best, beam_size)
        return SearchOptions(
            beam_size=beam_size,
            n_best=self._number("n_best", n_best, 1, beam_size, bound="beam_size"),
            length_penalty=self._length_penalty(),
            length_penalty_kind=self._choice("length_penalty_kind", LENGTH_PENALTY_KINDS, defaults.length_penalty_kind),
            early_stopping=self._choice("early_stopping", EARLY_STOPPINGS, defaults.early_stopping),
            min_new_tokens=self._number("min_new_tokens", least, 0, max_new_tokens, bound="max_new_tokens"),
            max_new_tokens=max_new_tokens,
        )

    def _number(self, name: str, default: int, least: int, most: int, *, bound: str = "") -> int:
        if not self._search.HasField(name):
            return default
        value: int = getattr(self._search, name)
        if least <= value <= most:
            return value
        named = f" ({bound})" if bound else ""
        self._violate(name, f"is {value}; expected {least} to {most}{named}")
        return min(max(value, least), most)

    def _length_penalty(self) -> float:
        if not self._search.HasField("length_penalty"):
            return self._defaults.length_penalty
        # NaN fails the comparison, too.
        if not abs(self._search.length_penalty) <= MAX_LENGTH_PENALTY:
            expected = f"a number between -{MAX_LENGTH_PENALTY:g} and {MAX_LENGTH_PENALTY:g}"
            self._violate("length_penalty", f"is {self._search.length_penalty}; expected {expected}")
        return self._search.length_penalty

    def _choice(self, name: str, choices: Mapping[Any, ChoiceT], default: ChoiceT) -> ChoiceT:
        number: int = getattr(self._search, name)
        if number == 0:  # unset, or set to UNSPECIFIED
            return default
        if number not in choices:
            self._violate(name, f"is {number}; expected a value of the enum")
        return choices.get(number, default)

    def _violate(self, name: str, problem: str) -> None:
        self._violations.append(Violation(f"search.{name}", problem))
