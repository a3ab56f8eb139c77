"""Whether the engine answers what PyTorch does: the embedded model beside transformers' `generate`, in process.

    python benchmarks/parity.py [--sentences 500] [--beam 4] [--n-best 1] [--int8]

Exports the model in fp32, translates sentences of its test file with both, and tells how many answers are the same
token sequences; for each that is not, the first step where the two searches part, and by how much `generate` preferred
its candidate there: below 1e-4, rounding decides. With --int8 also BLEU of fp32 and int8 over the whole file.
"""

import argparse
import gzip
import itertools
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from beamline_export.agreement import NEAR_TIE, Tokens, search_all
from beamline_export.bundle_writer import ExportOptions, export
from beamline_export.generate_oracle import Comparison, GenerateOracle
from beamline_export.progress import Progress
from beamline_export.reference import HuggingFaceReference
from beamline_server.bundle import Bundle
from beamline_server.engine.request import EarlyStopping, SearchOptions
from beamline_server.models.load import build_backend, model_rules, usable_cores
from beamline_server.tokenizer import Tokenizer, load_tokenizer

MODEL = Path(__file__).parent.parent / "models" / "fr-en"
BATCH = 32
MAX_NEW_TOKENS = 128


def test_set(folder: Path) -> list[list[str]]:
    """Source and references of every test sentence."""
    with gzip.open(folder / "test.tsv.gz", "rt", encoding="utf-8") as stream:
        return [line.rstrip("\n").split("\t") for line in stream]


def default_search(bundle: Bundle, beam: int, n_best: int) -> SearchOptions:
    """What `generate(num_beams=beam, max_new_tokens=128)` does with the model's own generation_config."""
    defaults = bundle.manifest.generation_defaults
    return SearchOptions(
        beam,
        n_best,
        length_penalty=defaults.length_penalty,
        early_stopping=EarlyStopping(defaults.early_stopping),
        min_new_tokens=defaults.min_new_tokens,
        max_new_tokens=MAX_NEW_TOKENS,
    )


def tokenizer_of(bundle: Bundle) -> Tokenizer:
    """The bundle's tokenizer; the embedded model has one."""
    tokenizer = load_tokenizer(bundle)
    assert tokenizer is not None
    return tokenizer


def compare(bundle: Bundle, model: Path, sources: Sequence[Tokens], options: SearchOptions) -> Iterator[Comparison]:
    """The engine beside `generate`, in order of the sources."""
    rules = model_rules(bundle.manifest)
    oracle = GenerateOracle(HuggingFaceReference("MarianMTModel", model).model, rules)
    backend = build_backend(bundle, "cpu", threads=usable_cores())
    # Sentences of like length side by side: `generate` computes their padding.
    order = sorted(range(len(sources)), key=lambda i: len(sources[i]))
    found: dict[int, Comparison] = {}
    for batch in tqdm(
        [order[i : i + BATCH] for i in range(0, len(order), BATCH)], desc="generate", leave=False, disable=None
    ):
        found |= dict(zip(batch, oracle.compare(backend, [sources[i] for i in batch], options), strict=True))
    return (found[i] for i in range(len(sources)))


def report(comparisons: Sequence[Comparison]) -> Iterator[str]:
    """The result as lines."""
    same = sum(c.same for c in comparisons)
    yield f"identical token sequences: {same} of {len(comparisons)} ({same / len(comparisons):.1%})"
    for number, comparison in enumerate(comparisons):
        if comparison.parting is not None:
            step, margin = comparison.parting.step, comparison.parting.margin
            verdict = "a near-tie" if margin < NEAR_TIE else "NOT a near-tie"
            yield f"  sentence {number}: parts at step {step}, where the candidates' margin is {margin:.2e}: {verdict}"
        elif not comparison.same:
            yield f"  sentence {number}: differs only from a padded batch; alone, generate answers the same"
    yield f"maximum score difference: {max(c.score_difference for c in comparisons):.2e}"


def bleu(bundle: Bundle, lines: Sequence[Sequence[str]]) -> float:
    """BLEU of the whole file, with all references of each sentence."""
    import sacrebleu

    tokenizer, options = tokenizer_of(bundle), default_search(bundle, 4, 1)
    backend, rules = build_backend(bundle, "cpu", threads=usable_cores()), model_rules(bundle.manifest)
    hypotheses: list[str] = []
    batches = [lines[i : i + 256] for i in range(0, len(lines), 256)]
    for batch in tqdm(batches, desc=f"translate, {bundle.manifest.precision}", leave=False, disable=None):
        answers = search_all(backend, rules, [(tuple(tokenizer.encode(source)), options) for source, *_ in batch])
        hypotheses += [tokenizer.decode(answer.hypotheses[0].tokens) for answer in answers]
    references = list(itertools.zip_longest(*(references for _, *references in lines)))
    return float(sacrebleu.corpus_bleu(hypotheses, references).score)


def main(argv: Sequence[str]) -> int:
    """Run; returns 1 if an answer differs by more than a near-tie."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sentences", type=int, default=500, help="how many of the test file (default: %(default)s)")
    parser.add_argument("--beam", type=int, default=4, help="beam width (default: %(default)s)")
    parser.add_argument("--n-best", type=int, default=1, help="hypotheses to compare (default: %(default)s)")
    parser.add_argument("--int8", action="store_true", help="also compare BLEU of fp32 and int8 on the whole file")
    arguments = parser.parse_args(argv)
    lines = test_set(MODEL)
    with tempfile.TemporaryDirectory() as folder:
        fp32 = export(MODEL, Path(folder) / "fp32", ExportOptions("fp32"), Progress())
        tokenizer = tokenizer_of(fp32)
        sources = [tuple(tokenizer.encode(source)) for source, *_ in lines[: arguments.sentences]]
        options = default_search(fp32, arguments.beam, arguments.n_best)
        comparisons = list(compare(fp32, MODEL, sources, options))
        print("\n".join(report(comparisons)))
        if arguments.int8:
            int8 = export(MODEL, Path(folder) / "int8", ExportOptions("int8"), Progress())
            for bundle in (fp32, int8):
                print(f"BLEU, {len(lines)} sentences, {bundle.manifest.precision}: {bleu(bundle, lines):.2f}")
    return 0 if all(c.agrees for c in comparisons) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
