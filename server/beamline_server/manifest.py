"""The manifest: everything that the server needs to know about a bundle, as data that is checked as a whole."""

import re
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from beamline_server import bounds
from beamline_server.bounds import Model as _Model
from beamline_server.graphs import GraphSizes, Precision, graph_files
from beamline_server.languages import Languages, ModelLanguages

FORMAT_VERSION = 4
MANIFEST = "manifest.json"
CHECKSUM = "manifest.sha256"
WEIGHTS = "weights.bin"
RELATIVE_BIAS = "relative_bias.bin"

LONGEST_TOLD = 100
"""Characters of what is wrong in a message."""
NAME_PATTERN = "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


class FileEntry(_Model):
    """Checksum and size of one file of the bundle."""

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    bytes: bounds.FileBytes


class RelativePositions(_Model):
    """Positions that self-attention knows by distance alone.

    What it adds to scores is in relative_bias.bin for the CPU, and among the weights for the graph of the whole step.

    Attributes:
        layers: Tables there: one for all layers of the decoder, or one for each.
        distances: Numbers of a head: for the distances 0, 1, …; the last one is for all that are greater, too.
    """

    layers: bounds.Layers
    distances: bounds.Positions


class Dimensions(_Model):
    """The sizes of the model that the engine needs.

    The fields with a default are left out where there is nothing to tell; servers of before know no such fields, and
    refuse a bundle that has them.

    Attributes:
        attention_width: That of queries, keys and values of all heads, where it is not `d_model`.
        relative_positions: Those of self-attention; None if the model has none.
        decoder_only: Whether the model has no encoder. What is given it as a source is the prompt, which a target
            begins with: both sides have one vocabulary.
        key_value_heads: Heads of keys and values, where several heads of queries share each; `decoder_heads` are those
            of queries.
        rotary_positions: Whether self-attention turns queries and keys by their positions.
    """

    d_model: bounds.Width
    decoder_layers: bounds.Layers
    decoder_heads: bounds.Width
    source_vocabulary: bounds.Vocabulary
    target_vocabulary: Annotated[bounds.Vocabulary, Field(gt=1)]
    max_source_tokens: bounds.Positions
    max_target_tokens: bounds.Positions
    attention_width: bounds.Width | None = None
    relative_positions: RelativePositions | None = None
    decoder_only: bool = False
    key_value_heads: bounds.Width | None = None
    rotary_positions: bool = False

    @property
    def attention(self) -> int:
        """The width of queries."""
        return self.attention_width or self.d_model

    @property
    def key_value(self) -> int:
        """The width of keys and values."""
        heads = self.decoder_heads
        return self.attention // heads * (self.key_value_heads or heads)

    @property
    def graph_sizes(self) -> GraphSizes:
        """What its graphs are made by."""
        return GraphSizes(
            self.decoder_layers,
            self.d_model,
            self.target_vocabulary,
            attention=self.attention_width,
            key_value=None if self.key_value_heads is None else self.key_value,
            encoder=not self.decoder_only,
            rotary=self.rotary_positions,
            relative=self.relative_positions is not None,
        )


class SpecialTokens(_Model):
    """Ids with a meaning. Tokenized text stands between `source_bos` and `source_eos`.

    A model without `eos` ends no output by itself: each has as many tokens as were asked for.
    """

    decoder_start: bounds.TokenId
    eos: bounds.Ends
    source_eos: bounds.TokenId | None = None
    source_bos: bounds.TokenId | None = None
    pad: bounds.TokenId | None = None
    forced_bos: bounds.TokenId | None = None
    forced_eos: bounds.TokenId | None = None
    banned: bounds.Banned = ()
    banned_at_start: bounds.Banned = ()


class GenerationDefaults(_Model):
    """What an unset search option means; from the checkpoint's generation_config.

    `not_supported` are settings of the checkpoint that would change answers and have no effect, with their values.
    """

    beam_size: bounds.Beams = 1
    length_penalty: bounds.LengthPenalty = 1.0
    length_penalty_kind: Literal["power", "gnmt"] = "power"
    early_stopping: Literal["when_full", "heuristic", "never"] = "heuristic"
    min_new_tokens: bounds.PositionsOrNone = 0
    max_new_tokens: bounds.Positions
    n_best: bounds.Beams = 1
    not_supported: dict[bounds.Text, bounds.Text] = Field(default_factory=dict)


