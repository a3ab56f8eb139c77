"""CTranslate2 as a contender, in process."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ctranslate2

from offline.task import Search, Sentence, Setting, batches


class CTranslate2Translator:
    """A translator of a converted model.

    A setting has `workers` (inter_threads), `threads` (intra_threads), `batch`, `batch_type` (examples or tokens) and
    `sorted`: whether it sees all sentences at once and sorts them by length, or gets them in batches as they come.
    """

    def __init__(self, spec: Mapping[str, Any]) -> None:
        self._model = spec["model"]
        self._precision = {"int8": "int8", "fp32": "float32"}[spec["precision"]]
        self._ids: dict[str, int] = json.loads(Path(spec["vocabulary"]).read_text("utf-8"))
        self._translator: Any = None
        self._setting: Setting = {}

    def open(self, setting: Setting) -> None:
        """As `Translator.open`."""
        self._setting = setting
        self._translator = ctranslate2.Translator(
            self._model,
            device="cpu",
            compute_type=self._precision,
            inter_threads=setting["workers"],
            intra_threads=setting["threads"],
        )

    def translate(self, sentences: Sequence[Sentence], search: Search) -> Sequence[Sequence[str]]:
        """As `Translator.translate`."""
        sources = [list(sentence.pieces) for sentence in sentences]
        options = {
            "beam_size": search.beam,
            "patience": 1,
            "length_penalty": 1,
            "min_decoding_length": max(1, search.min_new_tokens),
            "max_decoding_length": search.max_new_tokens,
            "return_end_token": True,
            "batch_type": self._setting["batch_type"],
        }
        size = self._setting["batch"]
        if self._setting["sorted"]:
            results = self._translator.translate_batch(sources, max_batch_size=size, **options)
            return [result.hypotheses[0] for result in results]
        pending = [
            result
            for batch in batches(sources, size)
            for result in self._translator.translate_batch(batch, asynchronous=True, **options)
        ]
        return [result.result().hypotheses[0] for result in pending]

    def ids(self, tokens: Sequence[str]) -> list[int]:
        """As `Translator.ids`."""
        return [self._ids[piece] for piece in tokens]

    def close(self) -> None:
        """As `Translator.close`."""
        self._translator = None
