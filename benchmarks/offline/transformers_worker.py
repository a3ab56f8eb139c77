"""`generate` as a contender: transformers on PyTorch, and optimum-onnx on onnxruntime."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from offline.task import Search, Sentence, Setting, batches, longest_first


class _Generating(ABC):
    """Whatever has a `generate`.

    A setting has `threads`, `batch` and `sorted`: whether sentences of like length share a batch.
    """

    def __init__(self, spec: Mapping[str, Any]) -> None:
        self._path = spec["model"]
        self._model: Any = None
        self._setting: Setting = {}

    @abstractmethod
    def _load(self, threads: int) -> Any:
        """The model, which computes with so many threads."""

    def open(self, setting: Setting) -> None:
        """As `Translator.open`."""
        if self._model is None or setting["threads"] != self._setting["threads"]:
            self._model = self._load(setting["threads"])
        self._setting = setting

    def translate(self, sentences: Sequence[Sentence], search: Search) -> Sequence[Sequence[int]]:
        """As `Translator.translate`."""
        order = longest_first(sentences) if self._setting["sorted"] else list(range(len(sentences)))
        answers: dict[int, Sequence[int]] = {}
        for batch in batches(order, self._setting["batch"]):
            found = self._generate([sentences[i].ids for i in batch], search)
            answers |= dict(zip(batch, found, strict=True))
        return [answers[i] for i in range(len(sentences))]

    def _generate(self, sources: Sequence[Sequence[int]], search: Search) -> list[list[int]]:
        config = self._model.generation_config
        width = max(map(len, sources))
        ids = torch.full((len(sources), width), config.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, source in enumerate(sources):
            ids[row, : len(source)] = torch.tensor(source)
            mask[row, : len(source)] = 1
        lengths = {"max_new_tokens": search.max_new_tokens}
        if search.min_new_tokens:
            lengths["min_new_tokens"] = search.min_new_tokens
        with torch.inference_mode():
            output = self._model.generate(
                input_ids=ids,
                attention_mask=mask,
                num_beams=search.beam,
                do_sample=False,
                early_stopping=True,
                length_penalty=1.0,
                **lengths,
            )
        # The first token is the decoder's start.
        return [_ended(row, config.eos_token_id) for row in output[:, 1:].tolist()]

    def ids(self, tokens: Sequence[int]) -> list[int]:
        """As `Translator.ids`."""
        return list(tokens)

    def close(self) -> None:
        """As `Translator.close`; the model stays loaded, for the next setting may need it."""
        self._setting = {"threads": self._setting["threads"]}


def _ended(tokens: list[int], eos: int) -> list[int]:
    """Without the padding behind end of sequence."""
    return tokens[: tokens.index(eos) + 1] if eos in tokens else tokens


class TransformersTranslator(_Generating):
    """A MarianMT checkpoint on PyTorch, fp32."""

    def _load(self, threads: int) -> Any:
        import transformers

        torch.set_num_threads(threads)
        return self._model or transformers.MarianMTModel.from_pretrained(self._path).eval()


class OptimumTranslator(_Generating):
    """The same checkpoint as optimum-onnx exports and runs it, fp32."""

    def _load(self, threads: int) -> Any:
        import onnxruntime
        from optimum.onnxruntime import ORTModelForSeq2SeqLM

        torch.set_num_threads(threads)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        return ORTModelForSeq2SeqLM.from_pretrained(self._path, session_options=options)