class TokenizerEntry(_Model):
    """Which tokenizer reads the text, and from which files of the bundle.

    `marian`: source.spm, target.spm, vocab.json, and target_vocab.json if the target has its own; `tokenizers`:
    tokenizer.json, and target_tokenizer.json if the target has its own; `sentencepiece`: source.spm, target.spm (ids
    are the pieces' own); `bytes`: the bytes of UTF-8, without a file (ByT5); `blenderbot_small`: vocab.json,
    merges.txt; `characters`: characters.json, the id of each; `moses`: moses.json, vocab.json, target_vocab.json if the
    target has its own, and merges.txt, or bpe.codes of subword-nmt; `none`: inputs and outputs are token ids.

    Attributes:
        kind: One of these.
        files: Names of its files.
        clean_up_spaces: Whether texts lose the spaces before punctuation, as transformers clean them up.
        special: Target ids that leave no trace in text; if None, `special_tokens` but for those of the source.
    """

    kind: Literal["marian", "tokenizers", "sentencepiece", "bytes", "blenderbot_small", "characters", "moses", "none"]
    files: tuple[bounds.Text, ...] = ()
    clean_up_spaces: bool = False
    special: tuple[bounds.TokenId, ...] | None = None


class Golden(_Model):
    """A forced decode with its answer: shows at warm-up that this machine computes what the exporting one did.

    Attributes:
        source: Source ids.
        forced: Decoder input ids, one per step, decoder start first.
        top_logprob: The log-probability of the most probable token after each step.
    """

    source: tuple[bounds.TokenId, ...]
    forced: tuple[bounds.TokenId, ...]
    top_logprob: tuple[bounds.LogProbability, ...]


class Activations(_Model):
    """How an int8 bundle scales what its products multiply: by each row's own largest value, or by measured ranges.

    Attributes:
        scaled: `per_row`, or `calibrated`: by one range per product, beyond which values saturate.
        sentences: How many sentences the ranges were measured with.
        ranges: The largest magnitude in each product's input, by the product's name.
    """

    scaled: Literal["per_row", "calibrated"]
    sentences: bounds.Sentences | None = None
    ranges: dict[bounds.Text, bounds.Range] = Field(default_factory=dict)


