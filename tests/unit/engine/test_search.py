"""The engine's search against its slow twin, a greedy loop and brute force, on tables of log-probabilities."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from beamline_export.reference_search import NextLogprobs, reference_search
from beamline_server.engine.errors import StepFailed
from beamline_server.engine.processors import SearchRules
from beamline_server.engine.request import (
    Completed,
    EarlyStopping,
    Failed,
    Finish,
    GenerationRequest,
    Hypothesis,
    LengthPenaltyKind,
    RequestId,
    SearchOptions,
)
from beamline_server.engine.step import ModelRules
from beamline_server.engine.table import FloatArray
from doubles.engine import LogprobTable, RandomTable, TableBackend, run_alone, table_rules
from doubles.memory import Tokens

SOURCE = (3, 4, 5)
EOS = 1


def searched(table: LogprobTable, rules: ModelRules, options: SearchOptions) -> tuple[Hypothesis, ...]:
    """What the engine finds; nothing if it finds that there is nothing."""
    return search(TableBackend(table, rules), rules, options)


def search(backend: TableBackend, rules: ModelRules, options: SearchOptions) -> tuple[Hypothesis, ...]:
    outcome = run_alone(backend, rules, GenerationRequest(RequestId(1), SOURCE, options))
    if isinstance(outcome, Failed):
        assert isinstance(outcome.error, StepFailed)
        return ()
    return outcome.hypotheses


def next_logprobs(table: LogprobTable) -> NextLogprobs:
    return lambda prefixes: np.stack([table(SOURCE, tuple(prefix)) for prefix in prefixes])


def assert_as_reference(table: LogprobTable, rules: ModelRules, options: SearchOptions) -> None:
    backend = TableBackend(table, rules)
    ours = search(backend, rules, options)
    theirs = reference_search(next_logprobs(table), rules.search, options, rules.decoder_start)
    expected = theirs.hypotheses[: options.n_best]
    assert [(h.tokens, h.score) for h in ours] == [(h.tokens, h.score) for h in expected]
    assert len(backend.trace) == len(theirs.steps), "the searches did not take equally many steps"


def only(*tokens: int, vocabulary: int = 8) -> FloatArray:
    """Log-probabilities that prefer some tokens, best first, by 1 each; all others come far behind."""
    result = np.full(vocabulary, -50, np.float32)
    result[list(tokens)] = -np.arange(1, len(tokens) + 1)
    return result


@pytest.mark.parametrize("early_stopping", EarlyStopping)
@pytest.mark.parametrize("beam_size", [1, 2, 3, 4, 5, 8, 16])
@pytest.mark.parametrize("kind", LengthPenaltyKind)
def test_engine_equals_the_reference_search(
    kind: LengthPenaltyKind, beam_size: int, early_stopping: EarlyStopping
) -> None:
    for seed, length_penalty in enumerate((-1.5, -0.5, 0.0, 0.6, 1.0, 2.0)):
        options = SearchOptions(
            beam_size=beam_size,
            n_best=beam_size,
            length_penalty=length_penalty,
            length_penalty_kind=kind,
            early_stopping=early_stopping,
            max_new_tokens=9,
        )
        assert_as_reference(RandomTable(9, seed), table_rules(9), options)


@dataclass(frozen=True)
class Case:
    """One search on one table."""

    table: RandomTable
    rules: ModelRules
    options: SearchOptions


@st.composite
def cases(draw: st.DrawFn) -> Case:
    vocabulary = draw(st.integers(2, 12) | st.just(60))
    tokens = st.integers(0, vocabulary - 1)
    rules = SearchRules(
        eos=tuple(draw(st.lists(tokens, max_size=3, unique=True))),
        banned=tuple(draw(st.lists(tokens, max_size=2, unique=True))),
        banned_at_start=tuple(draw(st.lists(tokens, max_size=2, unique=True))),
        forced_first=draw(st.none() | tokens),
        forced_last=draw(st.none() | tokens),
    )
    beam_size = draw(st.integers(1, 16))
    max_new_tokens = draw(st.integers(1, 8))
    options = SearchOptions(
        beam_size=beam_size,
        n_best=draw(st.integers(1, beam_size)),
        length_penalty=draw(st.sampled_from([-2.0, -0.7, 0.0, 0.5, 1.0, 1.7]) | st.floats(-3, 3)),
        length_penalty_kind=draw(st.sampled_from(LengthPenaltyKind)),
        early_stopping=draw(st.sampled_from(EarlyStopping)),
        min_new_tokens=draw(st.integers(0, max_new_tokens)),
        max_new_tokens=max_new_tokens,
    )
    table = RandomTable(
        vocabulary,
        draw(st.integers(0, 2**16)),
        sharpness=draw(st.sampled_from([0.0, 2.0, 8.0])),
        levels=draw(st.none() | st.integers(1, 6)),
    )
    return Case(table, table_rules(vocabulary, rules), options)


@given(cases())
@settings(max_examples=4 * settings().max_examples)
def test_engine_equals_the_reference_search_whatever_the_rules(case: Case) -> None:
    """Bans, forced tokens, several ends, beams wider than the vocabulary, exact ties, searches without a result."""
    assert_as_reference(case.table, case.rules, case.options)


@given(cases(), st.integers(0, 1 << 16))
def test_what_cannot_occur_and_what_is_no_number_is_never_chosen(case: Case, seed: int) -> None:
    """Some tokens have no probability, after some prefixes none has any; some log-probabilities are no numbers."""

    def holes(source: Tokens, prefix: Tokens) -> FloatArray:
        logprobs = case.table(source, prefix).copy()
        draw = np.random.default_rng([seed, *prefix]).integers(0, 8, len(logprobs))
        logprobs[draw == 0] = np.nan
        logprobs[draw <= (7 if draw[0] == 7 else 2)] = -np.inf
        return logprobs

    assert_as_reference(holes, case.rules, case.options)
    for hypothesis in searched(holes, case.rules, case.options):
        assert np.isfinite(hypothesis.score)


@given(cases())
def test_token_logprobs_add_up_to_the_score_without_penalty(case: Case) -> None:
    for hypothesis in searched(case.table, case.rules, replace(case.options, length_penalty=0.0)):
        assert len(hypothesis.token_logprobs) == len(hypothesis.tokens)
        assert sum(hypothesis.token_logprobs) == pytest.approx(hypothesis.score, rel=1e-6, abs=1e-6)


def test_token_logprobs_are_the_tables() -> None:
    table, rules = RandomTable(8), table_rules()
    for hypothesis in searched(table, rules, SearchOptions(beam_size=4, n_best=4, max_new_tokens=12)):
        prefix: Tokens = (0,)
        for token, logprob in zip(hypothesis.tokens, hypothesis.token_logprobs, strict=True):
            assert logprob == pytest.approx(float(table(SOURCE, prefix)[token]), abs=1e-5)
            prefix = (*prefix, token)


@pytest.mark.parametrize("early_stopping", EarlyStopping)
@pytest.mark.parametrize("min_new_tokens", [0, 6])
def test_one_beam_is_greedy(min_new_tokens: int, early_stopping: EarlyStopping) -> None:
    rules = table_rules(8, SearchRules(eos=(EOS, 2), banned=(5,)))
    options = SearchOptions(min_new_tokens=min_new_tokens, max_new_tokens=10, early_stopping=early_stopping)
    for seed in range(20):
        table = RandomTable(8, seed)
        tokens: list[int] = []
        while len(tokens) < 10 and not {EOS, 2} & set(tokens):
            logprobs = table(SOURCE, (0, *tokens)).copy()
            logprobs[[5, EOS, 2] if len(tokens) < min_new_tokens else [5]] = -np.inf
            tokens.append(int(logprobs.argmax()))
        (found,) = searched(table, rules, options)
        assert found.tokens == tuple(tokens)


def every_sequence(vocabulary: int, longest: int) -> list[Tokens]:
    """All that a search may return: ended by its only end of sequence, or as long as can be."""
    others = [token for token in range(vocabulary) if token != EOS]
    ended = [(*tokens, EOS) for length in range(longest) for tokens in itertools.product(others, repeat=length)]
    return ended + list(itertools.product(others, repeat=longest))


def brute_force(table: LogprobTable, sequences: Sequence[Tokens], options: SearchOptions) -> list[tuple[Tokens, float]]:
    scored = []
    for tokens in sequences:
        total = np.float32(0)
        for position, token in enumerate(tokens):
            total += table(SOURCE, (0, *tokens[:position]))[token]
        n = len(tokens)
        base = (5 + n) / 6 if options.length_penalty_kind is LengthPenaltyKind.GNMT else n
        scored.append((tokens, float(total) / base**options.length_penalty))
    return sorted(scored, key=lambda entry: -entry[1])


@pytest.mark.parametrize(
    ("vocabulary", "longest", "beam_size"),
    [
        pytest.param(2, 4, 2, id="two tokens"),
        pytest.param(3, 3, 12, id="three tokens, up to 3"),
        pytest.param(3, 4, 16, id="three tokens, up to 4"),
        pytest.param(4, 3, 16, id="four tokens, up to 3"),
    ],
)
@pytest.mark.parametrize("kind", LengthPenaltyKind)
def test_a_beam_as_wide_as_needed_is_brute_force(
    kind: LengthPenaltyKind, vocabulary: int, longest: int, beam_size: int
) -> None:
    rules = table_rules(vocabulary)
    sequences = every_sequence(vocabulary, longest)
    for seed, length_penalty in itertools.product(range(10), (-1.0, 0.0, 1.0, 2.5)):
        table = RandomTable(vocabulary, seed)
        options = SearchOptions(
            beam_size=beam_size,
            n_best=beam_size,
            length_penalty=length_penalty,
            length_penalty_kind=kind,
            early_stopping=EarlyStopping.NEVER,
            max_new_tokens=longest,
        )
        found = searched(table, rules, options)
        best = brute_force(table, sequences, options)[:beam_size]
        assert [h.tokens for h in found] == [tokens for tokens, _ in best]
        assert [h.score for h in found] == pytest.approx([score for _, score in best], rel=1e-6)


@pytest.mark.parametrize("beam_size", [1, 4])
def test_a_search_can_finish_at_its_first_step(beam_size: int) -> None:
    """The end is the best first token, and all that could follow the others is worse."""
    outcome = run_alone(
        TableBackend(lambda _, prefix: only(EOS) if prefix == (0,) else only(2, 3), table_rules()),
        table_rules(),
        GenerationRequest(RequestId(1), SOURCE, SearchOptions(beam_size=beam_size, early_stopping=EarlyStopping.NEVER)),
    )
    assert isinstance(outcome, Completed)
    best = outcome.hypotheses[0]
    assert (best.tokens, best.finish, best.token_logprobs) == ((EOS,), Finish.END_OF_SEQUENCE, (-1.0,))
    if beam_size == 1:
        assert outcome.timing.steps == 1


@pytest.mark.parametrize("beam_size", [1, 4])
def test_a_search_ends_at_its_limit(beam_size: int) -> None:
    options = SearchOptions(beam_size=beam_size, n_best=beam_size, max_new_tokens=5)
    found = searched(lambda *_: only(2, 3, 4, 5), table_rules(), options)
    assert found[0].tokens == (2, 2, 2, 2, 2)
    assert {(len(h.tokens), h.finish) for h in found} == {(5, Finish.LENGTH)}


def test_the_token_at_the_limit_may_be_the_end() -> None:
    table: LogprobTable = lambda _, prefix: only(EOS if len(prefix) == 3 else 2)  # noqa: E731
    (found,) = searched(table, table_rules(), SearchOptions(max_new_tokens=3))
    assert (found.tokens, found.finish) == ((2, 2, EOS), Finish.END_OF_SEQUENCE)


def test_a_forced_last_token_ends_with_probability_one() -> None:
    rules = table_rules(8, SearchRules(eos=(EOS,), forced_last=EOS))
    (found,) = searched(lambda *_: only(2), rules, SearchOptions(max_new_tokens=3))
    assert (found.tokens, found.token_logprobs) == ((2, 2, EOS), (-1.0, -1.0, 0.0))


def test_a_beam_wider_than_all_there_is_returns_what_there_is() -> None:
    """Two tokens and one step leave two hypotheses, however many are asked for."""
    found = searched(RandomTable(2), table_rules(2), SearchOptions(beam_size=16, n_best=16, max_new_tokens=1))
    assert sorted(h.tokens for h in found) == [(0,), (1,)]


def test_of_equal_scores_the_lower_token_wins() -> None:
    options = SearchOptions(beam_size=3, n_best=3, max_new_tokens=2, length_penalty=0.0)
    rules = table_rules(4, SearchRules(eos=(3,), banned=(3,)))
    found = searched(RandomTable(4, levels=1), rules, options)
    assert [h.tokens for h in found] == [(0, 0), (0, 1), (0, 2)]


def test_a_running_beam_that_is_only_as_good_ends_the_search() -> None:
    """All tokens are equally likely: after two hypotheses have ended, no other can have a better mean."""
    rules = table_rules(4, SearchRules(eos=(0,)))
    backend = TableBackend(RandomTable(4, levels=1), rules)
    found = search(backend, rules, SearchOptions(beam_size=2, n_best=2))
    assert [(h.tokens, h.score) for h in found] == [((0,), -0.5), ((1, 0), -0.5)]
    assert len(backend.trace) == 2


@pytest.mark.parametrize("beam_size", [1, 4])
def test_no_end_comes_before_the_least_length(beam_size: int) -> None:
    """Ends are the best two tokens of every row: no candidate is missing when they are taken away."""
    rules = table_rules(8, SearchRules(eos=(1, 2)))
    options = SearchOptions(beam_size=beam_size, n_best=beam_size, min_new_tokens=3, max_new_tokens=9)
    found = searched(lambda *_: only(1, 2, 3, 4, 5), rules, options)
    assert found[0].tokens == (3, 3, 3, 1)
    assert min(len(hypothesis.tokens) for hypothesis in found) == 4


def test_banned_tokens_never_occur_and_those_banned_at_the_start_are_not_first() -> None:
    rules = table_rules(8, SearchRules(eos=(EOS,), banned=(2,), banned_at_start=(3,)))
    (found,) = searched(lambda *_: only(2, 3, 4), rules, SearchOptions(max_new_tokens=3))
    assert found.tokens == (4, 3, 3)


def test_a_forced_first_token_is_first_with_probability_one() -> None:
    rules = table_rules(8, SearchRules(eos=(EOS,), banned=(5,), forced_first=5))
    (found,) = searched(lambda *_: only(2), rules, SearchOptions(max_new_tokens=3))
    assert (found.tokens, found.token_logprobs) == ((5, 2, 2), (0.0, -1.0, -1.0))


@pytest.mark.parametrize("model_forces", [None, 5])
@pytest.mark.parametrize("min_new_tokens", [0, 3])
def test_a_request_forces_its_own_first_token(model_forces: int | None, min_new_tokens: int) -> None:
    """It goes before the model's, is certain even where it is banned or an end, and is one of the tokens."""
    search_rules = SearchRules(eos=(EOS,), banned=(6,), banned_at_start=(6,), forced_first=model_forces)
    rules = table_rules(8, search_rules)
    options = SearchOptions(beam_size=2, min_new_tokens=min_new_tokens, max_new_tokens=3)
    asked = GenerationRequest(RequestId(1), SOURCE, options, forced_first=6)
    outcome = run_alone(TableBackend(lambda *_: only(2), rules), rules, asked)
    assert isinstance(outcome, Completed)
    (found,) = outcome.hypotheses
    assert (found.tokens, found.token_logprobs) == ((6, 2, 2), (0.0, -1.0, -1.0))
    assert found.score == pytest.approx(-2 / 3)


