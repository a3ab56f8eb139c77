"""The bundle: what export writes and the server reads. The server owns this contract.

A bundle is a folder:

    manifest.json           this module's `Manifest`
    encoder.onnx            ids -> cross-attention keys and values
    decoder_step.onnx       one step of the decoder over packed rows; for CUDA (fp16, fp32)
    decoder_piece_….onnx    the same step cut at its attentions; for the CPU (int8, fp32): piece 0 before the first
                            self-attention, one piece after each attention
    weights.bin             every weight once; all graphs point into it
    tokenizer files         as the manifest names them

The server refuses what it cannot verify and says which file and why. It holds what it serves in memory: files that
change later change nothing, so a file may be a link to wherever a store keeps the content. Files that it does not know
are verified and ignored.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from beamline_server.engine.request import MAX_BEAMS, MAX_LENGTH_PENALTY

FORMAT_VERSION = 3
MANIFEST = "manifest.json"
ENCODER = "encoder.onnx"
DECODER_STEP = "decoder_step.onnx"
WEIGHTS = "weights.bin"

EXIT_BUNDLE = 3
"""Exit status of a command whose bundle cannot be served."""
MOST_FOREIGN_TOLD = 8
"""Files that are no part of a bundle are named up to so many."""
MOST_LAYERS = 1000
"""Decoders of more layers are no models: it bounds how many files are looked for."""
_LONGEST_MANIFEST = 16 * 1024 * 1024

NAME_PATTERN = "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"

Precision = Literal["fp32", "fp16", "int8"]
TokenId = Annotated[int, Field(ge=0)]


def decoder_pieces(layers: int) -> list[str]:
    """Names of the graphs that a decoder step of so many layers is cut into at its attentions, in their order."""
    return [f"decoder_piece_{number}.onnx" for number in range(2 * layers + 1)]


def decoder_graphs(precision: str, layers: int) -> list[str]:
    """Names of the decoder's graphs in a bundle: the whole step where CUDA runs it, the pieces where the CPU does."""
    whole, pieces = [DECODER_STEP], decoder_pieces(layers)
    return {"fp16": whole, "int8": pieces, "fp32": [*whole, *pieces]}[precision]


