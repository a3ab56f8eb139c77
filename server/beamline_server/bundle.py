"""The bundle: what export writes and the server reads. The server owns this contract.

A bundle is a folder:

    manifest.json           this module's `Manifest`
    manifest.sha256         its checksum, as sha256sum writes it
    encoder.onnx            ids -> cross-attention keys and values
    decoder_step.onnx       one step of the decoder over packed rows; for CUDA (fp16, fp32)
    decoder_piece_….onnx    the same step cut at its attentions; for the CPU (int8, fp32): piece 0 before the first
                            self-attention, one piece after each attention
    weights.bin             every weight once; all graphs point into it
    relative_bias.bin       of models with relative positions alone: what the decoder's self-attention adds to scores,
                            as fp32 numbers (layers, heads, distances)
    tokenizer files         as the manifest names them

The server refuses what it cannot verify and says which file, why, and what to do. The manifest has the checksums of
all files, and one of its own beside it, so that no bit of a bundle can change unnoticed; that is against damage, and
signatures are for who stores and ships bundles (docs/adr/0015-checksum-of-the-manifest.md). The server holds what it
serves in memory: files that change later change nothing, so a file may be a link to wherever a store keeps the content.
Files that it does not know are verified and ignored.
"""

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import BufferedIOBase, BufferedReader
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from beamline_server import bounds
from beamline_server.bounds import Model as _Model
from beamline_server.graph_file import read_graph
from beamline_server.graphs import ElementType, GraphSpec, decoder_piece_graph, decoder_step_graph, encoder_graph
from beamline_server.languages import Languages, ModelLanguages

FORMAT_VERSION = 4
MANIFEST = "manifest.json"
CHECKSUM = "manifest.sha256"
ENCODER = "encoder.onnx"
DECODER_STEP = "decoder_step.onnx"
WEIGHTS = "weights.bin"
RELATIVE_BIAS = "relative_bias.bin"

EXIT_BUNDLE = 3
"""Exit status of a command whose bundle cannot be served."""
MOST_FOREIGN_TOLD = 8
"""Files that are no part of a bundle are named up to so many."""
COPY_AGAIN = "copy the bundle again"
EXPORT_AGAIN = "export the model again"

_MOST_PROBLEMS_TOLD, _LONGEST_TOLD = 8, 100

NAME_PATTERN = "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
_VOLUME_BOOKKEEPING = re.compile(r"\.\.(data|data_tmp|\d{4}_\d\d_\d\d_.*)")
"""What Kubernetes has beside the files of a volume: `..data`, and the folder with a time in its name behind it."""
_CHUNK = 1 << 20

Precision = Literal["fp32", "fp16", "int8"]


def decoder_pieces(layers: int) -> list[str]:
    """Names of the graphs that a decoder step of so many layers is cut into at its attentions, in their order."""
    return [f"decoder_piece_{number}.onnx" for number in range(2 * layers + 1)]


def decoder_graphs(precision: str, layers: int, *, relative: bool = False) -> list[str]:
    """Names of the decoder's graphs in a bundle: the whole step where CUDA runs it, the pieces where the CPU does.

    With relative positions there is no whole step.
    """
    whole, pieces = [] if relative else [DECODER_STEP], decoder_pieces(layers)
    return {"fp16": whole, "int8": pieces, "fp32": [*whole, *pieces]}[precision]


def bundle_graphs(  # noqa: PLR0913 - what graphs differ by
    precision: str,
    cache: ElementType,
    *,
    layers: int,
    width: int,
    vocabulary: int,
    attention: int | None = None,
    relative: bool = False,
) -> dict[str, GraphSpec]:
    """The contracts of all graphs of a bundle, by the names of their files; keys and values are of type `cache`.

    `attention` is the width of queries, keys and values, by default `width`; `relative` as `decoder_graphs`.
    """
    wide = attention or width
    contracts = {
        ENCODER: encoder_graph(layers, wide, cache),
        DECODER_STEP: decoder_step_graph(layers, wide, vocabulary, cache),
    }
    for number, name in enumerate(decoder_pieces(layers)):
        contracts[name] = decoder_piece_graph(number, layers, width, vocabulary, wide)
    return {name: contracts[name] for name in (ENCODER, *decoder_graphs(precision, layers, relative=relative))}


