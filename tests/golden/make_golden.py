"""Makes the bundles beside it and records what they answer.

    python tests/golden/make_golden.py

Run it once per format version, never to make a failing test pass: the bundles show that what was exported long ago is
still read, and still gives the same answers. A new version gets new folders; old ones stay as long as they are read.
"""

import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from beamline_export.agreement import Tokens, search_all
from beamline_export.bundle_writer import ExportOptions, export
from beamline_export.parity import all_logprobs, random_sources
from beamline_export.progress import Progress
from beamline_export.reference_search import reference_search
from beamline_export.testing import nn_config, write_nn_transformer
from beamline_server.bundle import Bundle
from beamline_server.engine.backend import Backend
from beamline_server.engine.request import EarlyStopping, SearchOptions
from beamline_server.engine.step import ModelRules
from beamline_server.manifest import FORMAT_VERSION
from beamline_server.models.load import build_backend, model_rules
from beamline_server.tokenizer import load_tokenizer

HERE = Path(__file__).parent
WORDS = ("<pad>", "</s>", "<s>", "<unk>", *(f"{a}{b}" for a in "bdfgklmn" for b in "aeiou"))
CONFIG = nn_config(
    d_model=16,
    nhead=2,
    num_encoder_layers=1,
    num_decoder_layers=2,
    dim_feedforward=32,
    max_positions=32,
    source_vocab_size=len(WORDS),
    target_vocab_size=len(WORDS),
    norm_first=True,
    activation="gelu",
    tie_embeddings=True,
    generation={"num_beams": 4, "max_new_tokens": 24, "bad_words_ids": [[0], [3]], "early_stopping": True},
)
SEARCHES = (
    SearchOptions(1, 1, max_new_tokens=12),
    SearchOptions(4, 4, max_new_tokens=12, early_stopping=EarlyStopping.WHEN_FULL),
    SearchOptions(3, 2, max_new_tokens=9, early_stopping=EarlyStopping.NEVER, length_penalty=0.6, min_new_tokens=3),
)
PER_SEARCH = 3
LEAST_MARGIN = {"fp32": 1e-3, "int8": 2e-3}
"""Recorded are searches whose every decision was clearer than this, so that other processors decide alike."""


def main() -> int:
    """Write the bundles and their answers."""
    answers: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_nn_transformer(Path(folder) / "golden", CONFIG, seed=1, sharpness=1.0)
        write_tokenizer(checkpoint / "tokenizer.json")
        for precision in ("fp32", "int8"):
            name = f"format{FORMAT_VERSION}-{precision}"
            options = ExportOptions(precision, "golden", replace=True)
            answers[name] = recorded(export(checkpoint, HERE / name, options, Progress()))
    (HERE / f"format{FORMAT_VERSION}.json").write_text(json.dumps(answers, indent=1) + "\n", "utf-8")
    return 0


def write_tokenizer(file: Path) -> None:
    """Words to ids, one by one."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(WORDS[:4]))
    tokenizer.save(str(file))


def recorded(bundle: Bundle) -> dict[str, Any]:
    """Texts with their ids, and searches with their answers."""
    backend, rules = build_backend(bundle, "cpu", threads=1), model_rules(bundle.manifest)
    tokenizer = load_tokenizer(bundle)
    assert tokenizer is not None
    texts = ["ba de fi", "", "ku  lo unheard"]
    return {
        "texts": [
            {"text": t, "ids": tokenizer.encode(t), "back": tokenizer.decode(tokenizer.encode(t))} for t in texts
        ],
        "searches": list(searches(backend, rules, LEAST_MARGIN[bundle.manifest.precision])),
    }


def searches(backend: Backend, rules: ModelRules, least_margin: float) -> Iterator[dict[str, Any]]:
    """Clear-cut searches and their answers."""
    for number, options in enumerate(SEARCHES):
        candidates = random_sources(len(WORDS), 1, 16, count=150, seed=number)
        clear = [source for source in candidates if margin(backend, rules, source, options) > least_margin]
        sources = clear[-PER_SEARCH:]
        assert len(sources) == PER_SEARCH, f"only {len(clear)} searches are clear enough"
        for source, answer in zip(sources, search_all(backend, rules, [(s, options) for s in sources]), strict=True):
            yield {
                "source": list(source),
                "options": {
                    "beam_size": options.beam_size,
                    "n_best": options.n_best,
                    "max_new_tokens": options.max_new_tokens,
                    "min_new_tokens": options.min_new_tokens,
                    "length_penalty": options.length_penalty,
                    "early_stopping": options.early_stopping.value,
                },
                "hypotheses": [{"tokens": list(h.tokens), "score": round(h.score, 6)} for h in answer.hypotheses],
            }


def margin(backend: Backend, rules: ModelRules, source: Tokens, options: SearchOptions) -> float:
    """How close the closest decision of a search was."""

    def next_logprobs(prefixes: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        return all_logprobs(backend, [source] * len(prefixes), np.array(prefixes), rules.vocabulary)[:, -1]

    trace = reference_search(next_logprobs, rules.search, options, rules.decoder_start)
    ranks = [abs(a.score - b.score) for a, b in zip(trace.hypotheses, trace.hypotheses[1:], strict=False)]
    return min([*ranks, *(step.margin for step in trace.steps), *(step.stop_margin for step in trace.steps)])


if __name__ == "__main__":
    sys.exit(main())
