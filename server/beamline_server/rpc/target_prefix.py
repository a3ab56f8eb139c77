"""The given beginning of a target: which ids it may have, and what room it leaves to what is generated.

A prompt, which a model without an encoder has in place of a source, is a part of that beginning.
"""

from dataclasses import replace

from beamline.v1 import generation_pb2 as pb
from beamline_server.engine.request import SearchOptions
from beamline_server.languages import Around, Marks, ModelLanguages
from beamline_server.manifest import SpecialTokens
from beamline_server.rpc.content import Content, ContentReader


class TargetPrefixReader:
    """Reads the target prefixes of requests for one model.

    Args:
        content: Reads content of the target's side.
        special: The model's special tokens.
        languages: The model's.
        longest: Most tokens of a target, its prefix and a prompt included.
        prompted: Whether a prompt stands before it.
    """

    def __init__(
        self,
        content: ContentReader,
        special: SpecialTokens,
        languages: ModelLanguages,
        longest: int,
        *,
        prompted: bool = False,
    ) -> None:
        self._content = content
        self._eos = frozenset(special.eos)
        # A prompt has been begun already.
        self._start = None if prompted else special.decoder_start
        self._languages = languages
        self._longest = longest

    def read(self, path: str, message: pb.TargetPrefix, search: pb.SearchOptions, marks: Marks) -> Content:
        """The prefix at this path, if there is room for it beside what the search options ask for.

        A language that the target begins with stands before text; ids are taken as they are.
        """
        content = self._content.read(path, message, Around(before=self._languages.code_before_prefix(marks)))
        start = self._start if marks.decoder_start is None else marks.decoder_start
        problem = content.problem or self._meaning(content.tokens, start)
        return replace(content, problem=problem or self.no_room(len(content.tokens), search))

    def leaves(self, given: int, options: SearchOptions) -> SearchOptions:
        """The options with no more tokens than fit beside so many that are given."""
        room = self._longest - given
        if options.max_new_tokens <= room:
            return options
        return replace(options, max_new_tokens=room, min_new_tokens=min(options.min_new_tokens, room))

    def _meaning(self, tokens: tuple[int, ...], start: int | None) -> str | None:
        """What is wrong with what the ids mean, if anything."""
        if start is not None and tokens[0] == start and start not in self._eos:
            return f"begins with the decoder's start, id {start}, which is put before it anyway; leave it out"
        ends = (index for index, token in enumerate(tokens) if token in self._eos)
        # `generate` would go on behind it, where no target that the model has learned from does.
        if (index := next(ends, None)) is not None:
            return f"has the end-of-sequence id {tokens[index]} at index {index}, where a target ends; leave it out"
        return None

    def no_room(self, given: int, search: pb.SearchOptions, before: int = 0) -> str | None:
        """Why so many tokens do not fit, if they do not: defaults give way to them, what a request sets does not."""
        room = self._longest - before
        behind = f" behind a prompt of {before}" if before else ""
        if given >= room:
            return f"has {given} tokens; expected at most {room - 1}{behind}, to leave room for one to generate"
        for name in ("max_new_tokens", "min_new_tokens"):
            if search.HasField(name) and given + (wanted := getattr(search, name)) > room:
                told = f"has {given} tokens, and search.{name} is {wanted}"
                return f"{told}; expected at most {room} together{behind}"
        return None