class BundleError(Exception):
    """The bundle cannot be served: a file or folder of it, what is wrong with it, and what to do, in one line."""

    def __init__(self, path: Path, problem: str, remedy: str) -> None:
        self.path = path
        self.problem = printable(problem)
        super().__init__(f"{printable(str(path))}: {self.problem}; {remedy}")


def printable(text: str) -> str:
    """A text for a line of a terminal: what is no character to be seen is spelled out."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def in_short(error: BaseException) -> str:
    """What an error of a library says, in a line of bounded length."""
    return " ".join(str(error).split())[: bounds.LONGEST_TEXT] or type(error).__name__


class FileEntry(_Model):
    """Checksum and size of one file of the bundle."""

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    bytes: bounds.FileBytes


class RelativePositions(_Model):
    """Positions that self-attention knows by distance alone: what it adds to scores is in relative_bias.bin.

    Attributes:
        layers: Tables there: one for all layers of the decoder, or one for each.
        distances: Numbers of a head: for the distances 0, 1, …; the last one is for all that are greater, too.
    """

    layers: bounds.Layers
    distances: bounds.Positions


class Dimensions(_Model):
    """The sizes of the model that the engine needs.

    `attention_width` is that of queries, keys and values of all heads, where it is not `d_model`. The last two are left
    out where there is nothing to tell; servers of before know no such fields, and refuse a bundle that has them.
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

    @property
    def attention(self) -> int:
        """The width of queries, keys and values."""
        return self.attention_width or self.d_model

    def decoder_graphs(self, precision: str) -> list[str]:
        """As `decoder_graphs`, of this model."""
        return decoder_graphs(precision, self.decoder_layers, relative=self.relative_positions is not None)


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
    are the pieces' own); `bytes`: the bytes of UTF-8, without a file (ByT5);
    `none`: inputs and outputs are token ids.

    Attributes:
        kind: One of these.
        files: Names of its files.
        clean_up_spaces: Whether texts lose the spaces before punctuation, as transformers clean them up.
        special: Target ids that leave no trace in text; if None, `special_tokens` but for those of the source.
    """

    kind: Literal["marian", "tokenizers", "sentencepiece", "bytes", "none"]
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
        if self.precision == "fp16":
            yield "dimensions: relative_positions are not in graphs of fp16"
        if relative.layers not in (1, dimensions.decoder_layers):
            told = f"{relative.layers} layers, the decoder has {dimensions.decoder_layers}"
            yield f"dimensions: relative_positions of {told}"
        wanted = 4 * relative.layers * dimensions.decoder_heads * relative.distances
        if RELATIVE_BIAS in self.files and (size := self.files[RELATIVE_BIAS].bytes) != wanted:
            yield f"files: {RELATIVE_BIAS!r} has {size} bytes, by the dimensions {wanted}"

    def _file_problems(self) -> Iterator[str]:
        graphs = (ENCODER, *self.dimensions.decoder_graphs(self.precision))
        tables = () if self.dimensions.relative_positions is None else (RELATIVE_BIAS,)
        for required in (*graphs, WEIGHTS, *tables, *self.tokenizer.files):
            if required not in self.files:
                yield f"files: {required!r} is not listed"
        for name, entry in self.files.items():
            if name in (MANIFEST, CHECKSUM) or not re.fullmatch(NAME_PATTERN, name):
                yield f"files: {name[:_LONGEST_TOLD]!r} is not a plain file name"
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
                    yield f"golden: {str(list(ids))[:_LONGEST_TOLD]} is nothing that this model reads"


class Bundle:
    """A verified bundle on disk.

    Attributes:
        path: Its folder.
        manifest: Its manifest.
        fingerprint: SHA-256 of the manifest file: the same value means the same model.
    """

    def __init__(self, path: Path, manifest: Manifest, fingerprint: str) -> None:
        self.path = path
        self.manifest = manifest
        self.fingerprint = fingerprint

    def file(self, name: str) -> Path:
        """Path of one of the files that the manifest lists."""
        if name not in self.manifest.files:
            raise BundleError(self.path / name, "is not listed in the manifest", EXPORT_AGAIN)
        return self.path / name

    def read(self, name: str) -> bytes:
        """Content of one of the files that the manifest lists, verified as it is read.

        Raises:
            BundleError: it is missing or damaged by now.
        """
        file = self.file(name)
        with _listed(file, self.manifest.files[name]) as stream:
            content = stream.read(self.manifest.files[name].bytes)
        _check_digest(file, self.manifest.files[name], hashlib.sha256(content).hexdigest())
        return content

    def foreign_files(self) -> list[str]:
        """Names beside the manifest that it does not list, as a fresh volume has one (lost+found)."""
        try:
            names = sorted(file.name for file in self.path.iterdir())
        except OSError:  # a folder may let its files be read and not be listed
            return []
        own = {MANIFEST, CHECKSUM, *self.manifest.files}
        return [name for name in names if name not in own and not _VOLUME_BOOKKEEPING.fullmatch(name)]


def checksum_line(manifest: bytes) -> str:
    """What is in the file beside a manifest, as `sha256sum manifest.json` writes it."""
    return f"{hashlib.sha256(manifest).hexdigest()}  {MANIFEST}\n"


def read_manifest(path: Path) -> tuple[Manifest, str]:
    """Read and check a bundle's manifest alone; returns it with its fingerprint.

    Raises:
        BundleError: it is missing, damaged, of another format, or contradicts itself.
    """
    file = path / MANIFEST
    raw = _content(file, bounds.LONGEST_MANIFEST, "is this a bundle? `beamline export` writes one")
    summed = _is_summed(path, raw)
    if summed is False:
        raise BundleError(file, f"does not match {CHECKSUM}", f"{COPY_AGAIN}; if it was edited, {EXPORT_AGAIN}")
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise BundleError(file, f"is not JSON ({in_short(error)})", COPY_AGAIN) from error
    version = data.get("format_version") if isinstance(data, dict) else None
    if version != FORMAT_VERSION or isinstance(version, float):
        told = f"is of format version {str(version)[:20]}, this server reads {FORMAT_VERSION}"
        raise BundleError(file, told, EXPORT_AGAIN)
    if summed is None:
        raise BundleError(path / CHECKSUM, "is missing", COPY_AGAIN)
    try:
        manifest = Manifest.model_validate(data)
    except ValidationError as error:
        found = (f"{'.'.join(_in_words(e['loc']))}: {e['msg'].removeprefix('Value error, ')}" for e in error.errors())
        raise BundleError(file, _in_one_line(found), EXPORT_AGAIN) from error
    if problem := _in_one_line(manifest.problems()):
        raise BundleError(file, problem, EXPORT_AGAIN)
    return manifest, hashlib.sha256(raw).hexdigest()


def _in_words(place: Iterable[str | int]) -> Iterator[str]:
    return (str(key)[:_LONGEST_TOLD] for key in place)


def _in_one_line(problems: Iterable[str]) -> str:
    told = list(problems)
    more = [f"and {len(told) - _MOST_PROBLEMS_TOLD} more"] if len(told) > _MOST_PROBLEMS_TOLD else []
    return "; ".join([*told[:_MOST_PROBLEMS_TOLD], *more])


def _is_summed(path: Path, manifest: bytes) -> bool | None:
    """Whether the checksum beside a manifest is that of its bytes; None if there is none."""
    file, expected = path / CHECKSUM, checksum_line(manifest).encode()
    if not os.path.lexists(file):
        return None
    return _content(file, len(expected), COPY_AGAIN) == expected


def load_bundle(path: Path) -> Bundle:
    """Read a bundle and verify every file against the manifest, the graphs' contracts included.

    Nothing is computed, and nothing larger than a graph is held in memory.

    Raises:
        BundleError: names the first file that is missing, damaged, no file, or not what the manifest makes of it.
    """
    manifest, fingerprint = read_manifest(path)
    bundle = Bundle(path, manifest, fingerprint)
    for name, entry in manifest.files.items():
        with _listed(path / name, entry):
            pass
    _check_graphs(bundle)
    for name, entry in manifest.files.items():
        with _listed(path / name, entry) as stream:
            _check_digest(path / name, entry, digest(stream, entry.bytes))
    return bundle


def _check_graphs(bundle: Bundle) -> None:
    """Hold the graphs' files to what the manifest's dimensions make of them, and the weights' to what graphs take."""
    dimensions = bundle.manifest.dimensions
    contracts = bundle_graphs(
        bundle.manifest.precision,
        "float16" if bundle.manifest.precision == "fp16" else "float32",
        layers=dimensions.decoder_layers,
        width=dimensions.d_model,
        vocabulary=dimensions.target_vocabulary,
        attention=dimensions.attention,
        relative=dimensions.relative_positions is not None,
    )
    needed = 0
    for name, contract in contracts.items():
        try:
            graph = read_graph(bundle.read(name))
        except ValueError as error:
            raise BundleError(bundle.path / name, str(error), EXPORT_AGAIN) from error
        if problem := next(graph.problems(contract, _tables(name, dimensions), WEIGHTS), None):
            raise BundleError(bundle.path / name, problem, EXPORT_AGAIN)
        needed = max(needed, graph.ends_in(WEIGHTS))
    if (size := bundle.manifest.files[WEIGHTS].bytes) != needed:
        raise BundleError(bundle.path / WEIGHTS, f"has {size} bytes, the graphs take {needed} of it", EXPORT_AGAIN)


