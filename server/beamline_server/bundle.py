"""The bundle: what export writes and the server reads. The server owns this contract.

A bundle is a folder:

    manifest.json           `manifest.Manifest`
    manifest.sha256         its checksum, as sha256sum writes it
    encoder.onnx            ids -> cross-attention keys and values; not of models without an encoder
    decoder_step.onnx       one step of the decoder over packed rows; for CUDA (fp16, fp32)
    decoder_piece_….onnx    the same step cut at its attentions; for the CPU (int8, fp32): piece 0 before the first
                            self-attention, one piece after each attention (graphs.py)
    weights.bin             every weight once; all graphs point into it
    relative_bias.bin       of models with relative positions alone, for the CPU: what the decoder's self-attention adds
                            to scores, as fp32 numbers (layers, heads, distances)
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
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import BufferedIOBase, BufferedReader
from pathlib import Path

from pydantic import ValidationError

from beamline_server import bounds
from beamline_server.graph_file import read_graph
from beamline_server.graphs import DECODER_STEP, ENCODER, bundle_graphs, decoder_pieces
from beamline_server.manifest import (
    CHECKSUM,
    FORMAT_VERSION,
    LONGEST_TOLD,
    MANIFEST,
    WEIGHTS,
    Dimensions,
    FileEntry,
    Manifest,
)

EXIT_BUNDLE = 3
"""Exit status of a command whose bundle cannot be served."""
MOST_FOREIGN_TOLD = 8
"""Files that are no part of a bundle are named up to so many."""
COPY_AGAIN = "copy the bundle again"
EXPORT_AGAIN = "export the model again"

_MOST_PROBLEMS_TOLD = 8
_VOLUME_BOOKKEEPING = re.compile(r"\.\.(data|data_tmp|\d{4}_\d\d_\d\d_.*)")
"""What Kubernetes has beside the files of a volume: `..data`, and the folder with a time in its name behind it."""
_CHUNK = 1 << 20


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

    @contextmanager
    def streamed(self, name: str) -> Iterator["VerifiedStream"]:
        """One of the files that the manifest lists, to be read from its beginning on.

        Raises:
            BundleError: it is missing or damaged by now; of what is in it, this is known only at the end.
        """
        file, entry = self.file(name), self.manifest.files[name]
        with _listed(file, entry) as stream:
            verified = VerifiedStream(stream, entry.bytes)
            yield verified
            _check_digest(file, entry, verified.digest())

    def foreign_files(self) -> list[str]:
        """Names beside the manifest that it does not list, as a fresh volume has one (lost+found)."""
        try:
            names = sorted(file.name for file in self.path.iterdir())
        except OSError:  # a folder may let its files be read and not be listed
            return []
        own = {MANIFEST, CHECKSUM, *self.manifest.files}
        return [name for name in names if name not in own and not _VOLUME_BOOKKEEPING.fullmatch(name)]


class VerifiedStream:
    """Content of a file, read piece by piece and summed on the way.

    Args:
        stream: The file, at its beginning.
        size: How many bytes count, however many follow.
    """

    def __init__(self, stream: BufferedReader, size: int) -> None:
        self._stream, self._left = stream, size
        self._sum = hashlib.sha256()

    def fill(self, memory: memoryview) -> None:
        """Read on, until the memory is full or the file has ended, which shows in the checksum."""
        at, wanted = 0, min(len(memory), self._left)
        while at < wanted and (count := self._stream.readinto(memory[at : min(at + _CHUNK, wanted)])):
            self._sum.update(memory[at : at + count])
            at, self._left = at + count, self._left - count

    def digest(self) -> str:
        """SHA-256 of all of the file, read to its end."""
        chunk = bytearray(_CHUNK)
        while left := self._left:
            self.fill(memoryview(chunk))
            if self._left == left:
                break
        return self._sum.hexdigest()


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
    return (str(key)[:LONGEST_TOLD] for key in place)


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


def load_bundle(path: Path, advance: Callable[[int], object] = lambda _: None) -> Bundle:
    """Read a bundle and verify every file against the manifest, the graphs' contracts included.

    Nothing is computed, and nothing larger than a graph is held in memory.

    Args:
        path: Its folder.
        advance: Is told of each part of a file that is summed, by its bytes.

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
            _check_digest(path / name, entry, digest(stream, entry.bytes, advance))
    return bundle


def _check_graphs(bundle: Bundle) -> None:
    """Hold the graphs' files to what the manifest's dimensions make of them, and the weights' to what graphs take."""
    dimensions = bundle.manifest.dimensions
    contracts = bundle_graphs(
        bundle.manifest.precision,
        "float16" if bundle.manifest.precision == "fp16" else "float32",
        dimensions.graph_sizes,
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
    pieces = decoder_pieces(dimensions.graph_sizes)
    if name == ENCODER:
        ids, positions = dimensions.source_vocabulary, dimensions.max_source_tokens
    elif name in (DECODER_STEP, pieces[0]):
        ids, positions = dimensions.target_vocabulary, dimensions.max_target_tokens
    else:
        turned = dimensions.rotary_positions and name != pieces[-1]
        return {"_positions": dimensions.max_target_tokens} if turned else {}
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


def digest(stream: BufferedIOBase, size: int, advance: Callable[[int], object] = lambda _: None) -> str:
    """SHA-256 of so many bytes, however many follow by now."""
    sum_so_far = hashlib.sha256()
    while size > 0 and (chunk := stream.read(min(size, _CHUNK))):
        sum_so_far.update(chunk)
        size -= len(chunk)
        advance(len(chunk))
    return sum_so_far.hexdigest()


def _check_digest(file: Path, entry: FileEntry, digest: str) -> None:
    if digest != entry.sha256:
        raise BundleError(file, "does not match its checksum", COPY_AGAIN)