class Manifest(_Model):
    """Everything the server needs to know about a bundle; `spec`, `parity` and `producers` are only told."""

    format_version: Literal[4]
    name: str = Field(pattern=NAME_PATTERN)
    architecture: bounds.Text
    precision: Precision
    activations: Activations | None = None
    created: bounds.Text
    dimensions: Dimensions
    special_tokens: SpecialTokens
    generation_defaults: GenerationDefaults
    tokenizer: TokenizerEntry
    languages: Languages | None = None
    files: Annotated[dict[str, FileEntry], Field(max_length=bounds.MOST_FILES)]
    golden: Annotated[tuple[Golden, ...], Field(min_length=1)]
    golden_tolerance: bounds.Tolerance
    spec: bounds.Told
    parity: bounds.Told
    producers: dict[bounds.Text, bounds.Text]

    def model_languages(self) -> ModelLanguages:
        """The languages that requests can name."""
        tokens = self.special_tokens
        return ModelLanguages(self.languages, forced_bos=tokens.forced_bos, decoder_start=tokens.decoder_start)

    def problems(self) -> Iterator[str]:
        """What contradicts itself although each field is valid."""
        yield from self._file_problems()
        yield from self._token_problems()
        yield from self._golden_problems()
        yield from self._activation_problems()
        yield from self._language_problems()
        dimensions, defaults = self.dimensions, self.generation_defaults
        if dimensions.attention % dimensions.decoder_heads:
            width = "d_model" if dimensions.attention_width is None else "attention_width"
            wrong = f"decoder_heads {dimensions.decoder_heads} does not divide {width} {dimensions.attention}"
            yield f"dimensions: {wrong}"
        yield from self._relative_problems()
        yield from self._decoder_only_problems()
        longest = dimensions.max_target_tokens
        if not defaults.min_new_tokens <= defaults.max_new_tokens <= longest:
            limits = f"min_new_tokens {defaults.min_new_tokens}, max_new_tokens {defaults.max_new_tokens}"
            yield f"generation_defaults: {limits} and the model's {longest} positions are not in this order"
        if defaults.n_best > defaults.beam_size:
            yield f"generation_defaults: n_best {defaults.n_best} is more than beam_size {defaults.beam_size}"

    def _relative_problems(self) -> Iterator[str]:
        dimensions, relative = self.dimensions, self.dimensions.relative_positions
        if relative is None:
            return
        if relative.layers not in (1, dimensions.decoder_layers):
            told = f"{relative.layers} layers, the decoder has {dimensions.decoder_layers}"
            yield f"dimensions: relative_positions of {told}"
        wanted = 4 * relative.layers * dimensions.decoder_heads * relative.distances
        if RELATIVE_BIAS in self.files and (size := self.files[RELATIVE_BIAS].bytes) != wanted:
            yield f"files: {RELATIVE_BIAS!r} has {size} bytes, by the dimensions {wanted}"

    def _decoder_only_problems(self) -> Iterator[str]:
        dimensions = self.dimensions
        if not dimensions.decoder_only:
            if dimensions.key_value_heads is not None or dimensions.rotary_positions:
                yield "dimensions: key_value_heads and rotary_positions belong to a model that is decoder_only"
            return
        if self.precision == "fp16":
            yield "dimensions: graphs of fp16 have an encoder"
        if dimensions.decoder_heads % (dimensions.key_value_heads or 1):
            told = f"key_value_heads {dimensions.key_value_heads} does not divide decoder_heads"
            yield f"dimensions: {told} {dimensions.decoder_heads}"
        if dimensions.relative_positions is not None:
            yield "dimensions: relative_positions are not in graphs without an encoder"
        if dimensions.source_vocabulary != dimensions.target_vocabulary:
            yield "dimensions: a model without an encoder has one vocabulary"
        if dimensions.max_source_tokens >= dimensions.max_target_tokens:
            yield "dimensions: a prompt of max_source_tokens leaves no room in max_target_tokens"
        if self.languages is not None:
            yield "languages: a model without an encoder has none"

    def _file_problems(self) -> Iterator[str]:
        graphs = graph_files(self.precision, self.dimensions.graph_sizes)
        attends = self.dimensions.relative_positions is not None and self.precision != "fp16"
        tables = (RELATIVE_BIAS,) if attends else ()
        for required in (*graphs, WEIGHTS, *tables, *self.tokenizer.files):
            if required not in self.files:
                yield f"files: {required!r} is not listed"
        for name, entry in self.files.items():
            if name in (MANIFEST, CHECKSUM) or not re.fullmatch(NAME_PATTERN, name):
                yield f"files: {name[:LONGEST_TOLD]!r} is not a plain file name"
            elif entry.bytes > (most := bounds.MOST_WEIGHT_BYTES if name == WEIGHTS else bounds.MOST_FILE_BYTES):
                yield f"files: {name!r} has {entry.bytes} bytes, more than {most}"

    def _token_problems(self) -> Iterator[str]:
        tokens, dimensions = self.special_tokens, self.dimensions
        one_by_one = (tokens.decoder_start, tokens.pad, tokens.forced_bos, tokens.forced_eos)
        for token in (*one_by_one, *tokens.eos, *tokens.banned, *tokens.banned_at_start):
            if token is not None and token >= dimensions.target_vocabulary:
                yield f"special_tokens: {token} is outside the target vocabulary of {dimensions.target_vocabulary}"
        for token in (tokens.source_eos, tokens.source_bos):
            if token is not None and token >= dimensions.source_vocabulary:
                yield f"special_tokens: {token} is outside the source vocabulary of {dimensions.source_vocabulary}"
        never = {*tokens.banned, *tokens.banned_at_start, *tokens.eos}
        if len(never.intersection(range(dimensions.target_vocabulary))) == dimensions.target_vocabulary:
            yield "special_tokens: nothing can be generated first: every token is banned or ends the sequence"

    def _activation_problems(self) -> Iterator[str]:
        activations = self.activations
        if (activations is not None) != (self.precision == "int8"):
            yield "activations: how they are scaled belongs to int8 bundles, and to no others"
        if activations is None:
            return
        calibrated = activations.scaled == "calibrated"
        if (activations.sentences is not None, bool(activations.ranges)) != (calibrated, calibrated):
            yield "activations: ranges, and how many sentences they are from, belong to those that are calibrated"

    def _language_problems(self) -> Iterator[str]:
        if self.languages is not None:
            tokens, sizes = self.special_tokens, self.dimensions
            yield from self.languages.problems(sizes.source_vocabulary, sizes.target_vocabulary, tokens.eos)

    def _golden_problems(self) -> Iterator[str]:
        dimensions = self.dimensions
        tokens, most = sum(len(each.source) + len(each.forced) for each in self.golden), bounds.MOST_GOLDEN_TOKENS
        if tokens > most:
            yield f"golden: {tokens} tokens are more than the {most} that a start computes"
        for golden in self.golden:
            if len(golden.forced) != len(golden.top_logprob):
                yield "golden: forced and top_logprob differ in length"
            sides = (
                (golden.source, dimensions.max_source_tokens, dimensions.source_vocabulary),
                (golden.forced, dimensions.max_target_tokens, dimensions.target_vocabulary),
            )
            for ids, longest, vocabulary in sides:
                if not 0 < len(ids) <= longest or max(ids) >= vocabulary:
                    yield f"golden: {str(list(ids))[:LONGEST_TOLD]} is nothing that this model reads"
            tokens = len(golden.source) + len(golden.forced)
            if dimensions.decoder_only and tokens > dimensions.max_target_tokens:
                yield f"golden: source and forced have {tokens} tokens together, more than the model reads"