class BundleError(Exception):
    """The bundle cannot be served; names the file and the reason."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path = path
        self.problem = problem


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)


class FileEntry(_Model):
    """Checksum and size of one file of the bundle."""

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)


class Dimensions(_Model):
    """The sizes of the model that the engine needs."""

    d_model: int = Field(gt=0)
    decoder_layers: int = Field(gt=0, le=MOST_LAYERS)
    decoder_heads: int = Field(gt=0)
    source_vocabulary: int = Field(gt=0)
    target_vocabulary: int = Field(gt=1)
    max_source_tokens: int = Field(gt=0)
    max_target_tokens: int = Field(gt=0)


class SpecialTokens(_Model):
    """Ids with a meaning. Tokenized text stands between `source_bos` and `source_eos`.

    A model without `eos` ends no output by itself: each has as many tokens as were asked for.
    """

    decoder_start: TokenId
    eos: tuple[TokenId, ...]
    source_eos: TokenId | None = None
    source_bos: TokenId | None = None
    pad: TokenId | None = None
    forced_bos: TokenId | None = None
    forced_eos: TokenId | None = None
    banned: tuple[TokenId, ...] = ()
    banned_at_start: tuple[TokenId, ...] = ()


class GenerationDefaults(_Model):
    """What an unset search option means; from the checkpoint's generation_config.

    `not_supported` are settings of the checkpoint that would change answers and have no effect, with their values.
    """

    beam_size: int = Field(default=1, ge=1, le=MAX_BEAMS)
    length_penalty: float = Field(default=1.0, ge=-MAX_LENGTH_PENALTY, le=MAX_LENGTH_PENALTY)
    length_penalty_kind: Literal["power", "gnmt"] = "power"
    early_stopping: Literal["when_full", "heuristic", "never"] = "heuristic"
    min_new_tokens: int = Field(default=0, ge=0)
    max_new_tokens: int = Field(gt=0)
    n_best: int = Field(default=1, ge=1, le=MAX_BEAMS)
    not_supported: dict[str, str] = Field(default_factory=dict)


class TokenizerEntry(_Model):
    """Which tokenizer reads the text, and from which files of the bundle.

    `marian`: source.spm, target.spm, vocab.json, and target_vocab.json if the target has its own; `tokenizers`:
    tokenizer.json, and target_tokenizer.json if the target has its own; `sentencepiece`: source.spm, target.spm (ids
    are the pieces' own); `none`: inputs and outputs are token ids.

    Attributes:
        kind: One of these.
        files: Names of its files.
        clean_up_spaces: Whether texts lose the spaces before punctuation, as transformers clean them up.
        special: Target ids that leave no trace in text; if None, `special_tokens` but for those of the source.
    """

    kind: Literal["marian", "tokenizers", "sentencepiece", "none"]
    files: tuple[str, ...] = ()
    clean_up_spaces: bool = False
    special: tuple[TokenId, ...] | None = None


class Golden(_Model):
    """A forced decode with its answer: shows at warm-up that this machine computes what the exporting one did.

    Attributes:
        source: Source ids.
        forced: Decoder input ids, one per step, decoder start first.
        top_logprob: The log-probability of the most probable token after each step.
    """

    source: tuple[TokenId, ...]
    forced: tuple[TokenId, ...]
    top_logprob: tuple[float, ...]


class Activations(_Model):
    """How an int8 bundle scales what its products multiply: by each row's own largest value, or by measured ranges.

    Attributes:
        scaled: `per_row`, or `calibrated`: by one range per product, beyond which values saturate.
        sentences: How many sentences the ranges were measured with.
        ranges: The largest magnitude in each product's input, by the product's name.
    """

    scaled: Literal["per_row", "calibrated"]
    sentences: int | None = Field(default=None, ge=1)
    ranges: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)


class Manifest(_Model):
    """Everything the server needs to know about a bundle."""

    format_version: Literal[3]
    name: str = Field(pattern=NAME_PATTERN)
    architecture: str
    precision: Precision
    activations: Activations | None = None
    created: str
    dimensions: Dimensions
    special_tokens: SpecialTokens
    generation_defaults: GenerationDefaults
    tokenizer: TokenizerEntry
    files: dict[str, FileEntry]
    golden: tuple[Golden, ...]
    golden_tolerance: float = Field(gt=0)
    spec: dict[str, object]
    graphs: dict[str, object]
    parity: dict[str, object]
    producers: dict[str, str]

    def problems(self) -> Iterator[str]:
        """What contradicts itself although each field is valid."""
        yield from self._file_problems()
        yield from self._token_problems()
        yield from self._golden_problems()
        yield from self._activation_problems()
        dimensions, defaults = self.dimensions, self.generation_defaults
        if dimensions.d_model % dimensions.decoder_heads:
            yield f"dimensions: decoder_heads {dimensions.decoder_heads} does not divide d_model {dimensions.d_model}"
        longest = dimensions.max_target_tokens
        if not defaults.min_new_tokens <= defaults.max_new_tokens <= longest:
            limits = f"min_new_tokens {defaults.min_new_tokens}, max_new_tokens {defaults.max_new_tokens}"
            yield f"generation_defaults: {limits} and the model's {longest} positions are not in this order"
        if defaults.n_best > defaults.beam_size:
            yield f"generation_defaults: n_best {defaults.n_best} is more than beam_size {defaults.beam_size}"

    def _file_problems(self) -> Iterator[str]:
        graphs = (ENCODER, *decoder_graphs(self.precision, self.dimensions.decoder_layers))
        for required in (*graphs, WEIGHTS, *self.tokenizer.files):
            if required not in self.files:
                yield f"files: {required!r} is not listed"
        for name in self.files:
            if name in ("", "..", ".", MANIFEST) or not name.isprintable() or any(c in name for c in "/\\:"):
                yield f"files: {name!r} is not a plain file name"

    def _token_problems(self) -> Iterator[str]:
        tokens, dimensions = self.special_tokens, self.dimensions
        one_by_one = (tokens.decoder_start, tokens.pad, tokens.forced_bos, tokens.forced_eos)
        for token in (*one_by_one, *tokens.eos, *tokens.banned, *tokens.banned_at_start):
            if token is not None and token >= dimensions.target_vocabulary:
                yield f"special_tokens: {token} is outside the target vocabulary of {dimensions.target_vocabulary}"
        for token in (tokens.source_eos, tokens.source_bos):
            if token is not None and token >= dimensions.source_vocabulary:
                yield f"special_tokens: {token} is outside the source vocabulary of {dimensions.source_vocabulary}"

    def _activation_problems(self) -> Iterator[str]:
        activations = self.activations
        if (activations is not None) != (self.precision == "int8"):
            yield "activations: how they are scaled belongs to int8 bundles, and to no others"
        if activations is None:
            return
        calibrated = activations.scaled == "calibrated"
        if (activations.sentences is not None, bool(activations.ranges)) != (calibrated, calibrated):
            yield "activations: ranges, and how many sentences they are from, belong to those that are calibrated"

    def _golden_problems(self) -> Iterator[str]:
        dimensions = self.dimensions
        for golden in self.golden:
            if len(golden.forced) != len(golden.top_logprob):
                yield "golden: forced and top_logprob differ in length"
            sides = (
                (golden.source, dimensions.max_source_tokens, dimensions.source_vocabulary),
                (golden.forced, dimensions.max_target_tokens, dimensions.target_vocabulary),
            )
            for tokens, most, vocabulary in sides:
                if not 0 < len(tokens) <= most or max(tokens) >= vocabulary:
                    yield f"golden: {list(tokens)} is nothing that this model reads"


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
            raise BundleError(self.path / name, "is not listed in the manifest")
        return self.path / name

    def read(self, name: str) -> bytes:
        """Content of one of the files that the manifest lists, verified as it is read.

        Raises:
            BundleError: it is missing or damaged by now.
        """
        file = self.file(name)
        with _opened(file, self.manifest.files[name]) as stream:
            content = stream.read()
        _check_digest(file, self.manifest.files[name], hashlib.sha256(content).hexdigest())
        return content

    def foreign_files(self) -> list[str]:
        """Names beside the manifest that it does not list, as a fresh volume has one (lost+found).

        But for names with a leading dot, which are the bookkeeping of ConfigMap and image volumes.
        """
        try:
            names = sorted(file.name for file in self.path.iterdir())
        except OSError:  # a folder may let its files be read and not be listed
            return []
        return [n for n in names if n != MANIFEST and n not in self.manifest.files and not n.startswith(".")]


def read_manifest(path: Path) -> tuple[Manifest, str]:
    """Read and check a bundle's manifest alone; returns it with its fingerprint.

    Raises:
        BundleError: it is missing, of another format, or contradicts itself.
    """
    file = path / MANIFEST
    hint = "is this a bundle? `beamline export` writes one"
    try:
        # Asked first: opening a pipe would wait for ever, and some devices never end.
        if file.exists() and not file.is_file():
            raise BundleError(file, f"is no file; {hint}")
        with file.open("rb") as stream:
            raw = stream.read(_LONGEST_MANIFEST + 1)
    except OSError as error:
        raise BundleError(file, f"cannot be read ({error.strerror}); {hint}") from error
    if len(raw) > _LONGEST_MANIFEST:
        raise BundleError(file, f"is longer than {_LONGEST_MANIFEST:,} bytes; {hint}")
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise BundleError(file, f"is not JSON ({error})") from error
    version = data.get("format_version") if isinstance(data, dict) else None
    if version != FORMAT_VERSION:
        raise BundleError(
            file, f"format version {version!r}; this server reads {FORMAT_VERSION}: export the model again"
        )
    try:
        manifest = Manifest.model_validate(data)
    except ValidationError as error:
        found = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise BundleError(file, found) from error
    if problems := list(manifest.problems()):
        raise BundleError(file, "; ".join(problems))
    return manifest, hashlib.sha256(raw).hexdigest()


def load_bundle(path: Path) -> Bundle:
    """Read a bundle and verify every file against the manifest.

    Raises:
        BundleError: names the first file that is missing, damaged or no file.
    """
    manifest, fingerprint = read_manifest(path)
    for name, entry in manifest.files.items():
        with _opened(path / name, entry) as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        _check_digest(path / name, entry, digest)
    return Bundle(path, manifest, fingerprint)


@contextmanager
def _opened(file: Path, entry: FileEntry) -> Iterator[BufferedReader]:
    """The file, open; a link is followed, since what counts is the content."""
    # Asked first: opening a pipe would wait for ever.
    if not file.is_file():
        raise BundleError(file, "is missing or no file; copy the bundle again")
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if size != entry.bytes:
                raise BundleError(file, f"has {size} bytes, the manifest says {entry.bytes}; copy the bundle again")
            yield stream
    except OSError as error:
        raise BundleError(file, f"cannot be read ({error.strerror})") from error


def _check_digest(file: Path, entry: FileEntry, digest: str) -> None:
    if digest != entry.sha256:
        raise BundleError(file, "does not match its checksum; copy the bundle again")