@pytest.mark.parametrize(("model_forces", "forces"), [(5, None), (None, 6), (5, 6)])
def test_tokens_that_are_banned_at_the_start_are_not_right_behind_a_forced_one(
    model_forces: int | None, forces: int | None
) -> None:
    rules = table_rules(8, SearchRules(eos=(EOS,), banned_at_start=(2,), forced_first=model_forces))
    asked = GenerationRequest(RequestId(1), SOURCE, SearchOptions(max_new_tokens=4), forced_first=forces)
    outcome = run_alone(TableBackend(lambda *_: only(2, 3), rules), rules, asked)
    assert isinstance(outcome, Completed)
    assert outcome.hypotheses[0].tokens == (forces or model_forces, 3, 2, 2)


def test_the_models_last_token_goes_before_a_requests_first_one() -> None:
    rules = table_rules(8, SearchRules(eos=(EOS,), forced_last=EOS))
    asked = GenerationRequest(RequestId(1), SOURCE, SearchOptions(max_new_tokens=1), forced_first=6)
    outcome = run_alone(TableBackend(lambda *_: only(2), rules), rules, asked)
    assert isinstance(outcome, Completed)
    assert outcome.hypotheses[0].tokens == (EOS,)


def test_a_first_token_gives_way_to_a_prefix_and_a_decoder_start_stands_before_it() -> None:
    rules = table_rules(8, SearchRules(eos=(EOS,)))
    seen: list[Tokens] = []

    def table(_: Tokens, prefix: Tokens) -> FloatArray:
        seen.append(prefix)
        return only(2)

    options = SearchOptions(max_new_tokens=2)
    asked = GenerationRequest(RequestId(1), SOURCE, options, target_prefix=(3,), decoder_start=7, forced_first=6)
    outcome = run_alone(TableBackend(table, rules, starts=[7]), rules, asked)
    assert isinstance(outcome, Completed)
    assert outcome.hypotheses[0].tokens == (2, 2)
    assert seen[-1] == (7, 3, 2)


