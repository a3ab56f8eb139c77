"""Operations of a decoder step."""

import pytest

from offline.gemm_rate import products, step_operations

SPEC = {"d_model": 512, "decoder_layers": 6, "decoder_ffn": 2048, "target_vocabulary": 16_000}


def test_a_step_multiplies_every_row_with_the_decoders_matrices() -> None:
    """Of a decoder layer with caches: 3 + 1 + 1 + 1 squares of the width, and the feed-forward layer; then the head."""
    layer = 6 * 512 * 512 + 2 * 512 * 2048

    assert step_operations(SPEC, rows=128) == pytest.approx(2 * 128 * (6 * layer + 512 * 16_000))


def test_operations_grow_with_rows() -> None:
    assert step_operations(SPEC, rows=8) == 2 * step_operations(SPEC, rows=4)
    assert sum(product.operations(1) for product in products(SPEC)) == step_operations(SPEC, rows=1)
