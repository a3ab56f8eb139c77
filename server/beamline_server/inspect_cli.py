"""`beamline inspect`: tells what is in a bundle."""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from beamline_server.bundle import (
    EXIT_BUNDLE,
    MOST_FOREIGN_TOLD,
    Bundle,
    BundleError,
    load_bundle,
    printable,
    read_manifest,
)
from beamline_server.manifest import Manifest

Row = tuple[str, str]


def main(argv: Sequence[str] | None = None) -> int:
    """Run `beamline inspect` with these arguments; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="beamline inspect",
        description="Tell what is in a bundle. Exit status: 0, or 3 for a bundle that cannot be served.",
    )
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder that `beamline export` has written")
    parser.add_argument("--verify", action="store_true", help="check every file against its checksum as well")
    parser.add_argument("--json", action="store_true", help="print the manifest as JSON, with the fingerprint")
    arguments = parser.parse_args(argv)
    try:
        bundle = (
            load_bundle(arguments.bundle)
            if arguments.verify
            else Bundle(arguments.bundle, *read_manifest(arguments.bundle))
        )
    except BundleError as error:
        sys.stderr.write(f"beamline inspect: {error}\n")
        return EXIT_BUNDLE
    if foreign := bundle.foreign_files():
        names = ", ".join(ascii(name) for name in foreign[:MOST_FOREIGN_TOLD])
        more = f" and {len(foreign) - MOST_FOREIGN_TOLD} more" if len(foreign) > MOST_FOREIGN_TOLD else ""
        sys.stderr.write(f"beamline inspect: no part of the bundle, ignored: {names}{more}\n")
    if arguments.json:
        content = {"fingerprint": bundle.fingerprint, **bundle.manifest.model_dump(mode="json")}
        sys.stdout.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    else:
        verified = ("files verified", "yes" if arguments.verify else "no; --verify")
        rows = [*description(bundle.manifest, bundle.fingerprint), verified]
        sys.stdout.write(aligned(rows))
    return 0


def description(manifest: Manifest, fingerprint: str) -> Iterator[Row]:
    """A bundle for people: a name and a value per line, and headings, which have no value."""
    dimensions, tokens, defaults = manifest.dimensions, manifest.special_tokens, manifest.generation_defaults
    yield "name", manifest.name
    yield "architecture", manifest.architecture
    yield "precision", manifest.precision
    if manifest.activations is not None:
        # The ranges are too many to read: --json has them.
        yield "activations", ""
        yield from _indented(manifest.activations.model_dump(exclude={"ranges"}, exclude_none=True))
    yield "created", manifest.created
    yield "fingerprint", fingerprint
    yield "tokenizer", f"{manifest.tokenizer.kind} {' '.join(manifest.tokenizer.files)}".rstrip()
    if manifest.languages is not None:
        yield "languages", ""
        yield from _indented(_languages(manifest))
    yield "dimensions", ""
    yield from _indented(dimensions.model_dump(exclude_defaults=True))
    yield "special tokens", ""
    yield from _indented({name: value for name, value in tokens.model_dump().items() if value not in (None, ())})
    yield "generation defaults", ""
    yield from _indented(defaults.model_dump(exclude={"not_supported"}))
    if defaults.not_supported:
        yield "not supported, ignored", ""
        yield from _indented(defaults.not_supported)
    yield "parity with PyTorch", ""
    yield from _indented(manifest.parity)
    yield "files", ""
    yield from _indented({name: f"{entry.bytes:,} bytes" for name, entry in manifest.files.items()})
    yield "", f"{sum(entry.bytes for entry in manifest.files.values()):,} bytes in all"
    yield "exported with", ""
    yield from _indented(manifest.producers)


def _languages(manifest: Manifest) -> Mapping[str, object]:
    """The languages of each side, with what there is to tell about them."""
    assert manifest.languages is not None
    found = manifest.model_languages()
    told: dict[str, object] = {"source marked": manifest.languages.source_marked}
    told["target begins"] = manifest.languages.target_begins
    for side, names in found.names.items():
        if names:
            told[side] = names
            told[f"default {side}"] = found.default[side] or ("none; required" if side in found.needed else "none")
    return told


def aligned(rows: Iterable[Row]) -> str:
    """Rows as text, their values in one column."""
    told = list(rows)
    width = max(len(name) for name, _ in told)
    return "".join(printable(f"{name:<{width}}  {value}".rstrip()) + "\n" for name, value in told)


def _indented(values: Mapping[str, object], depth: int = 1) -> Iterator[Row]:
    indent = "  " * depth
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield f"{indent}{name}", ""
            yield from _indented(value, depth + 1)
        elif isinstance(value, Sequence) and not isinstance(value, str):
            yield f"{indent}{name}", " ".join(map(str, value))
        else:
            yield f"{indent}{name}", str(value)
