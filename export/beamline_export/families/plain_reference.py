"""A Transformer of any spec in plain PyTorch: what checkpoints are compared with that no library at hand can run."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from beamline_export.spec import Activation, Checkpoint, NormPlacement

if TYPE_CHECKING:
    from torch import Tensor


class PlainReference:
    """The spec's formulas over the canonical weights, whole sequences at once and without a cache.

    Args:
        checkpoint: With its weights.
        removed: Ids that are taken out before the softmax.
    """

    def __init__(self, checkpoint: Checkpoint, removed: Sequence[int]) -> None:
        import torch

        self._spec, self._removed = checkpoint.spec, list(removed)
        self._weights = {name: torch.from_numpy(array) for name, array in checkpoint.weights.items()}

    def logprobs(self, source: Sequence[int], targets: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """As `Reference.logprobs`."""
        import torch

        with torch.inference_mode():
            memory = self._encoded(torch.tensor([list(source)])).expand(len(targets), -1, -1)
            logits = self._linear("head", self._decoded(torch.tensor([list(t) for t in targets]), memory))
            logits[..., self._removed] = -torch.inf
            result: NDArray[np.float32] = logits.log_softmax(-1).numpy()
        return result

    def _encoded(self, source: "Tensor") -> "Tensor":
        x = self._embedded("source", "encoder", source)
        for i in range(self._spec.encoder_layers):
            x = self._attend(x, None, f"encoder.{i}.self_attention", self._spec.encoder_heads)
            x = self._feed_forward(x, f"encoder.{i}")
        return self._norm("encoder.final_norm", x) if self._spec.encoder_final_norm else x

    def _decoded(self, target: "Tensor", memory: "Tensor") -> "Tensor":
        x, heads = self._embedded("target", "decoder", target), self._spec.decoder_heads
        for i in range(self._spec.decoder_layers):
            x = self._attend(x, None, f"decoder.{i}.self_attention", heads, causal=True)
            x = self._attend(x, memory, f"decoder.{i}.cross_attention", heads)
            x = self._feed_forward(x, f"decoder.{i}")
        return self._norm("decoder.final_norm", x) if self._spec.decoder_final_norm else x

    def _embedded(self, side: str, stack: str, ids: "Tensor") -> "Tensor":
        x = self._weights[f"{side}_embedding"][ids] * self._spec.embedding_scale
        x = x + self._weights[f"{side}_positions"][: ids.shape[1]]
        return self._norm(f"{stack}.embedding_norm", x) if self._spec.embedding_norm else x

    def _attend(self, x: "Tensor", memory: "Tensor | None", name: str, heads: int, *, causal: bool = False) -> "Tensor":
        from torch.nn import functional

        read = self._before(x, f"{name}_norm")
        of = read if memory is None else memory
        query, key, value = (
            self._linear(f"{name}.{part}", what).view(*what.shape[:2], heads, -1).transpose(1, 2)
            for part, what in (("query", read), ("key", of), ("value", of))
        )
        y = functional.scaled_dot_product_attention(query, key, value, is_causal=causal)
        return self._after(x, self._linear(f"{name}.output", y.transpose(1, 2).flatten(2)), f"{name}_norm")

    def _feed_forward(self, x: "Tensor", layer: str) -> "Tensor":
        y = self._activated(self._linear(f"{layer}.ffn.up", self._before(x, f"{layer}.ffn_norm")))
        return self._after(x, self._linear(f"{layer}.ffn.down", y), f"{layer}.ffn_norm")

    def _before(self, x: "Tensor", norm: str) -> "Tensor":
        return self._norm(norm, x) if self._spec.norm_placement is NormPlacement.PRE else x

    def _after(self, x: "Tensor", y: "Tensor", norm: str) -> "Tensor":
        return self._norm(norm, x + y) if self._spec.norm_placement is NormPlacement.POST else x + y

    def _norm(self, name: str, x: "Tensor") -> "Tensor":
        from torch.nn import functional

        weight, bias = self._weights[f"{name}.weight"], self._weights[f"{name}.bias"]
        return functional.layer_norm(x, weight.shape, weight, bias, self._spec.norm_epsilon)

    def _linear(self, name: str, x: "Tensor") -> "Tensor":
        from torch.nn import functional

        return functional.linear(x, self._weights[f"{name}.weight"], self._weights[f"{name}.bias"])

    def _activated(self, x: "Tensor") -> "Tensor":
        from torch.nn import functional

        match self._spec.activation:
            case Activation.RELU:
                return functional.relu(x)
            case Activation.GELU:
                return functional.gelu(x)
            case Activation.GELU_TANH:
                return functional.gelu(x, approximate="tanh")
            case Activation.SILU:
                return functional.silu(x)
