"""The family nn_transformer as PyTorch runs it: what an export is compared with, built from the file's own tensors."""

import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from beamline_export.families.buffers import take_sinusoids
from beamline_export.families.nn_config import Config
from beamline_export.families.nn_layouts import SHARED_POSITIONS, SOURCE_POSITIONS, TARGET_POSITIONS
from beamline_export.renamer import Renamer
from beamline_export.spec import Activation, Array, NormPlacement, TransformerSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

    Tensors = Mapping[str, Tensor]
    Stacks = Callable[[Tensor, Tensor], Tensor]
    """Embedded source (B, R, D) and target (B, T, D) -> what the generator reads, (B, T, D)."""


class NnReference:
    """Embeddings, the two stacks of a layout, and a generator.

    Args:
        config: What config.json says.
        state: The file's tensors by the names of the layout.
        removed: Ids that are taken out before the softmax.
    """

    def __init__(self, config: Config, state: Mapping[str, Array], removed: Sequence[int]) -> None:
        import torch

        layout, spec = config.layout, config.spec
        self._scale, self._removed = spec.embedding_scale, list(removed)
        tensors = {name: torch.from_numpy(array) for name, array in state.items()}
        self._source, self._target, self._generator = (
            next(tensors[name] for name in names if name in tensors) for names in config.tables().values()
        )
        self._bias = tensors.get(f"{layout.generator}.bias")
        self._source_positions, self._target_positions = _positions(config, state)
        self._stacks = (_annotated_stacks if layout.unbiased_norms else _torch_stacks)(config, tensors)

    def logprobs(self, source: Sequence[int], targets: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """As `Reference.logprobs`."""
        import torch

        with torch.inference_mode():
            ids, inputs = torch.tensor([list(source)] * len(targets)), torch.tensor([list(t) for t in targets])
            x = self._source[ids] * self._scale + self._source_positions[: ids.shape[1]]
            y = self._target[inputs] * self._scale + self._target_positions[: inputs.shape[1]]
            logits = torch.nn.functional.linear(self._stacks(x, y), self._generator, self._bias)
            logits[..., self._removed] = -torch.inf
            result: NDArray[np.float32] = logits.log_softmax(-1).numpy()
        return result


def _positions(config: Config, state: Mapping[str, Array]) -> "tuple[Tensor, Tensor]":
    """The tables of source and target, (positions, D)."""
    import torch

    if config.learned_positions:
        both = (state.get(name, state.get(SHARED_POSITIONS)) for name in (SOURCE_POSITIONS, TARGET_POSITIONS))
        source, target = (torch.from_numpy(table).view(-1, config.spec.d_model) for table in both)
        return source, target
    names = Renamer(state)
    names.take("source_embedding", *config.tables()["source_embedding"])
    take_sinusoids(names, config.spec)
    table = torch.from_numpy(names.weights["source_positions"])
    return table, table


def _torch_stacks(config: Config, tensors: "Tensors") -> "Stacks":
    """A `torch.nn.Transformer` with the file's weights."""
    import torch

    transformer = _transformer(config)
    # A model without biases is one with zeros for biases.
    own = transformer.state_dict()
    zeros = {name: torch.zeros(tensor.shape) for name, tensor in own.items() if name.endswith("bias")}
    saved = {name.removeprefix("transformer."): t for name, t in tensors.items() if name.startswith("transformer.")}
    transformer.load_state_dict(zeros | {name: saved[name] for name in own if name in saved}, assign=True)

    def run(source: "Tensor", target: "Tensor") -> "Tensor":
        mask = torch.nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        # tgt_is_causal would allow a fused path that not every build has.
        result: Tensor = transformer(source, target, tgt_mask=mask)
        return result

    return run


def _transformer(config: Config) -> "nn.Transformer":
    """On no device yet, so that nothing is drawn at random."""
    import torch

    spec = config.spec
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # about a shortcut for padded batches that some models cannot take
        transformer = torch.nn.Transformer(
            d_model=spec.d_model,
            nhead=spec.encoder_heads,
            num_encoder_layers=spec.encoder_layers,
            num_decoder_layers=spec.decoder_layers,
            dim_feedforward=spec.encoder_ffn,
            dropout=0.0,
            activation=_activation(spec),
            layer_norm_eps=config.norm_epsilon,
            batch_first=True,
            norm_first=spec.norm_placement is NormPlacement.PRE,
        ).eval()
    if not spec.encoder_final_norm:
        transformer.encoder.norm = None
    if not spec.decoder_final_norm:
        transformer.decoder.norm = None
    return transformer


def _activation(spec: TransformerSpec) -> "Callable[[Tensor], Tensor]":
    from torch.nn import functional

    if spec.activation is Activation.RELU:
        return functional.relu
    return functools.partial(functional.gelu, approximate="tanh" if spec.activation is Activation.GELU_TANH else "none")


def _annotated_stacks(config: Config, tensors: "Tensors") -> "Stacks":
    """The Annotated Transformer's encoder and decoder, with its own layer norm."""
    import torch

    model, spec = _Annotated(config, tensors), config.spec

    def run(source: "Tensor", target: "Tensor") -> "Tensor":
        for i in range(spec.encoder_layers):
            layer = f"encoder.layers.{i}"
            y = model.norm(f"{layer}.sublayer.0.norm", source)
            source = source + model.attention(f"{layer}.self_attn", y, y)
            y = model.norm(f"{layer}.sublayer.1.norm", source)
            source = source + model.feed_forward(f"{layer}.feed_forward", y)
        memory = model.norm("encoder.norm", source)
        past = torch.ones(target.shape[1], target.shape[1], dtype=torch.bool).tril()
        for i in range(spec.decoder_layers):
            layer = f"decoder.layers.{i}"
            y = model.norm(f"{layer}.sublayer.0.norm", target)
            target = target + model.attention(f"{layer}.self_attn", y, y, past)
            y = model.norm(f"{layer}.sublayer.1.norm", target)
            target = target + model.attention(f"{layer}.src_attn", y, memory)
            y = model.norm(f"{layer}.sublayer.2.norm", target)
            target = target + model.feed_forward(f"{layer}.feed_forward", y)
        return model.norm("decoder.norm", target)

    return run


class _Annotated:
    """The parts of an Annotated Transformer, by their names in the file."""

    def __init__(self, config: Config, tensors: "Tensors") -> None:
        self._heads, self._epsilon = config.spec.encoder_heads, config.norm_epsilon
        self._activation, self._tensors = _activation(config.spec), tensors

    def norm(self, name: str, x: "Tensor") -> "Tensor":
        deviation = x.std(-1, keepdim=True, unbiased=True)
        normal = (x - x.mean(-1, keepdim=True)) / (deviation + self._epsilon)
        return self._tensors[f"{name}.a_2"] * normal + self._tensors[f"{name}.b_2"]

    def linear(self, name: str, x: "Tensor") -> "Tensor":
        result = x @ self._tensors[f"{name}.weight"].T
        bias = self._tensors.get(f"{name}.bias")
        return result if bias is None else result + bias

    def attention(self, name: str, x: "Tensor", memory: "Tensor", allowed: "Tensor | None" = None) -> "Tensor":
        query, key, value = (
            self._heads_of(self.linear(f"{name}.linears.{i}", of)) for i, of in enumerate((x, memory, memory))
        )
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -math.inf)
        return self.linear(f"{name}.linears.3", (scores.softmax(-1) @ value).transpose(1, 2).flatten(2))

    def _heads_of(self, x: "Tensor") -> "Tensor":
        return x.view(*x.shape[:2], self._heads, -1).transpose(1, 2)

    def feed_forward(self, name: str, x: "Tensor") -> "Tensor":
        return self.linear(f"{name}.w_2", self._activation(self.linear(f"{name}.w_1", x)))