def _tables(name: str, dimensions: Dimensions) -> dict[str, int]:
    """What a graph looks up ids and positions in: rows of each table, by the end of its name."""
    if name == ENCODER:
        ids, positions = dimensions.source_vocabulary, dimensions.max_source_tokens
    elif name in (DECODER_STEP, decoder_pieces(1)[0]):
        ids, positions = dimensions.target_vocabulary, dimensions.max_target_tokens
    else:
        return {}
    return {"_embedding": ids} | ({"_positions": positions} if dimensions.relative_positions is None else {})


@contextmanager
def _regular(file: Path) -> Iterator[tuple[BufferedReader, int]]:
    """A regular file, open, with its size; a link is followed, since what counts is the content.

    Raises:
        OSError: it is none, or cannot be opened.
    """
    # Asked first, for opening a device may do something, and once more of what was opened.
    _check_regular(os.stat(file))
    # Without waiting, as one would for who writes into a pipe.
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as stream:
        status = os.fstat(descriptor)
        _check_regular(status)
        yield stream, status.st_size


def _check_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise OSError(0, "no regular file")


def _content(file: Path, most: int, remedy: str) -> bytes:
    """Content of a file of unknown size, up to so many bytes."""
    try:
        with _regular(file) as (stream, size):
            if size > most:
                raise BundleError(file, f"has {size:,} bytes, more than {most:,}", remedy)
            return stream.read(size)
    except OSError as error:
        raise _unreadable(file, error, remedy) from error


