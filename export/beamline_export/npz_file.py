"""Reads NumPy archives (.npz) without trusting them: plain numbers alone, and never more than the file holds."""

import io
import math
import zipfile
from collections.abc import Collection
from pathlib import Path

import numpy as np

from beamline_export.checkpoint import MOST_TENSORS, check_file
from beamline_export.spec import Array, ExportError

_MOST_GROWTH = 4
"""fp32 over bytes; arrays that lie over one another would be more."""
_LONGEST_HEADER, _LONGEST_NAME, _LONGEST_TEXT = 10_000, 1000, 1 << 20


def read_npz(file: Path, texts: Collection[str] = ()) -> tuple[dict[str, Array], dict[str, bytes]]:
    """Every array of an archive as fp32, and those called as in `texts` as bytes.

    Raises:
        ExportError: it is missing, no archive, compressed, damaged, or holds something else than numbers.
    """
    check_file(file, None)
    arrays: dict[str, Array] = {}
    found: dict[str, bytes] = {}
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            _check_entries(file, entries)
            for entry in entries:
                name = entry.filename.removesuffix(".npy")
                array = _read_array(file, name, archive.read(entry))
                if name in texts:
                    found[name] = array.tobytes()
                else:
                    arrays[name] = array.astype(np.float32)
    except FileNotFoundError as error:
        raise ExportError(f"{file} is missing") from error
    except ExportError:
        raise
    except Exception as error:  # whatever zipfile and NumPy's reading of headers raise, all mean the same to the user
        told = next(iter(str(error).splitlines()), "")[:200] or type(error).__name__
        raise ExportError(f"{file} cannot be read as a NumPy archive ({told}); copy it again") from error
    return arrays, found


def _check_entries(file: Path, entries: list[zipfile.ZipInfo]) -> None:
    if len(entries) > MOST_TENSORS:
        raise ExportError(f"{file} holds {len(entries):,} arrays, more than any model has ({MOST_TENSORS:,})")
    if any(len(entry.filename) > _LONGEST_NAME for entry in entries):
        raise ExportError(f"{file} holds an array with a name of more than {_LONGEST_NAME:,} characters; copy it again")
    if packed := [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]:
        raise ExportError(
            f"{file}: {packed[0][:60]!r} in it is compressed; save it again with numpy.savez, which does not compress"
        )
    if sum(entry.file_size for entry in entries) > max(_MOST_GROWTH * file.stat().st_size, 1 << 20):
        raise ExportError(f"{file} holds the same numbers in many arrays; save it again with numpy.savez")


def _read_array(file: Path, name: str, content: bytes) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    stream = io.BytesIO(content)
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ExportError(
            f"{file}: {name[:60]!r} is of version {version}, which is not known; save it with numpy.savez"
        )
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(stream, max_header_size=_LONGEST_HEADER)
    if dtype.hasobject or dtype.kind not in "fiub":
        raise ExportError(f"{file}: {name[:60]!r} holds no numbers ({dtype}); save the weights alone")
    if math.prod(shape) * dtype.itemsize != len(content) - stream.tell():
        raise ExportError(f"{file}: {name[:60]!r} is not as large as it says ({list(shape)}); copy it again")
    flat = np.frombuffer(content, dtype, offset=stream.tell())
    return flat.reshape(shape, order="F" if fortran else "C")


def read_text(found: dict[str, bytes], name: str) -> str | None:
    """A text that an archive holds as bytes, without the zeros behind it; None if it is absent or endless."""
    content = found.get(name)
    if content is None or len(content) > _LONGEST_TEXT:
        return None
    return content.rstrip(b"\0").decode("utf-8", "replace")
