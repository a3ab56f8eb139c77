"""The PyTorch model that an export is compared with."""

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from beamline_export.checkpoint import read_json
from beamline_export.known_settings import ALIASES, ANY, CONFIG, GENERATION, READ
from beamline_export.spec import ExportError

_POSITIONS = "max_position_embeddings"


class Reference(Protocol):
    """A trained model as PyTorch runs it."""

    def logprobs(self, source: Sequence[int], targets: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Log-probabilities after every decoder input, (targets, T, V); the targets are equally long.

        A model without an encoder reads the source, which may be empty, before each target.
        """
        ...


class HuggingFaceReference:
    """A transformers sequence-to-sequence model in fp32 on the CPU, without a cache.

    Args:
        model_class: Name of its class in transformers.
        folder: The checkpoint.
        removed: Ids that are taken out before the softmax.
        most_positions: More of them are not computed, where position tables are; None computes what config.json says.
        token_by_token: Targets are computed as `generate` does, with a cache; for models that number tokens otherwise
            if they see a whole target at once.
        computed: Names of tensors, as a regular expression, that transformers compute where the file lacks them.

    Raises:
        ExportError: transformers cannot load it.
    """

    def __init__(
        self,
        model_class: str,
        folder: Path,
        removed: Sequence[int] = (),
        *,
        most_positions: int | None = None,
        token_by_token: bool = False,
        computed: str = "",
    ) -> None:
        import torch
        import transformers

        told = f"transformers cannot load {folder} as {model_class}"
        try:
            with quiet_transformers():
                # Of what does not fit, its own error says no more than that a report, which is silenced, lists it.
                cls: Any = getattr(transformers, model_class)
                loaded, report = cls.from_pretrained(
                    folder,
                    config=cls.config_class.from_dict(_config(folder, cls.config_class.model_type, most_positions)),
                    local_files_only=True,
                    trust_remote_code=False,
                    dtype=torch.float32,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,
                )
        except Exception as error:  # transformers raises many kinds; all mean that there is nothing to compare with
            raise ExportError(f"{told} ({next(iter(str(error).splitlines()), type(error).__name__)})") from error
        if problems := list(_load_problems(report, computed)):
            raise ExportError(f"{told}: {'; '.join(problems)}; correct config.json, or save the model again")
        self.model: Any = loaded.eval()
        self._removed = list(removed)
        self._token_by_token = token_by_token

    def logprobs(self, source: Sequence[int], targets: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """As `Reference.logprobs`."""
        import torch

        with torch.inference_mode():
            ids = torch.tensor([list(source)] * len(targets))
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            whole = torch.tensor([list(target) for target in targets])
            if self._token_by_token:
                logits = torch.cat(list(self._steps(inputs, whole)), dim=1)
            else:
                logits = self.model(**inputs, decoder_input_ids=whole).logits.float()
            logits[..., self._removed] = -torch.inf
            result: NDArray[np.float32] = logits.log_softmax(-1).numpy()
        return result

    def _steps(self, inputs: dict[str, Any], targets: Any) -> Iterator[Any]:
        """Logits of one target position after the other, (targets, 1, V)."""
        past = None
        encoded = self.model.get_encoder()(**inputs)
        for i in range(targets.shape[1]):
            output = self.model(
                encoder_outputs=encoded,
                attention_mask=inputs["attention_mask"],
                decoder_input_ids=targets[:, i : i + 1],
                past_key_values=past,
                use_cache=True,
            )
            past = output.past_key_values
            yield output.logits.float()


class PromptedReference:
    """A transformers model that is a decoder without an encoder.

    Args:
        model: The model, in evaluation mode.
        removed: Ids that are taken out before the softmax.
    """

    def __init__(self, model: Any, removed: Sequence[int] = ()) -> None:
        self.model = model
        self._removed = list(removed)

    def logprobs(self, source: Sequence[int], targets: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """As `Reference.logprobs`."""
        import torch

        with torch.inference_mode():
            whole = torch.tensor([[*source, *target] for target in targets])
            logits = self.model(input_ids=whole, use_cache=False).logits[:, len(source) :].float()
            logits[..., self._removed] = -torch.inf
            result: NDArray[np.float32] = logits.log_softmax(-1).numpy()
        return result


def _config(folder: Path, family: str, most_positions: int | None) -> dict[str, Any]:
    """What config.json says of the model, and of searching; the rest may lead the library elsewhere, or be endless."""
    known = {**GENERATION, **dict.fromkeys(ALIASES, READ), **CONFIG[family]}
    given = read_json(folder / "config.json")
    config = {name: value for name, value in given.items() if known.get(name, ANY) is not ANY}
    if most_positions is not None:
        config[_POSITIONS] = min(config[_POSITIONS], most_positions)
    return config


def _load_problems(report: Mapping[str, Any], computed: str) -> Iterator[str]:
    """What transformers would draw at random, or could not convert."""
    for name, found, expected in sorted(report["mismatched_keys"]):
        yield f"{name} has shape {list(found)}, and {list(expected)} by its config"
    # An absent bias is zero.
    absent = (name for name in report["missing_keys"] if not name.endswith("bias"))
    if missing := sorted(name for name in absent if not re.fullmatch(computed, name)):
        yield f"missing: {', '.join(missing)}"
    yield from map(str, report["error_msgs"])


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
