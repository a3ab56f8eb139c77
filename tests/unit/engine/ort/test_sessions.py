"""How sessions run: their threads are quick while steps follow each other, and then leave the cores to others."""

import pytest

from beamline_server.engine.ort.sessions import SPIN_US, session_options


def spins(threads: int) -> str:
    return str(session_options(threads).get_session_config_entry("session.intra_op.allow_spinning"))


def test_a_single_thread_waits_for_nobody() -> None:
    assert spins(1) == "0"


@pytest.mark.parametrize("threads", [2, 8])
def test_several_threads_stay_awake_while_steps_follow_each_other_and_no_longer(threads: int) -> None:
    options = session_options(threads)
    assert options.intra_op_num_threads == threads
    assert spins(threads) == "1"
    # Without a bound, onnxruntime's threads keep the cores busy for much longer than a step takes.
    assert options.get_session_config_entry("session.intra_op.spin_duration_us") == str(SPIN_US)
    assert 0 < SPIN_US <= 1000
