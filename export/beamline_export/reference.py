"""The PyTorch model that an export is compared with."""

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from beamline_export.spec import ExportError


class Reference(Protocol):
    """A trained model as PyTorch runs it."""

    def logprobs(self, source: Sequence[int], targets: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Log-probabilities after every decoder input, (targets, T, V); the targets are equally long."""
        ...


class HuggingFaceReference:
    """A transformers sequence-to-sequence model in fp32 on the CPU, without a cache.

    Args:
        model_class: Name of its class in transformers.
        folder: The checkpoint.
        removed: Ids that are taken out before the softmax.

    Raises:
        ExportError: transformers cannot load it.
    """

    def __init__(self, model_class: str, folder: Path, removed: Sequence[int] = ()) -> None:
        import torch
        import transformers

        try:
            with quiet_transformers():
                loaded = getattr(transformers, model_class).from_pretrained(
                    folder, local_files_only=True, trust_remote_code=False, dtype=torch.float32
                )
        except Exception as error:  # transformers raises many kinds; all mean that there is nothing to compare with
            reason = str(error).splitlines()[0]
            raise ExportError(f"transformers cannot load {folder} as {model_class} ({reason})") from error
        self.model: Any = loaded.eval()
        self._removed = list(removed)

    def logprobs(self, source: Sequence[int], targets: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """As `Reference.logprobs`."""
        import torch

        count = len(targets)
        with torch.inference_mode():
            ids = torch.tensor([list(source)] * count)
            output = self.model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                decoder_input_ids=torch.tensor([list(t) for t in targets]),
            )
            logits = output.logits.float()
            logits[..., self._removed] = -torch.inf
            result: NDArray[np.float32] = logits.log_softmax(-1).numpy()
        return result


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without the library's progress bars and advice, which are not about the user's checkpoint."""
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(level)
        transformers_logging.enable_progress_bar()
