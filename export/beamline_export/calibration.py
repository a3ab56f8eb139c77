"""Measures how large the inputs of a model's products get on real sentences, for `CalibratedInt8Store`.

The model's fp32 graphs get one more output per product; the engine's own search runs over the sentences, and the
largest magnitude seen is the product's range.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from beamline.text_lines import NotText, read_lines
from beamline_export.agreement import Tokens, search_all
from beamline_export.checkpoint import check_file
from beamline_export.expectations import bounded_lines
from beamline_export.graph_writer import GraphWriter
from beamline_export.languages import default_around, require_default_target
from beamline_export.parity import Progress
from beamline_export.precision import Fp32Store
from beamline_export.spec import Array, ExportError
from beamline_server.bundle import Bundle
from beamline_server.engine.ort.cpu import CpuBackend
from beamline_server.engine.request import EarlyStopping, LengthPenaltyKind, SearchOptions
from beamline_server.graphs import TensorSpec
from beamline_server.languages import NOTHING_AROUND
from beamline_server.manifest import GenerationDefaults
from beamline_server.models.forced import forced_decode
from beamline_server.models.load import model_rules, usable_cores
from beamline_server.tokenizer import load_tokenizer

MOST_SENTENCES = 1000
"""Sentences beyond these are not used: a few hundred settle the ranges."""

_LEAST_BEAMS = 4
_AT_ONCE = 16
"""Sentences in one batch; bounds the memory for their caches."""
_MORE_TOKENS = 32
"""A search ends after this many tokens more than twice its source's."""
_MOST_PROBLEMS = 8
Magnitudes = NDArray[np.float32]
"""The largest magnitude in each row of a product's input, (N,)."""
_RANGE = "range:"
"""What the names of the additional outputs begin with; the product's name follows."""


class RangeStore(Fp32Store):
    """As `Fp32Store`, with one more output per product: the largest magnitude in each row of its input, (N).

    Where a product rectifies its input, it is that of the rectified one.
    """

    def linear(
        self, g: GraphWriter, x: str, name: str, weight: Array, bias: Array | None, *, rectify: bool = False
    ) -> str:
        """As `WeightStore.linear`."""
        x = g.one("Relu", x) if rectify else x
        _add_range(g, x, name)
        return super().linear(g, x, name, weight, bias)

    def head(self, g: GraphWriter, x: str, name: str, weight: Array, bias: Array | None) -> str:
        """As `WeightStore.head`."""
        _add_range(g, x, name)
        return super().head(g, x, name, weight, bias)


def _add_range(g: GraphWriter, x: str, product: str) -> None:
    largest = g.one("ReduceMax", g.one("Abs", x), g.constant([-1], np.int64), keepdims=0)
    g.add_output(largest, f"{_RANGE}{product}", TensorSpec("float32", ("N",)))


@dataclass(frozen=True, slots=True)
class Sentences:
    """What a calibration file holds.

    Attributes:
        file: Where they are from.
        lines: Line number, from 1, and text of each; none is empty.
        more: Whether the file has more than these.
    """

    file: Path
    lines: tuple[tuple[int, str], ...]
    more: bool


def read_sentences(file: Path) -> Sentences:
    """Read the first `MOST_SENTENCES` lines that are not empty; what a line is, `text_lines` says.

    Raises:
        ExportError: the file cannot be read, is no UTF-8 text or holds no sentences.
    """
    lines: list[tuple[int, str]] = []
    more = False
    check_file(file, None)
    try:
        with file.open("rb") as stream:
            for line in read_lines(bounded_lines(stream, file)):
                text = line.text().strip()
                if text and len(lines) == MOST_SENTENCES:
                    more = True
                    break
                if text:
                    lines.append((line.number, text))
    except NotText as error:
        raise ExportError(f"{file}: {error}") from error
    except OSError as error:
        raise ExportError(f"{file} cannot be read ({error.strerror}); give a text file, a sentence per line") from error
    if not lines:
        raise ExportError(f"{file} holds no sentences; give a few hundred like those that will be translated")
    return Sentences(file, tuple(lines), more)


