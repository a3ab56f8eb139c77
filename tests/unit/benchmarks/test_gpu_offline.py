"""Throughput on a device: what is compared is replayed, and captured before it is timed."""

from pathlib import Path

import pytest
from gpu_parts.bundles import make
from gpu_parts.offline import offline
from gpu_parts.setting import TINY, Setting


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    setting = Setting("cpu", tmp_path, tmp_path, TINY)
    make(setting, setting.names[1], "fp16")
    return setting


def test_nothing_is_captured_while_it_is_timed(setting: Setting) -> None:
    measured = offline(setting)

    assert measured["graphs"] > 0
    assert measured["encoder_graphs"] > 0
    assert [batch["captured"] for batch in measured["batches"]] == [0] * len(TINY.batches)
    assert all(batch["tokens_per_s"] > 0 for batch in measured["batches"])