@contextmanager
def _listed(file: Path, entry: FileEntry) -> Iterator[BufferedReader]:
    """A file that the manifest lists, open, of the size that it says."""
    try:
        with _regular(file) as (stream, size):
            if size != entry.bytes:
                raise BundleError(file, f"has {size} bytes, the manifest says {entry.bytes}", COPY_AGAIN)
            yield stream
    except FileNotFoundError as error:
        raise BundleError(file, "is missing", COPY_AGAIN) from error
    except OSError as error:
        raise _unreadable(file, error, COPY_AGAIN) from error


def _unreadable(file: Path, error: OSError, remedy: str) -> BundleError:
    remedy = "let the server's user read it" if isinstance(error, PermissionError) else remedy
    return BundleError(file, f"cannot be read ({error.strerror})", remedy)


def digest(stream: BufferedIOBase, size: int) -> str:
    """SHA-256 of so many bytes, however many follow by now."""
    sum_so_far = hashlib.sha256()
    while size > 0 and (chunk := stream.read(min(size, _CHUNK))):
        sum_so_far.update(chunk)
        size -= len(chunk)
    return sum_so_far.hexdigest()


def _check_digest(file: Path, entry: FileEntry, digest: str) -> None:
    if digest != entry.sha256:
        raise BundleError(file, "does not match its checksum", COPY_AGAIN)