def encode_sentences(sentences: Sentences, bundle: Bundle) -> list[Tokens]:
    """Source ids of each sentence: by the bundle's tokenizer, or as they stand there if it has none.

    Raises:
        ExportError: names the lines that are longer than the model's positions, or no token ids; or the model
            needs languages and its checkpoint names none.
    """
    tokenizer, dimensions = load_tokenizer(bundle), bundle.manifest.dimensions
    require_default_target(bundle.manifest)
    around = NOTHING_AROUND if tokenizer is None else default_around(bundle.manifest)
    sources: list[Tokens] = []
    problems: list[str] = []
    for number, text in sentences.lines:
        try:
            if tokenizer is None:
                source = _token_ids(text, dimensions.source_vocabulary)
            else:
                source = tokenizer.encode(text, around)
        except ValueError as error:
            problems.append(f"line {number}: {error}")
            continue
        if not 0 < len(source) <= dimensions.max_source_tokens:
            problems.append(
                f"line {number} has {len(source)} tokens (the model takes 1 to {dimensions.max_source_tokens})"
            )
        sources.append(tuple(source))
    if problems:
        more = f"; and {len(problems) - _MOST_PROBLEMS} more" if len(problems) > _MOST_PROBLEMS else ""
        raise ExportError(f"{sentences.file}: {'; '.join(problems[:_MOST_PROBLEMS])}{more}")
    return sources


def _token_ids(text: str, vocabulary: int) -> list[int]:
    parts = text.split()
    # The length bounds what int() has to read, and what the message has to show.
    wrong = [part for part in parts if not (part.isascii() and part.isdecimal() and len(part) < 10)]
    wrong = wrong or [part for part in parts if int(part) >= vocabulary]
    if wrong:
        raise ValueError(
            f"{wrong[0][:20]!r} is no token id below {vocabulary} (the model has no tokenizer: give ids, with spaces "
            "between them)"
        )
    return [int(part) for part in parts]


def calibration_search(defaults: GenerationDefaults) -> SearchOptions:
    """The model's own search, but with four beams at least: requests may ask for wider ones than it does."""
    return SearchOptions(
        beam_size=max(defaults.beam_size, _LEAST_BEAMS),
        length_penalty=defaults.length_penalty,
        length_penalty_kind=LengthPenaltyKind(defaults.length_penalty_kind),
        early_stopping=EarlyStopping(defaults.early_stopping),
        min_new_tokens=defaults.min_new_tokens,
        max_new_tokens=defaults.max_new_tokens,
    )


def measure_ranges(
    bundle: Bundle, sources: Sequence[Tokens], options: SearchOptions, progress: Progress
) -> dict[str, float]:
    """The largest magnitude in the input of each product while these sources are searched for.

    Args:
        bundle: Its graphs are written with a `RangeStore`.
        sources: Token ids of each sentence.
        options: How to search.
        progress: Shows how far it is.

    Returns:
        The range of each product, by its name.

    Raises:
        ExportError: the graphs cannot be loaded, or their values leave fp32.
    """
    ranges: dict[str, float] = {}

    def note(output: str, magnitudes: Magnitudes) -> None:
        product = output.removeprefix(_RANGE)
        # As numpy's maximum, which keeps a NaN.
        ranges[product] = float(np.maximum(ranges.get(product, 0.0), magnitudes.max()))

    backend, rules = _load(bundle, note), model_rules(bundle.manifest)
    # The engine would tell a search without finite scores as an error of its own, in its log.
    _, logprobs = forced_decode(backend, sources[0], (rules.decoder_start,))
    _check_finite({**ranges, "its log-probabilities": logprobs[0]})
    sizes = bundle.manifest.dimensions
    room = sizes.max_target_tokens if sizes.decoder_only else None
    batches = [sources[i : i + _AT_ONCE] for i in range(0, len(sources), _AT_ONCE)]
    for i in progress("calibrate", len(batches)):
        search_all(backend, rules, [(source, bounded_search(source, options, room)) for source in batches[i]])
    _check_finite(ranges)
    return ranges


def bounded_search(source: Tokens, options: SearchOptions, room: int | None = None) -> SearchOptions:
    """The search, but for a runaway that would take longer than all other sentences and tell nothing new.

    Of a model without an encoder, prompt and answer have so much room together.
    """
    most = min(options.max_new_tokens, 2 * len(source) + _MORE_TOKENS)
    most = most if room is None else min(most, room - len(source))
    return replace(options, max_new_tokens=most, min_new_tokens=min(options.min_new_tokens, most))


def _check_finite(values: Mapping[str, float]) -> None:
    if wrong := [name for name, value in values.items() if not np.isfinite(value)]:
        raise ExportError(f"the model's values are not finite in fp32, at {wrong[0]}; its weights or config are broken")


def _load(bundle: Bundle, note: Callable[[str, Magnitudes], None]) -> CpuBackend:
    try:
        return CpuBackend(bundle, threads=usable_cores(), note=note)
    except Exception as error:  # onnxruntime refuses in many ways
        reason = str(error).partition("\n")[0]
        raise ExportError(f"the fp32 model for the calibration cannot be loaded: {reason}") from error
