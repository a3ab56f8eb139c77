"""A signal ends what is being done by an exception, but not while it is cleaned up."""

import signal

import pytest

from beamline_export.stopping import SIGNALS, Stopped

ENDING = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.mark.parametrize("number", ENDING)
def test_a_signal_is_an_exception_and_its_handler_comes_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Stopped) as caught, SIGNALS.as_exceptions():
        signal.raise_signal(number)
    assert caught.value.signal is number
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", ENDING)
def test_what_was_ignored_from_the_start_stays_so(number: signal.Signals) -> None:
    """As nohup does, and a shell with what it runs in the background."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with SIGNALS.as_exceptions():
            signal.raise_signal(number)
    finally:
        signal.signal(number, before)


def test_a_signal_waits_for_the_end_of_what_is_not_to_be_cut() -> None:
    with SIGNALS.as_exceptions():
        SIGNALS.held += 1
        SIGNALS.held += 1
        signal.raise_signal(signal.SIGTERM)
        SIGNALS.release()
        with pytest.raises(Stopped) as caught:
            SIGNALS.release()
    assert caught.value.signal is signal.SIGTERM


def test_each_time_begins_anew() -> None:
    with SIGNALS.as_exceptions():
        SIGNALS.held += 1
        signal.raise_signal(signal.SIGTERM)
    with SIGNALS.as_exceptions():
        SIGNALS.held += 1
        SIGNALS.release()
