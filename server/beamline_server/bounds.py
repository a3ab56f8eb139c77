"""What a manifest may say at most.

Every number in it has a bound, far above any model that there is, so that nothing that is computed from it overflows,
and nothing is made in its size before the files have shown that it is true (`bundle.load_bundle`).
"""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from beamline_server.engine.request import MAX_BEAMS, MAX_LENGTH_PENALTY

LONGEST_MANIFEST = 4 * 1024 * 1024
"""Bytes: many times what a thousand layers and all bans come to."""
MOST_WEIGHT_BYTES = 1 << 40
"""Of the file of weights: a terabyte."""
MOST_FILE_BYTES = (1 << 31) - 1
"""Of any other file: ONNX's format takes no more, and what reads tokenizers holds a file whole."""
MOST_LAYERS = 1000
"""Of a decoder, each of which has two files: as many as the deepest ones published have."""
MOST_FILES = 2 * MOST_LAYERS + 64
"""The graphs, the weights, and what a tokenizer needs."""
MOST_WIDTH = 1 << 16
"""Of rows; the widest language models have some 18,000."""
MOST_TOKENS = 1 << 22
"""Of a vocabulary; the largest ones have a million."""
MOST_POSITIONS = 1 << 20
"""Of a side; every position is a row of a table among the weights."""
MOST_ENDS = 64
"""Tokens that end a sequence: a search ranks as many more candidates per beam."""
MOST_BANNED = 4096
"""Tokens that never occur: a step takes as many more candidates per row, and looks at each in turn."""
MOST_GOLDEN_TOKENS = 4096
"""Of all golden inputs together, sources and targets: every start computes them. An export writes 72."""
MOST_TOLERANCE = 0.1
"""Of golden inputs: twice an export's widest. More would let another model pass."""
MOST_SENTENCES = 1_000_000
"""That ranges are measured with; an export takes 1,000."""
MOST_LANGUAGES = 4096
"""Of a model; the largest ones have some four hundred."""
LONGEST_LANGUAGE = 64
"""Characters of a language's name."""
LARGEST_FLOAT = 3.4e38
"""Of fp32, in which ranges are measured."""
LARGEST_NUMBER = 1 << 53
"""Magnitude of a number that is only told: what all readers of JSON hold exactly."""
LONGEST_TEXT = 300
"""Characters of a text that is only told."""
_DEEPEST = 4
"""Nesting of what is only told."""


class Model(BaseModel):
    """A part of a manifest: nothing is in it that is not described."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)


def _count(most: int, least: int = 1) -> Any:
    return Field(strict=True, ge=least, le=most)


def _number(least: float, most: float) -> Any:
    return Field(strict=True, ge=least, le=most)


FileBytes = Annotated[int, _count(MOST_WEIGHT_BYTES, least=0)]
Layers = Annotated[int, _count(MOST_LAYERS)]
Width = Annotated[int, _count(MOST_WIDTH)]
Vocabulary = Annotated[int, _count(MOST_TOKENS)]
TokenId = Annotated[int, _count(MOST_TOKENS - 1, least=0)]
Positions = Annotated[int, _count(MOST_POSITIONS)]
PositionsOrNone = Annotated[int, _count(MOST_POSITIONS, least=0)]
Beams = Annotated[int, _count(MAX_BEAMS)]
LengthPenalty = Annotated[float, _number(-MAX_LENGTH_PENALTY, MAX_LENGTH_PENALTY)]
Tolerance = Annotated[float, Field(strict=True, gt=0, le=MOST_TOLERANCE)]
LogProbability = Annotated[float, _number(-100, MOST_TOLERANCE)]
"""Of the most probable token: at least -ln(MOST_TOKENS), and above 0 by rounding alone."""
Sentences = Annotated[int, _count(MOST_SENTENCES)]
Range = Annotated[float, _number(0, LARGEST_FLOAT)]
Ends = Annotated[tuple[TokenId, ...], Field(max_length=MOST_ENDS)]
Banned = Annotated[tuple[TokenId, ...], Field(max_length=MOST_BANNED)]
Text = Annotated[str, Field(max_length=LONGEST_TEXT)]
LanguageName = Annotated[str, Field(min_length=1, max_length=LONGEST_LANGUAGE, pattern=r"^[^\s\x00-\x1f\x7f<>]+$")]


def _bounded(value: Any, depth: int = _DEEPEST) -> Any:
    """A value that is only told, if it is within the bounds of that.

    Raises:
        ValueError: something in it is not.
    """
    if isinstance(value, Mapping | list):
        if not depth:
            raise ValueError(f"values are nested deeper than {_DEEPEST}")
        names = value if isinstance(value, Mapping) else ()
        for inner in (*names, *(value.values() if isinstance(value, Mapping) else value)):
            _bounded(inner, depth - 1)
    elif isinstance(value, str) and len(value) > LONGEST_TEXT:
        raise ValueError(f"a text is longer than {LONGEST_TEXT} characters")
    elif isinstance(value, int | float) and not -LARGEST_NUMBER <= value <= LARGEST_NUMBER:
        raise ValueError(f"a number is beyond {LARGEST_NUMBER}")
    return value


Told = Annotated[dict[str, object], AfterValidator(_bounded)]
"""What is kept for people: nothing is computed from it."""
