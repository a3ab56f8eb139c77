"""Time inside and outside onnxruntime, from calls on threads."""

import pytest

from offline.session_clock import Call, share_outside


def test_what_no_run_covers_is_outside() -> None:
    """Two threads at work from 0 and from 2 until 10: 18 seconds, of which sessions run for 12, 9 of them computing."""
    backend = [Call(1, 0.0, 5.0, 0.0), Call(1, 6.0, 10.0, 0.0), Call(2, 2.0, 9.0, 0.0)]
    runs = [Call(1, 1.0, 5.0, 3.0), Call(1, 6.0, 8.0, 2.0), Call(2, 3.0, 9.0, 4.0)]

    share = share_outside(backend, 10.0, runs)

    assert share.outside == pytest.approx(1 - 12 / 18)
    assert share.outside_and_waiting == pytest.approx(1 - 9 / 18)


def test_what_comes_after_the_window_or_on_other_threads_does_not_count() -> None:
    backend = [Call(1, 0.0, 4.0, 4.0), Call(1, 9.0, 20.0, 11.0)]
    runs = [Call(1, 0.0, 4.0, 4.0), Call(1, 9.0, 20.0, 11.0), Call(2, 0.0, 4.0, 4.0)]

    assert share_outside(backend, 10.0, runs).outside == pytest.approx(1 - 4 / 10)
