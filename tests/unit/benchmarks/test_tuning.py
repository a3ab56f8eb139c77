"""The search for a contender's best setting."""

from collections import Counter

from offline.task import Setting
from offline.tuning import FINAL_TRIES, FINALISTS, best_setting


def test_the_fastest_of_the_best_few_wins() -> None:
    """On some of the sentences 4 is the fastest, on all of them 3."""
    quick, whole = {0: 1.0, 1: 2.0, 2: 3.0, 3: 4.0, 4: 5.0}, {2: 30.0, 3: 50.0, 4: 40.0}
    tried: Counter[int] = Counter()

    def wholly(setting: Setting) -> float:
        tried[setting["n"]] += 1
        return whole[setting["n"]]

    choice = best_setting([{"n": n} for n in quick], lambda setting: quick[setting["n"]], wholly)

    assert choice.setting == {"n": 3}
    assert choice.sentences_per_s == 50.0
    assert choice.tried == len(quick)
    assert tried == dict.fromkeys(whole, FINAL_TRIES)
    assert len(tried) == FINALISTS


def test_one_slow_run_does_not_decide() -> None:
    runs = {"steady": [10.0, 10.0], "disturbed": [1.0, 20.0]}
    pending = {name: iter(values) for name, values in runs.items()}

    choice = best_setting([{"n": n} for n in runs], lambda _: 0.0, lambda setting: next(pending[setting["n"]]))

    assert choice.setting == {"n": "disturbed"}


def test_a_single_setting_is_not_looked_for() -> None:
    rates = iter([7.0])

    choice = best_setting([{"n": 0}], lambda _: 0.0, lambda _: next(rates))

    assert choice.sentences_per_s == 7.0
