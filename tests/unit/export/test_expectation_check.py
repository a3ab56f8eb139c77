"""Outputs of another model are told from those of the same one, near-ties from both; the first difference is shown."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from beamline_export.expectation_check import ExpectedOutputs
from beamline_export.expectations import Expectations, Line
from beamline_export.reference_search import reference_search
from beamline_export.spec import ExportError
from beamline_server.bundle import Bundle
from beamline_server.engine.request import EarlyStopping, SearchOptions
from beamline_server.engine.step import ModelRules
from beamline_server.manifest import FileEntry, Manifest, TokenizerEntry
from beamline_server.models.load import model_rules
from doubles.engine import RandomTable, TableBackend
from doubles.service import make_manifest

VOCABULARY, LIMIT = 12, 9
SOURCES = [(3, 5, 1), (4, 1), (7, 7, 2, 1), (9, 1)]
MANIFEST = make_manifest(
    architecture="nn_transformer",
    tokenizer={"kind": "none", "files": []},
    special_tokens={"decoder_start": 0, "eos": [1]},
    generation_defaults={"max_new_tokens": LIMIT},
    dimensions={
        "d_model": 8,
        "decoder_layers": 1,
        "decoder_heads": 2,
        "source_vocabulary": VOCABULARY,
        "target_vocabulary": VOCABULARY,
        "max_source_tokens": 16,
        "max_target_tokens": 16,
    },
)
RULES = model_rules(MANIFEST)


@dataclass(frozen=True)
class Nudged:
    """A table that prefers one token after one prefix of one source by some more."""

    table: Callable[[Any, Any], NDArray[np.float32]]
    source: tuple[int, ...]
    prefix: tuple[int, ...]
    token: int
    by: float

    def __call__(self, source: tuple[int, ...], prefix: tuple[int, ...]) -> NDArray[np.float32]:
        """The row of the table, nudged."""
        row = self.table(source, prefix).copy()
        if (tuple(source), tuple(prefix)) == (self.source, (0, *self.prefix)):
            row[self.token] += np.float32(self.by)
        return row


TABLE = RandomTable(VOCABULARY, seed=1)


def outputs(table: Callable[[Any, Any], NDArray[np.float32]], beam: int = 1) -> list[tuple[int, ...]]:
    """What a model answers to the sources."""
    options = SearchOptions(beam, early_stopping=EarlyStopping.HEURISTIC, max_new_tokens=LIMIT)

    def search(source: tuple[int, ...]) -> tuple[int, ...]:
        def next_logprobs(prefixes: Sequence[Sequence[int]]) -> NDArray[np.float32]:
            return np.stack([table(source, tuple(prefix)) for prefix in prefixes])

        return reference_search(next_logprobs, RULES.search, options, RULES.decoder_start).hypotheses[0].tokens

    return [search(source) for source in SOURCES]


def expected(targets: Sequence[Sequence[int]], **fields: Any) -> ExpectedOutputs:
    lines = [
        Line(source_ids=list(source), target_ids=list(target), **fields)
        for source, target in zip(SOURCES, targets, strict=True)
    ]
    return ExpectedOutputs(
        Expectations(Path("expected.jsonl"), tuple(enumerate(lines, 1))), Bundle(Path("bundle"), MANIFEST, "f" * 64)
    )


def quiet(_: str, count: int) -> Iterator[int]:
    return iter(range(count))


def runner(table: Callable[[Any, Any], NDArray[np.float32]] = TABLE) -> TableBackend:
    return TableBackend(table, RULES)


def second_choice(path: Sequence[int], step: int) -> tuple[int, float]:
    """The second-best token of the first source at a step, and by how much it is behind."""
    row = TABLE(SOURCES[0], (0, *path[:step]))
    second, first = np.argsort(row)[-2:]
    return int(second), float(row[first] - row[second])


@pytest.mark.parametrize("beam", [1, 4])
@pytest.mark.parametrize("end", [True, False], ids=["with-end", "without-end"])
def test_the_same_model_gives_what_is_expected(beam: int, end: bool) -> None:
    table = RandomTable(VOCABULARY, seed=4)  # has outputs that end and others that the limit ends, with any beam
    targets = [target[:-1] if not end and target[-1] == 1 else target for target in outputs(table, beam)]
    targets[0] = (1,)  # an output of the end alone is never without it
    check = expected(targets, beam_size=beam)
    assert check.check(runner(table), quiet) == {"examples": 4, "same": 4, "near_ties": 0}
    assert check.count_same(runner(table), quiet) == 4


@pytest.mark.parametrize("beam", [1, 4])
def test_another_model_is_found(beam: int) -> None:
    targets = outputs(RandomTable(VOCABULARY, seed=2), beam)
    with pytest.raises(ExportError, match=r"expected\.jsonl: 0 of 4 outputs are as expected; the first that differs"):
        expected(targets, beam_size=beam).check(runner(), quiet)


def test_the_first_difference_is_shown_with_likely_causes() -> None:
    """Line, token, what was expected and what came, and how likely either was."""
    path = outputs(TABLE)[0]
    token, behind = second_choice(path, 2)
    targets = outputs(Nudged(TABLE, SOURCES[0], path[:2], token, behind + 1))
    with pytest.raises(ExportError) as caught:
        expected(targets).check(runner(), quiet)
    row = TABLE(SOURCES[0], (0, *path[:2]))
    assert str(caught.value).startswith(
        "expected.jsonl: 3 of 4 outputs are as expected; the first that differs is in line 1, at token 3: "
        f"expected {token} (log-probability {row[token]:.3f}), got {path[2]} ({row[path[2]]:.3f}); "
        "config.json is probably wrong in one of nhead, norm_first, activation, positions, scale_embedding, "
    )


@pytest.mark.parametrize("beam", [1, 2])
def test_a_near_tie_is_no_difference(beam: int) -> None:
    """Two tokens are as good as equal: the model that wrote the file took the one, the export takes the other."""
    token, behind = second_choice(outputs(TABLE)[0], 0)
    theirs, ours = (Nudged(TABLE, SOURCES[0], (), token, behind + by) for by in (2e-5, -2e-5))
    targets = outputs(theirs)
    if beam == 2:  # two hypotheses of one token, whose order is the near-tie
        targets = [target[:1] for target in targets]
    check = expected(targets, beam_size=beam, max_new_tokens=1 if beam == 2 else None)
    assert check.check(runner(ours), quiet)["near_ties"] == 1
    with pytest.raises(ExportError, match="3 of 4"):
        check.check(runner(TABLE), quiet)


def test_after_a_near_tie_the_rest_still_counts() -> None:
    path = outputs(TABLE)[0]
    token, behind = second_choice(path, 0)
    theirs, ours = (Nudged(TABLE, SOURCES[0], (), token, behind + by) for by in (2e-5, -2e-5))
    first = outputs(theirs)[0]
    assert len(first) > 2
    best = TABLE(SOURCES[0], (0, *first[:2])).argmax()
    wrong = (*first[:2], int(best) - 1 if best > 2 else int(best) + 1)
    with pytest.raises(ExportError, match="at token 3"):
        expected([wrong, *outputs(theirs)[1:]]).check(runner(ours), quiet)


def test_near_ties_alone_decide_nothing() -> None:
    def flat(*_: object) -> NDArray[np.float32]:
        return np.full(VOCABULARY, -np.log(VOCABULARY), np.float32)

    with pytest.raises(ExportError, match=r"0 of 4 outputs are as expected, all others are near-ties"):
        expected([(5, 6)] * 4).check(runner(flat), quiet)


def test_log_probabilities_are_compared_where_they_are_given() -> None:
    targets = outputs(TABLE)
    logprobs = [
        [float(TABLE(source, (0, *target[:i]))[token]) for i, token in enumerate(target)]
        for source, target in zip(SOURCES, targets, strict=True)
    ]

    def given(change: float) -> ExpectedOutputs:
        lines = [
            Line(source_ids=list(s), target_ids=list(t), logprobs=[*p[:-1], p[-1] + change])
            for s, t, p in zip(SOURCES, targets, logprobs, strict=True)
        ]
        read = Expectations(Path("expected.jsonl"), tuple(enumerate(lines, 1)))
        return ExpectedOutputs(read, Bundle(Path("bundle"), MANIFEST, "f" * 64))

    figures = given(-5e-4).check(runner(), quiet)
    assert figures.pop("max_logprob_difference") == pytest.approx(5e-4, rel=0.01)
    assert figures == {"examples": 4, "same": 4, "near_ties": 0, "with_logprobs": 4}
    wanted = logprobs[0][-1]
    message = (
        rf"line 1: the log-probability of token {len(targets[0])} \({targets[0][-1]}\) is {wanted:.4f}, "
        rf"expected {wanted - 2e-3:.4f} \(allowed difference: 0\.001\); config\.json is probably wrong"
    )
    with pytest.raises(ExportError, match=message):
        given(-2e-3).check(runner(), quiet)


def words_of(tokens: Sequence[int]) -> str:
    return " ".join(f"w{i}" for i in tokens if i not in (0, 1))


def expected_texts(folder: Path, texts: Sequence[str], **fields: Any) -> ExpectedOutputs:
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCABULARY)}))
    words.pre_tokenizer = Whitespace()
    words.save(str(folder / "tokenizer.json"))
    content = (folder / "tokenizer.json").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    manifest = MANIFEST.model_copy(
        update={
            "tokenizer": TokenizerEntry(kind="tokenizers", files=("tokenizer.json",)),
            "files": {**MANIFEST.files, "tokenizer.json": FileEntry(sha256=digest, bytes=len(content))},
        }
    )
    lines = [Line(source_ids=list(source), target=text, **fields) for source, text in zip(SOURCES, texts, strict=True)]
    read = Expectations(Path("expected.jsonl"), tuple(enumerate(lines, 1)))
    return ExpectedOutputs(read, Bundle(folder, manifest, "f" * 64))


def test_a_near_tie_is_no_difference_of_texts_either(tmp_path: Path) -> None:
    """The tokens of a text are not known: it counts whether near-ties alone lead to it."""
    token, behind = second_choice(outputs(TABLE)[0], 0)
    theirs, ours = (Nudged(TABLE, SOURCES[0], (), token, behind + by) for by in (2e-5, -2e-5))
    texts = [words_of(target) for target in outputs(theirs)]
    check = expected_texts(tmp_path, texts)
    assert check.check(runner(theirs), quiet) == {"examples": 4, "same": 4, "near_ties": 0}
    assert check.check(runner(ours), quiet) == {"examples": 4, "same": 3, "near_ties": 1}
    with pytest.raises(ExportError, match=rf"3 of 4 .* in line 1: expected '{texts[0]}', got 'w"):
        check.check(runner(TABLE), quiet)


def test_a_near_tie_excuses_no_text_that_it_does_not_lead_to(tmp_path: Path) -> None:
    """Neither other words, nor others after the close choice, nor an output that goes on."""
    token, behind = second_choice(outputs(TABLE)[0], 0)
    theirs, ours = (Nudged(TABLE, SOURCES[0], (), token, behind + by) for by in (2e-5, -2e-5))
    texts = [words_of(target) for target in outputs(theirs)]
    begin = texts[0].split()
    assert len(begin) > 2
    for wrong in ("w9 w9 w9 w9", " ".join([*begin[:-1], "w11"]), " ".join(begin[:-1]), f"{texts[0]} w3"):
        with pytest.raises(ExportError, match=rf"3 of 4 .* in line 1: expected '{wrong}', got 'w"):
            expected_texts(tmp_path, [wrong, *texts[1:]]).check(runner(ours), quiet)


def test_a_text_that_differs_in_a_model_of_near_ties_is_told(tmp_path: Path) -> None:
    """The ways that near-ties lead to are countless here, and the text on none of them."""

    def flat(*_: object) -> NDArray[np.float32]:
        return np.full(VOCABULARY, -np.log(VOCABULARY), np.float32)

    with pytest.raises(ExportError, match=r"0 of 4 outputs are as expected; the first that differs is in line 1"):
        expected_texts(tmp_path, ["nothing like it"] * 4).check(runner(flat), quiet)


def other_rules(**tokens: Any) -> ModelRules:
    """The rules of the model with other special tokens."""
    return model_rules(other_manifest(tokens))


def other_manifest(tokens: dict[str, Any], **defaults: int) -> Manifest:
    return MANIFEST.model_copy(
        update={
            "special_tokens": MANIFEST.special_tokens.model_copy(update=tokens),
            "generation_defaults": MANIFEST.generation_defaults.model_copy(update=defaults),
        }
    )


def lone(source: Sequence[int], target: Sequence[int], manifest: Manifest = MANIFEST, **fields: Any) -> ExpectedOutputs:
    """One line alone, of a model with this manifest."""
    line = Line(source_ids=list(source), target_ids=list(target), **fields)
    return ExpectedOutputs(
        Expectations(Path("expected.jsonl"), ((1, line),)), Bundle(Path("bundle"), manifest, "f" * 64)
    )


@pytest.mark.parametrize("end", [True, False], ids=["with-end", "without-end"])
def test_an_output_that_ends_where_the_model_goes_on_is_told(end: bool) -> None:
    """As with a wrong eos_token_id: 1 ended the output, config.json says 5."""
    path = outputs(TABLE)[0]
    assert path[-1] == 1
    assert 5 not in path
    target = path if end else path[:-1]
    check = lone(SOURCES[0], target, other_manifest({"eos": (5,)}), max_new_tokens=12)
    with pytest.raises(ExportError, match=rf"0 of 1 .* line 1, at token {len(target) + 1}: .*eos_token_id \(5\)"):
        check.check(TableBackend(TABLE, other_rules(eos=(5,))), quiet)


def test_a_part_of_an_output_of_a_beam_search_is_told() -> None:
    path = outputs(TABLE, 4)[0]
    with pytest.raises(ExportError, match=rf"at token 4: expected the end, got {path[3]}; an output ends with eos_tok"):
        lone(SOURCES[0], path[:3], beam_size=4).check(runner(), quiet)


def test_a_part_of_an_output_is_told() -> None:
    """It is neither ended nor as long as the limit; the next token is named."""
    path = outputs(TABLE)[0]
    row = TABLE(SOURCES[0], (0, *path[:2]))
    with pytest.raises(ExportError) as caught:
        expected([path[:2], *outputs(TABLE)[1:]]).check(runner(), quiet)
    assert str(caught.value).startswith(
        "expected.jsonl: 3 of 4 outputs are as expected; the first that differs is in line 1, at token 3: "
        f"expected the end (log-probability {row[1]:.3f}), got {path[2]} ({row[path[2]]:.3f}); an output ends with "
        "eos_token_id (1) or after max_new_tokens (9): correct config.json, or give the max_new_tokens of the line; "
    )
    check = lone(SOURCES[0], path[:2], max_new_tokens=2)
    assert check.check(runner(), quiet)["same"] == 1


def test_a_near_tie_at_the_end_is_none_of_the_differences() -> None:
    """Whether an output ends there is as close as any other choice may be."""
    path = outputs(TABLE)[0][:2]
    row = TABLE(SOURCES[0], (0, *path))
    behind = float(row.max() - row[1])
    assert behind > 0
    ours = Nudged(TABLE, SOURCES[0], path, 1, behind - 2e-5)
    for target in (path, (*path, 1)):
        check = expected([target, *outputs(TABLE)[1:]])
        assert check.check(runner(ours), quiet) == {"examples": 4, "same": 3, "near_ties": 1}


def test_a_model_without_an_end_ends_at_the_limit() -> None:
    path = [int(TABLE(SOURCES[0], (0,)).argmax())]
    while len(path) < LIMIT:
        path.append(int(TABLE(SOURCES[0], (0, *path)).argmax()))
    endless = other_manifest({"eos": ()})
    model = TableBackend(TABLE, other_rules(eos=()))
    assert lone(SOURCES[0], path, endless).check(model, quiet)["same"] == 1
    with pytest.raises(ExportError, match=r"at token 9: expected the end .*eos_token_id \(none\)"):
        lone(SOURCES[0], path[:-1], endless).check(model, quiet)


def test_an_output_that_is_forced_to_end_at_the_limit_is_as_long_as_the_model_says() -> None:
    path = [int(TABLE(SOURCES[0], (0,)).argmax())]
    while len(path) < 3:
        path.append(int(TABLE(SOURCES[0], (0, *path)).argmax()))
    assert 1 not in path
    model = TableBackend(TABLE, other_rules(forced_eos=1))
    for target in ((*path, 1), path):
        by_default = lone(SOURCES[0], target, other_manifest({"forced_eos": 1}, max_new_tokens=4))
        by_line = lone(SOURCES[0], target, other_manifest({"forced_eos": 1}), max_new_tokens=4)
        assert [check.check(model, quiet)["same"] for check in (by_default, by_line)] == [1, 1]


def test_an_end_before_the_least_length_is_told() -> None:
    path = outputs(TABLE)[0]
    assert path[-1] == 1
    for target in (path, path[:-1]):
        with pytest.raises(ExportError, match=r"0 of 1"):
            lone(SOURCES[0], target, other_manifest({}, min_new_tokens=LIMIT)).check(runner(), quiet)
