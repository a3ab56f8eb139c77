"""transformers are given what config.json says of the model, and nothing that leads them elsewhere."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from beamline_export.reference import HuggingFaceReference

CLASSES = {"marian": "MarianMTModel", "bart": "BartForConditionalGeneration"}
LABELS = {"marian": 2, "bart": 3}
"""What each has where config.json does not say."""


@pytest.mark.parametrize("family", CLASSES)
@pytest.mark.parametrize(
    "setting",
    [
        {"num_labels": 10**7},
        {"problem_type": "none", "id2label": {"a": "b"}},
        {"transformers_weights": "../model.safetensors"},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        {"attn_implementation": "someone/kernel"},
        {"_attn_implementation": "someone/kernel"},
        {"dtype": "float8", "torch_dtype": 3},
        {"return_dict": False},
        {"dropout": float("nan")},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_settings_that_are_not_of_the_model_change_nothing(
    family: str, setting: dict[str, Any], make_checkpoint: Callable[[str], Any]
) -> None:
    checkpoint = make_checkpoint(family)
    expected = HuggingFaceReference(CLASSES[family], checkpoint.folder).logprobs([5, 1], [[2, 7]])
    found = HuggingFaceReference(CLASSES[family], checkpoint.config(**setting))
    assert found.logprobs([5, 1], [[2, 7]]).tolist() == expected.tolist()
    assert found.model.config.num_labels == LABELS[family]


def test_settings_of_the_model_do(make_checkpoint: Callable[[str], Any]) -> None:
    checkpoint = make_checkpoint("marian")
    expected = HuggingFaceReference("MarianMTModel", checkpoint.folder).logprobs([5, 1], [[2, 7]])
    scaled = HuggingFaceReference("MarianMTModel", checkpoint.config(scale_embedding=True)).logprobs([5, 1], [[2, 7]])
    assert np.abs(scaled - expected).max() > 0.1


def test_positions_that_are_not_compared_are_not_computed(make_checkpoint: Callable[[str], Any]) -> None:
    checkpoint = make_checkpoint("marian")
    expected = HuggingFaceReference("MarianMTModel", checkpoint.folder)
    found = HuggingFaceReference("MarianMTModel", checkpoint.folder, most_positions=12)
    assert len(found.model.model.encoder.embed_positions.weight) == 12
    assert found.logprobs([5, 1], [[2, 7]]).tolist() == expected.logprobs([5, 1], [[2, 7]]).tolist()