def test_candidates_are_as_many_as_an_exact_search_needs_and_no_more_than_there_are() -> None:
    rules = SearchRules(eos=(1, 2), banned=(3,), banned_at_start=(4, 5, 6))
    # Three per beam, so that two ends leave one; and one for each token that may be taken away.
    assert rules.needed_candidates(1, 1000) == 3 + 6
    assert rules.needed_candidates(16, 1000) == 48 + 6
    assert rules.needed_candidates(16, 20) == 20
    assert SearchRules(eos=()).needed_candidates(4, 1000) == 8


def test_many_ends_leave_enough_candidates_to_go_on() -> None:
    """Three ends are the best tokens of every beam; still two beams go on."""
    rules = table_rules(8, SearchRules(eos=(1, 2, 3)))
    backend = TableBackend(lambda *_: only(1, 2, 3, 4, 5), rules)
    search(backend, rules, SearchOptions(beam_size=2, length_penalty=3.0, early_stopping=EarlyStopping.NEVER))
    assert [step.rows for step in backend.trace[:3]] == [1, 2, 2]


def test_nothing_left_to_generate_is_a_failure_and_no_hang() -> None:
    rules = table_rules(2, SearchRules(eos=(1,), banned=(0,)))
    assert searched(RandomTable(2), rules, SearchOptions(beam_size=2, min_new_tokens=2, max_new_tokens=4)) == ()


@given(st.floats(allow_nan=False, allow_infinity=False), st.sampled_from(LengthPenaltyKind), st.integers(1, 40))
@example(-100.0, LengthPenaltyKind.POWER, 30)
@example(1e300, LengthPenaltyKind.POWER, 30)
def test_any_finite_length_penalty_has_a_result(
    length_penalty: float, kind: LengthPenaltyKind, max_new_tokens: int
) -> None:
    """A checkpoint may ask for any finite exponent; none may overflow to a failure of the server."""
    for early_stopping in EarlyStopping:
        options = SearchOptions(
            beam_size=2,
            length_penalty=length_penalty,
            length_penalty_kind=kind,
            early_stopping=early_stopping,
            max_new_tokens=max_new_tokens,
        )
        (found,) = searched(RandomTable(8), table_rules(), options)
        assert np.isfinite(found.score)
