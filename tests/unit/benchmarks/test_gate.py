"""The gate: which changes fail it."""

import json

import pytest

from offline.gate import PAIRS, Change, Record, changes
from offline.ratios import Spread


def exactly(value: float) -> Spread:
    return Spread(value, value, value)


@pytest.mark.parametrize(
    ("now", "recorded", "lost"),
    [(1.0, 1.0, False), (0.91, 1.0, False), (0.89, 1.0, True), (1.2, 1.0, False), (1.79, 2.0, True)],
)
def test_more_than_a_tenth_less_is_a_loss(now: float, recorded: float, lost: bool) -> None:
    assert Change("ratio", exactly(now), exactly(recorded)).lost is lost


def test_the_medians_decide() -> None:
    assert not Change("ratio", Spread(1.0, 0.5, 1.1), exactly(1.0)).lost
    assert Change("ratio", Spread(0.8, 0.7, 2.0), exactly(1.0)).lost


def test_what_was_not_recorded_cannot_be_lost() -> None:
    (change,) = changes({"new": exactly(1.0)}, {"old": exactly(9.0)})

    assert not change.lost
    assert "not recorded" in str(change)


def test_a_loss_is_told() -> None:
    (change,) = changes({"ratio": exactly(0.8)}, {"ratio": exactly(1.0)})

    assert str(change) == "ratio: 0.80 (0.80-0.80), recorded 1.00: -20.0% LOST"


def test_four_ratios_matter_most() -> None:
    assert len({pair.title for pair in PAIRS}) == len(PAIRS) == 4


def test_a_record_survives_json() -> None:
    record = Record({"cpu": "some"}, {"ratio": Spread(2.0, 1.0, 3.0)}, {"ratio": {"somebody": {"workers": 2}}})

    assert Record.from_json(json.loads(json.dumps(record.as_json()))) == record
    with pytest.raises(ValueError, match="record anew"):
        Record.from_json({"format": 0})
